//! `eval` against what another implementation computed.

use crate::{DType, Tensors, case, error, f32s, i64s, json, ok, says, scratch, tensors, write};

/// The tolerances of the reference cases, see tests/tests/reference.rs.
const LOGITS: f32 = 2e-4;
const LOSS: f64 = 1e-5;

fn compare(args: &str, name: &str) {
    let folder = scratch();
    let (case, out) = (case(name), folder.path().join("out.safetensors"));
    let expect = case.join("expect.safetensors");
    let report = json(&format!("eval {{}} --inputs {{}} --out {{}} --json {args}"), &[&case, &expect, &out]);
    let ((made, shape), (want, wanted_shape)) = (f32s(&out, "logits"), f32s(&expect, "prefill_logits"));
    assert_eq!(shape, wanted_shape);
    let worst = made.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= LOGITS, "{name} {args}: logits are off by {worst:e}");
    let ((made, shape), (want, _)) = (f32s(&out, "loss"), f32s(&expect, "loss"));
    assert_eq!(shape, [0usize; 0]);
    let off = (f64::from(made[0]) - f64::from(want[0])).abs();
    assert!(off <= LOSS, "{name} {args}: the loss is off by {off:e}");
    assert_eq!(report["loss"].as_f64().map(|x| x as f32), Some(made[0]));
}

#[test]
fn whole_texts() {
    compare("", "tiny");
    compare("--graph prefill --target host", "tiny-llama");
}

#[test]
fn token_by_token() {
    for name in ["tiny", "tiny-llama"] {
        compare("--graph decode", name);
        compare("--graph decode --prefill 5", name);
        compare("--graph decode --prefill 1000", name);
    }
}

/// The inputs of `tiny` in which a tensor was changed.
fn inputs(change: impl FnOnce(&mut Tensors)) -> Tensors {
    let mut all = tensors(&case("tiny").join("expect.safetensors"));
    all.retain(|name, _| name == "input_ids" || name == "attention_mask");
    change(&mut all);
    all
}

#[test]
fn masks_and_ids_of_every_kind_say_the_same() {
    let folder = scratch();
    let (file, out) = (folder.path().join("in"), folder.path().join("out"));
    let evaluate = |inputs: &Tensors| {
        write(&file, inputs);
        ok("eval {} --inputs {} --out {}", &[&case("tiny"), &file, &out]);
        tensors(&out)
    };
    let narrow = |t: &mut Tensors, name: &str, to: DType| {
        let (dtype, _, bytes) = t.get_mut(name).expect("it is there");
        let wide: Vec<i64> = bytes.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect();
        *bytes = match to {
            DType::I32 => wide.iter().flat_map(|&x| (x as i32).to_le_bytes()).collect(),
            _ => wide.iter().map(|&x| x as u8).collect(),
        };
        *dtype = to;
    };
    let want = evaluate(&inputs(|_| {}));
    for to in [DType::I32, DType::U8, DType::Bool] {
        assert!(evaluate(&inputs(|t| narrow(t, "attention_mask", to))) == want, "mask of {to}");
    }
    assert!(evaluate(&inputs(|t| narrow(t, "input_ids", DType::I32))) == want);
}

#[test]
fn a_text_of_one_token_has_no_loss() {
    let folder = scratch();
    let (file, out) = (folder.path().join("in"), folder.path().join("out"));
    write(&file, &Tensors::from([("input_ids".to_owned(), (DType::I64, vec![1, 1], i64s(&[7])))]));
    says(&ok("eval {} --inputs {} --out {}", &[&case("tiny"), &file, &out]), &["no loss"]);
    assert!(f32s(&out, "loss").0[0].is_nan());
    says(
        &error("eval {} --inputs {} --out {} --grad", &[&case("tiny"), &file, &out]),
        &["no text has two tokens, so there is no loss"],
    );
}

#[test]
fn gradients_and_a_step() {
    let folder = scratch();
    for name in ["tiny", "tiny-llama"] {
        let (case, out) = (case(name), folder.path().join("out"));
        let expect = case.join("expect.safetensors");
        let args = "eval {} --inputs {} --out {} --grad --adamw-step --json";
        let report = json(args, &[&case, &expect, &out]);
        let off = (f32s(&out, "loss").0[0] - f32s(&expect, "loss").0[0]).abs();
        assert!(f64::from(off) <= LOSS, "{name}: the loss is off by {off:e}");
        let norm = f32s(&out, "grad_norm").0[0];
        assert_eq!(report["grad_norm"].as_f64().map(|x| x as f32), Some(norm));

        let (made, weights) = (tensors(&out), tensors(&case.join("model.safetensors")));
        assert_eq!(made.len(), 2 + 2 * weights.len(), "{name}: a gradient and a step for each tensor");
        let mut squares = 0.0;
        for (tensor, (_, shape, _)) in &weights {
            let (g, shape_of_g) = f32s(&out, &format!("grad.{tensor}"));
            assert_eq!(&shape_of_g, shape);
            squares += g.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>();
            // Of the first step, all but the sign of a gradient cancels.
            let (p, _) = f32s(&case.join("model.safetensors"), tensor);
            let (stepped, _) = f32s(&out, &format!("adamw1.{tensor}"));
            for ((p, stepped), g) in p.iter().zip(&stepped).zip(&g) {
                let sign = if *g == 0.0 { 0.0 } else { g.signum() };
                let want = p * (1.0 - 1e-4) - 1e-3 * sign;
                let clear = *g == 0.0 || (g / norm.max(1.0)).abs() >= 1e-5;
                assert!(
                    (stepped - want).abs() <= if clear { 3e-6 } else { 1e-3 },
                    "{name}: {tensor}: {stepped}, {want}"
                );
            }
        }
        let want = squares.sqrt() as f32;
        assert!((norm - want).abs() <= 1e-5 * want, "{name}: the norm is {norm}, not {want}");
    }
    // One of the two alone.
    let (case, out) = (case("tiny-llama"), folder.path().join("out"));
    let expect = case.join("expect.safetensors");
    ok("eval {} --inputs {} --out {} --grad", &[&case, &expect, &out]);
    assert!(tensors(&out).keys().all(|name| !name.starts_with("adamw1.")));
}
