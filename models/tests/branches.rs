//! What no reference case takes: grouped queries, renormalised gates, a tied head; against plain loops.

use latentc_frontend::{DType, SpecFn, Tracer};
use latentc_ir::{Caches, Function, Interpreter, Precision, SplitMix, Tensor, Weight, verify};
use latentc_models::config::{DeepseekV2Config, LlamaConfig, ModelConfig, TopkMethod};
use latentc_models::{Goal, deepseek_67b, deepseek_v2, trace};

fn llama() -> LlamaConfig {
    match ModelConfig::bundled("deepseek-67b").unwrap() {
        ModelConfig::Llama(cfg) => cfg,
        ModelConfig::DeepseekV2(_) => panic!("DeepSeek 67B is a Llama"),
    }
}

fn lite() -> DeepseekV2Config {
    match ModelConfig::bundled("deepseek-v2-lite").unwrap() {
        ModelConfig::DeepseekV2(cfg) => cfg,
        ModelConfig::Llama(_) => panic!("V2-Lite is a DeepSeek-V2"),
    }
}

/// A weight that depends on its name and shape alone.
fn weight(_: &str, f: &Function, w: &Weight) -> Result<Tensor, String> {
    let ty = f.ty(w.value);
    let shape: Vec<_> = ty.axes.iter().filter_map(|&a| f.axis(a).size.fixed()).map(|n| n as usize).collect();
    let seed = f.value(w.value).name.bytes().fold(shape.len() as u64, |h, b| h * 131 + u64::from(b));
    Ok(Tensor::random(DType::F32, shape, &mut SplitMix(seed)))
}

/// All values of a function on one operand.
fn values<F: FnOnce(&mut Tracer)>(
    spec: SpecFn<F>,
    x: &Tensor,
) -> (latentc_ir::Module, Vec<(String, Tensor)>) {
    let module =
        latentc_frontend::trace("test", DType::F32, spec).unwrap_or_else(|e| panic!("{}", e.render())).module;
    verify(&module).unwrap();
    let values = Interpreter::new(&module, Precision::Exact)
        .trace(std::slice::from_ref(x), &mut weight, &mut Caches::new())
        .unwrap();
    (module, values)
}

fn value<'v>(values: &'v [(String, Tensor)], name: &str) -> &'v Tensor {
    &values.iter().find(|v| v.0 == name).unwrap_or_else(|| panic!("no value is called {name}")).1
}

#[test]
fn grouped_queries() {
    let (groups, heads, width, hidden, len) = (2, 3, 4, 6, 5);
    let mut cfg = llama();
    cfg.common.hidden_size = hidden;
    cfg.num_key_value_heads = groups;
    cfg.num_attention_heads = groups * heads;
    cfg.head_dim = width;
    let x = Tensor::random(DType::F32, [1, len, hidden], &mut SplitMix(1));
    let (module, values) = values(deepseek_67b::gqa(&cfg), &x);
    let f = module.entry().unwrap();
    let w: Vec<_> = f.weights.iter().map(|w| weight("", f, w).unwrap()).collect();
    let [wq, wk, wv, wo] = &w[..] else { panic!("four weights") };

    let freqs = cfg.rope.inv_freq(width);
    let project = |row: &dyn Fn(usize) -> f64, t: usize| -> f64 {
        (0..hidden).map(|d| row(d) * x.at(&[0, t, d]).unwrap()).sum()
    };
    // Element k of a head pairs with element k + width/2, and the pair turns by the position times its frequency.
    let turned = |head: &dyn Fn(usize) -> f64, t: usize, k: usize| {
        let (pair, half) = (k % (width / 2), width / 2);
        let (sin, cos) = (t as f64 * freqs[pair]).sin_cos();
        if k < half { head(k) * cos - head(k + half) * sin } else { head(k) * cos + head(k - half) * sin }
    };
    let query = |t, g, h, k| turned(&|k| project(&|d| wq.at(&[g, h, k, d]).unwrap(), t), t, k);
    let key = |t, g, k| turned(&|k| project(&|d| wk.at(&[g, k, d]).unwrap(), t), t, k);
    let val = |t, g, k| project(&|d| wv.at(&[g, k, d]).unwrap(), t);

    let mut want = Tensor::zeros(DType::F32, [1, len, hidden]);
    for t in 0..len {
        for (g, h) in (0..groups).flat_map(|g| (0..heads).map(move |h| (g, h))) {
            let score = |s: usize| -> f64 {
                let dot: f64 = (0..width).map(|k| query(t, g, h, k) * key(s, g, k)).sum();
                (dot / (width as f64).sqrt()).exp()
            };
            let all: f64 = (0..=t).map(score).sum();
            for k in 0..width {
                let o: f64 = (0..=t).map(|s| score(s) / all * val(s, g, k)).sum();
                for d in 0..hidden {
                    want.data[t * hidden + d] += wo.at(&[d, g, h, k]).unwrap() * o;
                }
            }
        }
    }
    value(&values, "u").close_to(&want, 1e-10, 1e-10).unwrap();
}

/// With `norm_topk_prob` the chosen gates sum to the scaling factor, and there are as many as the paper says.
#[test]
fn renormalised_gates() {
    let mut cfg = lite();
    cfg.common.hidden_size = 6;
    let moe = cfg.moe.as_mut().unwrap();
    (moe.n_routed_experts, moe.moe_intermediate_size, moe.num_experts_per_tok) = (8, 4, 3);
    moe.topk_method = TopkMethod::GroupLimitedGreedy { n_group: 4, topk_group: 2 };
    (moe.norm_topk_prob, moe.routed_scaling_factor) = (true, 16.0);
    let x = Tensor::random(DType::F32, [2, 5, 6], &mut SplitMix(2));
    let (_, values) = values(deepseek_v2::moe(&cfg, cfg.moe.as_ref().unwrap()), &x);
    for token in value(&values, "gate.2").data.chunks_exact(8) {
        assert_eq!(token.iter().filter(|g| **g > 0.0).count(), 3);
        assert!((token.iter().sum::<f64>() - 16.0).abs() < 1e-9);
        // The chosen lie in two groups of two.
        let groups = token.chunks_exact(2).filter(|g| g.iter().any(|g| *g > 0.0)).count();
        assert_eq!(groups, 2);
    }
}

/// Without shared experts nothing is added, and nothing is read for them.
#[test]
fn no_shared_experts() {
    let mut cfg = lite();
    cfg.moe.as_mut().unwrap().n_shared_experts = 0;
    let module = trace(&ModelConfig::DeepseekV2(cfg), Goal::Logits, DType::Bf16).unwrap().module;
    verify(&module).unwrap();
    assert!(!module.to_string().contains("shared_experts"));
}

#[test]
fn tied_head() {
    let mut cfg = llama();
    cfg.common.tie_word_embeddings = true;
    let module = trace(&ModelConfig::Llama(cfg), Goal::Logits, DType::Bf16).unwrap().module;
    verify(&module).unwrap();
    let inventory = module.inventory().unwrap();
    assert!(inventory.tensor("lm_head.weight").is_none());
    assert_eq!(inventory.tensor("model.embed_tokens.weight").unwrap().uses.len(), 2);
}
