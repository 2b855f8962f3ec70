//! What a program is for: logits, or the loss. Both end the same trunk.

use latentc_frontend::{SpecFn, Tracer, spec};

use crate::config::Common;

spec! {
    /// The logits of the rows `at` of a batch of sequences.
    pub fn logits(cfg: &Common, trunk: SpecFn<impl FnOnce(&mut Tracer)>)(tok[t]: i32, at[q]: i32) -> y[q,v]: f32 {
        axes { each b; t; q; d = cfg.hidden_size; v = cfg.vocab_size }
        weights { g[d] = "model.norm.weight"[d]; }
        if cfg.tie_word_embeddings {
            weights { W[v,d] = "model.embed_tokens.weight"[v, d]; }
        } else {
            weights { W[v,d] = "lm_head.weight"[v, d]; }
        }
        x[t,d]      = call {trunk}(tok[t]);
        last[q,d]   = x[at[q], d];
        h[q,d]      = g[d] * rms_norm[d; cfg.rms_norm_eps](last[q,d]);
        y[q,v]: f32 = W[v,d] * h[q,d];
    }

    /// The mean cross entropy of the targets, each with its weight.
    pub fn loss(cfg: &Common, trunk: SpecFn<impl FnOnce(&mut Tracer)>)
        (tok[b,t]: i32, target[b,t]: i32, weight[b,t]: f32) -> loss: f32
    {
        axes { b; t; d = cfg.hidden_size }
        x[b,t,d] = call {trunk}(tok[b,t]);
        state cross_entropy(cfg);
    }

    /// The same as what training minimises, for models that add nothing to it, whatever
    /// [`crate::deepseek_v2::balance`] would do with `here`, `part` and `bound`.
    pub fn objective(cfg: &Common, trunk: SpecFn<impl FnOnce(&mut Tracer)>)
        (tok[b,t]: i32, target[b,t]: i32, weight[b,t]: f32, here[b,t]: f32, part: f32, bound[b]: f32)
        -> (objective: f32, loss: f32)
    {
        state loss(cfg, trunk);
        objective: f32 = loss;
    }

    /// The mean cross entropy of the targets, each with its weight, from the residual stream.
    pub fn cross_entropy(cfg: &Common)(x[b,t,d], target[b,t]: i32, weight[b,t]: f32) -> loss: f32 {
        axes { b; t; d = cfg.hidden_size; v = cfg.vocab_size }
        weights { g[d] = "model.norm.weight"[d]; }
        if cfg.tie_word_embeddings {
            weights { W[v,d] = "model.embed_tokens.weight"[v, d]; }
        } else {
            weights { W[v,d] = "lm_head.weight"[v, d]; }
        }
        h[b,t,d]      = g[d] * rms_norm[d; cfg.rms_norm_eps](x[b,t,d]);
        y[b,t,v]: f32 = W[v,d] * h[b,t,d];
        nll[b,t]: f32 = logsumexp[v](y[b,t,v]) - y[b,t,target[b,t]];
        loss: f32     = weight[b,t] * nll[b,t] / sum[b,t](weight[b,t]);
    }
}
