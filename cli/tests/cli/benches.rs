//! `latentc bench`. What is measured here is small, and no test asks how fast anything is.

use std::collections::{BTreeMap, BTreeSet};

use latentc_codegen::traffic::Traffic;
use latentc_ir::{DType, Symbols};
use latentc_models::Goal;
use latentc_models::config::ModelConfig;
use latentc_passes::{Graph, pipeline};
use latentc_runtime::compiled::{Compiled, compile};
use serde_json::Value;

use crate::{case, error, json, latentc, ok, says, scratch, words};

/// The decode graph of the case `tiny`.
fn decode() -> Compiled {
    let config = ModelConfig::from_path(case("tiny")).unwrap();
    let traced = latentc_models::trace(&config, Goal::Logits, DType::F32).unwrap();
    compile(&traced.module, Graph::Decode, &pipeline()).unwrap()
}

fn number(v: &Value) -> f64 {
    v.as_f64().unwrap_or_else(|| panic!("{v} is no number"))
}

/// All kernels of a program are there with positive times, and totals are what the formulas say.
fn is_whole(report: &Value, compiled: &Compiled, sizes: &BTreeMap<String, u64>) {
    let rows = report["kernels"].as_array().expect("a list");
    let names: BTreeSet<_> = rows.iter().filter_map(|r| r["name"].as_str()).collect();
    assert_eq!(names, compiled.program.kernels.iter().map(|k| k.name.as_str()).collect());
    for row in rows {
        let seconds = &row["time"]["seconds"];
        let [low, median, high] = ["low", "median", "high"].map(|at| number(&seconds[at]));
        assert!(0.0 < low && low <= median && median <= high, "{row}");
        assert!(number(&row["time"]["of_bound"]) > 0.0 && number(&row["bound_seconds"]) > 0.0, "{row}");
        latentc_ir::parse("a kernel", row["ir"].as_str().expect("a text")).unwrap();
    }
    let shares: f64 = rows.iter().map(|r| number(&r["time"]["of_launches"])).sum();
    assert!((shares - 1.0).abs() < 1e-9, "{shares}");

    let (step, traffic) = (&report["step"], Traffic::of_run(&compiled.program, sizes).unwrap());
    for (key, want) in [("flops", traffic.flops), ("read", traffic.read), ("written", traffic.written)] {
        let got = number(&step["traffic"][key]);
        assert!((got - want).abs() <= 1e-9 * want, "{key}: {got}, by formula {want}");
    }
    assert_eq!(step["launches"].as_u64(), Some(compiled.program.launches()));
    let bound: f64 = rows.iter().map(|r| number(&r["bound_seconds"]) * number(&r["launches"])).sum();
    assert!((number(&step["bound_seconds"]) - bound).abs() <= 1e-9 * bound);
    for key in ["copy", "read", "product"] {
        assert!(number(&report["ceilings"][key]["rate"]) > 0.0, "{key}");
    }
    assert!(number(&step["tokens_per_second"]) > 0.0 && number(&step["launches_seconds"]) > 0.0);
}

#[test]
fn every_kernel_of_a_model_is_measured() {
    let compiled = decode();
    let sizes = Symbols::of(compiled.module()).bind(2, 1, 40);
    let line = "bench {} --quick --repeat 3 --batch 2 --context 40 --json --target";
    for target in ["host", "wgpu"] {
        let out = latentc(words(&format!("{line} {target}"), &[&case("tiny")]));
        let said = String::from_utf8_lossy(&out.stderr);
        if said.contains("no wgpu device") {
            eprintln!("SKIPPED: every_kernel_of_a_model_is_measured on wgpu: {said}");
            continue;
        }
        assert!(out.status.success(), "{said}");
        let report: Value = serde_json::from_slice(&out.stdout).expect("JSON");
        assert_eq!((&report["target"], &report["graph"]), (&target.into(), &"decode".into()));
        assert_eq!((&report["batch"], &report["step"]["tokens"]), (&2.into(), &2.into()));
        is_whole(&report, &compiled, &sizes);
        // The host's part is told where launches return before they are done.
        let step = &report["step"];
        assert_eq!(step.get("host_seconds").is_some(), target == "wgpu");
        if target == "wgpu" {
            assert!(number(&step["host_seconds"]["low"]) > 0.0, "{step}");
            assert!(number(&step["host_seconds"]["median"]) <= number(&step["seconds"]["high"]), "{step}");
            assert_eq!(step["device_seconds"]["samples"], 3);
        }
    }
}

#[test]
fn every_graph_is_measured() {
    for graph in ["prefill", "train", "gradient"] {
        let report = json(
            &format!("bench {{}} --graph {graph} --tokens 7 --quick --repeat 1 --json"),
            &[&case("tiny-llama")],
        );
        assert!(number(&report["step"]["seconds"]["median"]) > 0.0);
        assert_eq!(report["step"]["tokens"], 7);
    }
}

#[test]
fn a_stack_is_cut_and_a_file_is_written() {
    let folder = scratch();
    let file = folder.path().join("step.json");
    let text = ok(
        "bench deepseek-v2-lite --layers 1 --whole --dtype f32 --context 16 --quick --repeat 1 -o {}",
        &[&file],
    );
    let head = text.lines().next().unwrap_or_default();
    assert!(head.starts_with("deepseek-v2-lite, decode on host") && head.ends_with("2 layers"), "{text}");
    assert!(text.contains("\nstep ") && !text.contains("\nkernel "), "{text}");
    let report: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).expect("JSON");
    assert_eq!((&report["layers"], &report["layers_of_each_kind"]), (&2.into(), &1.into()));
    // What was not measured is not there.
    assert!(report["kernels"].as_array().expect("a list").iter().all(|r| r.get("time").is_none()));
    assert!(report["step"].get("launches_seconds").is_none());
}

#[test]
fn sizes_that_do_not_fit_each_other() {
    let tiny = case("tiny");
    let of = |rest: &str| error(&format!("bench {{}} {rest}"), &[&tiny]);
    says(&of("--tokens 4"), &["--tokens 4: decode has one new token", "--graph prefill"]);
    says(&of("--graph prefill --tokens 4 --context 3"), &["--context 3 is less than 4 tokens"]);
    says(
        &of("--graph train --tokens 4 --context 5"),
        &["--context 5: the train graph reads whole sequences"],
    );
    says(&of("--whole --quick -o /no/such/folder/x.json"), &["/no/such/folder/x.json: cannot write"]);
    for usage in ["--context 0", "--repeat 0", "--kernels --whole", "--layers 0", "--target abacus"] {
        let out = latentc(words(&format!("bench {{}} {usage}"), &[&tiny]));
        assert_eq!(out.status.code(), Some(2), "{usage}");
    }
}

#[test]
fn a_text_is_measured_as_it_stands() {
    let folder = scratch();
    let text = folder.path().join("rows.ir");
    let module = "module rows entry @rows

func @rows {
  axes t, e=4, f=3, d=5
  param x: f32[t, d=5]
  param which: i32[t]
  weight w: f32[e=4, f=3, d=5] = \"w\"[e, f, d]

  chosen: f32[t, f=3, d=5] = gather w, which along e
  y: f32[t, f=3] = contract chosen, x over d
  return y
}
";
    std::fs::write(&text, module).unwrap();
    let report = json("bench {} --size t=7 --skew 1.5 --quick --repeat 1 --json", &[&text]);
    assert_eq!((&report["model"], &report["text_sizes"]["t"]), (&"rows".into(), &7.into()));
    let rows = report["kernels"].as_array().expect("a list");
    let work = serde_json::json!({"is": "grouped", "count": 1, "groups": 4, "rows": 7, "n": 3, "k": 5});
    assert_eq!((rows.len(), &rows[0]["kind"], &rows[0]["work"]), (1, &"grouped".into(), &work));
    assert!(report.get("layers").is_none() && report["step"].get("tokens_per_second").is_none());

    says(&error("bench {} --quick", &[&text]), &["the size `t` is not given; --size t=N gives it"]);
    says(&error("bench {} --size s=4 --size t=7", &[&text]), &["rows.ir: no axis has the size `s`"]);
    says(&error("bench {} --size t=7 --tokens 4", &[&text]), &["--tokens is for models"]);
    says(&error("bench {} --size t=7 --skew -1", &[&text]), &["--skew -1: give a number from 0 on"]);
    says(&error("bench {} --size t=7 --kernel z", &[&text]), &["rows has no kernel `z`", "it has rows_y"]);
    says(&error("bench {} --size t=7", &[&case("tiny")]), &["--size t=7 is for texts"]);
    let out = latentc(words("bench {} --size t", &[&text]));
    assert!(String::from_utf8_lossy(&out.stderr).contains("`t` is not like t=512"));
    std::fs::write(&text, "module rows").unwrap();
    says(&error("bench {} --size t=7", &[&text]), &["rows.ir"]);
}

#[test]
fn texts_that_are_shipped_are_measured() {
    let ops = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/ops");
    let mut seen = 0;
    for entry in std::fs::read_dir(ops).unwrap() {
        let file = entry.unwrap().path();
        let text = std::fs::read_to_string(&file).unwrap();
        let module = latentc_ir::check("an operation", &text).unwrap();
        let sizes: BTreeSet<_> = module.functions[0].axes.iter().map(|a| a.size.to_string()).collect();
        let sizes = sizes.into_iter().filter(|s| s.parse::<u64>().is_err());
        let given: Vec<_> = sizes.map(|s| format!("--size {s}=2")).collect();
        // Weights of experts are large, so nothing is run: a name that is not there is told when all else is right.
        let line = format!("bench {{}} {} --quick --repeat 1 --kernel none", given.join(" "));
        says(&error(&line, &[&file]), &["has no kernel `none` here"]);
        seen += 1;
    }
    assert_eq!(seen, 7);
}

#[test]
fn narrow_weights_are_measured_on_a_gpu() {
    let line = "bench {} --target wgpu --dtype bf16 --cache int6 --context 9 --quick --repeat 1 --json";
    let out = latentc(words(line, &[&case("tiny")]));
    let said = String::from_utf8_lossy(&out.stderr);
    if said.contains("no wgpu device") {
        return eprintln!("SKIPPED: narrow_weights_are_measured_on_a_gpu: {said}");
    }
    assert!(out.status.success(), "{said}");
    let report: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert!(
        report["kernels"].as_array().expect("a list").iter().all(|r| number(&r["time"]["of_bound"]) > 0.0)
    );
}

#[test]
fn one_kernel_is_measured() {
    let report = json("bench {} --context 9 --quick --repeat 1 --kernel logits_y --json", &[&case("tiny")]);
    let rows = report["kernels"].as_array().expect("a list");
    let timed: Vec<_> = rows.iter().filter(|r| r.get("time").is_some()).map(|r| &r["name"]).collect();
    assert_eq!(timed, ["logits_y"]);
    assert!(report["step"].get("seconds").is_none());
}

/// What `scripts/gpu-check.sh` does with results.
#[test]
fn measurements_are_joined_with_those_of_peers() {
    let folder = scratch();
    std::fs::create_dir(folder.path().join("bench")).unwrap();
    let file = folder.path().join("bench/tiny.json");
    ok("bench {} --context 9 --quick --repeat 1 -o {}", &[&case("tiny"), &file]);
    let report: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let row =
        report["kernels"].as_array().unwrap().iter().find(|r| r["name"] == "logits_y").expect("it is there");
    let sizes: Vec<_> = row["sizes"].as_object().unwrap().values().map(Value::to_string).collect();
    let ours = number(&row["time"]["seconds"]["median"]);
    let item = serde_json::json!({"by": "linear", "median": 3.0 * ours});
    let peers = serde_json::json!({
        "device": "a peer", "items": {format!("tiny/logits_y/{}", sizes.join(",")): item}, "failed": {"tiny/step": "why"}
    });
    std::fs::write(folder.path().join("peers.json"), peers.to_string()).unwrap();
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/gpu_table.py");
    let out =
        match std::process::Command::new("python3").arg(&script).arg("table").arg(folder.path()).output() {
            Ok(out) => out,
            Err(e) => return eprintln!("SKIPPED: measurements_are_joined_with_those_of_peers: python3: {e}"),
        };
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8_lossy(&out.stdout);
    let line = text.lines().find(|l| l.starts_with("| logits_y |")).unwrap_or_else(|| panic!("{text}"));
    assert!(line.contains("| linear |") && line.ends_with("| 3.00 |"), "{line}");
    assert!(text.contains("Peers: a peer.") && text.contains("Not measured: tiny/step: why"), "{text}");
    for row in report["kernels"].as_array().unwrap() {
        assert!(text.contains(&format!("| {} |", row["name"].as_str().unwrap())), "{row}");
    }
}
