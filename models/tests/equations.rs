//! The models' equations against the reference: tiny models with weights, and their logits, losses and residual
//! streams as the Hugging Face implementation computes them in float64.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use latentc_ir::{Caches, DType, Interpreter, Precision, Tensor, Tensors, verify};
use latentc_models::config::ModelConfig;
use latentc_models::{Goal, trace};
use safetensors::{Dtype, SafeTensors};

/// The folder of a reference case, or `None`, said out loud, where the references are not at hand.
fn case(name: &str) -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/reference/cases").join(name);
    if dir.is_dir() {
        return Some(dir);
    }
    eprintln!("SKIPPED {name}: there are no reference cases beside the workspace");
    None
}

fn read(path: &Path, into: &mut Tensors) {
    let bytes = fs::read(path).unwrap();
    for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
        let shape = view.shape().to_vec();
        let words = |n: usize| view.data().chunks_exact(n);
        let tensor = match view.dtype() {
            Dtype::F32 => {
                let data: Vec<_> = words(4).map(|w| f32::from_le_bytes(w.try_into().unwrap())).collect();
                Tensor::from_f32(shape, &data)
            }
            Dtype::I64 => {
                let data: Vec<_> = words(8).map(|w| i64::from_le_bytes(w.try_into().unwrap())).collect();
                Tensor::from_i64(shape, &data)
            }
            other => panic!("{name}: {other:?} does not occur in the reference cases"),
        };
        into.insert(name, tensor.unwrap());
    }
}

/// All tensors of the files in a folder whose names begin so.
fn tensors(dir: &Path, prefix: &str) -> Tensors {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.starts_with(prefix) && name.ends_with(".safetensors") {
            read(&path, &mut found);
        }
    }
    found
}

fn indices(shape: [usize; 2], at: impl Fn(usize, usize) -> f64) -> Tensor {
    let data =
        (0..shape[0]).flat_map(|b| (0..shape[1]).map(move |t| (b, t))).map(|(b, t)| at(b, t)).collect();
    Tensor::new(DType::I32, shape, data).unwrap()
}

/// The largest difference, over the rows that are no padding.
fn difference(ours: &Tensor, theirs: &Tensor, lens: &[usize]) -> f64 {
    assert_eq!(ours.shape, theirs.shape);
    let [_, s, v] = ours.shape[..] else { panic!("b, s and v") };
    let rows = lens.iter().enumerate().flat_map(|(b, &n)| (0..n).map(move |t| (b * s + t) * v));
    let pairs = rows.flat_map(|at| ours.data[at..at + v].iter().zip(&theirs.data[at..at + v]));
    pairs.map(|(x, y)| (x - y).abs()).fold(0.0, |m, d| if d.is_nan() { f64::INFINITY } else { d.max(m) })
}

fn check(name: &str) {
    let Some(dir) = case(name) else { return };
    let config = ModelConfig::from_path(dir.join("config.json")).unwrap();
    let expect = tensors(&dir, "expect");
    let mut weights = tensors(&dir, "model");
    let ids = &expect["input_ids"];
    let tok = Tensor::new(DType::I32, ids.shape.clone(), ids.data.clone()).unwrap();
    let [b, s] = ids.shape[..] else { panic!("b and s") };
    let lens = match expect.get("seq_lens") {
        Some(lens) => lens.data.iter().map(|&n| n as usize).collect(),
        None => vec![s; b],
    };

    let logits = trace(&config, Goal::Logits, DType::F32).unwrap().module;
    verify(&logits).unwrap();
    let at = indices([b, s], |_, t| t as f64);
    let interpreter = Interpreter::new(&logits, Precision::Exact);
    let y = interpreter.run(&[tok.clone(), at], &mut weights, &mut Caches::new()).unwrap();
    let worst = difference(&y[0], &expect["prefill_logits"], &lens);
    eprintln!("{name}: logits differ by {worst:.1e}");
    assert!(worst < 1e-5, "{name}: logits differ by {worst:e}");

    let Some(expected) = expect.get("loss") else { return };
    let loss = trace(&config, Goal::Loss, DType::F32).unwrap().module;
    verify(&loss).unwrap();
    let target = indices([b, s], |b, t| if t + 1 < s { ids.data[b * s + t + 1] } else { 0.0 });
    let weight = indices([b, s], |b, t| f64::from(u8::from(t + 1 < lens[b])));
    let weight = Tensor::new(DType::F32, weight.shape, weight.data).unwrap();
    let interpreter = Interpreter::new(&loss, Precision::Exact);
    let y = interpreter.run(&[tok, target, weight], &mut weights, &mut Caches::new()).unwrap();
    let apart = (y[0].data[0] - expected.data[0]).abs();
    eprintln!("{name}: loss differs by {apart:.1e}");
    assert!(apart < 1e-6, "{name}: loss {} against {}", y[0].data[0], expected.data[0]);
}

macro_rules! cases {
    ($($test:ident = $name:literal;)*) => { $(
        #[test]
        fn $test() {
            check($name);
        }
    )* };
}
cases! {
    lite_tiny = "lite-tiny";
    v2_tiny = "v2-tiny";
    v2_yarn = "v2-yarn";
    v2_ragged = "v2-ragged";
    v2_sharded = "v2-sharded";
    dense_only = "dense-only";
    one_expert_hot = "one-expert-hot";
}

/// What each layer leaves is a value of the trunk: `x` the embedding, `x.1` the first layer's, and so on.
#[test]
fn layer_outputs() {
    let Some(dir) = case("v2-tiny") else { return };
    let config = ModelConfig::from_path(dir.join("config.json")).unwrap();
    let expect = tensors(&dir, "expect");
    let mut weights = tensors(&dir, "model");
    let mut trunk = trace(&config, Goal::Logits, DType::F32).unwrap().module;
    trunk.entry = "trunk".to_owned();
    let ids = &expect["input_ids"];
    let tok = Tensor::new(DType::I32, ids.shape.clone(), ids.data.clone()).unwrap();
    let values =
        Interpreter::new(&trunk, Precision::Exact).trace(&[tok], &mut weights, &mut Caches::new()).unwrap();
    let value = |name: &str| &values.iter().find(|v| v.0 == name).unwrap().1;
    value("x").close_to(&expect["embed_out"], 1e-6, 0.0).unwrap();
    for l in 0..config.common().num_hidden_layers {
        value(&format!("x.{}", l + 1)).close_to(&expect[&format!("layer_out.{l}")], 1e-4, 1e-5).unwrap();
    }
}
