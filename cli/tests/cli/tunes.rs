//! `latentc tune`, and `--tuning FILE` where other commands take it.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::{case, error, files, latentc, ok, says, scratch, words};

/// Changes what a file says.
fn change(file: &Path, how: impl FnOnce(&mut Value)) {
    let mut json = serde_json::from_str(&fs::read_to_string(file).expect("it was written")).expect("JSON");
    how(&mut json);
    fs::write(file, json.to_string()).expect("it can be written");
}

/// What a command prints that must succeed, whatever drivers of graphics say.
fn report(line: &str, paths: &[&Path]) -> Value {
    let out = latentc(words(line, paths));
    assert!(out.status.success(), "latentc {line}: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).expect("JSON")
}

/// In which ways the kernel of that name is computed, and whether a tuning says so.
fn ways(rows: &Value, name: &str) -> Vec<(Value, bool)> {
    let rows = rows.as_array().expect("a list").iter().filter(|r| r["name"] == name);
    rows.map(|r| (r["way"].clone(), r["tuned"] == true)).collect()
}

#[test]
fn the_best_ways_are_written_to_a_file_and_taken_from_it() {
    let folder = scratch();
    let (model, file) = (case("tiny"), folder.path().join("tiny.json"));
    let line = "tune {} --target wgpu --quick --repeat 1 --graph decode --context 4,8 --json -o {} \
                --kernel dense_layer_xa --kernel logits_y --kernel moe_layer_y --kernel dense_layer_P_c_KV_s";
    let out = latentc(words(line, &[&model, &file]));
    let said = String::from_utf8_lossy(&out.stderr);
    if said.contains("no wgpu device") {
        eprintln!("SKIPPED: the_best_ways_are_written_to_a_file_and_taken_from_it: {said}");
        return;
    }
    assert!(out.status.success(), "{said}");
    let written: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    let text = fs::read_to_string(&file).expect("it was written");
    assert_eq!(serde_json::from_str::<Value>(&text).expect("JSON"), written);
    let kernels = written["kernels"].as_array().expect("a list");
    assert!(
        kernels.len() >= 3 && kernels.is_sorted_by_key(|k| k["name"].as_str().map(str::to_owned)),
        "{text}"
    );
    for choice in kernels.iter().flat_map(|k| k["choices"].as_array().expect("a list")) {
        let tried = choice["tried"].as_array().expect("a list");
        let place = |way: &Value| tried.iter().position(|t| t["way"] == *way).expect("it was tried");
        let (best, rule) = (place(&choice["way"]), place(&choice["by_rule"]));
        assert!(tried.len() > 1 && best <= rule, "{choice}");
        assert!(tried.iter().all(|t| t["microseconds"].as_f64() > Some(0.0)), "every way is right: {choice}");
    }

    // What is run is what the file says, and the tokens are those of any way.
    let run = |more: &str, paths: &[&Path]| {
        let line = format!("run {{}} --target wgpu --prompt-ids 1,2,3 --steps 4 --ignore-eos{more}");
        let out = latentc(words(&line, &[&[&*model], paths].concat()));
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{said}");
        (String::from_utf8_lossy(&out.stdout).into_owned(), said)
    };
    let (own, _) = run("", &[]);
    let (same, said) = run(" --tuning {}", &[&file]);
    assert_eq!(own, same);
    let all = kernels.iter().map(|k| k["choices"].as_array().map_or(0, Vec::len)).sum::<usize>();
    says(&said, &[&format!("tiny.json: {all} of its {all} choices are taken")]);
    assert!(!said.contains("remark"), "{said}");

    // A way that is turned round is taken as well.
    let (name, other) = ("dense_layer_xa", "contract");
    change(&file, |json| {
        let kernel =
            json["kernels"].as_array_mut().and_then(|all| all.iter_mut().find(|k| k["name"] == name));
        kernel.expect("it has a product")["choices"][0]["way"] = json!(other);
        json["device"]["name"] = json!("another GPU");
    });
    let bench = "bench {} --target wgpu --quick --repeat 1 --kernels --context 8 --json";
    let by_rule = report(bench, &[&model]);
    assert_eq!(ways(&by_rule["kernels"], name), [(json!({"few": {"wide": 0, "rows": 1}}), false)]);
    let tuned = report(&format!("{bench} --tuning {{}}"), &[&model, &file]);
    assert_eq!(ways(&tuned["kernels"], name), [(json!(other), true)]);
    let (same, said) = run(" --tuning {}", &[&file]);
    assert_eq!(own, same);
    says(&said, &["tiny.json was made on another GPU, and this is wgpu ", "other ways may be better here"]);

    // A folder that is compiled with it has the texts of these ways, without a device, and the same ones each time.
    let compile = |out: &Path| {
        let line = "compile {} --target wgpu --graph decode --context 8 --tokens 1 --tuning {} -o {}";
        let told = ok(line, &[&model, &file, out]);
        says(&told, &[" choices are taken\n"]);
        files(out)
    };
    let (first, second) = (compile(&folder.path().join("a")), compile(&folder.path().join("b")));
    assert!(first == second, "two compilations differ");
    let manifest: Value = serde_json::from_slice(&first[Path::new("manifest.json")]).expect("JSON");
    let entry = manifest["kernels"].as_array().expect("a list").iter().find(|k| k["name"] == name);
    let taken = entry.expect("it is there")["taken"].as_array().expect("a list");
    assert!(taken.iter().any(|t| t["way"] == other && t["tuned"] == true), "{taken:?}");

    // What is wrong with a file is said.
    change(&file, |json| {
        let kernel =
            json["kernels"].as_array_mut().and_then(|all| all.iter_mut().find(|k| k["name"] == name));
        kernel.expect("it has a product")["choices"][0]["way"] = json!("few rows, 3");
    });
    let said = error("compile {} --target wgpu --tuning {} -o x", &[&model, &file]);
    says(&said, &["tiny.json: it has no way `few rows, 3`, but `contract`; `few rows, 1`"]);
    change(&file, |json| json["kernels"][0]["choices"][0]["ways"] = json!([]));
    let said = error("compile {} --target wgpu --tuning {} -o x", &[&model, &file]);
    says(&said, &["tiny.json: not a tuning of latentc", "unknown field `ways`"]);
}

#[test]
fn a_tuning_is_for_a_target_that_has_ways() {
    let folder = scratch();
    let (model, file) = (case("tiny"), folder.path().join("some.json"));
    let tuning = json!({
        "latentc": "0.1.0", "target": "cuda", "kernels": [],
        "device": {"name": "a GPU", "multiprocessors": 4, "shared_bytes": 1024, "groups": false, "boxes": false}
    });
    fs::write(&file, tuning.to_string()).expect("it can be written");
    let said = error("tune {} --target host -o {}", &[&model, &file]);
    says(&said, &["the host has one way to compute a kernel; give --target wgpu or cuda"]);
    let line = "tune {} --target wgpu --quick --graph decode --kernel mlp -o {}";
    let out = latentc(words(line, &[&model, &file]));
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success());
    if !said.contains("no wgpu device") {
        says(&said, &["deepseek_v2 has no kernel `mlp` here; it has dense_layer_"]);
    }
    let said = error("compile {} --target host --tuning {} -o x", &[&model, &file]);
    says(&said, &["the host has one way to compute a kernel"]);
    let said = error("compile {} --target wgpu --tuning {} -o x", &[&model, &file]);
    says(&said, &["some.json: made for cuda, and this is for wgpu", "`latentc tune … --target wgpu`"]);
    let said =
        error("compile {} --target cuda --tuning {} -o x", &[&model, &folder.path().join("none.json")]);
    says(&said, &["none.json: give a file that `latentc tune` wrote"]);
    // For what its device is, it is used though it names no kernel.
    let out = folder.path().join("out");
    says(&ok("compile {} --target cuda --tuning {} -o {}", &[&model, &file, &out]), &["0 of its 0 choices"]);
}

#[test]
fn products_of_f32_are_rounded_where_that_is_asked_for() {
    let folder = scratch();
    let ways = |more: &str, name: &str| {
        let out = folder.path().join(name);
        ok(&format!("compile bench-moe-0.3b --target cuda --graph prefill -o {{}}{more}"), &[&out]);
        let named = |file: &std::path::PathBuf| file.to_string_lossy().contains("_tf32_");
        files(&out).into_keys().filter(named).count()
    };
    assert_eq!(ways("", "exact"), 0);
    assert!(ways(" --tf32", "rounded") > 0);
    says(
        &error("run {} --tf32 --prompt-ids 1 --steps 1", &[&case("tiny")]),
        &["--tf32: host has no such products", "--target cuda"],
    );
}
