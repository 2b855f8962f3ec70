//! Token dropping: arXiv 2405.04434, section 2.2.4, in training only.
//!
//! A device may do so much: its share of what all tokens ask for, times a capacity factor (1 in the paper). Of the pairs of a token
//! and an expert that are sent to it, those with the lowest affinity are dropped until the rest fits. Sequences that are exempt
//! keep all of theirs, which take room like any other.
//!
//! Which pairs fit is said by a threshold for each device, and that is found by narrowing down: each round counts the pairs above
//! [`WAYS`] thresholds between a bound that lets too many through and one that does not. No list is sorted, and all rounds are calls
//! of one function.

use latentc_frontend::spec;

use crate::config::MoeConfig;

/// The thresholds of a round, and the rounds: affinities are told apart to 2^-36 of their range.
const WAYS: usize = 8;
const ROUNDS: usize = 12;

spec! {
    /// The affinity above which pairs are kept, for each expert that of its device. `v` is the affinity of each pair that is sent, in
    /// (0, 1], 2 where it cannot be dropped, and 0 where nothing is sent; `here` is 1 on tokens.
    pub fn least_affinity(experts: &MoeConfig, factor: f64)(v[b,t,e]: f32, here[b,t]: f32) -> least[e]: f32 {
        axes {
            b; t;
            e = experts.n_routed_experts;
            i = experts.n_devices;
            k = experts.n_routed_experts / experts.n_devices;
        }
        room: f32    = {factor * experts.num_experts_per_tok as f64 / experts.n_devices as f64} * sum[b,t](here[b,t]);
        low[i]: f32  = table[i; vec![0.0; experts.n_devices]]();
        high[i]: f32 = table[i; vec![1.0; experts.n_devices]]();
        for _ in 0..ROUNDS {
            (low[i], high[i]) = call narrowed(experts)(v[b,t,e], room, low[i], high[i]);
        }
        // Halfway between the last that is kept and the first that is dropped: whoever computes an affinity again, with another
        // rounding, decides the same.
        over[b,t,i,k]: f32  = select(high[i] < v[b,t,(i,k)], -v[b,t,(i,k)], {-2.0});
        under[b,t,i,k]: f32 = select(high[i] < v[b,t,(i,k)], 0, v[b,t,(i,k)]);
        last[b,t,i]: f32    = max[k](over[b,t,i,k]);
        first[b,t,i]: f32   = max[k](under[b,t,i,k]);
        last_of[b,i]: f32   = max[t](last[b,t,i]);
        first_of[b,i]: f32  = max[t](first[b,t,i]);
        between[i]: f32     = 0.5 * (max[b](first_of[b,i]) - max[b](last_of[b,i]));
        all[k]: f32         = table[k; vec![1.0; experts.n_routed_experts / experts.n_devices]]();
        least[(i,k) as e]: f32 = between[i] * all[k];
    }

    /// Closer bounds: no more than `room` pairs of a device lie above `high`, unless that is where it began, and more above `low`,
    /// unless all fit.
    pub fn narrowed(experts: &MoeConfig)(v[b,t,e]: f32, room: f32, low[i]: f32, high[i]: f32)
        -> (low[i]: f32, high[i]: f32)
    {
        axes {
            b; t;
            e = experts.n_routed_experts;
            i = experts.n_devices;
            k = experts.n_routed_experts / experts.n_devices;
            m = WAYS;
        }
        near[m]: f32    = table[m; (0..WAYS).map(|m| 1.0 - m as f64 / WAYS as f64).collect::<Vec<_>>()]();
        far[m]: f32     = table[m; (0..WAYS).map(|m| m as f64 / WAYS as f64).collect::<Vec<_>>()]();
        x[i,m]: f32     = low[i] * near[m] + high[i] * far[m];
        above[i,m]: f32 = sum[b,t,k](select(x[i,m] < v[b,t,(i,k)], 1, 0));
        many[i,m]: f32  = select(room < above[i,m], x[i,m], 0);
        few[i,m]: f32   = select(room < above[i,m], {-2.0}, -x[i,m]);
        low[i]: f32     = max(low[i], max[m](many[i,m]));
        high[i]: f32    = min(high[i], -max[m](few[i,m]));
    }
}
