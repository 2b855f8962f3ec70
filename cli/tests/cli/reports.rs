//! `report`: figures from graphs beside figures by hand.

use serde_json::Value;

use crate::{case, error, json, latentc, ok, says, words};

fn number(value: &Value, path: &str) -> f64 {
    value.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("{path} is a number in {value}"))
}

/// The figures of DeepSeek-V2 and DeepSeek 67B.
fn both() -> Value {
    json("report deepseek-v2 --vs deepseek-67b --json --batch 1 --context 1024,4096", &[])
}

#[test]
fn caches_are_those_of_the_paper() {
    let report = both();
    // 576 elements in 60 layers; 2 x 8 x 128 in 95.
    assert_eq!(number(&report, "/models/0/cache/elements"), 34_560.0);
    assert_eq!(number(&report, "/models/1/cache/elements"), 194_560.0);
    says(
        &ok("report deepseek-v2 --vs deepseek-67b", &[]),
        &["deepseek-v2 in int6 keeps 93.2% less than deepseek-67b in bf16 (the paper: 93.3%)"],
    );
    // Codes of 6 bits and scales of 16: of latents for each 128 elements, of rotated keys for all 64.
    let bytes = &report["models"][0]["cache"]["bytes"];
    assert_eq!(bytes[3], serde_json::json!(["int6", 60 * (512 * 6 / 8 + 4 * 2 + 64 * 6 / 8 + 2)]));
}

#[test]
fn operations_are_those_derived_by_hand() {
    let report = both();
    let near = |path: &str, want: f64| {
        let got = number(&report, path);
        assert!((got / want - 1.0).abs() < 1e-6, "{path}: {got} where {want} was derived");
    };
    let (embedding, norms) = (102_400.0 * 8192.0, 191.0 * 8192.0);
    // Two operations for each parameter of a product, and for each head and position of the sequence a score and a sum.
    let products = 2.0 * (67_425_001_472.0 - embedding - norms);
    let attention = |n: f64| 95.0 * 64.0 * n * 4.0 * 128.0;
    near("/models/1/training/forward", products + attention(4096.0));
    near("/models/1/training/all", 3.0 * (products + attention(4096.0)));
    near("/models/1/decode/0/flops", products + attention(1024.0));

    let (embedding, norms) = (102_400.0 * 5120.0, 121.0 * 5120.0 + 60.0 * (512.0 + 1536.0));
    let products = 2.0 * (21_375_800_320.0 - embedding - norms);
    // Training has keys and values of 192 and 128 elements a head, decode works on latents of 576 and 512.
    let attention = |n: f64, width: f64| 60.0 * 128.0 * n * 2.0 * width;
    near("/models/0/training/forward", products + attention(4096.0, 192.0 + 128.0));
    near("/models/0/decode/0/flops", products + attention(1024.0, 576.0 + 512.0));
}

#[test]
fn bytes_are_weights_and_caches_once() {
    let report = both();
    // One token reads its active parameters, one row of the embedding, and the cache of 1024 tokens; it writes one.
    let read = 2.0 * (21_375_800_320.0 - 102_399.0 * 5120.0);
    let want = read + 69_120.0 * 1025.0;
    let got = number(&report, "/models/0/decode/0/bytes");
    assert!((got / want - 1.0).abs() < 1e-9, "{got} where {want} was derived");
    let want = 2.0 * 235_741_434_880.0 + 69_120.0 * 1024.0;
    assert_eq!(number(&report, "/models/0/decode/0/resident"), want);
}

#[test]
fn generation_fills_the_memory() {
    let report = both();
    let memory = 8.0 * 80e9;
    for model in ["/models/0", "/models/1"] {
        for n in 0..4 {
            let at = |key: &str| number(&report, &format!("{model}/throughput/{n}/at/{key}"));
            let token = number(&report, &format!("{model}/cache/bytes/{}/1", [0, 0, 3, 3][n]));
            let sequence = token * at("context");
            assert!(at("resident") <= memory && at("resident") + sequence > memory, "{model} {n}");
        }
    }
    says(&ok("report deepseek-v2 --devices 1", &[]), &["needs 471 GB", "none"]);
}

#[test]
fn a_model_alone_and_other_machines() {
    let text = ok("report {} --machine h200 --devices 2 --batch 4 --context 16", &[&case("tiny")]);
    says(&text, &["deepseek_v2", "prefill on 2 x h200", "88,332"]);
    assert!(!text.contains("paper") && !text.contains("  ratio"), "{text}");
    let slow = json("report deepseek-v2-lite --machine a100 --devices 1 --json", &[]);
    let fast = json("report deepseek-v2-lite --machine h200 --devices 1 --json", &[]);
    let path = "/models/0/decode/0/seconds";
    assert!(number(&slow, path) > number(&fast, path));
    for line in ["report deepseek-v2 --machine abacus", "report deepseek-v2 --batch 0"] {
        let out = latentc(words(line, &[]));
        assert_eq!(out.status.code(), Some(2), "{line}");
        says(&String::from_utf8_lossy(&out.stderr), &["error: invalid value"]);
    }
}

#[test]
fn a_step_of_training_has_its_memory_told() {
    let report =
        json("report deepseek-v2 --graph train --function counted_layer --json --train-length 4096", &[]);
    let at = |key: &str| number(&report, &format!("/models/0/steps/0/{key}"));
    // As `params` counts a layer: norms, attention, experts, shared ones; and the scale before it. In bf16, and in f32.
    let layer = 10_240.0 + 149_227_520.0 + 3_775_692_800.0 + 47_185_920.0 + 5120.0;
    assert_eq!(at("parameters"), layer);
    assert_eq!([at("weights"), at("masters"), at("moments")], [2.0 * layer, 4.0 * layer, 8.0 * layer]);
    // Gradients in f32, of which the last are made when some temporaries are gone.
    let (results, kept) = (at("account/results"), at("account/kept"));
    assert!(results <= 4.0 * layer + 4.0 && results > 2.0 * layer, "{results}");
    let alive = results + kept + at("account/passing");
    assert!(alive <= at("temporaries") && at("temporaries") < 1.1 * alive, "{alive}");
    assert_eq!(at("peak"), 18.0 * layer + at("temporaries"));

    // What is kept grows with the sequences, and with the layers.
    let text = ok("report deepseek-v2-lite --graph train --batch 1,4 --train-length 1024", &[]);
    says(
        &text,
        &["deepseek-v2-lite", "kept for the way back", "moments of AdamW", "sequences of 1024 tokens"],
    );
    let report = json("report deepseek-v2-lite --graph train --batch 1,4 --train-length 1024 --json", &[]);
    let at = |n: usize, key: &str| number(&report, &format!("/models/0/steps/{n}/{key}"));
    assert_eq!(at(0, "parameters"), 15_706_484_224.0);
    let [one, four] = [0, 1].map(|n| at(n, "account/kept_at_turn"));
    assert!(four > 3.9 * one && four < 4.1 * one, "{one} and {four}");
    // At the least, each of 27 layers keeps what it was given.
    assert!(one > 27.0 * 1024.0 * 2048.0 * 2.0, "{one}");
    let none = error("report deepseek-v2 --graph train --function layer", &[]);
    says(&none, &["no function `layer`", "counted_layer"]);
    says(&error("report deepseek-v2 --graph train --function balance", &[]), &["`balance` is no layer"]);
}

#[test]
fn weights_in_codes_are_counted_with_their_scales() {
    let report = json("report deepseek-67b --json --batch 1 --context 1024 --weights int8", &[]);
    // A byte for each element, and a scale of four for each 128 of them; norms stay as they are.
    let (embedding, norms) = (102_400.0 * 8192.0, 191.0 * 8192.0);
    let coded = |elements: f64| elements * (1.0 + 4.0 / 128.0);
    let held = coded(67_425_001_472.0 - norms) + 2.0 * norms;
    assert_eq!(number(&report, "/models/0/weight_bytes"), held);
    let cache = 95.0 * 2.0 * 1024.0 * 2.0;
    assert_eq!(number(&report, "/models/0/decode/0/resident"), held + cache * 1024.0);
    let read = coded(67_425_001_472.0 - norms - embedding + 8192.0) + 2.0 * norms + cache * 1025.0;
    let got = number(&report, "/models/0/decode/0/bytes");
    assert!((got / read - 1.0).abs() < 1e-9, "{got} where {read} was derived");
    assert_eq!(report["models"][0]["throughput"][0]["weights"], "int8");
    let text = ok("report deepseek-v2-lite --weights int8 --weight-group 64", &[]);
    says(&text, &["bytes of all in int8", "weights in int8, cache in bf16"]);
    says(
        &error("report deepseek-v2-lite --graph train --weights int8", &[]),
        &["--weights: there is no gradient"],
    );
}

#[test]
fn prompts_have_their_memory_told() {
    let line = "report bench-moe-0.3b --graph prefill --target host --batch 1,8 --context 512,2048 --json";
    let report = json(line, &[]);
    let at = |n: usize, key: &str| number(&report, &format!("/models/0/runs/{n}/{key}"));
    for (n, (batch, context)) in
        [(1.0, 512.0), (8.0, 512.0), (1.0, 2048.0), (8.0, 2048.0)].into_iter().enumerate()
    {
        // The host holds what it computes in f32, but caches and weights in the 16 bits of their type.
        assert_eq!(at(n, "caches"), 8.0 * (256.0 + 32.0) * 2.0 * batch * context);
        assert_eq!(at(n, "peak"), at(n, "weights") + at(n, "caches") + at(n, "temporaries"));
        assert!(at(n, "temporaries") <= at(n, "whole"));
    }
    // A short prompt is read at once, many long ones are not.
    assert_eq!((at(0, "chunk"), at(0, "temporaries")), (512.0, at(0, "whole")));
    assert!(at(3, "chunk") < 2048.0 && at(3, "temporaries") < at(3, "whole") / 2.0);
    let report = json(&format!("{line} --prefill-chunk 100 --weights int8"), &[]);
    // Chunks are alike: 21 of 2048.
    assert_eq!(number(&report, "/models/0/runs/3/chunk"), 98.0);
    assert!(number(&report, "/models/0/runs/3/weights") < 0.53 * at(3, "weights"));
    let text = ok("report deepseek-v2-lite --graph prefill --batch 64", &[]);
    says(&text, &["of these at once", "temporaries of a chunk", "weights in bf16"]);
    says(
        &error("report deepseek-v2-lite --graph prefill --function mla", &[]),
        &["--function is for --graph train"],
    );
}
