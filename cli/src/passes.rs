//! Which passes a command runs.

use anyhow::{anyhow, bail};
use clap::builder::PossibleValuesParser;
use latentc_ir::Module;
use latentc_passes::validate::{INSTANCES, validate};
use latentc_passes::{Context, Pass, Without, pipeline, selected};
use serde::Serialize;

use crate::progress::Shown;

/// A pipeline with some of its passes.
#[derive(clap::Args)]
pub(crate) struct Choice {
    /// Leave these passes out, to see what they are good for.
    #[arg(long, value_delimiter = ',', value_name = "PASS,…", value_parser = PossibleValuesParser::new(names(false)))]
    skip: Vec<String>,
    /// Run these passes only, and those without which there are no kernels.
    #[arg(long, value_delimiter = ',', value_name = "PASS,…", conflicts_with = "skip",
          value_parser = PossibleValuesParser::new(names(true)))]
    passes: Vec<String>,
}

impl Choice {
    /// The passes, in the order of the pipeline.
    pub(crate) fn pipeline(&self) -> Vec<Pass> {
        selected(|pass| {
            let named = |list: &[String]| list.iter().any(|name| name == pass.name);
            !named(&self.skip) && (self.passes.is_empty() || named(&self.passes))
        })
    }

    /// As it is asked for on a command line.
    pub(crate) fn words(&self) -> String {
        let list = |flag: &str, names: &[String]| match names {
            [] => String::new(),
            some => format!(" {flag} {}", some.join(",")),
        };
        list("--skip", &self.skip) + &list("--passes", &self.passes)
    }

    /// The passes up to the one of that name.
    ///
    /// # Errors
    /// If it is left out.
    pub(crate) fn up_to(&self, last: &str) -> anyhow::Result<Vec<Pass>> {
        let mut passes = self.pipeline();
        let Some(at) = passes.iter().position(|p| p.name == last) else {
            bail!("there is nothing after `{last}`, since that pass is left out");
        };
        passes.truncate(at + 1);
        Ok(passes)
    }
}

/// The names of the pipeline's passes, of all or of those that can be left out.
pub(crate) fn names(all: bool) -> Vec<&'static str> {
    let named = |p: &Pass| all || !matches!(p.without, Without::Impossible);
    pipeline().iter().filter(|p| named(p)).map(|p| p.name).collect()
}

/// The pass of that name.
///
/// # Errors
/// If there is none; with all names.
pub(crate) fn named(name: &str) -> anyhow::Result<Pass> {
    pipeline()
        .into_iter()
        .find(|p| p.name == name)
        .ok_or_else(|| anyhow!("unknown pass `{name}`; known: {}", names(true).join(", ")))
}

/// What came of running each pass's program before and after it on the same numbers.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Validation {
    /// Applications of passes, those included that changed nothing.
    pub(crate) passes: usize,
    /// Instances that each was tried on.
    pub(crate) instances: u64,
    /// Those whose programs could not be compared.
    pub(crate) not_compared: Vec<NotCompared>,
    /// What has been validated: variants of a graph have their first stages in common.
    #[serde(skip)]
    done: Vec<(&'static str, Module, Module)>,
}

/// A pass that could not be validated.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct NotCompared {
    graph: &'static str,
    pass: &'static str,
    why: String,
}

impl Validation {
    /// Validates the passes that led from one stage to the next.
    ///
    /// # Errors
    /// The smallest program that one of them spoils, as text that shows it again.
    pub(crate) fn add(
        &mut self,
        passes: &[Pass],
        cx: &Context,
        stages: &[(&'static str, Module)],
        shown: &Shown,
    ) -> anyhow::Result<()> {
        self.instances = INSTANCES;
        for (pass, two) in passes.iter().zip(stages.windows(2)) {
            let (graph, (_, before), (_, after)) = (cx.graph.name(), &two[0], &two[1]);
            if self.done.iter().any(|(name, b, a)| *name == pass.name && b == before && a == after) {
                continue;
            }
            shown.say(format!("validating {graph}, {}", pass.name));
            let unknown = validate(pass, cx, before, after)?;
            self.passes += 1;
            self.not_compared.extend(unknown.map(|why| NotCompared { graph, pass: pass.name, why }));
            self.done.push((pass.name, before.clone(), after.clone()));
        }
        Ok(())
    }

    /// In a line, and a line for each that could not be compared.
    pub(crate) fn summary(&self) -> String {
        let (passes, instances) = (self.passes, self.instances);
        let s = if passes == 1 { "" } else { "es" };
        let mut text = format!("{passes} pass{s} validated on {instances} small instances each");
        for NotCompared { graph, pass, why } in &self.not_compared {
            text += &format!("\n  but for {pass} ({graph}), which could not be: {why}");
        }
        text
    }
}
