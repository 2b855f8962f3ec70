//! What is kept in few bits reads back to within half a step, whatever it is, and the program around it stays what it was.

use latentc_ir::{Caches, DType, Function, Interpreter, Module, Precision, Scale, Tensor, Weight};
use latentc_models::config::ModelConfig;
use latentc_models::{Goal, trace};
use latentc_passes::validate::validate;
use latentc_passes::{CacheForm, Codes, Context, Graph, Kind, Wanted, pipeline, quantise, run};
use proptest::prelude::*;

const CODED: [Codes; 3] = [Codes::Fp8, Codes::Int8, Codes::Int6];

fn decode(codes: Codes, group: u64) -> Wanted {
    Wanted { cache: Some(CacheForm { group, ..CacheForm::new(codes) }), ..Graph::Decode.into() }
}

/// What a row of f32 is when it has been kept.
fn read_back(row: &[f64], codes: Codes, group: u64, precision: Precision) -> Vec<f64> {
    let n = row.len();
    let text = format!(
        "module row entry @f\n\nfunc @f {{\n  axes t, s=t like t, c={n}\n  param x: f32[t, c={n}]\n\n  \
         y: f32[s, c={n}] = past x from t to s\n  return y\n}}\n"
    );
    let module = latentc_ir::check("row", &text).unwrap_or_else(|e| panic!("{}", e.render()));
    let rounded = quantise::rounded(&module, &Context::new(decode(codes, group)));
    latentc_ir::verify(&rounded).unwrap_or_else(|e| panic!("{}", e[0]));
    let x = Tensor::new(DType::F32, vec![1, n], row.to_vec()).expect("a row");
    let mut none = |_: &str, _: &Function, _: &Weight| Err("no weights here".to_owned());
    let run = Interpreter::new(&rounded, precision).run(&[x], &mut none, &mut Caches::new());
    run.expect("it runs").remove(0).data
}

/// How far off an element of a group with this largest magnitude may be.
fn bound(codes: Codes, x: f64, largest: f64) -> f64 {
    match codes {
        Codes::Bf16 => x.abs() / 256.0,
        Codes::Fp8 => (x.abs() / 16.0).max(largest / 448.0 / 1024.0),
        Codes::Int8 => largest / 127.0 / 2.0,
        Codes::Int6 => largest / 31.0 / 2.0,
    }
}

/// The size of the groups that a row is cut into.
fn groups(n: usize, codes: Codes, most: usize) -> usize {
    let unit = if codes == Codes::Int6 { 16 } else { 4 };
    n.div_ceil(n.div_ceil(most)).next_multiple_of(unit)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Of any size, in groups of any size, and of numbers as large and small as f32 has them.
    #[test]
    fn what_is_kept_is_close(
        row in prop::collection::vec((-1.0..1.0_f64, -20..20_i32).prop_map(|(x, e)| x * f64::from(e).exp2()), 1..70),
        codes in prop::sample::select(CODED.to_vec()),
        most in 1..80_usize,
        precision in prop::sample::select(vec![Precision::Exact, Precision::Declared]),
    ) {
        let row: Vec<f64> = row.iter().map(|&x| f64::from(x as f32)).collect();
        let got = read_back(&row, codes, most as u64, precision);
        // A cache that would not get smaller is not touched; then the error is 0.
        for (x, y) in row.chunks(groups(row.len(), codes, most)).zip(got.chunks(groups(row.len(), codes, most))) {
            let largest = x.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
            for (&x, &y) in x.iter().zip(y) {
                let most = bound(codes, x, largest) * (1.0 + 1e-4);
                prop_assert!((x - y).abs() <= most, "{codes}: {x} of {largest} reads {y}, {most} off at most");
            }
        }
    }
}

#[test]
fn every_finite_e4m3_is_itself() {
    let number = |bits: i32| {
        let (e, m) = (bits / 8, f64::from(bits % 8));
        if e == 0 { m / 512.0 } else { (1.0 + m / 8.0) * f64::from(e - 7).exp2() }
    };
    let all: Vec<f64> = (0..127).flat_map(|bits| [number(bits), -number(bits)]).collect();
    let got = read_back(&all, Codes::Fp8, 1000, Precision::Exact);
    for (x, y) in all.iter().zip(got) {
        assert!((x - y).abs() <= 1e-12 * x.abs(), "{x} reads {y}");
    }
}

#[test]
fn every_code_is_itself() {
    for (codes, most) in [(Codes::Int8, 127), (Codes::Int6, 31)] {
        let all: Vec<f64> = (-most..=most).map(f64::from).collect();
        let got = read_back(&all, codes, 1000, Precision::Exact);
        assert!(all.iter().zip(&got).all(|(x, y)| (x - y).abs() < 1e-12), "{codes}: {got:?}");
    }
}

#[test]
fn zeros_are_zeros_and_what_is_not_finite_does_not_pass_for_a_number() {
    for codes in CODED {
        let zeros = read_back(&[0.0; 40], codes, 20, Precision::Declared);
        assert!(zeros.iter().all(|&y| y == 0.0), "{codes}: {zeros:?}");
        let mut row = [1.0; 40];
        row[3] = f64::INFINITY;
        let got = read_back(&row, codes, 20, Precision::Declared);
        let group = groups(40, codes, 20);
        assert!(!got[3].is_finite(), "{codes}: {got:?}");
        assert!(got[group..].iter().all(|y| (y - 1.0).abs() < 0.1), "{codes}: {got:?}");
    }
}

/// The modules that a model goes through, and what was said.
fn stages(name: &str, wanted: Wanted) -> (Vec<(&'static str, Module)>, Context) {
    let config = ModelConfig::bundled(name).expect("a bundled model");
    let traced = trace(&config, Goal::Logits, DType::Bf16).unwrap_or_else(|e| panic!("{}", e.render()));
    let mut cx = Context::new(wanted);
    let stages = run(&traced.module, &mut cx, &pipeline()).expect("every model compiles");
    (stages, cx)
}

#[test]
fn the_passes_around_a_quantised_cache_keep_what_it_holds() {
    for codes in [Codes::Fp8, Codes::Int6] {
        let name = "deepseek-v2-lite";
        let (stages, cx) = stages(name, decode(codes, 128));
        for (pass, two) in pipeline().iter().zip(stages.windows(2)) {
            if !matches!(pass.name, "quantise" | "derive") {
                continue;
            }
            let sizes = Scale::of(&[&two[0].1, &two[1].1]);
            assert!(sizes.size(512) < 128, "the latents stay {} long", sizes.size(512));
            let unknown = validate(pass, &cx, &two[0].1, &two[1].1).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(unknown, None, "{codes}: {}", pass.name);
        }
    }
}

#[test]
fn the_bytes_of_a_token_are_said() {
    let said = |name: &str, wanted: Wanted| -> Vec<String> {
        let (_, cx) = stages(name, wanted);
        let of_pass = cx.remarks.into_iter().filter(|r| r.pass == "quantise" && r.kind == Kind::Applied);
        of_pass.map(|r| r.message).collect()
    };
    let six = said("deepseek-v2", decode(Codes::Int6, 128));
    assert!(
        six.iter().any(|m| m.contains(
            "is kept in int6: 392 bytes a token in place of 1024, with 4 scales for 512 elements, one for each 128; \
             others would take: bf16 1024, fp8 520, int8 520"
        )),
        "{six:?}"
    );
    assert!(
        six.iter().any(|m| m.contains("is kept in int6: 50 bytes a token in place of 128, with one scale")),
        "{six:?}"
    );
    // What positions have rotated may stay.
    let mut wanted = decode(Codes::Int6, 128);
    if let Some(form) = &mut wanted.cache {
        form.rotated_wide = true;
    }
    let wide = said("deepseek-v2", wanted);
    assert!(!wide.is_empty() && wide.iter().all(|m| m.contains("392 bytes")), "{wide:?}");
}
