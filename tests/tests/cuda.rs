//! Every kernel of the published models, in real size, through NVIDIA's own compilers: no GPU is needed for that.

use std::collections::BTreeMap;

use latentc_codegen::cube::{cuda_sources, typical};
use latentc_codegen::nvrtc::{Nvrtc, Toolkit};
use latentc_codegen::program::Kernel;
use latentc_ir::DType;
use latentc_models::config::ModelConfig;
use latentc_models::{Goal, trace};
use latentc_passes::{Graph, pipeline};
use latentc_runtime::compiled::{Compiled, compile};

fn compiled(config: &ModelConfig, graph: Graph) -> Compiled {
    let goal = if graph.serves() { Goal::Logits } else { Goal::Loss };
    let traced = trace(config, goal, DType::Bf16).expect("the bundled models are right");
    compile(&traced.module, graph, &pipeline()).expect("the bundled models compile")
}

#[test]
fn every_kernel_of_the_bundled_models_is_accepted_for_sm_90a() {
    // The sources must come out without any toolkit; only what follows needs it.
    let mut kernels: BTreeMap<String, Kernel> = BTreeMap::new();
    for name in ["deepseek-v2", "deepseek-v2-lite", "deepseek-67b"] {
        let config = ModelConfig::bundled(name).expect("bundled");
        for graph in Graph::ALL {
            for kernel in compiled(&config, graph).program.kernels.iter().flat_map(typical) {
                kernels.insert(format!("{}\n{:?}", kernel.body, kernel.kind), kernel);
            }
        }
    }
    let mut sources = Vec::new();
    for k in kernels.into_values() {
        let all = cuda_sources(&k).unwrap_or_else(|e| panic!("{e}"));
        sources.extend(all.into_iter().map(|source| (source.name, source.text)));
    }
    println!("{} distinct sources", sources.len());
    let toolkit = match Toolkit::find() {
        Ok(toolkit) => toolkit,
        Err(e) => {
            eprintln!("SKIPPED: every_kernel_of_the_bundled_models_is_accepted_for_sm_90a: {e}");
            return;
        }
    };
    let nvrtc = Nvrtc::load(&toolkit).expect("the toolkit that was found loads");
    let folder = tempfile::tempdir().expect("a temporary folder");
    // ptxas saves four registers around the slow path of a division: one in a softmax, two in the gradient of a norm,
    // three in that of a router's softmax, whose quotients are made again for the groups, the sum and the result.
    const SPILL_BYTES: u32 = 48;
    let mut spilled = Vec::new();
    for (name, source) in &sources {
        let ptx = nvrtc.compile(source, "sm_90a").unwrap_or_else(|e| panic!("{name}: {e}\n{source}"));
        let cubin = toolkit.assemble(&ptx, "sm_90a", folder.path()).unwrap_or_else(|e| panic!("{name}: {e}"));
        if cubin.resources.spill_bytes > SPILL_BYTES {
            spilled.push(format!("{name}: {:?}", cubin.resources));
        }
    }
    assert!(spilled.is_empty(), "kernels that spill registers:\n{}", spilled.join("\n"));
}

#[test]
fn the_number_of_kernels_does_not_grow_with_depth() {
    let count = |layers: usize| {
        let text = ModelConfig::bundled("deepseek-v2").expect("bundled").to_json().to_string();
        let text = text.replace("\"num_hidden_layers\":60", &format!("\"num_hidden_layers\":{layers}"));
        let config = ModelConfig::from_str("config.json", &text).expect("still right");
        compiled(&config, Graph::Decode).program.kernels.len()
    };
    assert_eq!(count(2), count(60));
}
