//! `run`: greedy, drawn, as ids and as text.

use std::fs;

use latentc_runtime::checkpoint::TensorFile;
use serde_json::{Value, json};

use crate::{case, changed, json, ok};

fn ids(value: &Value) -> Vec<i64> {
    value.as_array().expect("a list").iter().map(|x| x.as_i64().expect("an id")).collect()
}

/// Numbers with a separator between them.
fn joined(ids: &[i64], by: &str) -> String {
    ids.iter().map(i64::to_string).collect::<Vec<_>>().join(by)
}

#[test]
fn greedy_tokens_are_the_references() {
    for name in ["tiny", "tiny-llama"] {
        let case = case(name);
        let expect = TensorFile::open(case.join("expect.safetensors")).unwrap();
        let integers = |name: &str| expect.require(name).unwrap().to_i64().unwrap();
        let (texts, columns) = (integers("input_ids"), expect.require("input_ids").unwrap().shape[1]);
        let greedy = integers("greedy_ids");
        for (r, &len) in integers("prompt_lens").iter().enumerate() {
            let prompt = &texts[r * columns..][..len as usize];
            let want = &greedy[r * 16..][..16];
            let line = format!("run {{}} --prompt-ids {} --steps 16", joined(prompt, ","));
            let report = json(&(line.clone() + " --json"), &[&case]);
            assert_eq!(ids(&report["ids"]), want, "{name}, row {r}");
            assert_eq!(ids(&report["prompt_ids"]), prompt);
            assert_eq!((&report["target"], &report["text"]), (&Value::from("host"), &Value::Null));
            assert!(report["prefill_s"].as_f64().is_some_and(|s| s > 0.0));
            assert!(report["decode_tokens_per_s"].as_f64().is_some_and(|s| s > 0.0));
            assert_eq!(ok(&line, &[&case]), joined(want, " ") + "\n", "{name}, row {r}");
            let paged = format!("{line} --cache-page 8");
            assert_eq!(ok(&paged, &[&case]), joined(want, " ") + "\n", "{name}, row {r}, in pages");
        }
    }
}

#[test]
fn a_text_ends_at_its_end() {
    let line = "run {} --prompt-ids 3,5,7 --steps 8 --json";
    let all = ids(&json(line, &[&case("tiny")])["ids"]);
    assert_eq!(all.len(), 8);
    let end = all[3];
    let until = all.iter().position(|&id| id == end).expect("it is there") + 1;
    let folder = changed(|config| config["eos_token_id"] = json!([198, end]), |_| {});
    assert_eq!(ids(&json(line, &[folder.path()])["ids"]), all[..until]);
    let ignored = format!("{line} --ignore-eos");
    assert_eq!(ids(&json(&ignored, &[folder.path()])["ids"]), all);
}

#[test]
fn a_seed_decides_what_is_drawn() {
    let draw = |seed: u32, temperature: f64| {
        let line = format!(
            "run {{}} --prompt-ids 3,5,7 --steps 12 --temperature {temperature} --top-p 0.9 --seed {seed}"
        );
        ok(&line, &[&case("tiny")])
    };
    assert_eq!(draw(1, 2.0), draw(1, 2.0));
    assert_ne!(draw(1, 2.0), draw(2, 2.0));
    assert_eq!(draw(1, 0.0), ok("run {} --prompt-ids 3,5,7 --steps 12", &[&case("tiny")]));
}

#[test]
fn with_a_tokenizer_it_speaks() {
    let folder = changed(|_| {}, |_| {});
    let vocabulary: serde_json::Map<_, _> = (0..199).map(|n| (format!("w{n}"), json!(n))).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    });
    fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).expect("the folder is ours");
    let made = ids(&json("run {} --prompt-ids 3,5,7 --steps 5 --json", &[&case("tiny")])["ids"]);
    let words: Vec<_> = made.iter().map(|id| format!("w{id}")).collect();

    let run = |extra: &[&str]| {
        let model = folder.path().to_string_lossy();
        let args = ["run", &model, "--prompt", "w3 w5 w7", "--steps", "5"];
        let out = crate::latentc(args.iter().chain(extra));
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).expect("output is text")
    };
    let report: Value = serde_json::from_str(&run(&["--json"])).expect("JSON");
    assert_eq!(ids(&report["ids"]), made);
    assert_eq!(ids(&report["prompt_ids"]), [3, 5, 7]);
    assert_eq!(report["text"], words.join(" "));
    assert_eq!(run(&[]).trim_end(), words.join(" "));
}
