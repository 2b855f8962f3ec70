//! What a token costs in decode beside the least that the equations allow, derived by hand in `docs/decode.md`.

use latentc_codegen::program::{KernelKind, Step};
use latentc_codegen::traffic::Traffic;
use latentc_ir::{DType, Symbols};
use latentc_models::config::{DeepseekV2Config, LlamaConfig, ModelConfig};
use latentc_models::{Goal, trace};
use latentc_passes::{Graph, pipeline};
use latentc_runtime::compiled::compile;

/// Operations, and elements of weights and caches that pass through memory.
#[derive(Default)]
struct Least {
    flops: f64,
    elements: f64,
}

impl Least {
    /// A product of one token's vector with a matrix, which is read.
    fn matrix(&mut self, rows: usize, columns: usize) {
        let n = rows as f64 * columns as f64;
        self.flops += 2.0 * n;
        self.elements += n;
    }

    /// Weights of which each is read once and hardly counted with: norms, rows of tables.
    fn vector(&mut self, n: usize) {
        self.elements += n as f64;
    }

    /// Scores and weighed sums over a context for heads whose keys and values have these sizes; of each token `cached`
    /// elements are read, and those of the new one are written.
    fn attend(&mut self, context: u64, heads: usize, key: usize, value: usize, cached: usize) {
        self.flops += 2.0 * context as f64 * heads as f64 * (key + value) as f64;
        self.elements += (context + 1) as f64 * cached as f64;
    }

    /// A gated linear unit.
    fn swiglu(&mut self, hidden: usize, inner: usize) {
        for _ in 0..3 {
            self.matrix(inner, hidden);
        }
    }
}

fn latent_attention(c: &DeepseekV2Config, context: u64) -> Least {
    let (d, i, l) = (c.common.hidden_size, c.num_attention_heads, c.kv_lora_rank);
    let (n, r, v) = (c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim);
    let mut least = Least::default();
    least.vector(d); // the token's embedding
    for layer in 0..c.common.num_hidden_layers {
        least.vector(2 * d + l);
        let query = match c.q_lora_rank {
            Some(rank) => {
                least.vector(rank);
                least.matrix(rank, d);
                rank
            }
            None => d,
        };
        least.matrix(i * (n + r), query);
        least.matrix(l + r, d);
        least.matrix(i * n, l);
        least.attend(context, i, l + r, l, l + r);
        least.matrix(i * l, v);
        least.matrix(d, i * v);
        match c.moe.as_ref().filter(|moe| moe.covers(layer)) {
            Some(moe) => {
                least.matrix(moe.n_routed_experts, d);
                for _ in 0..moe.num_experts_per_tok {
                    least.swiglu(d, moe.moe_intermediate_size);
                }
                least.swiglu(d, moe.n_shared_experts * moe.moe_intermediate_size);
            }
            None => least.swiglu(d, c.common.intermediate_size),
        }
    }
    least.vector(d);
    least.matrix(c.common.vocab_size, d);
    least
}

fn grouped_queries(c: &LlamaConfig, context: u64) -> Least {
    let (d, i, g, k) = (c.common.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim);
    let mut least = Least::default();
    least.vector(d);
    for _ in 0..c.common.num_hidden_layers {
        least.vector(2 * d);
        least.matrix(i * k, d);
        least.matrix(2 * g * k, d);
        least.attend(context, i, k, k, 2 * g * k);
        least.matrix(d, i * k);
        least.swiglu(d, c.common.intermediate_size);
    }
    least.vector(d);
    least.matrix(c.common.vocab_size, d);
    least
}

#[test]
fn a_token_costs_what_the_equations_make_it_cost() {
    for name in ModelConfig::bundled_names() {
        let config = ModelConfig::bundled(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        let traced = trace(&config, Goal::Logits, DType::Bf16).unwrap_or_else(|e| panic!("{name}: {e}"));
        let compiled =
            compile(&traced.module, Graph::Decode, &pipeline()).unwrap_or_else(|e| panic!("{name}: {e}"));
        let symbols = Symbols::of(compiled.module());
        for context in [256, 4096, 32_768] {
            let least = match &config {
                ModelConfig::DeepseekV2(c) => latent_attention(c, context),
                ModelConfig::Llama(c) => grouped_queries(c, context),
            };
            let sizes = symbols.bind(1, 1, context);
            let run = Traffic::of_run(&compiled.program, &sizes).unwrap_or_else(|e| panic!("{name}: {e}"));
            let (flops, bytes) = (run.flops / least.flops, run.bytes() / (2.0 * least.elements));
            println!(
                "{name} at {context}: {:.4e} operations ({flops:.4} of the least), {:.4e} bytes ({bytes:.4})",
                run.flops,
                run.bytes()
            );
            assert!((1.0..1.01).contains(&flops), "{name} at {context}: {flops} times the operations");
            assert!((1.0..1.01).contains(&bytes), "{name} at {context}: {bytes} times the bytes");
        }
    }
}

#[test]
fn a_layer_of_experts_is_eleven_launches_and_a_merge() {
    let config = ModelConfig::bundled("deepseek-v2").expect("bundled");
    let traced = trace(&config, Goal::Logits, DType::Bf16).expect("the bundled models are right");
    let program = compile(&traced.module, Graph::Decode, &pipeline()).expect("it compiles").program;
    let layer = program.routine("moe_layer").expect("V2 has layers of experts");
    // A stream that is shared out over a device has a second launch, which merges.
    let streams = layer.steps.iter().filter(|step| match step {
        Step::Launch { kernel, .. } => program.kernels[*kernel].kind == KernelKind::Stream,
        Step::Call { .. } => false,
    });
    let (launches, merges) = (layer.groups().count(), streams.count());
    assert!(launches + merges <= 12, "{launches} launches and {merges} merges");
    let text = program.to_string();
    let layer = text.split("\n\n").find(|routine| routine.starts_with("routine @moe_layer "));
    insta::assert_snapshot!(layer.expect("it was found above"));
}
