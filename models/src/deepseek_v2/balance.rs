//! Balance losses: arXiv 2405.04434, section 2.2.3. What training minimises beside the cross entropy, lest few experts, or few
//! devices, do all the work.
//!
//! [`objective`] takes `(tok: i32[b, t], target: i32[b, t], weight: f32[b, t], here: f32[b, t], part: f32,
//! bound: f32[b])`; the first three as the plain loss does, `here` 1 on tokens and 0 on padding. A row is a sequence: its tokens are the T of the equations. `part` is
//! what balance losses are multiplied by: 1, or, where a batch is run in parts that count by their targets, a part's share of all
//! sequences over its share of all targets, so that the parts add up to the batch. `bound` is 1 on sequences
//! whose tokens may be dropped (see [`dropping`](super::dropping)), where the configuration has a `device_capacity_factor`, and 0 on
//! those that are exempt. It returns
//!
//! | result | |
//! |---|---|
//! | `objective: f32` | what is minimised: `loss` and each balance loss times its factor, where that is not 0 |
//! | `loss: f32` | the weighted mean cross entropy |
//! | `expert: f32` | equation 23 without its factor: mean over sequences, sum over layers |
//! | `device: f32` | equation 26, likewise |
//! | `communication: f32` | equation 29, likewise |
//! | `load: f32[l, e]` | tokens of all sequences that chose expert `e` in the `l`-th layer that has experts |
//! | `kept: f32[l]` | of all of these choices of a layer, those that are not dropped |
//!
//! so that balance can be watched where no loss asks for it, too: with equal work everywhere `expert` and `device` are the number of
//! layers, and `communication` is not more than it times the devices of a token. The gradient graph returns the gradients behind
//! these. Gradients flow through the scores; counts are constants.
//!
//! The factors are `aux_loss_alpha`, `device_loss_alpha` and `communication_loss_alpha` of the configuration. Without
//! `seq_aux` all that runs at once counts as one sequence.

use latentc_frontend::spec;

use super::dropping::least_affinity;
use super::model::{attended, dense_layer};
use super::moe::{experts, gates};
use crate::config::{DeepseekV2Config, MoeConfig};
use crate::head::cross_entropy;

spec! {
    /// The mixture of experts, and what the balance losses count: of each sequence, the tokens of each expert, the sum of its
    /// scores, the tokens sent to each device, and the choices that are not dropped.
    pub fn counted_moe(cfg: &DeepseekV2Config, moe: &MoeConfig)(u[t,d], here[t]: f32, bound: f32)
        -> (y[t,d], count[e]: f32, score[e]: f32, sent[i]: f32, kept: f32)
    {
        axes { each b; t; i = moe.n_devices; k = moe.n_routed_experts / moe.n_devices }
        state gates(cfg, moe);
        chosen[t,e]   = in_top[e; moe.num_experts_per_tok](a[t,e]);
        one[t,e]: f32 = select(chosen[t,e], 1, 0);
        count[e]: f32 = here[t] * one[t,e];
        score[e]: f32 = here[t] * s[t,e];
        there[t,i]: f32 = max[k](one[t,(i,k)]);
        sent[i]: f32  = here[t] * there[t,i];

        kept: f32     = sum[e](count[e]);
        if let Some(factor) = moe.device_capacity_factor {
            worth[t,e]: f32    = select(0 < bound, s[t,e], 2);
            v[t,e]: f32        = here[t] * one[t,e] * worth[t,e];
            least[e]: f32      = call least_affinity(moe, factor)(v[t,e], here[t]);
            fits[t,e]          = least[e] < worth[t,e];
            gate[t,e]: f32     = select(fits[t,e], gate[t,e], 0);
            kept: f32          = sum[t,e](select(least[e] < v[t,e], 1, 0));
        }
        state experts(cfg, moe);
    }

    /// A layer with experts, and what is counted of them.
    pub fn counted_layer(cfg: &DeepseekV2Config, experts: &MoeConfig)(x[t,d], here[t]: f32, bound: f32)
        -> (y[t,d], count[e]: f32, score[e]: f32, sent[i]: f32, kept: f32)
    {
        axes { each b; t; e = experts.n_routed_experts; i = experts.n_devices }
        state attended(cfg);
        (m[t,d], count[e], score[e], sent[i], kept) = call counted_moe(cfg, experts)(u[t,d], here[t], bound) in "mlp";
        y[t,d] = xa[t,d] + m[t,d]                                                        @20;
    }

    /// The losses and loads of the layers so far, and those of one more, which is where `layer` is 1.
    pub fn balance(experts: &MoeConfig, layers: usize)
        (tokens[b]: f32, count[b,e]: f32, score[b,e]: f32, sent[b,i]: f32, done[b]: f32, layer[l]: f32,
         expert: f32, device: f32, communication: f32, load[l,e]: f32, kept[l]: f32)
        -> (expert: f32, device: f32, communication: f32, load[l,e]: f32, kept[l]: f32)
    {
        axes {
            b;
            e = experts.n_routed_experts;
            i = experts.n_devices;
            k = experts.n_routed_experts / experts.n_devices;
            l = layers;
        }
        load[l,e]: f32 = load[l,e] + layer[l] * sum[b](count[b,e]);
        kept[l]: f32   = kept[l] + layer[l] * sum[b](done[b]);

        // A sequence without tokens has no loss, and no share in the mean.
        some[b]: f32 = select(0 < tokens[b], 1, 0);
        if !experts.seq_aux {
            count[b,e]: f32 = some[b] * sum[b](count[b,e]);
            score[b,e]: f32 = some[b] * sum[b](score[b,e]);
            sent[b,i]: f32  = some[b] * sum[b](sent[b,i]);
            tokens[b]: f32  = some[b] * sum[b](tokens[b]);
        }
        share[b]: f32 = some[b] / max(sum[b](some[b]), 1);
        T[b]: f32     = max(tokens[b], 1);

        f[b,e]: f32 = e / {experts.num_experts_per_tok} * count[b,e] / T[b]              @24;
        P[b,e]: f32 = score[b,e] / T[b]                                                  @25;
        expert: f32 = expert + share[b] * f[b,e] * P[b,e]                                @23;

        f_D[b,i]: f32 = sum[k](f[b,(i,k)]) / k                                           @27;
        P_D[b,i]: f32 = sum[k](P[b,(i,k)])                                               @28;
        device: f32   = device + share[b] * f_D[b,i] * P_D[b,i]                          @26;

        f_C[b,i]: f32 = i / {experts.topk_device} * sent[b,i] / T[b]                     @30;
        P_C[b,i]: f32 = P_D[b,i]                                                         @31;
        communication: f32 = communication + share[b] * f_C[b,i] * P_C[b,i]              @29;
    }

    /// All layers, as the trunk, with what the balance losses see of them.
    pub fn counted_trunk(cfg: &DeepseekV2Config, experts: &MoeConfig)(tok[b,t]: i32, here[b,t]: f32, bound[b]: f32)
        -> (x[b,t,d], expert: f32, device: f32, communication: f32, load[l,e]: f32, kept[l]: f32)
    {
        let routed: Vec<usize> = (0..cfg.common.num_hidden_layers).filter(|l| experts.covers(*l)).collect();
        axes {
            b; t;
            d = cfg.common.hidden_size;
            v = cfg.common.vocab_size;
            e = experts.n_routed_experts;
            i = experts.n_devices;
            l = routed.len();
        }
        weights { W_E[v,d] = "model.embed_tokens.weight"[v, d]; }
        x[b,t,d]    = W_E[tok[b,t], d];
        tokens[b]: f32 = sum[t](here[b,t]);
        expert: f32 = 0;
        device: f32 = 0;
        communication: f32 = 0;
        load[l,e]: f32 = table[l; vec![0.0; routed.len()]]() * table[e; vec![0.0; experts.n_routed_experts]]();
        kept[l]: f32 = table[l; vec![0.0; routed.len()]]();
        for layer in 0..cfg.common.num_hidden_layers {
            let scope = format!("model.layers.{layer}");
            if routed.contains(&layer) {
                let at: Vec<f64> = routed.iter().map(|r| f64::from(u8::from(*r == layer))).collect();
                at[l]: f32 = table[l; at]();
                (x[b,t,d], count[b,e], score[b,e], sent[b,i], done[b]) =
                    call counted_layer(cfg, experts)(x[b,t,d], here[b,t], bound[b]) in scope;
                (expert, device, communication, load[l,e], kept[l]) = call balance(experts, routed.len())
                    (tokens[b], count[b,e], score[b,e], sent[b,i], done[b], at[l],
                     expert, device, communication, load[l,e], kept[l]);
            } else {
                x[b,t,d] = call dense_layer(cfg)(x[b,t,d]) in scope;
            }
        }
    }

    /// What training minimises, and what it shows.
    pub fn objective(cfg: &DeepseekV2Config, experts: &MoeConfig)
        (tok[b,t]: i32, target[b,t]: i32, weight[b,t]: f32, here[b,t]: f32, part: f32, bound[b]: f32)
        -> (objective: f32, loss: f32, expert: f32, device: f32, communication: f32, load[l,e]: f32, kept[l]: f32)
    {
        let layers = (0..cfg.common.num_hidden_layers).filter(|l| experts.covers(*l)).count();
        axes { b; t; d = cfg.common.hidden_size; e = experts.n_routed_experts; l = layers }
        (x[b,t,d], expert, device, communication, load[l,e], kept[l]) =
            call counted_trunk(cfg, experts)(tok[b,t], here[b,t], bound[b]);
        state cross_entropy(&cfg.common);
        expert: f32        = part * expert;
        device: f32        = part * device;
        communication: f32 = part * communication;
        objective: f32     = loss;
        if experts.aux_loss_alpha > 0.0 {
            objective: f32 = objective + {experts.aux_loss_alpha} * expert               @23;
        }
        if experts.device_loss_alpha > 0.0 {
            objective: f32 = objective + {experts.device_loss_alpha} * device            @26;
        }
        if experts.communication_loss_alpha > 0.0 {
            objective: f32 = objective + {experts.communication_loss_alpha} * communication @29;
        }
    }
}
