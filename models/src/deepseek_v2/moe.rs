//! DeepSeekMoE: arXiv 2405.04434, section 2.2. Dense in meaning: every expert, times a gate that is mostly 0.

use latentc_frontend::spec;

use crate::config::{DeepseekV2Config, MoeConfig, TopkMethod};
use crate::swiglu::swiglu;

spec! {
    /// Shared experts, and routed ones under their gates.
    pub fn moe(cfg: &DeepseekV2Config, moe: &MoeConfig)(u[t,d]) -> y[t,d] {
        axes { each b; t; d = cfg.common.hidden_size; e = moe.n_routed_experts; f = moe.moe_intermediate_size }
        state gates(cfg, moe);
        state experts(cfg, moe);
    }

    /// The router: the affinity `s` of each token to each expert, and the gates of those that it chooses.
    pub fn gates(cfg: &DeepseekV2Config, moe: &MoeConfig)(u[t,d]) -> gate[t,e]: f32 {
        axes { each b; t; d = cfg.common.hidden_size; e = moe.n_routed_experts }
        weights { E[e,d] = "gate.weight"[e, d]; }
        s[t,e]: f32 = softmax[e](E[e,d] * u[t,d])                                        @22;
        a[t,e]: f32 = s[t,e];

        // Device-limited routing, section 2.2.2: a group of experts is worth its best.
        if let TopkMethod::GroupLimitedGreedy { n_group, topk_group } = moe.topk_method {
            axes { g = n_group; j = moe.n_routed_experts / n_group }
            best[t,g]: f32          = max[j](a[t,(g,j)]);
            open[t,g]               = in_top[g; topk_group](best[t,g]);
            a[t,(g,j) as e]: f32    = select(open[t,g], a[t,(g,j)], 0);
        }
        gate[t,e]: f32 = top[e; moe.num_experts_per_tok](a[t,e])                         @21;
        if moe.norm_topk_prob {
            gate[t,e]: f32 = gate[t,e] / (sum[e](gate[t,e]) + 1e-20);
        }
        gate[t,e]: f32 = {moe.routed_scaling_factor} * gate[t,e];
    }

    /// Shared experts, and routed ones under given gates.
    pub fn experts(cfg: &DeepseekV2Config, moe: &MoeConfig)(u[t,d], gate[t,e]: f32) -> y[t,d] {
        axes { each b; t; d = cfg.common.hidden_size; e = moe.n_routed_experts; f = moe.moe_intermediate_size }
        weights {
            W_1[e,f,d] = "experts.{e}.gate_proj.weight"[f, d];
            W_3[e,f,d] = "experts.{e}.up_proj.weight"[f, d];
            W_2[e,d,f] = "experts.{e}.down_proj.weight"[d, f];
        }
        y_1[t,e,f] = W_1[e,f,d] * u[t,d];
        y_3[t,e,f] = W_3[e,f,d] * u[t,d];
        z[t,e,f]   = silu(y_1[t,e,f]) * y_3[t,e,f];
        y[t,d]     = gate[t,e] * W_2[e,d,f] * z[t,e,f]                                     @20;
        if moe.n_shared_experts > 0 {
            shared[t,d] = call swiglu(cfg.common.hidden_size, moe.n_shared_experts * moe.moe_intermediate_size)(u[t,d])
                          in "shared_experts"                                            @20;
            y[t,d]      = y[t,d] + shared[t,d]                                           @20;
        }
    }
}
