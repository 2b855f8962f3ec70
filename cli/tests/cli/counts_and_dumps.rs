//! `params`, `dump`, `verify`, and the pipe behind them.

use std::fs;
use std::io::Read;
use std::process::{Command, Stdio};

use crate::{case, error, json, ok, says, scratch};

#[test]
fn the_published_models_have_the_published_sizes() {
    let figures =
        [("deepseek-v2", 235.7, 21.4), ("deepseek-v2-lite", 15.7, 2.7), ("deepseek-67b", 67.4, 67.4)];
    for (name, total, active) in figures {
        says(
            &ok(&format!("params {name}"), &[]),
            &[&format!("{name}: {total}B parameters, {active}B active per token")],
        );
        let report = json(&format!("params {name} --json"), &[]);
        let billions = |key: &str| (report[key].as_f64().expect("a number") / 1e8).round() / 10.0;
        assert_eq!((billions("total"), billions("active")), (total, active), "{name}");
        let modules = report["modules"].as_array().expect("a list");
        let sum: u64 = modules.iter().map(|m| m["total"].as_u64().expect("a number")).sum();
        assert_eq!(Some(sum), report["total"].as_u64(), "{name}: the modules add up");
    }
}

#[test]
fn parameters_by_module() {
    insta::assert_snapshot!(ok("params {}", &[&case("tiny")]));
}

#[test]
fn a_model_is_a_folder_a_file_or_a_name() {
    let folder = ok("params {}", &[&case("tiny")]);
    assert_eq!(ok("params {}", &[&case("tiny").join("config.json")]), folder);
    says(&ok("params bench-moe-0.3b", &[]), &["bench-moe-0.3b: "]);
}

#[test]
fn the_definition_of_a_layer() {
    let text = ok("dump {} --after trace", &[&case("tiny-llama")]);
    let start = text.find("func @layer").expect("the function");
    let end = text[start..].find("\n}\n").expect("its end");
    insta::assert_snapshot!(&text[start..start + end + 3]);
}

#[test]
fn every_stage_of_every_graph_dumps_and_verifies() {
    let folder = scratch();
    let (text, js) = (folder.path().join("x.ir"), folder.path().join("x.json"));
    let pipeline = json("dump --print-pipeline --format json", &[]);
    let stages: Vec<&str> =
        pipeline.as_array().expect("a list").iter().map(|s| s["name"].as_str().expect("a name")).collect();
    assert_eq!((stages.first(), stages.last()), (Some(&"trace"), Some(&"schedule")));
    for case in [case("tiny"), case("tiny-llama")] {
        for graph in ["prefill", "decode", "train"] {
            for stage in &stages[..stages.len() - 1] {
                let line = format!("dump {{}} --graph {graph} --after {stage}");
                fs::write(&text, ok(&line, &[&case])).expect("a file of ours");
                says(&ok("verify {}", &[&text]), &["x.ir: ok, "]);
                fs::write(&js, ok(&(line + " --format json"), &[&case])).expect("a file of ours");
                says(&ok("verify {}", &[&js]), &["x.json: ok, "]);
            }
            says(&ok(&format!("dump {{}} --graph {graph} --after schedule"), &[&case]), &[" = launch "]);
            json(&format!("dump {{}} --graph {graph} --after schedule --format json"), &[&case]);
        }
    }
}

#[test]
fn the_pipeline_is_printed_with_or_without_a_model() {
    let text = ok("dump --print-pipeline", &[]);
    assert!(text.starts_with("trace "), "{text}");
    assert!(text.lines().last().is_some_and(|l| l.starts_with("schedule ")), "{text}");
    assert_eq!(ok("dump {} --print-pipeline", &[&case("tiny")]), text);
    for line in text.lines() {
        assert!(line.split_once(' ').is_some_and(|(_, law)| !law.trim().is_empty()), "no law: {line}");
    }
}

#[test]
fn a_dtype_can_be_chosen() {
    says(&ok("dump {} --after trace --dtype bf16", &[&case("tiny")]), &["bf16["]);
    assert!(!ok("dump {} --after trace", &[&case("tiny")]).contains("bf16["));
}

#[test]
fn malformed_ir_is_drawn_with_carets() {
    let folder = scratch();
    let file = folder.path().join("wrong.ir");
    fs::write(
        &file,
        "module toy entry @f\n\nfunc @f {\n  axes k=4\n  param x: f32[k]\n  y: f32[k] = cosh x\n  return y\n}\n",
    )
    .expect("a file of ours");
    let message = error("verify {}", &[&file]);
    insta::assert_snapshot!(message.replace(&*folder.path().to_string_lossy(), "FOLDER"));

    // Well formed, but no program.
    fs::write(
        &file,
        "module toy entry @f\n\nfunc @f {\n  axes k=4\n  param x: f32[k]\n  y: f32[k] = tanh z\n  return y\n}\n",
    )
    .expect("a file of ours");
    says(&error("verify {}", &[&file]), &["error: ", "z", "^"]);
    fs::write(&file, [0xff, 0xfe]).expect("a file of ours");
    says(&error("verify {}", &[&file]), &["wrong.ir: cannot read"]);
    says(&error("verify {}", &[&folder.path().join("none.ir")]), &["none.ir: cannot read"]);
    fs::write(folder.path().join("x.json"), "{").expect("a file of ours");
    says(&error("verify {}", &[&folder.path().join("x.json")]), &["x.json: line 1, column 1"]);
}

#[test]
fn a_reader_may_stop_reading() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_latentc"))
        .args(["dump", "deepseek-v2", "--format", "json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let mut first = [0; 16];
    child.stdout.take().expect("a pipe").read_exact(&mut first).expect("it begins to print");
    let out = child.wait_with_output().expect("it ends");
    assert!(out.status.success());
    assert_eq!(String::from_utf8_lossy(&out.stderr), "");
}
