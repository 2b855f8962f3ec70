//! `opt` on texts, and `explain`.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use crate::{case, error, json, ok, says, scratch};

const DOUBLE: &str = "module toy entry @f\n\nfunc @f {\n  axes t\n  param x: f32[t]\n  one: f32 = const 1.0\n  y: f32[t] = mul x, one\n  z: f32[t] = neg y\n  return z\n}\n";

#[test]
fn passes_run_on_text_in_the_order_given() {
    let folder = scratch();
    let (file, out) = (folder.path().join("x.ir"), folder.path().join("y.ir"));
    fs::write(&file, DOUBLE).expect("a file of ours");
    let simple = ok("opt {} --passes simplify,expand,simplify", &[&file]);
    assert!(!simple.contains("mul"), "{simple}");
    says(&simple, &["z: f32[t] = neg x"]);
    assert_eq!(ok("opt {} --passes simplify -o {}", &[&file, &out]), "");
    assert_eq!(fs::read_to_string(&out).expect("it was written"), simple);
    assert_eq!(crate::names(folder.path()), ["x.ir", "y.ir"]);

    let mut child = Command::new(env!("CARGO_BIN_EXE_latentc"))
        .args(["opt", "-", "--passes", "simplify"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    child.stdin.take().expect("a pipe").write_all(DOUBLE.as_bytes()).expect("it reads");
    let piped = child.wait_with_output().expect("it ends");
    assert_eq!(String::from_utf8_lossy(&piped.stdout), simple);
}

#[test]
fn passes_on_a_dump_give_the_next_dump() {
    let folder = scratch();
    let file = folder.path().join("x.ir");
    let pipeline = json("dump --print-pipeline --format json", &[]);
    let names: Vec<&str> =
        pipeline.as_array().expect("a list").iter().map(|s| s["name"].as_str().expect("a name")).collect();
    for graph in ["prefill", "decode", "train"] {
        fs::write(&file, ok(&format!("dump {{}} --graph {graph} --after trace"), &[&case("tiny")]))
            .expect("a file of ours");
        let passes = names[1..names.len() - 1].join(",");
        assert_eq!(
            ok(&format!("opt {{}} --graph {graph} --passes {passes}"), &[&file]),
            ok(&format!("dump {{}} --graph {graph}"), &[&case("tiny")]),
        );
    }
}

#[test]
fn passes_can_be_left_out() {
    let without = |words: &str| ok(&format!("dump {{}} --graph decode {words}"), &[&case("tiny")]);
    let all = without("");
    assert!(all.contains("top_indices") && !without("--skip route").contains("top_indices"));
    assert_eq!(
        without("--skip route,simplify,tidy"),
        without("--passes place_cache,reassociate,inline,stream_softmax")
    );
    // What kernels need is done all the same.
    assert!(without("--skip reassociate --after schedule").contains("launch dense_layer_k_C_s(W_UK, "));
    says(
        &error("dump {} --skip simplify --after simplify", &[&case("tiny")]),
        &["there is nothing after `simplify`, since that pass is left out"],
    );
    let refused = crate::latentc(["dump", "deepseek-v2", "--skip", "derive"]);
    says(
        &String::from_utf8_lossy(&refused.stderr),
        &["invalid value 'derive'", "place_cache, quantise, page, simplify"],
    );

    let folder = scratch();
    let out = folder.path().join("out");
    ok("compile {} --target host --passes place_cache -o {}", &[&case("tiny"), &out]);
    let stages = ["trace", "differentiate", "place_cache", "derive", "expand", "pair", "define"];
    let stages: Vec<_> = stages.iter().enumerate().map(|(n, s)| format!("{n:02}_{s}.ir")).collect();
    assert_eq!(crate::names(&out.join("decode"))[..7], stages);
}

#[test]
fn opt_validates_what_it_is_given() {
    let folder = scratch();
    let file = folder.path().join("x.ir");
    fs::write(&file, ok("dump {} --graph decode --after derive", &[&case("tiny")])).expect("a file of ours");
    let path = file.to_string_lossy();
    let words = ["opt", &path, "--graph", "decode", "--passes", "simplify,expand", "--validate"];
    let run = crate::latentc(words);
    assert!(run.status.success());
    says(&String::from_utf8_lossy(&run.stderr), &["2 passes validated on 2 small instances each"]);
    assert_eq!(
        String::from_utf8_lossy(&run.stdout),
        ok("dump {} --graph decode --after expand", &[&case("tiny")])
    );

    // An index that is out of range: there is nothing to compare, and that is said.
    let text = "module m entry @f\n\nfunc @f {\n  axes d=3, e=2\n  param x: f32[d=3]\n  \
                j: i32[e=2] = const [7, 8]\n  y: f32[e=2] = gather x, j along d\n  return y\n}\n";
    fs::write(&file, text).expect("a file of ours");
    let run = crate::latentc(["opt", &path, "--passes", "simplify", "--validate"]);
    says(
        &String::from_utf8_lossy(&run.stderr),
        &["but for simplify (prefill), which could not be: the program itself fails: @f: y: "],
    );
}

#[test]
fn what_opt_refuses() {
    let folder = scratch();
    let file = folder.path().join("x.ir");
    fs::write(&file, DOUBLE).expect("a file of ours");
    says(&error("opt {} --passes simplify,fold", &[&file]), &["unknown pass `fold`; known: ", "simplify, "]);
    says(&error("opt {} --passes simplify -o /proc/none/x", &[&file]), &["/proc/none/x: cannot write"]);
    says(&error("opt /none --passes simplify", &[]), &["/none: cannot read"]);
    fs::write(&file, DOUBLE.replace("neg y", "neg w")).expect("a file of ours");
    says(&error("opt {} --passes simplify", &[&file]), &["error: ", "x.ir:8", "^"]);
}

#[test]
fn remarks_are_a_list_and_the_same_each_time() {
    for graph in ["prefill", "decode", "train"] {
        let line = format!("explain {{}} --graph {graph}");
        let text = ok(&line, &[&case("tiny")]);
        assert_eq!(ok(&line, &[&case("tiny")]), text);
        let list = json(&format!("{line} --remarks json"), &[&case("tiny")]);
        let list = list.as_array().expect("a list");
        says(
            text.lines().next().unwrap_or_default(),
            &[&format!("deepseek_v2, {graph}: {} remark", list.len())],
        );
        for remark in list {
            says(&text, &[remark["message"].as_str().expect("a sentence")]);
        }
    }
    says(&error("explain gpt-2", &[]), &["unknown model `gpt-2`"]);
}
