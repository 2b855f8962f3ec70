//! `--from DIR`: texts of kernels that someone changed in the folder that `compile` wrote.

use std::fs;
use std::path::Path;

use crate::{case, error, latentc, ok, says, scratch, words};

/// Turns the sign of what a kernel stores into its third buffer.
fn negate(file: &Path) {
    let text = fs::read_to_string(file).expect("it was written");
    let line = |line: &str| match line.split_once("] = l_") {
        Some((place, value)) if place.starts_with("buffer_2") => format!("{place}] = -l_{value}\n"),
        _ => format!("{line}\n"),
    };
    let changed: String = text.lines().map(line).collect();
    assert!(changed != text, "{} stores nothing:\n{text}", file.display());
    fs::write(file, changed).expect("it can be written");
}

#[test]
fn a_changed_text_is_what_is_checked() {
    let folder = scratch();
    let (model, out) = (case("tiny"), folder.path().join("out"));
    ok("compile {} --target cuda -o {}", &[&model, &out]);
    let line = "check {} --graph prefill --graph decode --kernel logits_y --from {}";
    let first = latentc(words(line, &[&model, &out]));
    let said = String::from_utf8_lossy(&first.stderr);
    if said.contains("no CUDA emulator") {
        eprintln!("SKIPPED: a_changed_text_is_what_is_checked: {said}");
        return;
    }
    assert!(first.status.success(), "{said}");
    says(&String::from_utf8_lossy(&first.stdout), &["no text differs from what was compiled", "1 kernels, "]);

    negate(&out.join("kernels/logits_y_few01.cu"));
    let second = latentc(words(line, &[&model, &out]));
    let told = String::from_utf8_lossy(&second.stdout);
    assert!(!second.status.success(), "{told}");
    let verdict = |name: &str| {
        let line = told.lines().find(|l| l.split_whitespace().next() == Some(name));
        line.unwrap_or_else(|| panic!("no line of {name} in\n{told}")).to_owned()
    };
    says(
        &told,
        &["texts changed in ", ": kernels/logits_y_few01.cu\n", "199 of 199 elements are off", " --from "],
    );
    assert!(verdict("kernels/logits_y_few01.cu").contains(" FAILS "), "{told}");
    assert!(verdict("logits_y").contains(" ok "), "what the compiler writes is as it was:\n{told}");

    // It belongs to no kernel of other graphs, and to no other target.
    let said = error("check {} --graph decode --kernel moe_layer_y --from {}", &[&model, &out]);
    says(&said, &["kernels/logits_y_few01.cu is the text of no kernel that is checked"]);
    let said = error("check {} --target wgpu --from {}", &[&model, &out]);
    says(&said, &["out: compiled for cuda, and this runs wgpu; compile with --target wgpu"]);
    let said = error("check {} --target host --from {}", &[&model, &out]);
    says(&said, &["the host runs the IR, so there is no text to change"]);
    fs::write(out.join("manifest.json"), "{}").expect("it can be written");
    let said = error("check {} --from {}", &[&model, &out]);
    says(&said, &["manifest.json: not a manifest of latentc", "missing field"]);
}

#[test]
fn a_changed_text_is_what_runs() {
    let folder = scratch();
    let (model, out) = (case("tiny"), folder.path().join("out"));
    ok("compile {} --target wgpu -o {}", &[&model, &out]);
    let run = |more: &str, paths: &[&Path]| {
        let line = format!("run {{}} --target wgpu --prompt-ids 1,2,3 --steps 4 --ignore-eos{more}");
        let out = latentc(words(&line, &[&[&*model], paths].concat()));
        (
            out.status.success(),
            String::from_utf8_lossy(&out.stdout).into_owned(),
            String::from_utf8_lossy(&out.stderr).into_owned(),
        )
    };
    let (done, own, said) = run("", &[]);
    if said.contains("no wgpu device") {
        eprintln!("SKIPPED: a_changed_text_is_what_runs: {said}");
        return;
    }
    assert!(done, "{said}");
    let (_, same, said) = run(" --from {}", &[&out]);
    assert_eq!(same, own);
    says(&said, &["out: no text differs from what was compiled\n"]);

    // The unlikeliest token comes now. Of the two, the other kernel is not launched for so few tokens.
    negate(&out.join("kernels/logits_y_few01.wgsl"));
    let plain = out.join("kernels/logits_y.wgsl");
    fs::write(&plain, fs::read_to_string(&plain).expect("it was written") + "\n// more\n")
        .expect("it can be written");
    let (done, other, said) = run(" --from {}", &[&out]);
    assert!(done && other != own, "{other}, {said}");
    says(
        &said,
        &[
            "kernels/logits_y_few01.wgsl",
            "warning: kernels/logits_y.wgsl was changed, but no launch wanted it",
        ],
    );
    assert!(!said.contains("warning: kernels/logits_y_few01.wgsl"), "{said}");
}
