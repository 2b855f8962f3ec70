//! The models that latentc knows, written as their papers write them.
//!
//! Start at [`deepseek_v2::attention`]: it is appendix C of the DeepSeek-V2 paper, tag for tag. A model holds no
//! algorithm: no cache, no absorbed projection, no routing. [`trace`] makes IR of it, and passes find those.

pub mod config;
pub mod deepseek_67b;
pub mod deepseek_v2;
pub mod head;
pub mod published;
pub mod swiglu;

use latentc_frontend::{DType, SpecError, Traced};

use config::ModelConfig;

/// What a program computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// `(tok: i32[b, t], at: i32[b, q])` to `f32[b, q, v]`: the logits of the rows `at`.
    Logits,
    /// `(tok: i32[b, t], target: i32[b, t], weight: f32[b, t])` to `f32`: the weighted mean cross entropy.
    Loss,
    /// `(tok: i32[b, t], target: i32[b, t], weight: f32[b, t], here: f32[b, t], part: f32, bound: f32[b])` to what training
    /// minimises, first of all, the mean cross entropy, and for models with experts what [`deepseek_v2::balance`] says of them.
    Objective,
}

impl Goal {
    /// The name in dumps.
    pub fn name(self) -> &'static str {
        match self {
            Goal::Logits => "logits",
            Goal::Loss => "loss",
            Goal::Objective => "objective",
        }
    }
}

/// The naive program of a model, its weights and activations of this dtype.
///
/// # Errors
/// Mistakes in the model's equations that only this configuration brings to light.
pub fn trace(config: &ModelConfig, goal: Goal, dtype: DType) -> Result<Traced, SpecError> {
    let name = format!("{}.{}", config.model_type(), goal.name());
    let common = config.common();
    match (config, goal) {
        (ModelConfig::DeepseekV2(cfg), Goal::Logits) => {
            latentc_frontend::trace(&name, dtype, head::logits(common, deepseek_v2::trunk(cfg)))
        }
        (ModelConfig::DeepseekV2(cfg), Goal::Loss) => {
            latentc_frontend::trace(&name, dtype, head::loss(common, deepseek_v2::trunk(cfg)))
        }
        (ModelConfig::DeepseekV2(cfg), Goal::Objective) => match &cfg.moe {
            Some(experts) => latentc_frontend::trace(&name, dtype, deepseek_v2::objective(cfg, experts)),
            None => latentc_frontend::trace(&name, dtype, head::objective(common, deepseek_v2::trunk(cfg))),
        },
        (ModelConfig::Llama(cfg), Goal::Objective) => {
            latentc_frontend::trace(&name, dtype, head::objective(common, deepseek_67b::trunk(cfg)))
        }
        (ModelConfig::Llama(cfg), Goal::Logits) => {
            latentc_frontend::trace(&name, dtype, head::logits(common, deepseek_67b::trunk(cfg)))
        }
        (ModelConfig::Llama(cfg), Goal::Loss) => {
            latentc_frontend::trace(&name, dtype, head::loss(common, deepseek_67b::trunk(cfg)))
        }
    }
}
