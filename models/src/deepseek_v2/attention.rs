//! Multi-head latent attention: arXiv 2405.04434, section 2.1 and appendix C.

use latentc_frontend::spec;

use crate::config::{DeepseekV2Config, LATENT_NORM_EPS};

/// The latent norms have this epsilon whatever the configuration says of the others.
const LATENT_EPS: f64 = LATENT_NORM_EPS;

spec! {
    /// Multi-head latent attention. Queries are compressed where the configuration has a rank for them (V2) and
    /// projected at once where not (V2-Lite).
    pub fn mla(cfg: &DeepseekV2Config)(h[t,d]) -> u[t,d] {
        axes {
            each b; t; s like t;
            d = cfg.common.hidden_size;
            i = cfg.num_attention_heads;
            n = cfg.qk_nope_head_dim;
            r = cfg.qk_rope_head_dim;
            v = cfg.v_head_dim;
            c = cfg.kv_lora_rank;
        }
        weights {
            W_DKV[c,d]  = "kv_a_proj_with_mqa.weight"[(c | r), d];
            W_KR[r,d]   = "kv_a_proj_with_mqa.weight"[(c | r), d];
            W_UK[i,n,c] = "kv_b_proj.weight"[i * (n | v), c];
            W_UV[i,v,c] = "kv_b_proj.weight"[i * (n | v), c];
            W_O[d,i,v]  = "o_proj.weight"[d, i * v];
            g_KV[c]     = "kv_a_layernorm.weight"[c];
        }
        let freqs = cfg.rope.inv_freq(cfg.qk_rope_head_dim);
        let turn = cfg.rope.cos_sin_scale();

        if let Some(rank) = cfg.q_lora_rank {
            axes { p = rank }
            weights {
                W_DQ[p,d]   = "q_a_proj.weight"[p, d];
                W_UQ[i,n,p] = "q_b_proj.weight"[i * (n | r), p];
                W_QR[i,r,p] = "q_b_proj.weight"[i * (n | r), p];
                g_Q[p]      = "q_a_layernorm.weight"[p];
            }
            c_Q[t,p]   = g_Q[p] * rms_norm[p; LATENT_EPS](W_DQ[p,d] * h[t,d])            @37;
            q_C[t,i,n] = W_UQ[i,n,p] * c_Q[t,p]                                          @38;
            q_R[t,i,r] = {turn} * rope[r at t; &freqs](W_QR[i,r,p] * c_Q[t,p])           @39;
        } else {
            weights {
                W_Q[i,n,d]  = "q_proj.weight"[i * (n | r), d];
                W_QR[i,r,d] = "q_proj.weight"[i * (n | r), d];
            }
            q_C[t,i,n] = W_Q[i,n,d] * h[t,d]                                             @38;
            q_R[t,i,r] = {turn} * rope[r at t; &freqs](W_QR[i,r,d] * h[t,d])             @39;
        }
        cache c_KV[t,c] = g_KV[c] * rms_norm[c; LATENT_EPS](W_DKV[c,d] * h[t,d])         @41;
        k_C[t,i,n]      = W_UK[i,n,c] * c_KV[t,c]                                        @42;
        cache k_R[t,r]  = {turn} * rope[r at t; &freqs](W_KR[r,d] * h[t,d])              @43;
        v_C[t,i,v]      = W_UV[i,v,c] * c_KV[t,c]                                        @45;
        P[t,i,s]        = softmax[s <= t]((q_C[t,i,n]*k_C[s,i,n] + q_R[t,i,r]*k_R[s,r])
                                          * {cfg.rope.attention_scale_factor()} / sqrt(n + r))  @46;
        o[t,i,v]        = P[t,i,s] * v_C[s,i,v]                                          @46;
        u[t,d]          = W_O[d,i,v] * o[t,i,v]                                          @47;
    }
}
