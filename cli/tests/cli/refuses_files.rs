//! What is wrong in a model folder, and what the answer says.

use std::fs;
use std::process::Output;

use serde_json::{Value, json};

use crate::{DType, case, changed, error, ok, says, words};

/// What every subcommand that reads a configuration says of a changed one.
fn config_error(change: impl FnOnce(&mut Value)) -> String {
    let folder = changed(change, |_| {});
    let message = error("params {}", &[folder.path()]);
    assert_eq!(error("dump {}", &[folder.path()]), message);
    assert_eq!(error("run {} --prompt-ids 1 --steps 1", &[folder.path()]), message);
    assert_eq!(error("compile {} --target host -o /proc/x", &[folder.path()]), message);
    says(&message, &["config.json:"]);
    message
}

#[test]
fn a_configuration_that_lacks_or_contradicts() {
    let remove = |key: &'static str| {
        config_error(move |c| {
            c.as_object_mut().expect("an object").remove(key);
        })
    };
    for key in ["hidden_size", "vocab_size", "num_hidden_layers", "kv_lora_rank", "model_type"] {
        says(&remove(key), &[&format!("`{key}`"), "missing"]);
    }
    let set = |key: &'static str, value: Value| config_error(move |c| c[key] = value);
    says(&set("num_attention_heads", json!(0)), &["`num_attention_heads`", "is 0"]);
    says(&set("hidden_size", json!(-4)), &["`hidden_size`", "is -4"]);
    says(&set("hidden_size", json!("wide")), &["`hidden_size`"]);
    says(&set("num_experts_per_tok", json!(16)), &["`num_experts_per_tok`", "16", "15"]);
    says(&set("n_group", json!(4)), &["`n_group`", "4", "15"]);
    says(&set("topk_group", json!(6)), &["`topk_group`", "6", "5"]);
    says(&set("model_type", json!("gpt2")), &["`model_type`", "gpt2", "deepseek_v2, llama"]);
    says(&set("torch_dtype", json!("int8")), &["`torch_dtype`", "int8"]);
    let two = config_error(|c| {
        c["hidden_size"] = json!(0);
        c["vocab_size"] = json!(0);
    });
    says(&two, &["2 problems", "`hidden_size`", "`vocab_size`"]);

    let folder = changed(|_| {}, |_| {});
    fs::write(folder.path().join("config.json"), "{").expect("the folder is ours");
    says(&error("params {}", &[folder.path()]), &["config.json: not JSON", "line 1"]);
    fs::write(folder.path().join("config.json"), "[]").expect("the folder is ours");
    says(&error("params {}", &[folder.path()]), &["config.json", "no JSON object"]);
}

#[test]
fn every_tensor_that_does_not_fit_is_named() {
    let folder = changed(
        |_| {},
        |tensors| {
            tensors.remove("model.norm.weight");
            tensors.remove("model.layers.1.mlp.experts.3.up_proj.weight");
            let norm = tensors["model.layers.0.input_layernorm.weight"].clone();
            tensors.insert("model.layers.7.extra".to_owned(), norm);
            let head = tensors.get_mut("lm_head.weight").expect("it is there");
            head.1.reverse();
            let embedding = tensors.get_mut("model.embed_tokens.weight").expect("it is there");
            embedding.0 = DType::I32;
        },
    );
    let message = error("run {} --prompt-ids 1 --steps 1", &[folder.path()]);
    says(
        &message,
        &[
            "missing: `model.norm.weight` [45]",
            "missing: `model.layers.1.mlp.experts.3.up_proj.weight` [7, 45]",
            "superfluous: `model.layers.7.extra`",
            "misshapen: `lm_head.weight` is [45, 199], the configuration wants [199, 45]",
            "wrong dtype: `model.embed_tokens.weight` is i32",
        ],
    );
    let inputs = case("tiny").join("expect.safetensors");
    let out = folder.path().join("out");
    assert_eq!(error("eval {} --inputs {} --out {}", &[folder.path(), &inputs, &out]), message);
    assert!(!out.exists());
}

#[test]
fn weights_that_are_cut_short_or_absent() {
    let folder = changed(|_| {}, |_| {});
    let file = folder.path().join("model.safetensors");
    let bytes = fs::read(&file).expect("it was written");
    let run = || error("run {} --prompt-ids 1 --steps 1", &[folder.path()]);
    for length in [bytes.len() - 1, bytes.len() / 2, 1000, 8, 3, 0] {
        fs::write(&file, &bytes[..length]).expect("the folder is ours");
        says(&run(), &["model.safetensors: "]);
    }
    fs::write(&file, &bytes[..bytes.len() - 1]).expect("the folder is ours");
    says(&run(), &["it was cut short, copy it again"]);
    fs::remove_file(&file).expect("the folder is ours");
    says(&run(), &["no model.safetensors and no model.safetensors.index.json here"]);
}

#[test]
fn a_device_that_is_absent_says_so() {
    // Where there is one, the tokens are those of the host.
    let host = ok("run {} --prompt-ids 3,5,7 --steps 3", &[&case("tiny")]);
    for (target, name) in [("cuda", "no CUDA device: "), ("wgpu", "no wgpu device: ")] {
        let line = format!("run {{}} --prompt-ids 3,5,7 --steps 3 --target {target}");
        let tiny = case("tiny");
        let out: Output = crate::latentc(words(&line, &[&tiny]));
        if out.status.success() {
            assert_eq!(String::from_utf8_lossy(&out.stdout), host, "{target}");
        } else {
            // Drivers may print as well.
            let stderr = String::from_utf8_lossy(&out.stderr);
            assert_eq!(out.status.code(), Some(1), "{stderr}");
            says(&stderr, &[name]);
            println!("SKIPPED: a run on {target}: {}", stderr.trim());
        }
    }
}
