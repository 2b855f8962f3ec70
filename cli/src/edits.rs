//! `--from DIR`: kernels whose text was changed in a folder that `compile` wrote run as they are there.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use latentc_codegen::cube::Edits;
use latentc_codegen::digest::digest;
use serde::Deserialize;

use crate::manifest;
use crate::target::Target;

/// Where texts of kernels are taken from.
#[derive(clap::Args)]
pub(crate) struct From {
    /// A folder that `latentc compile` wrote: kernels whose text was changed there run as they are there, and the command says which.
    #[arg(long, value_name = "DIR")]
    from: Option<PathBuf>,
}

/// What of `manifest.json` is wanted here.
#[derive(Deserialize)]
struct Manifest {
    latentc: String,
    target: Target,
    kernels: Vec<Kernel>,
    #[serde(default)]
    together: Vec<manifest::Source>,
}

#[derive(Deserialize)]
struct Kernel {
    sources: Vec<manifest::Source>,
}

/// Texts that were changed.
#[derive(Default)]
pub(crate) struct Texts {
    /// What devices are given.
    pub(crate) edits: Arc<Edits>,
    /// The files, in the order of the manifest, each with what the kernel is known by.
    pub(crate) changed: Vec<(String, u64)>,
    dir: Option<PathBuf>,
}

impl From {
    /// The folder, if one is given.
    pub(crate) fn folder(&self) -> Option<&Path> {
        self.from.as_deref()
    }

    /// Reads what was changed; nothing if no folder is given.
    pub(crate) fn read(&self, target: Target) -> anyhow::Result<Texts> {
        let Some(dir) = &self.from else { return Ok(Texts::default()) };
        let shown = dir.display();
        if target == Target::Host {
            bail!(
                "--from {shown}: the host runs the IR, so there is no text to change; give --target wgpu or cuda"
            );
        }
        let manifest = read(dir)?;
        let (version, name) = (env!("CARGO_PKG_VERSION"), target.name());
        if manifest.latentc != version {
            bail!(
                "{shown}: compiled by latentc {}, and this is {version}; compile it again",
                manifest.latentc
            );
        }
        if manifest.target != target {
            let was = manifest.target.name();
            bail!("{shown}: compiled for {was}, and this runs {name}; compile with --target {name}");
        }
        let mut texts = Texts { dir: Some(dir.clone()), ..Texts::default() };
        let mut edits = Edits::default();
        let kernels = manifest.kernels.into_iter().flat_map(|k| k.sources);
        for source in kernels.chain(manifest.together) {
            let file = dir.join(&source.file);
            let cannot = || format!("{}: cannot read the text of a kernel", file.display());
            let text = fs::read_to_string(&file).with_context(cannot)?;
            let (Some(identity), Some(was)) = (source.identity, source.digest) else { continue };
            // One text may serve several kernels.
            let known = texts.changed.iter().any(|(_, known)| *known == identity.0);
            if digest(text.bytes()) != was.0 && !known {
                edits.insert(identity.0, source.file.clone(), source.entry, text);
                texts.changed.push((source.file, identity.0));
            }
        }
        texts.edits = Arc::new(edits);
        Ok(texts)
    }
}

fn read(dir: &Path) -> anyhow::Result<Manifest> {
    let file = dir.join(manifest::FILE);
    let advice = || format!("{}: give a folder that `latentc compile` wrote", file.display());
    let text = fs::read_to_string(&file).with_context(advice)?;
    serde_json::from_str(&text).with_context(|| format!("{}: not a manifest of latentc", file.display()))
}

impl Texts {
    /// What is run in place of what was compiled, in a line for people; `None` if no folder is given.
    pub(crate) fn said(&self) -> Option<String> {
        let dir = self.dir.as_ref()?.display();
        Some(match &self.changed[..] {
            [] => format!("{dir}: no text differs from what was compiled"),
            some => {
                let files: Vec<_> = some.iter().map(|(file, _)| file.as_str()).collect();
                format!("texts changed in {dir}: {}", files.join(", "))
            }
        })
    }

    /// Says it to standard error.
    pub(crate) fn announce(&self) {
        if let Some(said) = self.said() {
            eprintln!("{said}");
        }
    }

    /// Says which of them no launch has wanted.
    pub(crate) fn warn_of_unused(&self) {
        for file in self.edits.unused() {
            eprintln!(
                "warning: {file} was changed, but no launch wanted it: its kernel runs in other ways at these sizes, or elsewhere"
            );
        }
    }
}
