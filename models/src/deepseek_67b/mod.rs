//! DeepSeek 67B, the paper's baseline: a Llama with grouped-query attention (arXiv 2305.13245).

use latentc_frontend::spec;

use crate::config::LlamaConfig;
use crate::swiglu::swiglu;

spec! {
    /// Grouped-query attention: `h` query heads share each of the `g` heads of keys and values.
    pub fn gqa(cfg: &LlamaConfig)(x[t,d]) -> u[t,d] {
        axes {
            each b; t; s like t;
            d = cfg.common.hidden_size;
            g = cfg.num_key_value_heads;
            h = cfg.num_attention_heads / cfg.num_key_value_heads;
            k = cfg.head_dim;
        }
        weights {
            W_Q[g,h,k,d] = "q_proj.weight"[g * h * k, d];
            W_K[g,k,d]   = "k_proj.weight"[g * k, d];
            W_V[g,k,d]   = "v_proj.weight"[g * k, d];
            W_O[d,g,h,k] = "o_proj.weight"[d, g * h * k];
        }
        let freqs = cfg.rope.inv_freq(cfg.head_dim);

        Q[t,g,h,k]     = rope_halves[k at t; &freqs](W_Q[g,h,k,d] * x[t,d]);
        cache K[t,g,k] = rope_halves[k at t; &freqs](W_K[g,k,d] * x[t,d]);
        cache V[t,g,k] = W_V[g,k,d] * x[t,d];
        P[t,g,h,s]     = softmax[s <= t](Q[t,g,h,k] * K[s,g,k] / sqrt(k));
        o[t,g,h,k]     = P[t,g,h,s] * V[s,g,k];
        u[t,d]         = W_O[d,g,h,k] * o[t,g,h,k];
    }

    /// Attention and MLP, each on the normed residual stream.
    pub fn layer(cfg: &LlamaConfig)(x[t,d]) -> y[t,d] {
        axes { each b; t; d = cfg.common.hidden_size }
        weights {
            g_A[d] = "input_layernorm.weight"[d];
            g_F[d] = "post_attention_layernorm.weight"[d];
        }
        h[t,d]  = g_A[d] * rms_norm[d; cfg.common.rms_norm_eps](x[t,d]);
        a[t,d]  = call gqa(cfg)(h[t,d]) in "self_attn";
        xa[t,d] = x[t,d] + a[t,d];
        u[t,d]  = g_F[d] * rms_norm[d; cfg.common.rms_norm_eps](xa[t,d]);
        m[t,d]  = call swiglu(cfg.common.hidden_size, cfg.common.intermediate_size)(u[t,d]) in "mlp";
        y[t,d]  = xa[t,d] + m[t,d];
    }

    /// All layers: from tokens to the residual stream below the final norm.
    pub fn trunk(cfg: &LlamaConfig)(tok[t]: i32) -> x[t,d] {
        axes { each b; t; d = cfg.common.hidden_size; v = cfg.common.vocab_size }
        weights { W_E[v,d] = "model.embed_tokens.weight"[v, d]; }
        x[t,d] = W_E[tok[t], d];
        for l in 0..cfg.common.num_hidden_layers {
            x[t,d] = call layer(cfg)(x[t,d]) in format!("model.layers.{l}");
        }
    }
}
