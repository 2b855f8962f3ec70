//! Layers and trunk: arXiv 2405.04434, figure 2.

use latentc_frontend::spec;

use super::attention::mla;
use super::moe::moe;
use crate::config::{DeepseekV2Config, MoeConfig};
use crate::swiglu::swiglu;

spec! {
    /// Attention on the normed residual stream, and the norm of what comes of it.
    pub fn attended(cfg: &DeepseekV2Config)(x[t,d]) -> u[t,d] {
        axes { each b; t; d = cfg.common.hidden_size }
        weights {
            g_A[d] = "input_layernorm.weight"[d];
            g_F[d] = "post_attention_layernorm.weight"[d];
        }
        h[t,d]  = g_A[d] * rms_norm[d; cfg.common.rms_norm_eps](x[t,d]);
        a[t,d]  = call mla(cfg)(h[t,d]) in "self_attn";
        xa[t,d] = x[t,d] + a[t,d];
        u[t,d]  = g_F[d] * rms_norm[d; cfg.common.rms_norm_eps](xa[t,d]);
    }

    /// Attention and a dense MLP.
    pub fn dense_layer(cfg: &DeepseekV2Config)(x[t,d]) -> y[t,d] {
        state attended(cfg);
        m[t,d] = call swiglu(cfg.common.hidden_size, cfg.common.intermediate_size)(u[t,d]) in "mlp";
        y[t,d] = xa[t,d] + m[t,d];
    }

    /// Attention and a mixture of experts.
    pub fn moe_layer(cfg: &DeepseekV2Config, experts: &MoeConfig)(x[t,d]) -> y[t,d] {
        state attended(cfg);
        m[t,d] = call moe(cfg, experts)(u[t,d]) in "mlp";
        y[t,d] = xa[t,d] + m[t,d]                                                        @20;
    }

    /// All layers: from tokens to the residual stream below the final norm. `x` is the embedding, `x.1` what
    /// layer 0 leaves, and so on.
    pub fn trunk(cfg: &DeepseekV2Config)(tok[t]: i32) -> x[t,d] {
        axes { each b; t; d = cfg.common.hidden_size; v = cfg.common.vocab_size }
        weights { W_E[v,d] = "model.embed_tokens.weight"[v, d]; }
        x[t,d] = W_E[tok[t], d];
        for l in 0..cfg.common.num_hidden_layers {
            if let Some(experts) = cfg.moe.as_ref().filter(|experts| experts.covers(l)) {
                x[t,d] = call moe_layer(cfg, experts)(x[t,d]) in format!("model.layers.{l}");
            } else {
                x[t,d] = call dense_layer(cfg)(x[t,d]) in format!("model.layers.{l}");
            }
        }
    }
}
