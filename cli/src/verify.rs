//! `latentc verify`: whether a text in the IR's format is a program.

use std::path::PathBuf;

use anyhow::{Context, anyhow};
use latentc_ir::Module;

use crate::{Rendered, colours, print};

/// Parses and verifies IR: text, or JSON if the name ends in .json. Errors point at their places.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A file as `dump` and `compile` write it.
    file: PathBuf,
}

pub(crate) fn verify(args: &Args) -> anyhow::Result<()> {
    let name = args.file.display().to_string();
    let text = std::fs::read_to_string(&args.file).with_context(|| format!("{name}: cannot read"))?;
    let module = if args.file.extension().is_some_and(|e| e == "json") {
        Module::from_json(&text).map_err(|e| anyhow!("{name}: {e}"))?
    } else {
        latentc_ir::check(&name, &text)
            .map_err(|e| Rendered(if colours() { e.render_in_colour() } else { e.render() }))?
    };
    let insts: usize = module.functions.iter().map(|f| f.body.len()).sum();
    print(&format!("{name}: ok, {} functions, {insts} instructions\n", module.functions.len()))
}
