//! What the configurations of all models have in common.

use std::fmt;

use serde_json::{Map, Value, json};

use super::fields::Fields;

/// The keys that every model's `config.json` has. Sizes are in elements.
#[derive(Debug, Clone, PartialEq)]
pub struct Common {
    /// Number of tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of a dense MLP.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Longest context, in tokens.
    pub max_position_embeddings: usize,
    /// What the norms of the residual stream add to the mean square.
    pub rms_norm_eps: f64,
    /// Whether the output matrix is the embedding.
    pub tie_word_embeddings: bool,
    /// Standard deviation of freshly made weights.
    pub initializer_range: f64,
    /// What the checkpoint stores its weights in.
    pub dtype: DType,
    /// Tokens that end a text; empty where the file names none.
    pub eos_token_ids: Vec<u32>,
    /// The file as it was read, so that what this compiler does not look at is written back.
    pub source: Map<String, Value>,
}

/// The element types that a published checkpoint may be stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of single precision.
    BF16,
}

impl DType {
    const ALL: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

    /// Size of an element in bytes.
    pub fn bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }

    /// The name in `config.json`, which is torch's.
    pub fn torch_name(self) -> &'static str {
        match self {
            DType::F32 => "float32",
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
        }
    }
}

impl From<DType> for latentc_frontend::DType {
    fn from(stored: DType) -> latentc_frontend::DType {
        match stored {
            DType::F32 => latentc_frontend::DType::F32,
            DType::F16 => latentc_frontend::DType::F16,
            DType::BF16 => latentc_frontend::DType::Bf16,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
        })
    }
}

impl Common {
    /// Number of weights outside the layers: embedding, output matrix, last norm.
    pub(super) fn parameters_around_layers(&self) -> u128 {
        let matrices = if self.tie_word_embeddings { 1 } else { 2 };
        let hidden = self.hidden_size as u128;
        matrices * self.vocab_size as u128 * hidden + hidden
    }

    pub(super) fn read(fields: &mut Fields<'_>) -> Self {
        fields.supports_only("hidden_act", &json!("silu"));
        fields.supports_only("attention_bias", &json!(false));
        fields.supports_only("quantization_config", &Value::Null);
        Common {
            vocab_size: fields.size("vocab_size"),
            hidden_size: fields.size("hidden_size"),
            intermediate_size: fields.size("intermediate_size"),
            num_hidden_layers: fields.size_up_to("num_hidden_layers", 1 << 14),
            max_position_embeddings: fields.size_or("max_position_embeddings", 2048),
            rms_norm_eps: fields.number("rms_norm_eps", 0.0).unwrap_or(1e-6),
            tie_word_embeddings: fields.flag_or("tie_word_embeddings", false),
            initializer_range: fields.factor("initializer_range").unwrap_or(0.02),
            dtype: read_dtype(fields),
            eos_token_ids: fields.token_ids("eos_token_id"),
            source: fields.source(),
        }
    }

    /// The file as it was read, with these keys as they are now, in the published form.
    pub(super) fn write(&self) -> Map<String, Value> {
        let mut map = self.source.clone();
        map.remove("dtype");
        let mut put = |key: &str, value: Value| map.insert(key.into(), value);
        put("vocab_size", json!(self.vocab_size));
        put("hidden_size", json!(self.hidden_size));
        put("intermediate_size", json!(self.intermediate_size));
        put("num_hidden_layers", json!(self.num_hidden_layers));
        put("max_position_embeddings", json!(self.max_position_embeddings));
        put("rms_norm_eps", json!(self.rms_norm_eps));
        put("tie_word_embeddings", json!(self.tie_word_embeddings));
        put("initializer_range", json!(self.initializer_range));
        put("hidden_act", json!("silu"));
        put("torch_dtype", json!(self.dtype.torch_name()));
        match &self.eos_token_ids[..] {
            [] => put("eos_token_id", Value::Null),
            [one] => put("eos_token_id", json!(one)),
            several => put("eos_token_id", json!(several)),
        };
        map
    }
}

/// `torch_dtype` in the published form, `dtype` in transformers 5; f32 where neither is stated.
fn read_dtype(fields: &mut Fields<'_>) -> DType {
    let mut found = None;
    for key in ["torch_dtype", "dtype"] {
        let Some(word) = fields.word(key) else { continue };
        let name = word.strip_prefix("torch.").unwrap_or(word);
        let Some(dtype) = DType::ALL.into_iter().find(|d| d.torch_name() == name) else {
            let known = "float32, float16 and bfloat16 are";
            fields.note(key, format!("not supported: is \"{word}\", only {known}"));
            continue;
        };
        if let Some((first, before)) = found.replace((key, dtype)) {
            fields.check(&[key, first], before == dtype, || {
                format!("is \"{word}\", but {first} is {}; remove one of them", before.torch_name())
            });
        }
    }
    found.map_or(DType::F32, |(_, dtype)| dtype)
}
