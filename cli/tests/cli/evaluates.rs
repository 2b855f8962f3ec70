//! `eval` against what another implementation computed.

use crate::{DType, Tensors, case, f32s, i64s, json, ok, says, scratch, tensors, write};

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
}
