//! `latentc check`.

use serde_json::Value;

use crate::{case, error, json, latentc, ok, scratch, words};

#[test]
fn every_kernel_of_a_model_is_compared_with_what_it_means() {
    let text = ok("check {} --target host", &[&case("tiny")]);
    let head = text.lines().next().unwrap_or_default();
    assert!(
        head.starts_with("kernel ") && head.ends_with("verdict  ways  cases  worst error  tolerance"),
        "{text}"
    );
    assert!(text.lines().filter(|l| l.contains("  ok  ")).count() > 40, "{text}");
    assert!(
        !text.contains("FAILS") && text.contains(" kernels, ") && text.contains(" cases, host"),
        "{text}"
    );
}

#[test]
fn what_training_minimises_is_checked_too() {
    let names = |flags: &str| {
        let line = format!("check {{}} --target host --graph train {flags} --json");
        let report = json(&line, &[&case("tiny")]);
        assert_eq!(report["passes"], true);
        let kernels = report["kernels"].as_array().expect("a list");
        kernels.iter().filter_map(|k| k["name"].as_str().map(str::to_owned)).collect::<Vec<_>>()
    };
    // Counts are of the balance losses, which the cross entropy does without.
    let counts = |names: &[String]| names.iter().any(|name| name.contains("counted"));
    assert!(!counts(&names("")) && counts(&names("--objective")));
}

#[test]
fn one_kernel_runs_as_cuda_text() {
    let model = case("tiny");
    let line =
        "check {} --graph decode --kernel dense_layer_c_Q_contract --kernel moe_layer_y --seed 5 --json";
    let out = latentc(words(line, &[&model]));
    let said = String::from_utf8_lossy(&out.stderr);
    if said.contains("no CUDA emulator") {
        eprintln!("SKIPPED: one_kernel_runs_as_cuda_text: {said}");
        return;
    }
    assert!(out.status.success(), "{said}");
    let report: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert_eq!(
        (&report["target"], &report["seed"], &report["passes"]),
        (&"emulate".into(), &5.into(), &true.into())
    );
    let names: Vec<_> = report["kernels"].as_array().expect("a list").iter().map(|k| &k["name"]).collect();
    assert_eq!(names, ["dense_layer_c_Q_contract", "moe_layer_y"]);
    let cases = report["kernels"][0]["cases"].as_array().expect("a list");
    assert!(cases.len() > 2 && cases.iter().all(|c| c["ratio"].as_f64() <= Some(1.0)), "{cases:?}");
}

#[test]
fn what_is_asked_for_must_be_there() {
    let said = error("check {} --target host --graph decode --kernel mla", &[&case("tiny")]);
    assert!(said.starts_with("error: deepseek_v2 has no kernel `mla` here; it has dense_layer_"), "{said}");
    let small = json(
        "check {} --target host --graph decode --kernel dense_layer_c_Q_contract --json",
        &[&case("tiny")],
    );
    assert_eq!(small["kernels"].as_array().map(Vec::len), Some(1));
}

#[test]
fn what_a_kernel_takes_of_a_gpu_is_told_without_one() {
    let line = "check {} --static --graph decode --kernel moe_layer_y --arch sm_80 --arch sm_90a --arch sm_100 --json";
    let out = latentc(words(line, &[&case("tiny")]));
    let said = String::from_utf8_lossy(&out.stderr);
    if said.contains("no CUDA toolkit") {
        eprintln!("SKIPPED: what_a_kernel_takes_of_a_gpu_is_told_without_one: {said}");
        return;
    }
    assert!(out.status.success(), "{said}");
    let report: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    let rows = report["kernels"].as_array().expect("a list");
    let of = |way: &str| -> Vec<_> {
        let same = rows.iter().filter(|r| r["way"] == way);
        same.map(|r| r["arch"].as_str().unwrap_or_default()).collect()
    };
    assert_eq!(of("moe_layer_y"), ["sm_80", "sm_90a", "sm_100"]);
    assert!(
        rows.iter().any(|r| r["kind"] == "few rows"),
        "decode takes another way than the plain one: {rows:?}"
    );
    for row in rows {
        let code = &row["code"];
        let number = |v: &Value| v.as_f64().expect("a number");
        let (registers, counts) = (number(&code["resources"]["registers"]), &code["instructions"]);
        assert!((1.0..=255.0).contains(&registers), "{row}");
        assert!(number(&code["occupancy"]) > 0.0 && number(&code["occupancy"]) <= 1.0, "{row}");
        // It reads and writes memory, and does something in between.
        assert!(number(&counts["global"]) >= 2.0 && number(&counts["total"]) > 20.0, "{row}");
        assert_eq!(
            (number(&code["resources"]["spill_bytes"]), number(&counts["local"])),
            (0.0, 0.0),
            "{row}"
        );
        assert_eq!((&counts["tensor"], &row["needed"]), (&0.into(), &0.into()), "in f32: {row}");
    }
}

#[test]
fn a_kernel_that_spills_fails() {
    let folder = scratch();
    let (model, out) = (case("tiny"), folder.path().join("out"));
    ok("compile {} --target cuda --dtype bf16 -o {}", &[&model, &out]);
    // So many cubes at once have too few registers each.
    let file = out.join("kernels/dense_layer_P_c_KV_s_matrix1.cu");
    let text = std::fs::read_to_string(&file).expect("it was written");
    let crowded = text.replacen("__launch_bounds__(128, 1)", "__launch_bounds__(128, 16)", 1);
    assert_ne!(crowded, text);
    std::fs::write(&file, crowded).expect("it can be written");
    let line = "check {} --static --dtype bf16 --graph prefill --graph decode --kernel dense_layer_P_c_KV_s --from {}";
    let out = latentc(words(line, &[&model, &out]));
    let said = String::from_utf8_lossy(&out.stderr);
    if said.contains("no CUDA toolkit") {
        eprintln!("SKIPPED: a_kernel_that_spills_fails: {said}");
        return;
    }
    let table = String::from_utf8_lossy(&out.stdout);
    assert!(!out.status.success(), "{table}");
    assert!(
        said.contains("error: 1 of ") && said.contains(" codes of deepseek_v2 spill registers"),
        "{said}"
    );
    let row = |name: &str| {
        let line = table.lines().find(|l| l.split_whitespace().next() == Some(name));
        line.unwrap_or_else(|| panic!("no line of {name} in\n{table}")).split_whitespace().collect::<Vec<_>>()
    };
    // Of both products of a block of positions, the code has all that a plane needs.
    let (heads, row) = (row("kernel"), row("dense_layer_P_c_KV_s_matrix1"));
    assert_eq!(heads[heads.len() - 2..], ["tensor", "needed"]);
    let [tensor, needed] = [row[row.len() - 2], row[row.len() - 1]].map(|n| n.parse().unwrap_or(0));
    assert!(needed > 0 && tensor >= needed && tensor % needed == 0, "{table}");
}

#[test]
fn what_kernels_move_is_counted() {
    let line = "check {} --traffic --dtype bf16 --graph decode --kernel dense_layer_P_c_KV_s --kernel logits_h --json";
    let out = latentc(words(line, &[&case("tiny")]));
    let said = String::from_utf8_lossy(&out.stderr);
    if said.contains("no CUDA emulator") {
        eprintln!("SKIPPED: what_kernels_move_is_counted: {said}");
        return;
    }
    assert!(out.status.success(), "{said}");
    let report: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    let rows = report["kernels"].as_array().expect("a list");
    let number = |v: &Value| v.as_f64().expect("a number");
    let least = |row: &Value| number(&row["least"]["read"]) + number(&row["least"]["written"]);
    let [stream, norm] = &rows[..] else { panic!("{rows:?}") };
    // Latents are keys and values both, and read by one block.
    assert_eq!(stream["kind"], "stream matrix");
    assert!(number(&stream["moved"]["by_block"]) <= 1.05 * least(stream), "{stream}");
    assert!(
        number(&stream["multiplied"]) > number(&stream["least"]["flops"]),
        "tiles have more rows: {stream}"
    );
    // Of the rows, the last of each sequence.
    assert!(
        number(&norm["moved"]["distinct"]) <= least(norm) && number(&norm["multiplied"]) == 0.0,
        "{norm}"
    );
    for row in rows {
        let of = |way: &str| number(&row["moved"][way]);
        assert!(of("asked") >= of("by_block") && of("by_block") >= of("distinct"), "{row}");
    }
}

#[test]
fn a_stored_state_is_compared_with() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let base = folder.path().join("base");
    let model = case("tiny");
    let line = "check {} --target host --graph decode --kernel moe_layer_y --kernel logits_y";
    ok(&format!("{line} --bless {{}}"), &[&model, &base]);
    ok(&format!("{line} --against {{}}"), &[&model, &base]);

    // Another text, another result.
    let text = folder.path().join("base/kernels/moe_layer_y.cu");
    let source = std::fs::read_to_string(&text).expect("it was written");
    std::fs::write(&text, source + "\n// more\n").expect("it can be written");
    let file = folder.path().join("base/baseline.json");
    let stored = std::fs::read_to_string(&file).expect("it was written");
    let mut stored: Value = serde_json::from_str(&stored).expect("JSON");
    stored["kernels"]["logits_y"]["results"][0] = "0".into();
    std::fs::write(&file, stored.to_string()).expect("it can be written");
    let out = latentc(words(&format!("{line} --against {{}}"), &[&model, &base]));
    let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success());
    assert!(said.contains("moe_layer_y: source +0 -1 lines\n"), "{said}");
    assert!(said.contains("logits_y: results of 1 of "), "{said}");
    assert!(said.contains("2 kernels are not as in "), "{said}");

    let said = error("check {} --target host --graph decode --against {}", &[&model, &model]);
    assert!(said.contains("baseline.json: no baseline; `latentc check … --bless` writes one"), "{said}");
}
