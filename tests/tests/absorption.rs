//! The published models through all passes: where latent attention meets its weights.

use latentc_codegen::program::{KernelKind, Role};
use latentc_ir::{DType, Function, Inst, Module, Op, Size};
use latentc_models::config::ModelConfig;
use latentc_models::{Goal, trace};
use latentc_passes::{Context, Graph, Remark, Variant, pipeline, run, variants};
use latentc_runtime::compiled::compile;

fn passed(name: &str, graph: Graph) -> (Module, Vec<Remark>) {
    let config = ModelConfig::bundled(name).expect("a bundled model");
    let goal = if graph.serves() { Goal::Logits } else { Goal::Loss };
    let traced = trace(&config, goal, DType::Bf16).unwrap_or_else(|e| panic!("{}", e.render()));
    let mut cx = Context::new(graph);
    let stages = run(&traced.module, &mut cx, &pipeline()).expect("every model compiles");
    let (_, module) = stages.into_iter().find(|(pass, _)| *pass == "reassociate").expect("in the pipeline");
    (module, cx.remarks)
}

/// The names of what each contraction of a function multiplies.
fn contractions(f: &Function) -> Vec<String> {
    let names = |i: &Inst| i.args.iter().map(|&a| f.value(a).name.clone()).collect::<Vec<_>>().join(" ");
    f.body.iter().filter(|i| i.op == Op::Contract).map(names).collect()
}

#[test]
fn decode_reads_the_latents_as_they_are() {
    for name in ["deepseek-v2", "deepseek-v2-lite"] {
        let (m, remarks) = passed(name, Graph::Decode);
        let found = contractions(m.function("mla").expect("attention"));
        for wanted in ["q_C W_UK", "q_C.W_UK c_KV.s", "P c_KV.s", "P.c_KV.s W_UV"] {
            assert!(found.iter().any(|f| f == wanted), "{name}: {wanted} is not in {found:?}");
        }
        let crossings = remarks.iter().filter(|r| r.function == "mla" && r.crossing.is_some()).count();
        assert_eq!(crossings, 2, "{name}: keys and values");
    }
}

#[test]
fn training_and_prefill_make_keys_and_values() {
    for (name, graph) in [("deepseek-v2", Graph::Prefill), ("deepseek-v2-lite", Graph::Train)] {
        let (m, _) = passed(name, graph);
        let found = contractions(m.function("mla").expect("attention"));
        for wanted in ["W_UK c_KV", "W_UV c_KV", "q_C k_C.s", "P v_C.s"] {
            assert!(found.iter().any(|f| f.starts_with(wanted)), "{name}: {wanted} is not in {found:?}");
        }
    }
}

#[test]
fn short_prompts_are_read_as_decode_reads_and_long_ones_are_not() {
    for name in ["deepseek-v2", "deepseek-v2-lite"] {
        let config = ModelConfig::bundled(name).expect("a bundled model");
        let traced = trace(&config, Goal::Logits, DType::Bf16).unwrap_or_else(|e| panic!("{}", e.render()));
        let made = |graph| variants(&traced.module, graph, &pipeline()).expect("every model compiles");
        let prefill = made(Graph::Prefill);
        let found = |v: &Variant| {
            let (_, module) =
                v.stages.iter().find(|(pass, _)| *pass == "reassociate").expect("in the pipeline");
            contractions(module.function("mla").expect("attention"))
        };
        let absorbed = ["q_C.W_UK c_KV.s", "P c_KV.s"];
        let first = found(&prefill[0]);
        assert!(absorbed.iter().all(|a| first.iter().any(|f| f == a)), "{name}: {first:?}");
        let last = found(&prefill[prefill.len() - 1]);
        assert!(absorbed.iter().all(|a| last.iter().all(|f| f != a)), "{name}: {last:?}");
        // Where the first ends, one of its orders is as good as another.
        let crossings: Vec<_> =
            prefill[0].remarks.iter().filter_map(|r| Some(r.crossing.as_ref()?.at)).collect();
        assert_eq!(
            prefill[0].guard.as_ref().and_then(|g| g.up_to),
            crossings.iter().min().copied(),
            "{name}"
        );
        assert!(
            made(Graph::Decode).len() == 1 && made(Graph::Train).len() == 1,
            "{name}: always the same sizes"
        );
    }
}

#[test]
fn grouped_queries_have_nothing_to_absorb() {
    for graph in Graph::ALL {
        let (m, remarks) = passed("deepseek-67b", graph);
        let found = contractions(m.function("gqa").expect("attention"));
        assert_eq!(found, ["W_Q x", "W_K x", "W_V x", "Q K.s", "P V.s", "W_O o"], "{}", graph.name());
        let choices = remarks.iter().filter(|r| r.pass == "reassociate" && r.function == "gqa").count();
        // Where whole sequences are at hand, values could be made of them afterwards; that is weighed and refused. For a gradient values
        // are kept, so that they are there.
        assert_eq!(choices, usize::from(graph == Graph::Train), "{}", graph.name());
    }
}

/// Of what a run makes, nothing has as many elements as there are pairs of tokens, or in decode, positions.
#[test]
fn no_scores_have_memory() {
    for name in ModelConfig::bundled_names() {
        let config = ModelConfig::bundled(name).expect("a bundled model");
        for graph in [Graph::Train, Graph::Prefill, Graph::Decode] {
            let goal = if graph.serves() { Goal::Logits } else { Goal::Loss };
            let traced = trace(&config, goal, DType::Bf16).unwrap_or_else(|e| panic!("{}", e.render()));
            let compiled =
                compile(&traced.module, graph, &pipeline()).unwrap_or_else(|e| panic!("{name}: {e}"));
            let streams = compiled.program.kernels.iter().filter(|k| k.kind == KernelKind::Stream).count();
            assert!(streams > 0, "{name}: {graph:?}");
            for routine in &compiled.program.routines {
                for made in routine.buffers.iter().filter(|b| b.role == Role::Temp) {
                    let at = |symbol: &str| {
                        made.dims.iter().filter(|d| **d == Size::Sym(symbol.to_owned())).count()
                    };
                    let pairs = at("t") * at("s") > 0 || at("t") > 1;
                    let history = graph == Graph::Decode && at("s") > 0;
                    assert!(!pairs && !history, "{name}, {graph:?}: @{} {made:?}", routine.name);
                }
            }
        }
    }
}
