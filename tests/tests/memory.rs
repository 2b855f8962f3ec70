//! Plans of memory for the bundled models: nothing is overwritten before it is read, and little is wasted.

use latentc_codegen::cube::Target;
use latentc_codegen::host;
use latentc_codegen::memory::{Account, Plan};
use latentc_ir::{DType, Size, Symbols};
use latentc_models::config::ModelConfig;
use latentc_models::{Goal, trace};
use latentc_passes::{Graph, pipeline};
use latentc_runtime::compiled::compile;

#[test]
fn temporaries_take_little_more_than_what_lives_at_one_moment() {
    // Sequences, new tokens of a prompt, and positions.
    let runs = [(1, 1, 1), (1, 1024, 4096), (3, 777, 1000), (64, 128, 8192)];
    for name in ModelConfig::bundled_names() {
        let config = ModelConfig::bundled(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        for graph in Graph::ALL {
            let goal = match graph {
                Graph::Train | Graph::Gradient => Goal::Loss,
                Graph::Prefill | Graph::Decode => Goal::Logits,
            };
            let traced = trace(&config, goal, DType::Bf16).unwrap_or_else(|e| panic!("{name}: {e}"));
            let compiled =
                compile(&traced.module, graph, &pipeline()).unwrap_or_else(|e| panic!("{name}: {e}"));
            let symbols = Symbols::of(compiled.module());
            // Nothing that grows with the square of the tokens has memory.
            let lengths = symbols.bind(0, 1, 1);
            for buffer in compiled.program.routines.iter().flat_map(|r| &r.buffers) {
                let long = |size: &&Size| matches!(size, Size::Sym(s) if lengths.get(s) == Some(&1));
                let long = buffer.dims.iter().filter(long).count();
                assert!(long < 2, "{name}, {graph:?}: {} {:?}", buffer.name, buffer.dims);
            }
            for (batch, tokens, context) in runs {
                let new = if graph == Graph::Decode { 1 } else { tokens };
                let sizes = symbols.bind(batch, new, context);
                for layout in [host::LAYOUT, Target::Cuda.layout(), Target::Wgsl.layout()] {
                    let what = format!("{name}, {graph:?} of {sizes:?}");
                    let plan = Plan::new(&compiled.program, &sizes, &layout)
                        .unwrap_or_else(|e| panic!("{what}: {e}"));
                    plan.replay(&compiled.program, &layout).unwrap_or_else(|e| panic!("{what}: {e}"));
                    let account = Account::of(&compiled.program, &sizes, &layout)
                        .unwrap_or_else(|e| panic!("{what}: {e}"));
                    let sum = account.results + account.kept + account.passing;
                    assert_eq!(sum, plan.bound, "{what}: {account:?}");
                    let (bytes, bound) = (plan.bytes(), plan.bound);
                    println!("{what}: {bytes} bytes, {bound} of them at one moment");
                    assert!(bytes * 10 <= bound * 11, "{what}: {bytes} bytes for {bound}");
                }
            }
        }
    }
}
