//! `compile`: the folder that it writes.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::{case, error, files, names, ok, says, scratch};

fn manifest(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("manifest.json")).expect("a manifest")).expect("JSON")
}

fn strings(value: &Value, key: &str) -> Vec<String> {
    let list = value.as_array().expect("a list");
    list.iter().map(|v| v[key].as_str().expect("a string").to_owned()).collect()
}

#[test]
fn the_same_bytes_in_any_folder() {
    let folder = scratch();
    for target in ["cuda", "wgpu", "host"] {
        let (a, b) = (folder.path().join("a"), folder.path().join("deeper/b"));
        for out in [&a, &b] {
            ok(
                &format!("compile {{}} --target {target} --graph train --graph decode -o {{}}"),
                &[&case("tiny"), out],
            );
        }
        let (first, second) = (files(&a), files(&b));
        assert_eq!(first.keys().collect::<Vec<_>>(), second.keys().collect::<Vec<_>>(), "{target}");
        for (name, bytes) in &first {
            assert!(second[name] == *bytes, "{target}: {} differs", name.display());
            let text = String::from_utf8_lossy(bytes);
            assert!(
                !text.contains(&*folder.path().to_string_lossy()),
                "{target}: {} has a path",
                name.display()
            );
        }
    }
    assert_eq!(names(folder.path()), ["a", "deeper"], "nothing temporary is left");
}

#[test]
fn the_manifest_describes_the_folder() {
    let folder = scratch();
    let out = folder.path().join("out");
    for (target, ending) in [("cuda", "cu"), ("wgpu", "wgsl"), ("host", "ir")] {
        let summary = ok(&format!("compile {{}} --target {target} -o {{}}"), &[&case("tiny"), &out]);
        says(&summary, &["prefill", "decode", "launches a run", "distinct kernels"]);
        let json = manifest(&out);
        assert_eq!(json["target"], target);
        assert_eq!(json["latentc"], env!("CARGO_PKG_VERSION"));
        assert_eq!(json["model"]["name"], "deepseek_v2");
        assert_eq!(json["model"]["config"]["hidden_size"], 45);
        // A prompt is read by one program or another, as its length wants.
        let mut graphs = strings(&json["graphs"], "graph");
        let guards: Vec<_> = json["graphs"].as_array().expect("a list").iter().map(|g| &g["guard"]).collect();
        assert_eq!(guards.iter().filter(|g| g.is_null()).count(), 1, "decode reads one token");
        assert_eq!((&guards[0]["size"], &guards[0]["above"]), (&Value::from("t"), &Value::from(0)));
        assert_eq!(guards[0]["up_to"], guards[1]["above"]);
        graphs.dedup();
        assert_eq!(graphs, ["prefill", "decode"]);

        let tensors = crate::tensors(&case("tiny").join("model.safetensors"));
        let stored: BTreeSet<_> = strings(&json["parameters"], "name").into_iter().collect();
        assert_eq!(stored, tensors.keys().cloned().collect(), "the parameters are the checkpoint's tensors");

        let mut written = BTreeSet::from(["manifest.json".to_owned()]);
        written.extend(strings(&json["kernels"], "spec"));
        let kernels = json["kernels"].as_array().expect("a list");
        for sources in kernels.iter().map(|k| &k["sources"]) {
            let files = strings(sources, "file");
            assert!(
                !files.is_empty() && files.iter().all(|f| f.ends_with(&format!(".{ending}"))),
                "{sources}"
            );
            written.extend(files);
        }
        let together = json["together"].as_array().map_or(&[][..], Vec::as_slice);
        assert_eq!(together.is_empty(), target != "cuda", "what runs in one grid has a text on CUDA");
        written.extend(together.iter().map(|t| t["file"].as_str().expect("a file").to_owned()));
        let known: BTreeSet<_> = strings(&json["kernels"], "name").into_iter().collect();
        assert_eq!(known.len(), json["kernels"].as_array().expect("a list").len(), "names are unique");
        for graph in json["graphs"].as_array().expect("a list") {
            written.extend(
                graph["stages"].as_array().expect("a list").iter().map(|f| f.as_str().unwrap().into()),
            );
            written.insert(graph["schedule"].as_str().expect("a file").to_owned());
            for routine in graph["routines"].as_array().expect("a list") {
                for step in routine["steps"].as_array().expect("a list") {
                    if let Some(kernel) = step["launch"]["kernel"].as_str() {
                        assert!(known.contains(kernel), "{kernel} is launched but not described");
                    }
                }
            }
        }
        let found: BTreeSet<_> = files(&out).keys().map(|f| f.to_string_lossy().into_owned()).collect();
        assert_eq!(found, written, "{target}");
        let ir: Vec<_> = written.iter().filter(|f| f.ends_with(".ir")).collect();
        assert!(
            ir.contains(&&"prefill/00_trace.ir".to_owned())
                && ir.iter().any(|f| f.starts_with("decode/") && f.ends_with("_derive.ir"))
        );
        for file in ir {
            ok("verify {}", &[&out.join(file)]);
        }
    }
}

#[test]
fn kernels_do_not_grow_with_depth() {
    let folder = scratch();
    let (deep, flat) = (folder.path().join("deep"), folder.path().join("flat"));
    ok("compile deepseek-v2 --target cuda -o {}", &[&deep]);
    let config = folder.path().join("config.json");
    let mut json: Value = manifest(&deep)["model"]["config"].clone();
    json["num_hidden_layers"] = 2.into();
    fs::write(&config, json.to_string()).expect("a file of ours");
    ok("compile {} --target cuda -o {}", &[&config, &flat]);
    assert_eq!(names(&deep.join("kernels")), names(&flat.join("kernels")));
}

#[test]
fn only_what_it_wrote_is_replaced() {
    let folder = scratch();
    let out = folder.path().join("out");
    fs::create_dir(&out).expect("a folder of ours");
    ok("compile {} --target host -o {}", &[&case("tiny"), &out]);
    ok("compile {} --target host --graph train -o {}", &[&case("tiny-llama"), &out]);
    assert_eq!(names(&out), ["kernels", "manifest.json", "train"]);

    let other = folder.path().join("other");
    fs::create_dir(&other).expect("a folder of ours");
    fs::write(other.join("manifest.json"), "{\"name\": \"a web app\"}").expect("a file of ours");
    let message = error("compile {} --target host -o {}", &[&case("tiny"), &other]);
    says(&message, &["other: the folder is not empty", "manifest.json of latentc"]);
    assert_eq!(names(&other), ["manifest.json"]);
    assert_eq!(names(folder.path()), ["other", "out"]);
}

#[test]
fn an_output_folder_that_cannot_be() {
    let folder = scratch();
    let file = folder.path().join("file");
    fs::write(&file, "").expect("a file of ours");
    for out in [file.clone(), file.join("out"), Path::new("/proc/latentc/out").to_owned()] {
        let message = error("compile {} --target host -o {}", &[&case("tiny"), &out]);
        says(&message, &[&out.to_string_lossy(), "cannot write the output folder"]);
        let message = error("init {} -o {}", &[&case("tiny"), &out]);
        says(&message, &[&out.to_string_lossy(), "cannot write the output folder"]);
    }
    assert_eq!(names(folder.path()), ["file"]);
}

#[test]
fn passes_are_validated_on_request() {
    let folder = scratch();
    let out = folder.path().join("out");
    let text =
        ok("compile {} --target host --graph train --graph decode --validate -o {}", &[&case("tiny"), &out]);
    let validation = &manifest(&out)["validation"];
    assert_eq!(validation["instances"], 2);
    assert_eq!(validation["not_compared"], Value::Array(Vec::new()));
    says(&text, &[&format!("{} passes validated on 2 small instances each", validation["passes"])]);

    ok("compile {} --target host --graph decode -o {}", &[&case("tiny"), &out]);
    assert_eq!(manifest(&out)["validation"], Value::Null);
}

#[test]
fn temporaries_are_planned_at_sizes_that_are_given() {
    let folder = scratch();
    let out = folder.path().join("out");
    let sizes = "--batch 2 --tokens 8 --context 64";
    let text = ok(&format!("compile {{}} --target cuda {sizes} -o {{}}"), &[&case("tiny"), &out]);
    let manifest = manifest(&out);
    let graphs = manifest["graphs"].as_array().expect("a list");
    for (graph, sizes) in [("prefill", "b=2 q=1 s=64 t=8"), ("decode", "b=2 q=1 s=64 t=1")] {
        let entry = graphs.iter().find(|g| g["graph"] == graph).expect("the graph");
        let memory = &entry["memory"];
        let number = |key: &str| memory[key].as_u64().expect("a number");
        let (bytes, bound) = (number("bytes"), number("bound"));
        assert_eq!(memory["sizes"]["s"], 64);
        // Places begin at multiples of 512 bytes, and these models are small.
        assert!(bound <= bytes && bytes < 2 * bound, "{memory}");
        says(&text, &[&format!("at {sizes}, ")]);
    }
    // Graphs that keep no caches have sequences as well.
    let whole = "compile {} --target cuda --graph train --graph gradient --batch 3 --tokens 5 -o {}";
    let text = ok(whole, &[&case("tiny"), &out]);
    assert_eq!(text.matches(" bytes at b=3 t=5, ").count(), 2, "{text}");
    let short = "compile {} --target cuda --tokens 9 --context 8 -o {}";
    let why = error(short, &[&case("tiny"), &folder.path().join("none")]);
    says(&why, &["--context 8 is less than --tokens 9"]);
    assert!(!folder.path().join("none").exists());
}
