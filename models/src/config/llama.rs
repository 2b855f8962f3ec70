//! The configuration of DeepSeek 67B (arXiv 2401.02954): a Llama with grouped-query attention, the dense
//! model that the DeepSeek-V2 paper compares with.

use serde_json::{Map, Value, json};

use super::common::Common;
use super::fields::{Fields, Problem};
use super::rope::Rope;

/// A model of architecture `LlamaForCausalLM`; the field names are those of its `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// What every model has: vocabulary, hidden size, layers, norms, tokens.
    pub common: Common,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key and value heads; each serves a run of neighbouring query heads of equal length.
    pub num_key_value_heads: usize,
    /// Width of a head, in elements; all of it is rotated, so it is even.
    pub head_dim: usize,
    /// The rotation, with pairs `(i, i + head_dim/2)`; never YaRN.
    pub rope: Rope,
}

impl LlamaConfig {
    /// Number of weights in the checkpoint, from the shapes alone.
    pub fn parameter_count(&self) -> u128 {
        let [hidden, width, layers] =
            [self.common.hidden_size, self.common.intermediate_size, self.common.num_hidden_layers]
                .map(|n| n as u128);
        let [heads, kv_heads, head] =
            [self.num_attention_heads, self.num_key_value_heads, self.head_dim].map(|n| n as u128);
        let attention = 2 * hidden * head * (heads + kv_heads);
        self.common.parameters_around_layers() + layers * (attention + 3 * hidden * width + 2 * hidden)
    }

    pub(super) fn read(map: &Map<String, Value>) -> Result<Self, Vec<Problem>> {
        let mut fields = Fields::new(map);
        let common = Common::read(&mut fields);
        let (hidden, heads) = (common.hidden_size, fields.size("num_attention_heads"));
        let kv_heads = fields.size_or("num_key_value_heads", heads);
        fields.check(&["num_key_value_heads", "num_attention_heads"], heads.is_multiple_of(kv_heads), || {
            format!("is {kv_heads}, which does not divide num_attention_heads, {heads}")
        });
        let head_dim = if fields.states("head_dim") {
            fields.even_size("head_dim")
        } else {
            fields.check(&["num_attention_heads", "hidden_size"], hidden.is_multiple_of(heads), || {
                format!("is {heads}, which does not divide hidden_size, {hidden}; write a head_dim")
            });
            let head_dim = hidden / heads;
            let even = head_dim > 0 && head_dim.is_multiple_of(2);
            fields.check(&["num_attention_heads", "hidden_size"], even, || {
                format!(
                    "is {heads}, so a head of hidden_size {hidden} has {head_dim} elements, \
                     but RoPE turns pairs; write an even head_dim"
                )
            });
            head_dim
        };
        let rope = Rope::read(&mut fields);
        let key = if fields.states("rope_scaling") { "rope_scaling" } else { "rope_parameters" };
        fields.check(&[key], rope.yarn.is_none(), || {
            "not supported: a llama with yarn; only deepseek_v2 is extended so".into()
        });
        fields.supports_only("mlp_bias", &json!(false));
        let config =
            LlamaConfig { common, num_attention_heads: heads, num_key_value_heads: kv_heads, head_dim, rope };
        fields.check_total(config.parameter_count());
        fields.finish().map(|()| config)
    }

    /// The published form: what this model is, over whatever else its file said.
    pub(super) fn to_json(&self) -> Map<String, Value> {
        let mut map = self.common.write();
        let mut put = |key: &str, value: Value| map.insert(key.into(), value);
        put("model_type", json!("llama"));
        put("num_attention_heads", json!(self.num_attention_heads));
        put("num_key_value_heads", json!(self.num_key_value_heads));
        if self.head_dim * self.num_attention_heads != self.common.hidden_size {
            put("head_dim", json!(self.head_dim));
        }
        self.rope.write(&mut map);
        map
    }
}
