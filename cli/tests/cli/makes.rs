//! `init`: model folders with random weights.

use std::fs;

use serde_json::Value;

use crate::{DType, case, error, f32s, files, json, names, ok, says, scratch, tensors};

#[test]
fn a_seed_decides_all() {
    let folder = scratch();
    let [a, b, c] = ["a", "b", "c"].map(|n| folder.path().join(n));
    ok("init {} -o {} --seed 3", &[&case("tiny"), &a]);
    ok("init {} -o {} --seed 3", &[&case("tiny").join("config.json"), &b]);
    ok("init {} -o {} --seed 4", &[&case("tiny"), &c]);
    assert_eq!(names(&a), ["config.json", "model.safetensors"]);
    assert!(files(&a) == files(&b));
    assert!(files(&a) != files(&c));
    assert_eq!(names(folder.path()), ["a", "b", "c"], "nothing temporary is left");

    let inputs = case("tiny").join("expect.safetensors");
    let outs = ["x", "y"].map(|n| folder.path().join(n));
    for (model, out) in [&a, &b].into_iter().zip(&outs) {
        let report = json("eval {} --inputs {} --out {} --json", &[model, &inputs, out]);
        // Small random weights say little of the next token: about as much as the uniform distribution.
        let loss = report["loss"].as_f64().expect("a number");
        assert!((loss - 199f64.ln()).abs() < 0.3, "{loss}");
    }
    assert!(fs::read(&outs[0]).unwrap() == fs::read(&outs[1]).unwrap());
}

#[test]
fn it_has_the_form_of_the_published_checkpoints() {
    let folder = scratch();
    for name in ["tiny", "tiny-llama"] {
        let out = folder.path().join(name);
        ok("init {} -o {} --dtype bf16", &[&case(name), &out]);
        let config: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["torch_dtype"], "bfloat16");
        let file = out.join("model.safetensors");
        let (made, theirs) = (tensors(&file), tensors(&case(name).join("model.safetensors")));
        let shapes = |t: &crate::Tensors| t.iter().map(|(n, t)| (n.clone(), t.1.clone())).collect::<Vec<_>>();
        assert_eq!(shapes(&made), shapes(&theirs), "{name}");
        assert!(made.values().all(|t| t.0 == DType::BF16));
        assert!(f32s(&file, "model.norm.weight").0.iter().all(|x| *x == 1.0));
        let (x, _) = f32s(&file, "lm_head.weight");
        let variance = x.iter().map(|x| f64::from(x * x)).sum::<f64>() / x.len() as f64;
        assert!((variance.sqrt() / 0.02 - 1.0).abs() < 0.05, "{}", variance.sqrt());
        ok("run {} --prompt-ids 5,6 --steps 2", &[&out]);
    }
}

#[test]
fn nothing_is_overwritten() {
    let folder = scratch();
    fs::write(folder.path().join("precious"), "").expect("a file of ours");
    says(
        &error("init {} -o {}", &[&case("tiny"), folder.path()]),
        &["the folder is not empty", "overwrites nothing"],
    );
    assert_eq!(names(folder.path()), ["precious"]);
}
