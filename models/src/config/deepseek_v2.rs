//! The configuration of DeepSeek-V2 (arXiv 2405.04434): latent attention and DeepSeekMoE.

use serde_json::{Map, Value, json};

use super::common::Common;
use super::fields::{Fields, Problem};
use super::rope::Rope;

/// What the norms of the compressed query and of the latent add to the mean square, whatever
/// `rms_norm_eps` says: no key of the file speaks of it, and all implementations agree on this value.
pub const LATENT_NORM_EPS: f64 = 1e-6;

/// A DeepSeek-V2 model; the field names are those of the published `config.json`. Sizes are in elements.
#[derive(Debug, Clone, PartialEq)]
pub struct DeepseekV2Config {
    /// What every model has: vocabulary, hidden size, layers, norms, tokens.
    pub common: Common,
    /// Number of attention heads; each has its own keys and values, made from the shared latent.
    pub num_attention_heads: usize,
    /// Width of the compressed query; `None` projects queries straight from the hidden state (V2-Lite).
    pub q_lora_rank: Option<usize>,
    /// Width of the latent that keys and values are made from, and that is cached.
    pub kv_lora_rank: usize,
    /// Width per head of the part of queries and keys that carries no position.
    pub qk_nope_head_dim: usize,
    /// Width of the rotated part: one per head in queries, one shared key. Even.
    pub qk_rope_head_dim: usize,
    /// Width per head of the values.
    pub v_head_dim: usize,
    /// The rotation, with pairs `(2i, 2i+1)` as they lie in the stored weights.
    pub rope: Rope,
    /// The routed layers; `None` where every layer is dense.
    pub moe: Option<MoeConfig>,
}

/// The mixture-of-experts layers of a [`DeepseekV2Config`].
#[derive(Debug, Clone, PartialEq)]
pub struct MoeConfig {
    /// The first layers, this many, have a dense MLP instead.
    pub first_k_dense_replace: usize,
    /// Of the others, those whose number is a multiple of this are routed.
    pub moe_layer_freq: usize,
    /// Number of experts that the router chooses from.
    pub n_routed_experts: usize,
    /// Number of experts that every token passes through; they are stored as one MLP of that many widths.
    pub n_shared_experts: usize,
    /// Width of one expert.
    pub moe_intermediate_size: usize,
    /// Number of routed experts that a token passes through.
    pub num_experts_per_tok: usize,
    /// How they are chosen.
    pub topk_method: TopkMethod,
    /// Whether the chosen gates are divided by their sum. transformers ignores it; DeepSeek's code obeys.
    pub norm_topk_prob: bool,
    /// What the chosen gates are multiplied by.
    pub routed_scaling_factor: f64,
    /// Weight of the expert-level balance loss (section 2.2.3) in training; 0 is none.
    pub aux_loss_alpha: f64,
    /// Whether the balance losses are taken per sequence rather than over the whole batch.
    pub seq_aux: bool,
    /// Number of devices that the experts lie on, in equal runs. Not a key of published files, nor are those below: if it is
    /// missing, a group of experts is a device.
    pub n_devices: usize,
    /// Number of devices that a token's experts lie on at most, M in section 2.2.2; if missing, that of groups.
    pub topk_device: usize,
    /// Weight of the device-level balance loss in training; 0, and if missing, is none.
    pub device_loss_alpha: f64,
    /// Weight of the communication balance loss in training; 0, and if missing, is none.
    pub communication_loss_alpha: f64,
    /// What a device may do in training, in shares of what all tokens ask for (section 2.2.4); tokens that ask for more are dropped.
    /// If missing, none is.
    pub device_capacity_factor: Option<f64>,
}

/// How the router chooses experts from the scores of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TopkMethod {
    /// The best experts.
    Greedy,
    /// The best experts of the best groups, a group being worth its best expert.
    GroupLimitedGreedy {
        /// Number of groups: equal runs of neighbouring experts.
        n_group: usize,
        /// Number of groups that are kept.
        topk_group: usize,
    },
}

impl TopkMethod {
    /// Of so many devices, how many a token's experts lie on at most: where a group is a device, as many as of those; elsewhere
    /// nothing limits it.
    pub fn devices_of_a_token(self, n_devices: usize) -> usize {
        match self {
            TopkMethod::GroupLimitedGreedy { n_group, topk_group } if n_group == n_devices => topk_group,
            TopkMethod::GroupLimitedGreedy { .. } | TopkMethod::Greedy => n_devices,
        }
    }
}

impl DeepseekV2Config {
    /// Whether layer `layer` (from 0) is routed rather than dense.
    pub fn is_moe(&self, layer: usize) -> bool {
        layer < self.common.num_hidden_layers && self.moe.as_ref().is_some_and(|moe| moe.covers(layer))
    }

    /// Number of weights in the checkpoint, from the shapes alone.
    pub fn parameter_count(&self) -> u128 {
        let [hidden, heads, latent] =
            [self.common.hidden_size, self.num_attention_heads, self.kv_lora_rank].map(|n| n as u128);
        let [nope, rope, value] =
            [self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim].map(|n| n as u128);
        let queries = heads * (nope + rope);
        let query = match self.q_lora_rank.map(|n| n as u128) {
            None => hidden * queries,
            Some(rank) => hidden * rank + rank + rank * queries,
        };
        let attention = query
            + hidden * (latent + rope)
            + latent
            + latent * heads * (nope + value)
            + heads * value * hidden;
        let layers = self.common.num_hidden_layers as u128;
        let routed = (0..self.common.num_hidden_layers).filter(|l| self.is_moe(*l)).count() as u128;
        let routed_mlp = self.moe.as_ref().map_or(0, |moe| {
            let [experts, shared, width] =
                [moe.n_routed_experts, moe.n_shared_experts, moe.moe_intermediate_size].map(|n| n as u128);
            hidden * experts + 3 * hidden * width * (experts + shared)
        });
        let dense_mlp = 3 * hidden * self.common.intermediate_size as u128;
        self.common.parameters_around_layers()
            + layers * (attention + 2 * hidden)
            + routed * routed_mlp
            + (layers - routed) * dense_mlp
    }

    /// Leaves as few layers as have so many of each kind, dense and routed, or all that there are.
    pub(super) fn cut(&mut self, each: usize) {
        let total = self.common.num_hidden_layers;
        let Some(moe) = &mut self.moe else {
            self.common.num_hidden_layers = total.min(each);
            return;
        };
        let routed = (0..total).filter(|&l| moe.covers(l)).count();
        let (routed, dense) = (routed.min(each), (total - routed).min(each));
        moe.first_k_dense_replace = moe.first_k_dense_replace.min(dense);
        let enough = |n: &usize| {
            let covered = (0..*n).filter(|&l| moe.covers(l)).count();
            covered >= routed && n - covered >= dense
        };
        self.common.num_hidden_layers = (0..=total).find(enough).unwrap_or(total);
    }

    pub(super) fn read(map: &Map<String, Value>) -> Result<Self, Vec<Problem>> {
        let mut fields = Fields::new(map);
        let common = Common::read(&mut fields);
        let heads = fields.size("num_attention_heads");
        let kv_heads = fields.size_or("num_key_value_heads", heads);
        fields.check(&["num_key_value_heads", "num_attention_heads"], kv_heads == heads, || {
            format!(
                "is {kv_heads}, but latent attention has one key per head of {heads}; write {heads} or null"
            )
        });
        let config = DeepseekV2Config {
            num_attention_heads: heads,
            q_lora_rank: fields.size_or_null("q_lora_rank"),
            kv_lora_rank: fields.size("kv_lora_rank"),
            qk_nope_head_dim: fields.size("qk_nope_head_dim"),
            qk_rope_head_dim: fields.even_size("qk_rope_head_dim"),
            v_head_dim: fields.size("v_head_dim"),
            rope: Rope::read(&mut fields),
            moe: MoeConfig::read(&mut fields, common.num_hidden_layers),
            common,
        };
        fields.check_total(config.parameter_count());
        fields.finish().map(|()| config)
    }

    /// The published form: what this model is, over whatever else its file said.
    pub(super) fn to_json(&self) -> Map<String, Value> {
        let mut map = self.common.write();
        let mut put = |key: &str, value: Value| map.insert(key.into(), value);
        put("model_type", json!("deepseek_v2"));
        put("num_attention_heads", json!(self.num_attention_heads));
        put("num_key_value_heads", json!(self.num_attention_heads));
        put("q_lora_rank", json!(self.q_lora_rank));
        put("kv_lora_rank", json!(self.kv_lora_rank));
        put("qk_nope_head_dim", json!(self.qk_nope_head_dim));
        put("qk_rope_head_dim", json!(self.qk_rope_head_dim));
        put("v_head_dim", json!(self.v_head_dim));
        self.rope.write(&mut map);
        match &self.moe {
            Some(moe) => moe.write(&mut map),
            // Whatever stood there made no layer routed; say so where the model was changed since.
            None => _ = map.insert("first_k_dense_replace".into(), json!(self.common.num_hidden_layers)),
        }
        map
    }
}

impl MoeConfig {
    /// Whether layer `layer` is routed, if the model has it.
    pub fn covers(&self, layer: usize) -> bool {
        layer >= self.first_k_dense_replace && layer.is_multiple_of(self.moe_layer_freq)
    }

    /// `None` where no layer is routed; nothing about experts is asked of the file then.
    fn read(fields: &mut Fields<'_>, layers: usize) -> Option<Self> {
        let first_k_dense_replace = fields.whole_or("first_k_dense_replace", 0, 0, usize::MAX >> 12);
        let moe_layer_freq = fields.size_or("moe_layer_freq", 1);
        let routed = |l: usize| l >= first_k_dense_replace && l.is_multiple_of(moe_layer_freq);
        if !(0..layers).any(routed) {
            return None;
        }
        let experts = fields.size_or_null("n_routed_experts")?;
        fields.supports_only("scoring_func", &json!("softmax"));
        // A shared expert is a part of the published models, so a file that is silent about it is in doubt.
        let shared = fields.size_or_null("n_shared_experts").unwrap_or(0);
        let chosen = fields.size("num_experts_per_tok");
        fields.check(&["num_experts_per_tok", "n_routed_experts"], chosen <= experts, || {
            format!("is {chosen}, but n_routed_experts is {experts}; choose no more than there are")
        });
        let method = fields.word("topk_method").unwrap_or("greedy");
        let topk_method = match method {
            "group_limited_greedy" => read_groups(fields, experts, chosen),
            "greedy" => TopkMethod::Greedy,
            other => {
                let known = "\"greedy\" and \"group_limited_greedy\" are";
                fields.note("topk_method", format!("not supported: is \"{other}\", only {known}"));
                TopkMethod::Greedy
            }
        };
        let groups = match topk_method {
            TopkMethod::Greedy => 1,
            TopkMethod::GroupLimitedGreedy { n_group, .. } => n_group,
        };
        let n_devices = fields.size_or("n_devices", groups);
        let topk_device = fields.size_or("topk_device", topk_method.devices_of_a_token(n_devices));
        fields.check(&["n_devices", "n_routed_experts"], experts.is_multiple_of(n_devices), || {
            format!(
                "is {n_devices}, which does not divide n_routed_experts, {experts}; devices hold equally many"
            )
        });
        fields.check(&["topk_device", "n_devices"], topk_device <= n_devices, || {
            format!("is {topk_device}, but n_devices is {n_devices}; use no more than there are")
        });
        Some(MoeConfig {
            first_k_dense_replace,
            moe_layer_freq,
            n_routed_experts: experts,
            n_shared_experts: shared,
            moe_intermediate_size: fields.size("moe_intermediate_size"),
            num_experts_per_tok: chosen,
            topk_method,
            norm_topk_prob: fields.flag_or("norm_topk_prob", false),
            routed_scaling_factor: fields.number("routed_scaling_factor", 0.0).unwrap_or(1.0),
            aux_loss_alpha: fields.factor("aux_loss_alpha").unwrap_or(0.0),
            seq_aux: fields.flag_or("seq_aux", true),
            n_devices,
            topk_device,
            device_loss_alpha: fields.factor("device_loss_alpha").unwrap_or(0.0),
            communication_loss_alpha: fields.factor("communication_loss_alpha").unwrap_or(0.0),
            device_capacity_factor: fields.number("device_capacity_factor", 0.0),
        })
    }

    fn write(&self, map: &mut Map<String, Value>) {
        let mut put = |key: &str, value: Value| map.insert(key.into(), value);
        put("first_k_dense_replace", json!(self.first_k_dense_replace));
        put("moe_layer_freq", json!(self.moe_layer_freq));
        put("n_routed_experts", json!(self.n_routed_experts));
        put("n_shared_experts", json!((self.n_shared_experts > 0).then_some(self.n_shared_experts)));
        put("moe_intermediate_size", json!(self.moe_intermediate_size));
        put("num_experts_per_tok", json!(self.num_experts_per_tok));
        put("norm_topk_prob", json!(self.norm_topk_prob));
        put("routed_scaling_factor", json!(self.routed_scaling_factor));
        put("aux_loss_alpha", json!(self.aux_loss_alpha));
        put("seq_aux", json!(self.seq_aux));
        put("n_devices", json!(self.n_devices));
        put("topk_device", json!(self.topk_device));
        put("device_loss_alpha", json!(self.device_loss_alpha));
        put("communication_loss_alpha", json!(self.communication_loss_alpha));
        put("device_capacity_factor", json!(self.device_capacity_factor));
        match self.topk_method {
            TopkMethod::Greedy => _ = put("topk_method", json!("greedy")),
            TopkMethod::GroupLimitedGreedy { n_group, topk_group } => {
                put("topk_method", json!("group_limited_greedy"));
                put("n_group", json!(n_group));
                put("topk_group", json!(topk_group));
            }
        }
    }
}

fn read_groups(fields: &mut Fields<'_>, experts: usize, chosen: usize) -> TopkMethod {
    let (n_group, topk_group) = (fields.size("n_group"), fields.size("topk_group"));
    fields.check(&["n_group", "n_routed_experts"], experts.is_multiple_of(n_group), || {
        format!("is {n_group}, which does not divide n_routed_experts, {experts}; groups are of equal size")
    });
    fields.check(&["topk_group", "n_group"], topk_group <= n_group, || {
        format!("is {topk_group}, but n_group is {n_group}; keep no more groups than there are")
    });
    let kept = topk_group * (experts / n_group);
    let keys = ["num_experts_per_tok", "topk_group", "n_group", "n_routed_experts"];
    fields.check(&keys, chosen <= kept, || {
        format!(
            "is {chosen}, but topk_group {topk_group} of n_group {n_group} keeps {kept} of {experts} experts; \
             keep more groups or choose fewer experts"
        )
    });
    TopkMethod::GroupLimitedGreedy { n_group, topk_group }
}
