//! The models as IR: what the dumps look like, how long they are, and that they hold the whole checkpoint.

use std::fs;
use std::path::Path;

use latentc_ir::{DType, Inst, Module, Op, check, verify};
use latentc_models::config::ModelConfig;
use latentc_models::{Goal, trace};

fn module(name: &str, goal: Goal) -> Module {
    let config = ModelConfig::bundled(name).unwrap();
    trace(&config, goal, DType::Bf16).unwrap_or_else(|e| panic!("{}", e.render())).module
}

/// The text of one function.
fn function(module: &Module, name: &str) -> String {
    let text = module.to_string();
    let start = text.find(&format!("func @{name} ")).unwrap();
    let len = text[start..].find("\n}\n").unwrap();
    text[start..start + len + 3].to_owned()
}

#[test]
fn attention() {
    insta::assert_snapshot!(function(&module("deepseek-v2", Goal::Logits), "mla"));
}

#[test]
fn experts() {
    insta::assert_snapshot!(function(&module("deepseek-v2", Goal::Logits), "moe"));
}

#[test]
fn layers() {
    insta::assert_snapshot!(function(&module("deepseek-v2", Goal::Logits), "trunk"));
}

#[test]
fn loss() {
    insta::assert_snapshot!(function(&module("deepseek-v2-lite", Goal::Loss), "loss"));
}

#[test]
fn grouped_queries() {
    insta::assert_snapshot!(function(&module("deepseek-67b", Goal::Logits), "gqa"));
}

#[test]
fn every_model_verifies_and_reads_its_whole_checkpoint() {
    for name in ModelConfig::bundled_names() {
        let parameters = ModelConfig::bundled(name).unwrap().parameter_count();
        for goal in [Goal::Logits, Goal::Loss] {
            let module = module(name, goal);
            verify(&module).unwrap_or_else(|e| panic!("{name}: {e:?}"));
            let inventory = module.inventory().unwrap();
            assert_eq!(u128::from(inventory.elements()), parameters, "{name}");
            assert!(inventory.tensors.iter().all(|t| t.unread == 0), "{name}");
        }
    }
}

/// `layer` of the paper's 60 is read in a minute, and the whole model is on a few screens.
#[test]
fn short_enough_to_read() {
    let module = module("deepseek-v2", Goal::Logits);
    let dump = module.to_string();
    assert!(dump.lines().count() < 180, "{} lines", dump.lines().count());
    // The layers are one line of the dump, and calls nonetheless.
    assert_eq!(dump.matches("call @moe_layer").count(), 1);
    let trunk = &module.function("trunk").unwrap().body;
    let calls = |inst: &&Inst| matches!(&inst.op, Op::Call { callee, .. } if callee == "moe_layer");
    assert_eq!(trunk.iter().filter(calls).count(), 59);
    assert!(check("deepseek_v2.ir", &dump).unwrap() == module);

    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files = ["deepseek_v2/attention.rs", "deepseek_v2/moe.rs", "deepseek_v2/model.rs", "swiglu.rs"];
    let lines: usize =
        files.iter().map(|f| fs::read_to_string(source.join(f)).unwrap().lines().count()).sum();
    assert!(lines < 190, "{lines} lines of attention, experts, layers and trunk");
}

/// The paper's boxed vectors.
#[test]
fn the_author_asserts_the_cache() {
    let traced = trace(&ModelConfig::bundled("deepseek-v2").unwrap(), Goal::Logits, DType::Bf16).unwrap();
    let cached: Vec<_> = traced.cached.iter().map(|c| (c.function.as_str(), c.values.join(" "))).collect();
    assert_eq!(cached, [("mla", "c_KV k_R".to_owned())]);
}
