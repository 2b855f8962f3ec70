//! Runs the files of `verify/`: each breaks rules, and says on the guilty line which error it expects.

use std::fs;
use std::path::Path;

use latentc_ir::{Stage, check, parse, verify_at};

const MARK: &str = "// error: ";

/// Line and message of each error, one a line of text.
fn expected(text: &str) -> String {
    let lines = text.lines().enumerate().filter_map(|(n, line)| Some((n + 1, line.split_once(MARK)?.1)));
    lines.flat_map(|(n, all)| all.split(MARK).map(move |m| format!("{n}: {}\n", m.trim()))).collect()
}

fn found(name: &str, text: &str) -> String {
    parse(name, text).unwrap_or_else(|e| panic!("{}", e.render()));
    let Err(broken) = check(name, text) else { return String::new() };
    let line = |at: usize| text[..at].matches('\n').count() + 1;
    broken.errors.iter().map(|e| format!("{}: {}\n", line(e.span.start), e.message)).collect()
}

#[test]
fn each_file_breaks_the_rules_that_it_says() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/verify");
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty());
    for file in files {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let text = fs::read_to_string(&file).unwrap();
        assert_eq!(found(&name, &text), expected(&text), "{name}");
    }
}

#[test]
fn an_error_names_function_value_and_line_of_the_model() {
    let text = r#"module m entry @mla
func @mla source "models/src/attention.rs" {
  axes t, d=4, c=2
  param h: f32[t, d=4]
  x4: f32[t] = softmax h over c     @41:9 (41)
  return x4
}
"#;
    let module = parse("m.ir", text).unwrap();
    let errors = latentc_ir::verify(&module).unwrap_err();
    assert_eq!(
        errors[0].to_string(),
        "@mla: x4 (models/src/attention.rs:41:9): the operand f32[t, d=4] has no axis `c`"
    );
}

#[test]
fn history_is_read_in_one_way_at_each_stage() {
    let traced = parse(
        "traced.ir",
        "module m entry @f\nfunc @f {\n  axes t, s=t like t\n  param x: f32[t]\n  y: f32[s] = past x from t to s\n  return y\n}\n",
    )
    .unwrap();
    assert_eq!(verify_at(&traced, Stage::Traced), Ok(()));
    let error = &verify_at(&traced, Stage::Derived).unwrap_err()[0];
    assert_eq!(error.to_string(), "@f: y: there is no `past` after `derive`");

    let derived = parse(
        "derived.ir",
        "module m entry @f\nfunc @f {\n  axes t, s like t\n  param x: f32[t]\n  cache K: f32[s]\n  p: i32[t] = position of t\n  y: f32[s] = append K, x, p from t to s\n  return y\n}\n",
    )
    .unwrap();
    assert_eq!(verify_at(&derived, Stage::Derived), Ok(()));
    let errors: Vec<_> =
        verify_at(&derived, Stage::Traced).unwrap_err().iter().map(|e| e.to_string()).collect();
    assert_eq!(
        errors,
        ["@f: K: there are no caches before `derive`", "@f: y: there is no `append` before `derive`"]
    );
}
