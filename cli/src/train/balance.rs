//! Balance of experts: which losses a training minimises for it, whether it drops tokens, and what it tells of both.

use anyhow::{Context, bail};
use latentc_models::config::{ModelConfig, MoeConfig};
use serde::{Deserialize, Serialize};

use super::settings::Settings;
use crate::model::Model;

/// Puts what the settings say of balance into the model's configuration, which every checkpoint then tells.
///
/// # Errors
/// If the model has nothing to balance, or not in that way.
pub(super) fn configure(model: &mut Model, settings: &Settings) -> anyhow::Result<()> {
    let weights = [
        ("--expert-balance", settings.expert_balance),
        ("--device-balance", settings.device_balance),
        ("--communication-balance", settings.communication_balance),
    ];
    let drops = ("--drop-tokens", settings.drop_tokens);
    for (flag, weight) in weights.iter().chain([&drops]).filter_map(|(flag, weight)| Some((flag, (*weight)?)))
    {
        if !(weight.is_finite() && weight >= 0.0) {
            bail!("{flag} is {weight}, but must be a finite number, at least 0");
        }
    }
    let Some(moe) = experts_of(&mut model.config) else {
        let loud = weights
            .iter()
            .chain([&drops])
            .find(|(_, weight)| weight.is_some_and(|w| w > 0.0))
            .map(|(flag, _)| *flag);
        if let Some(flag) = loud.or(settings.devices.map(|_| "--devices")) {
            bail!(
                "{flag}: {} has no layers with experts, so there is nothing to balance or drop",
                model.name
            );
        }
        return Ok(());
    };
    if let Some(devices) = settings.devices {
        if devices == 0 || !moe.n_routed_experts.is_multiple_of(devices) {
            bail!(
                "--devices is {devices}, which does not divide the {} experts of a layer (n_routed_experts); \
                 devices hold equally many",
                moe.n_routed_experts
            );
        }
        moe.n_devices = devices;
        moe.topk_device = moe.topk_method.devices_of_a_token(devices);
    }
    let factors = [&mut moe.aux_loss_alpha, &mut moe.device_loss_alpha, &mut moe.communication_loss_alpha];
    for (factor, (_, weight)) in factors.into_iter().zip(weights) {
        *factor = weight.unwrap_or(*factor);
    }
    if let Some(factor) = settings.drop_tokens {
        moe.device_capacity_factor = (factor > 0.0).then_some(factor);
    }
    let among_devices = [
        ("--device-balance", "device_loss_alpha", moe.device_loss_alpha),
        ("--communication-balance", "communication_loss_alpha", moe.communication_loss_alpha),
        (drops.0, "device_capacity_factor", moe.device_capacity_factor.unwrap_or(0.0)),
    ];
    let loud = among_devices.iter().find(|(.., weight)| *weight > 0.0);
    if let (1, Some((flag, key, weight))) = (moe.n_devices, loud) {
        bail!(
            "{flag} ({key} of config.json) is {weight}, but all experts lie on one device, which does its share at any time; \
             say with --devices (n_devices) on how many they lie, or give {flag}=0"
        );
    }
    Ok(())
}

fn experts_of(config: &mut ModelConfig) -> Option<&mut MoeConfig> {
    match config {
        ModelConfig::DeepseekV2(config) => config.moe.as_mut(),
        ModelConfig::Llama(_) => None,
    }
}

/// How evenly the experts of a step were used.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Balance {
    /// Equation 23 without its weight: mean over sequences, sum over layers. With equal work for all it is the number of layers.
    expert_balance: f64,
    /// Equation 26, likewise.
    device_balance: f64,
    /// Equation 29, likewise.
    communication_balance: f64,
    /// The largest of all violations.
    pub(super) max_violation: f64,
    /// The mean of them.
    pub(super) mean_violation: f64,
    /// Of each layer with experts: the tokens of its busiest expert over the mean of its experts, less 1. 0 is equal work.
    violations: Vec<f64>,
    /// The part of all choices of experts that were dropped.
    dropped: f64,
}

impl Balance {
    /// From the results of the objective (`latentc_models::deepseek_v2::balance`); none of models without experts.
    pub(super) fn of(config: &ModelConfig, results: &[Vec<f64>]) -> anyhow::Result<Option<Balance>> {
        let experts = match config {
            ModelConfig::DeepseekV2(config) => config.moe.as_ref().map(|moe| moe.n_routed_experts),
            ModelConfig::Llama(_) => None,
        };
        let Some(experts) = experts else { return Ok(None) };
        let (Some(load), Some(kept)) = (results.get(5), results.get(6)) else {
            bail!("the objective returns no load of experts");
        };
        let violation = |layer: &[f64]| {
            let mean = layer.iter().sum::<f64>() / experts as f64;
            layer.iter().fold(0.0, |most: f64, &x| most.max(x)) / mean - 1.0
        };
        Ok(Some(Balance {
            expert_balance: number(results, 2)?,
            device_balance: number(results, 3)?,
            communication_balance: number(results, 4)?,
            dropped: 1.0 - kept.iter().sum::<f64>() / load.iter().sum::<f64>(),
            ..Balance::of_violations(load.chunks(experts).map(violation).collect())
        }))
    }

    /// Of layers that are so far from equal work.
    pub(super) fn of_violations(violations: Vec<f64>) -> Balance {
        Balance {
            expert_balance: 0.0,
            device_balance: 0.0,
            communication_balance: 0.0,
            max_violation: violations.iter().fold(0.0, |most: f64, &x| most.max(x)),
            mean_violation: violations.iter().sum::<f64>() / violations.len() as f64,
            violations,
            dropped: 0.0,
        }
    }

    /// How many times the mean the busiest expert of any layer has to do, and what was dropped.
    pub(super) fn text(&self) -> String {
        let dropped = match self.dropped {
            0.0 => String::new(),
            part => format!(", {:.1}% dropped", 100.0 * part),
        };
        format!(", busiest expert {:.2} x mean{dropped}", 1.0 + self.max_violation)
    }
}

/// A result of the objective that is a number.
pub(super) fn number(results: &[Vec<f64>], n: usize) -> anyhow::Result<f64> {
    results
        .get(n)
        .and_then(|r| r.first().copied())
        .with_context(|| format!("the objective has no result {n}"))
}
