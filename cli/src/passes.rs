//! Which passes a command runs.

use anyhow::{anyhow, bail};
use clap::builder::PossibleValuesParser;
use latentc_passes::{Pass, Without, pipeline, selected};

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
