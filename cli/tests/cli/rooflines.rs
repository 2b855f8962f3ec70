//! `latentc roofline`: what kernels move at real sizes, by formula.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::{error, json, ok, says};

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// The kernels of a graph.
fn kernels(report: &Value) -> Vec<Value> {
    let graphs = report["graphs"].as_array().expect("a list");
    graphs.iter().flat_map(|graph| graph["kernels"].as_array().expect("a list").clone()).collect()
}

fn bytes(row: &Value) -> f64 {
    number(&row["least"]["read"]) + number(&row["least"]["written"])
}

#[test]
fn what_streams_comes_from_memory_once() {
    for model in ["deepseek-v2", "deepseek-v2-lite", "deepseek-67b", "bench-moe-0.3b"] {
        // All of decode streams, and so do elements and rows in prefill.
        let decode = ["4096", "131072"].into_iter().flat_map(|context| {
            kernels(&json(&format!("roofline {model} --graph decode --context {context} --json"), &[]))
        });
        let prefill = kernels(&json(&format!("roofline {model} --graph prefill --json"), &[]));
        let rows = prefill.into_iter().filter(|row| row["kind"] == "map").chain(decode).collect::<Vec<_>>();
        assert!(rows.len() > 12, "{model}: {rows:?}");
        for row in rows {
            // What parts of a stream leave for the launch that merges them is apart.
            let moved = number(&row["moved"]["memory"]) - number(&row["between"]["memory"]);
            assert!(moved <= 1.05 * bytes(&row), "{model}: {moved} bytes by {row}");
        }
    }
}

#[test]
fn attention_over_latents_reads_each_byte_of_the_cache_once() {
    // Two cubes have the heads of a position, side by side.
    let line =
        "roofline deepseek-v2 --graph decode --batch 32 --context 4096 --kernel dense_layer_P_c_KV_s --json";
    let [stream] = &kernels(&json(line, &[]))[..] else { panic!("one kernel") };
    assert_eq!(stream["way"], "stream matrix, 64");
    for (buffer, width) in [(2, 512.0), (4, 64.0)] {
        let read = &stream["launches"][0]["buffers"][buffer][0];
        let once = 32.0 * 4096.0 * width * 2.0;
        assert_eq!(["memory", "distinct", "by_block"].map(|of| number(&read[of])), [once, once, 2.0 * once]);
    }
}

#[test]
fn the_page_shows_what_is_printed() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/roofline.md");
    let text = fs::read_to_string(&page).expect("there is a page");
    let printed = ok("roofline deepseek-v2", &[]);
    let (head, rest) = text.split_once("```text\n").expect("a block of text");
    let (shown, tail) = rest.split_once("```\n").expect("its end");
    if std::env::var_os("LATENTC_BLESS").is_some() {
        fs::write(&page, format!("{head}```text\n{printed}```\n{tail}")).expect("it can be written");
    } else {
        assert_eq!(shown, printed, "docs/roofline.md; LATENTC_BLESS=1 rewrites");
    }
}

#[test]
fn a_kernel_that_is_not_there_is_named() {
    let said = error("roofline deepseek-v2-lite --graph decode --kernel mlp", &[]);
    says(&said, &["deepseek-v2-lite has no kernel `mlp` here; it has dense_layer_"]);
}
