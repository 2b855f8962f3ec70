//! Model configurations: a Hugging Face `config.json` read, checked and written back.
//!
//! A configuration that was read is sound: every size is positive, every divisor divides, and the weights
//! can be counted without overflow, so what builds on it need not check again. Reading lists everything that
//! is wrong with a file at once.

mod common;
mod deepseek_v2;
mod fields;
mod llama;
mod rope;

use std::fmt::Write as _;
use std::path::Path;

use serde_json::Value;

pub use common::{Common, DType};
pub use deepseek_v2::{DeepseekV2Config, LATENT_NORM_EPS, MoeConfig, TopkMethod};
pub use fields::Problem;
pub use llama::LlamaConfig;
pub use rope::{Rope, Yarn, yarn_mscale};

/// A model that this compiler knows, by the `model_type` of its configuration.
#[derive(Debug, Clone, PartialEq)]
pub enum ModelConfig {
    /// `deepseek_v2`: DeepSeek-V2 and V2-Lite.
    DeepseekV2(DeepseekV2Config),
    /// `llama`: DeepSeek 67B.
    Llama(LlamaConfig),
}

/// The values of `model_type` that are known.
pub const MODEL_TYPES: [&str; 2] = ["deepseek_v2", "llama"];

/// Published configurations, by name: DeepSeek's of the V2 paper and its baseline, and a small one to
/// measure with.
const BUNDLED: [(&str, &str); 4] = [
    ("deepseek-v2", include_str!("../../configs/deepseek-v2.json")),
    ("deepseek-v2-lite", include_str!("../../configs/deepseek-v2-lite.json")),
    ("deepseek-67b", include_str!("../../configs/deepseek-67b.json")),
    ("bench-moe-0.3b", include_str!("../../configs/bench-moe-0.3b.json")),
];

/// Why a configuration was not read.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is not there or not readable.
    #[error("{file}: cannot read the model's configuration: {source}")]
    Read {
        /// The file.
        file: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// The file is not JSON.
    #[error("{file}: not JSON: {source}")]
    Syntax {
        /// The file.
        file: String,
        /// What is wrong, with line and column.
        source: serde_json::Error,
    },
    /// The file is JSON, and contradicts itself or what this compiler can do.
    #[error("{}", listed(file, problems))]
    Invalid {
        /// The file.
        file: String,
        /// All that is wrong, at least one thing.
        problems: Vec<Problem>,
    },
    /// No configuration of that name is bundled.
    #[error("unknown model `{name}`; known: {}", ModelConfig::bundled_names().join(", "))]
    UnknownName {
        /// The name asked for.
        name: String,
    },
}

/// One problem on the line of the file, several one to a line below it.
fn listed(file: &str, problems: &[Problem]) -> String {
    let mut text = format!("{file}:");
    match problems {
        [one] => _ = write!(text, " {one}"),
        several => {
            _ = write!(text, " {} problems", several.len());
            for problem in several {
                _ = write!(text, "\n  {problem}");
            }
        }
    }
    text
}

impl ModelConfig {
    /// Reads `path`: a configuration, or a folder that holds a `config.json`.
    ///
    /// # Errors
    /// Everything that [`ConfigError`] lists but an unknown name.
    pub fn from_path(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let path = path.as_ref();
        let file = if path.is_dir() { path.join("config.json") } else { path.to_path_buf() };
        let name = file.display().to_string();
        match std::fs::read_to_string(&file) {
            Ok(text) => Self::from_str(&name, &text),
            Err(source) => Err(ConfigError::Read { file: name, source }),
        }
    }

    /// Reads a configuration from its text; errors call it `file`.
    ///
    /// # Errors
    /// [`ConfigError::Syntax`] and [`ConfigError::Invalid`].
    pub fn from_str(file: &str, text: &str) -> Result<Self, ConfigError> {
        let value =
            serde_json::from_str(text).map_err(|source| ConfigError::Syntax { file: file.into(), source })?;
        Self::from_value(&value).map_err(|problems| ConfigError::Invalid { file: file.into(), problems })
    }

    fn from_value(value: &Value) -> Result<Self, Vec<Problem>> {
        let one = |key: &str, what: String| vec![Problem { key: key.into(), what }];
        let Value::Object(map) = value else {
            return Err(one(".", "the file holds no JSON object; give a model's config.json".into()));
        };
        match map.get("model_type") {
            Some(Value::String(s)) if s == "deepseek_v2" => DeepseekV2Config::read(map).map(Self::DeepseekV2),
            Some(Value::String(s)) if s == "llama" => LlamaConfig::read(map).map(Self::Llama),
            found => {
                let found = found.map_or("missing".into(), |v| format!("is {v}"));
                Err(one("model_type", format!("{found}; known: {}", MODEL_TYPES.join(", "))))
            }
        }
    }

    /// A bundled configuration, see [`ModelConfig::bundled_names`].
    ///
    /// # Errors
    /// [`ConfigError::UnknownName`], which lists the names there are.
    pub fn bundled(name: &str) -> Result<Self, ConfigError> {
        match BUNDLED.iter().find(|(known, _)| *known == name) {
            Some((name, text)) => Self::from_str(name, text),
            None => Err(ConfigError::UnknownName { name: name.into() }),
        }
    }

    /// The names that [`ModelConfig::bundled`] knows.
    pub fn bundled_names() -> Vec<&'static str> {
        BUNDLED.iter().map(|(name, _)| *name).collect()
    }

    /// What every model has.
    pub fn common(&self) -> &Common {
        match self {
            Self::DeepseekV2(c) => &c.common,
            Self::Llama(c) => &c.common,
        }
    }

    /// `model_type` as the file has it.
    pub fn model_type(&self) -> &'static str {
        match self {
            Self::DeepseekV2(_) => MODEL_TYPES[0],
            Self::Llama(_) => MODEL_TYPES[1],
        }
    }

    /// Number of weights in the checkpoint, from the shapes alone.
    pub fn parameter_count(&self) -> u128 {
        match self {
            Self::DeepseekV2(c) => c.parameter_count(),
            Self::Llama(c) => c.parameter_count(),
        }
    }

    /// The same model with as few layers as have so many of each kind, or all that there are: enough to measure one with.
    #[must_use]
    pub fn with_layers(&self, each: usize) -> ModelConfig {
        let mut cut = self.clone();
        match &mut cut {
            Self::DeepseekV2(c) => c.cut(each),
            Self::Llama(c) => c.common.num_hidden_layers = c.common.num_hidden_layers.min(each),
        }
        cut
    }

    /// The configuration in the form of the published checkpoints, whichever form it was read in.
    ///
    /// Keys that this compiler does not look at are as they were read.
    pub fn to_json(&self) -> Value {
        Value::Object(match self {
            Self::DeepseekV2(c) => c.to_json(),
            Self::Llama(c) => c.to_json(),
        })
    }
}

#[cfg(test)]
mod tests;
