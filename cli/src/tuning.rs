//! `--tuning FILE`: ways to compute kernels that `latentc tune` found to be the best on a device.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail};
use latentc_codegen::cube::{Machine, Tuning};
use latentc_codegen::device::Device;
use serde::{Deserialize, Serialize};

use crate::manifest::Hex;
use crate::target::Target;

/// Where choices of ways are taken from.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct TuningArgs {
    /// A file that `latentc tune` wrote: kernels that it knows are computed as it says, at sizes like those that it was made for. In which
    /// way that is, `way` of each choice says; whoever changes it there has another.
    #[arg(long, value_name = "FILE")]
    tuning: Option<PathBuf>,
    /// Rounds the factors of products of f32 with f32 to 11 bits (tf32) where tensor cores can read both as they are stored. Without it, such
    /// products err no more than f32 sums do, and take about twice as long. For cuda.
    #[arg(long)]
    tf32: bool,
}

/// The file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct File {
    /// The version that wrote it.
    pub(crate) latentc: String,
    pub(crate) target: Target,
    pub(crate) device: Description,
    /// By name.
    pub(crate) kernels: Vec<Kernel>,
}

/// What the device was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Description {
    pub(crate) name: String,
    #[serde(flatten)]
    pub(crate) machine: Machine,
}

/// A kernel of which the device has several ways.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Kernel {
    /// For people: what decides is what it computes.
    pub(crate) name: String,
    /// What it is known by, whatever it is called.
    pub(crate) identity: Hex,
    pub(crate) choices: Vec<Choice>,
}

/// What was chosen for a class of sizes.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Choice {
    /// The largest run-time sizes of the class; the others are more than half of them.
    pub(crate) up_to: BTreeMap<String, usize>,
    /// What is taken.
    pub(crate) way: String,
    /// What the rules would take.
    pub(crate) by_rule: String,
    /// All ways that were tried, the quickest first.
    pub(crate) tried: Vec<Trial>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Trial {
    pub(crate) way: String,
    /// Of a launch, in the median.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) microseconds: Option<f64>,
    /// Why it is not to be taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) refused: Option<String>,
}

/// Choices that were read, or none.
#[derive(Default)]
pub(crate) struct Tuned {
    /// What devices are given.
    pub(crate) tuning: Arc<Tuning>,
    /// The file, and the device that it was made on.
    of: Option<(PathBuf, Description)>,
}

impl TuningArgs {
    /// The same as it was given.
    pub(crate) fn again(&self) -> String {
        let file = self.tuning.as_ref().map(|file| format!(" --tuning {}", file.display()));
        file.unwrap_or_default() + if self.tf32 { " --tf32" } else { "" }
    }

    /// Reads the choices; none if no file is given.
    pub(crate) fn read(&self, target: Target) -> anyhow::Result<Tuned> {
        if self.tf32 && target != Target::Cuda {
            bail!("--tf32: {} has no such products; leave it out, or give --target cuda", target.name());
        }
        let Some(path) = &self.tuning else {
            let tuning = Tuning::default().with_tf32(self.tf32);
            return Ok(Tuned { tuning: Arc::new(tuning), of: None });
        };
        let shown = path.display();
        if target == Target::Host {
            bail!("--tuning {shown}: the host has one way to compute a kernel; give --target wgpu or cuda");
        }
        let text = fs::read_to_string(path)
            .with_context(|| format!("{shown}: give a file that `latentc tune` wrote"))?;
        let file: File =
            serde_json::from_str(&text).with_context(|| format!("{shown}: not a tuning of latentc"))?;
        if file.target != target {
            let (was, is) = (file.target.name(), target.name());
            bail!(
                "{shown}: made for {was}, and this is for {is}; make one with `latentc tune … --target {is}`"
            );
        }
        let mut tuning = Tuning::new(shown.to_string(), file.device.machine).with_tf32(self.tf32);
        for kernel in file.kernels {
            for choice in kernel.choices {
                tuning.insert(kernel.identity.0, choice.up_to, choice.way);
            }
        }
        Ok(Tuned { tuning: Arc::new(tuning), of: Some((path.clone(), file.device)) })
    }
}

impl Tuned {
    /// Says what is used, and if it was made elsewhere.
    pub(crate) fn announce<D: Device>(&self, device: &D) {
        let Some((path, made)) = &self.of else { return };
        let (path, here) = (path.display(), describe(device));
        if here.as_ref() != Some(made) {
            let name = here.map_or_else(|| device.name(), |here| here.name);
            eprintln!(
                "remark: {path} was made on {}, and this is {name}: other ways may be better here",
                made.name
            );
        }
    }

    /// How many of the choices were taken, in a line for people; `None` if no file is given.
    pub(crate) fn said(&self) -> Option<String> {
        let (path, _) = self.of.as_ref()?;
        let (taken, all) = (self.tuning.taken(), self.tuning.len());
        Some(format!("{}: {taken} of its {all} choices are taken", path.display()))
    }

    /// Says it to standard error.
    pub(crate) fn say(&self) {
        if let Some(said) = self.said() {
            eprintln!("{said}");
        }
    }
}

/// The device, if it has ways to choose among.
pub(crate) fn describe<D: Device>(device: &D) -> Option<Description> {
    device.machine().map(|(_, machine)| Description { name: device.name(), machine })
}
