//! Programs at smaller sizes are programs, and what ops say of sizes holds.

use latentc_ir::verify::Stage;
use latentc_ir::{Module, Op, Scale, check, verify};
use proptest::prelude::*;

fn module(text: &str) -> Module {
    check("test.ir", text).unwrap_or_else(|e| panic!("{}", e.render()))
}

#[test]
fn relations_of_sizes_hold() {
    let m = module(
        r#"module m entry @f

func @f {
  axes t, d=5120, e=160, g=8, j=20, k=6, c=512, r=64, a=576, f=32, h=448
  param x: f32[t, a=576]
  param pos: i32[t]
  param s: f32[t, e=160]
  weight W: f32[g=8, c=512] = "w"[g * (c | r)]

  freq: f32[f=32] = const [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32]
  x_c: f32[t, c=512] = slice x axis a into c start 0
  x_r: f32[t, r=64] = slice x axis a into r start 512
  y_r: f32[t, r=64] = rope x_r, pos, freq over r pairs halves
  part: f32[t, h=448] = slice x_c axis c into h start 64
  y: f32[t, a=576] = concat part, y_r, y_r axes h, r, r into a
  s.2: f32[t, g=8, j=20] = split s axis e into g, j
  best: f32[t, g=8] = reduce_max s.2 over j
  m: bool[t, g=8] = top_k best over g k 3
  at: i32[t, k=6] = top_indices s over e into k
  sum: f32[t] = reduce_sum x_c over c
  size: f32 = const 512
  mean: f32[t] = div sum, size
  half: f32[t] = div mean, size
  return y, m, at, half
}
"#,
    );
    for scale in [Scale::of(&[&m]), Scale::least(&[&m])] {
        let small = scale.apply(&m);
        verify(&small).unwrap_or_else(|e| panic!("{}\n{small}", e[0]));
        let f = small.entry().expect("an entry");
        assert!(f.axes.iter().all(|a| a.size.fixed().is_none_or(|n| n <= 24)), "{small}");
        let size = |name: &str| f.axis(f.axis_named(name).expect("an axis")).size.fixed().expect("fixed");
        assert_eq!(
            (size("e"), size("a"), size("r")),
            (size("g") * size("j"), size("c") + size("r"), 2 * size("f"))
        );
        let [first, second] = ["mean", "half"].map(|name| {
            let by = f.body.iter().find(|i| f.value(i.result()).name == name).expect("it is there").args[1];
            let Some(Op::Const(numbers)) = f.body.iter().find(|i| i.result() == by).map(|i| &i.op) else {
                panic!("a constant")
            };
            numbers[0].0
        });
        assert_eq!((first, second), (size("c") as f64, 512.0), "a mean stays a mean, a number a number");
    }
}

#[test]
fn stages_of_one_program_shrink_alike() {
    let text = |axes: &str, line: &str| {
        module(&format!(
            "module m entry @f\n\nfunc @f {{\n  axes {axes}\n  param x: f32[d=4096]\n  {line}\n  return y\n}}\n"
        ))
    };
    let before = text("d=4096, i=32, n=128", "y: f32[i=32, n=128] = split x axis d into i, n");
    let after = text("i=32, n=128, d=4096", "y: f32[i=32, n=128] = split x axis d into i, n");
    let scale = Scale::of(&[&before, &after]);
    let (before, after) = (scale.apply(&before), scale.apply(&after));
    assert_eq!(before.functions[0].values[0].name, "x");
    assert_eq!(before.functions[0].axes[0].size, after.functions[0].axes[2].size);
    assert!(scale.size(4096) == scale.size(32) * scale.size(128) && scale.size(4096) <= 25);
}

#[test]
fn a_mean_stays_one_where_its_sum_has_become_a_product() {
    let text = |sum: &str| {
        module(&format!(
            "module m entry @f\n\nfunc @f {{\n  axes d=4096, n=96\n  param x: f32[d=4096, n=96]\n  param w: f32[d=4096, n=96]\n  \
             {sum}\n  size: f32 = const 96\n  mean: f32[d=4096] = div sum, size\n  return mean\n}}\n"
        ))
    };
    let before = text("y: f32[d=4096, n=96] = mul x, w\n  sum: f32[d=4096] = reduce_sum y over n");
    let after = text("sum: f32[d=4096] = contract x, w over n");
    let scale = Scale::of(&[&before, &after]);
    for m in [before, after] {
        let small = scale.apply(&m);
        let f = small.entry().expect("an entry");
        let mean = f.body.iter().find(|i| f.value(i.result()).name == "mean").expect("it is there");
        let Some(Op::Const(by)) = f.body.iter().find(|i| i.result() == mean.args[1]).map(|i| &i.op) else {
            panic!("a constant")
        };
        assert_eq!(by[0].0, scale.size(96) as f64, "{small}");
    }
}

proptest! {
    #[test]
    fn random_programs_shrink(module in prop_oneof![
        latentc_ir::testing::arb_module(Stage::Traced),
        latentc_ir::testing::arb_module(Stage::Derived),
    ]) {
        for scale in [Scale::of(&[&module]), Scale::least(&[&module])] {
            let small = scale.apply(&module);
            verify(&small).map_err(|e| TestCaseError::fail(format!("{}\n{module}\n{small}", e[0])))?;
        }
    }
}
