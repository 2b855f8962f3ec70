//! The trained model that comes with the project: how well it tells its text, and that its page says so.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use tokenizers::Tokenizer;

use crate::{DType, Tensors, i64s, json, names, ok, scratch, write};

/// Tokens that the model was trained to read at once.
const CONTEXT: usize = 128;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/eighty-days")
}

/// The number that stands behind these words in the page.
fn said(words: &str) -> f64 {
    let page = fs::read_to_string(folder().join("README.md")).expect("the folder has a page");
    let page = page.split_whitespace().collect::<Vec<_>>().join(" ");
    let behind = page.split_once(words).unwrap_or_else(|| panic!("the page says `{words}`")).1;
    let number = behind.split_whitespace().next().unwrap_or_default();
    number.trim_end_matches([',', '.', ';']).parse().unwrap_or_else(|e| panic!("{words} {number}: {e}"))
}

/// The tokens of the chapters that it was not trained on.
fn tokens() -> Vec<i64> {
    let tokenizer = Tokenizer::from_file(folder().join("tokenizer.json")).expect("a tokenizer");
    let text = fs::read_to_string(folder().join("valid.txt")).expect("an excerpt");
    let encoded = tokenizer.encode(text.as_str(), false).expect("any text is bytes");
    assert_eq!(tokenizer.decode(encoded.get_ids(), false).expect("bytes are a text"), text);
    encoded.get_ids().iter().map(|&id| i64::from(id)).collect()
}

#[test]
fn the_loss_on_chapters_held_back_is_what_the_page_says() {
    let (folder_, out) = (folder(), scratch());
    let ids = tokens();
    let rows: Vec<&[i64]> = ids.chunks_exact(CONTEXT + 1).collect();
    let shape = vec![rows.len(), CONTEXT + 1];
    let (inputs, logits) = (out.path().join("inputs"), out.path().join("logits"));
    write(&inputs, &Tensors::from([("input_ids".to_owned(), (DType::I64, shape, i64s(&rows.concat())))]));
    let report = json("eval {} --inputs {} --out {} --json", &[&folder_, &inputs, &logits]);
    let loss = report["loss"].as_f64().expect("texts of many tokens have a loss");
    let stated = said("the loss is");
    assert!((loss - stated).abs() < 0.002, "the loss is {loss:.4}, the page says {stated}");

    let mut counts: BTreeMap<i64, f64> = BTreeMap::new();
    ids.iter().for_each(|&id| *counts.entry(id).or_default() += 1.0);
    let n = ids.len() as f64;
    let entropy: f64 = counts.values().map(|c| c / n * (n / c).ln()).sum();
    let stated = said("their entropy one by one is");
    assert!((entropy - stated).abs() < 0.002, "the entropy is {entropy:.4}, the page says {stated}");
    assert!(loss < entropy - 1.0, "{loss} is not well below {entropy}");
}

#[test]
fn another_one_begins_with_its_tokenizer() {
    let out = scratch();
    let folders = ["folder", "file"].map(|name| out.path().join(name));
    ok("init {} -o {}", &[&folder(), &folders[0]]);
    ok("init {} -o {}", &[&folder().join("config.json"), &folders[1]]);
    for made in folders {
        assert_eq!(names(&made), ["config.json", "model.safetensors", "tokenizer.json"]);
    }
}

#[test]
fn it_is_small_enough_to_come_along() {
    let size = |name: &str| fs::metadata(folder().join(name)).expect("it is there").len();
    let bytes: u64 = ["model.safetensors", "tokenizer.json", "config.json"].map(size).iter().sum();
    assert!(bytes < 4_000_000, "{bytes} bytes");
}
