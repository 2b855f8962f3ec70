//! The command as its users meet it: the built binary, its output, its files, its errors.

mod benches;
mod bundled;
mod checks;
mod compiles;
mod counts_and_dumps;
mod evaluates;
mod inspects;
mod makes;
mod refuses_files;
mod refuses_words;
mod reports;
mod rooflines;
mod runs;
mod trains;
mod tunes;
mod workbench;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use latentc_runtime::checkpoint::{DType, TensorFile, write_tensors};
use serde_json::Value;

/// Tensors by name, as they lie in a file.
type Tensors = BTreeMap<String, (DType, Vec<usize>, Vec<u8>)>;

/// A reference case of the project.
fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases").join(name)
}

fn latentc<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_latentc"));
    command.args(args).env("NO_COLOR", "1").output().expect("the binary starts")
}

/// The arguments of a command line in which `{}` stands for these paths, in order.
fn words<'a>(line: &'a str, paths: &[&'a Path]) -> Vec<&'a OsStr> {
    let mut paths = paths.iter();
    let mut path = || paths.next().expect("a path for each {}").as_os_str();
    line.split_whitespace().map(|w| if w == "{}" { path() } else { OsStr::new(w) }).collect()
}

/// Runs a command that must succeed, and gives what it printed.
fn ok(line: &str, paths: &[&Path]) -> String {
    let out = latentc(words(line, paths));
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "latentc {line}: {stderr}");
    assert!(!stderr.contains("error:"), "latentc {line}: {stderr}");
    String::from_utf8(out.stdout).expect("output is text")
}

/// Runs a command that must print one JSON value.
fn json(line: &str, paths: &[&Path]) -> Value {
    serde_json::from_str(&ok(line, paths)).unwrap_or_else(|e| panic!("latentc {line}: {e}"))
}

/// Runs a command that must fail with code 1 and nothing but an error, and gives the error.
fn error(line: &str, paths: &[&Path]) -> String {
    error_of(&latentc(words(line, paths)), line)
}

fn error_of(out: &Output, line: &str) -> String {
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "latentc {line}: {stderr}");
    assert!(stderr.starts_with("error"), "latentc {line}: {stderr}");
    assert!(!stderr.contains("panicked"), "latentc {line}: {stderr}");
    assert_eq!(String::from_utf8_lossy(&out.stdout), "", "latentc {line} printed before it failed");
    stderr
}

/// Asserts that an error says all of this.
#[track_caller]
fn says(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "this should say `{part}`:\n{error}");
    }
}

/// A folder that goes away after the test.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().expect("the system has room for a folder")
}

fn tensors(file: &Path) -> Tensors {
    let file = TensorFile::open(file).unwrap_or_else(|e| panic!("{e}"));
    let tensor = |name: &str| {
        let t = file.require(name).unwrap_or_else(|e| panic!("{e}"));
        (name.to_owned(), (t.dtype, t.shape.to_vec(), t.bytes.to_vec()))
    };
    file.names().map(tensor).collect()
}

fn write(file: &Path, tensors: &Tensors) {
    let tensors =
        tensors.iter().map(|(name, (dtype, shape, bytes))| (&name[..], *dtype, &shape[..], &bytes[..]));
    write_tensors(file, tensors, &BTreeMap::new()).unwrap_or_else(|e| panic!("{e}"));
}

fn i64s(values: &[i64]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn f32s(file: &Path, name: &str) -> (Vec<f32>, Vec<usize>) {
    let file = TensorFile::open(file).unwrap_or_else(|e| panic!("{e}"));
    let t = file.require(name).unwrap_or_else(|e| panic!("{e}"));
    (t.to_f32().unwrap_or_else(|e| panic!("{e}")), t.shape.to_vec())
}

/// A copy of the case `tiny` with another configuration and other weights.
fn changed(config: impl FnOnce(&mut Value), weights: impl FnOnce(&mut Tensors)) -> tempfile::TempDir {
    let folder = scratch();
    let text = fs::read_to_string(case("tiny").join("config.json")).expect("the case has it");
    let mut json: Value = serde_json::from_str(&text).expect("the case has JSON");
    config(&mut json);
    fs::write(folder.path().join("config.json"), json.to_string()).expect("the folder is ours");
    let mut all = tensors(&case("tiny").join("model.safetensors"));
    weights(&mut all);
    write(&folder.path().join("model.safetensors"), &all);
    folder
}

/// Every file below a folder with its bytes.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut left = vec![folder.to_owned()];
    while let Some(next) = left.pop() {
        for entry in fs::read_dir(&next).expect("a folder").map(|e| e.expect("an entry").path()) {
            if entry.is_dir() {
                left.push(entry);
            } else {
                let name = entry.strip_prefix(folder).expect("below it").to_owned();
                found.insert(name, fs::read(&entry).expect("a file"));
            }
        }
    }
    found
}

/// The names in a folder.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("a folder");
    let mut names: Vec<_> =
        entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
