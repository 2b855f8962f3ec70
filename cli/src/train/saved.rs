//! Checkpoints of a training.
//!
//! `OUT/checkpoints/STEP` is a model folder with the optimiser's state beside the weights. It is written under a temporary name and
//! renamed when all of it is on disk, so a folder of that name is complete, whatever happened; the one before it is removed two
//! checkpoints later. The files of OUT itself are links to those of the last one, each replaced by a rename: OUT can be read
//! at any time, and loses nothing when the process is killed.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use latentc_codegen::device::Device;
use latentc_runtime::checkpoint::DType;
use latentc_runtime::train::{Trainer, save};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::settings::Settings;
use crate::folder::{NewFolder, sync};
use crate::model::{DTypeArg, Model};

const FOLDER: &str = "checkpoints";
const STATE: &str = "state.json";

/// So many checkpoints are kept.
const KEPT: usize = 2;

/// What belongs to a model beside its weights, if it is there.
const BESIDE: [&str; 3] = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"];

/// What a checkpoint says of itself: `state.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Saved {
    /// Steps made.
    pub(super) step: u64,
    /// Of the data, so that a run goes on with those only.
    pub(super) fingerprint: String,
    pub(super) settings: Settings,
}

/// The checkpoints of a folder.
pub(super) struct Saves {
    out: PathBuf,
    /// Complete ones, oldest first.
    steps: Vec<u64>,
    /// Files that every checkpoint has a copy of.
    files: Vec<(String, Vec<u8>)>,
    dtype: DType,
}

impl Saves {
    /// Begins a new folder, where there must be nothing, or what a run left that was killed before its first checkpoint.
    pub(super) fn begin(out: &Path) -> anyhow::Result<Saves> {
        let saves = Saves { out: out.to_owned(), steps: Vec::new(), files: Vec::new(), dtype: DType::F32 };
        let shown = out.display();
        match fs::read_dir(out) {
            Ok(mut entries) => {
                let ours = |e: &io::Result<fs::DirEntry>| e.as_ref().is_ok_and(|e| e.file_name() == FOLDER);
                if !entries.all(|e| ours(&e)) || !saves.complete()?.is_empty() {
                    bail!(
                        "{shown}: the folder is not empty and training overwrites nothing; give another folder, remove it, \
                         or go on with --resume"
                    );
                }
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e).with_context(|| format!("{shown}: cannot write the output folder here")),
        }
        saves.clean()?;
        Ok(saves)
    }

    /// Opens a folder that has checkpoints.
    pub(super) fn open(out: &Path) -> anyhow::Result<Saves> {
        let mut saves =
            Saves { out: out.to_owned(), steps: Vec::new(), files: Vec::new(), dtype: DType::F32 };
        saves.steps = saves.complete()?;
        if saves.steps.is_empty() {
            bail!("{}: there is no checkpoint here to go on from; begin anew with -o", out.display());
        }
        saves.clean()?;
        Ok(saves)
    }

    /// OUT.
    pub(super) fn folder(&self) -> &Path {
        &self.out
    }

    /// Whether there is a checkpoint.
    pub(super) fn any(&self) -> bool {
        !self.steps.is_empty()
    }

    /// The folder of the last checkpoint, and what it says. Every later one will have its configuration and tokenizer.
    pub(super) fn last(&mut self) -> anyhow::Result<(PathBuf, Saved)> {
        let step = self.steps.last().copied().unwrap_or(0);
        let folder = self.at(step);
        let file = folder.join(STATE);
        let text = fs::read_to_string(&file).with_context(|| format!("{}: cannot read", file.display()))?;
        let saved: Saved =
            serde_json::from_str(&text).with_context(|| format!("{}: damaged", file.display()))?;
        if saved.step != step {
            bail!("{}: it says to be of step {}; rename the folder back", file.display(), saved.step);
        }
        let model = crate::model::open(&folder)?;
        self.describe(&folder, &model, None)?;
        // A run may have been killed before the last of these was linked.
        self.link(&folder)?;
        Ok((folder, saved))
    }

    /// Takes configuration and tokenizer from a model folder.
    pub(super) fn describe(
        &mut self,
        from: &Path,
        model: &Model,
        dtype: Option<DTypeArg>,
    ) -> anyhow::Result<()> {
        let mut json = model.config.to_json();
        if let (Some(dtype), Value::Object(map)) = (dtype, &mut json) {
            map.insert("torch_dtype".to_owned(), dtype.torch_name().into());
        }
        self.dtype = match model.dtype(dtype) {
            latentc_ir::DType::Bf16 => DType::BF16,
            latentc_ir::DType::F16 => DType::F16,
            latentc_ir::DType::F32 | latentc_ir::DType::F64 => DType::F32,
            latentc_ir::DType::I32 | latentc_ir::DType::Bool => bail!("weights are floats"),
        };
        let config = serde_json::to_string_pretty(&json)? + "\n";
        self.files = vec![("config.json".to_owned(), config.into_bytes())];
        for name in BESIDE {
            let path = from.join(name);
            match fs::read(&path) {
                Ok(bytes) => self.files.push((name.to_owned(), bytes)),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e).with_context(|| format!("{}: cannot read", path.display())),
            }
        }
        Ok(())
    }

    /// Writes a checkpoint, and makes it the one that OUT shows.
    pub(super) fn write<D: Device>(&mut self, saved: &Saved, trainer: &mut Trainer<D>) -> anyhow::Result<()> {
        if self.steps.last() == Some(&saved.step) {
            return Ok(());
        }
        let place = self.at(saved.step);
        let folder = NewFolder::begin(&place, |_| false, "a checkpoint overwrites nothing")?;
        for (name, bytes) in &self.files {
            folder.write(name, bytes)?;
        }
        let state = trainer.state()?;
        save::write(folder.path(), trainer.places(), &state, self.dtype)?;
        folder.write(STATE, &(serde_json::to_string_pretty(saved)? + "\n"))?;
        folder.publish()?;
        self.link(&place)?;
        self.steps.push(saved.step);
        while self.steps.len() > KEPT {
            let oldest = self.steps.remove(0);
            let old = self.at(oldest);
            // What is half removed must not have the name of a checkpoint.
            let aside = hidden(&old, "old");
            let cannot = || format!("{}: cannot remove an old checkpoint", old.display());
            fs::rename(&old, &aside).with_context(cannot)?;
            fs::remove_dir_all(&aside).with_context(cannot)?;
        }
        Ok(())
    }

    fn at(&self, step: u64) -> PathBuf {
        self.out.join(FOLDER).join(format!("{step:08}"))
    }

    /// The steps of all complete checkpoints, ascending.
    fn complete(&self) -> anyhow::Result<Vec<u64>> {
        let entries = match fs::read_dir(self.out.join(FOLDER)) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e).with_context(|| format!("{}: cannot read", self.out.display())),
        };
        let number = |e: io::Result<fs::DirEntry>| e.ok()?.file_name().to_str()?.parse::<u64>().ok();
        let mut steps: Vec<u64> = entries.filter_map(number).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// Removes what a run left that was killed: names that begin with a dot and end as ours do.
    fn clean(&self) -> anyhow::Result<()> {
        for folder in [self.out.clone(), self.out.join(FOLDER)] {
            let Ok(entries) = fs::read_dir(&folder) else { continue };
            for path in entries.filter_map(|e| Some(e.ok()?.path())) {
                let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
                if !(name.starts_with('.') && (name.ends_with(".tmp") || name.ends_with(".old"))) {
                    continue;
                }
                let gone = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
                gone.with_context(|| format!("{}: cannot remove what a killed run left", path.display()))?;
            }
        }
        Ok(())
    }

    /// Makes the files of OUT those of a checkpoint.
    fn link(&self, checkpoint: &Path) -> anyhow::Result<()> {
        let cannot = || format!("{}: cannot show the new checkpoint here", self.out.display());
        let entries = fs::read_dir(checkpoint).with_context(cannot)?;
        let mut files: Vec<PathBuf> =
            entries.map(|e| Ok(e?.path())).collect::<io::Result<_>>().with_context(cannot)?;
        // Weights come last: where there are weights, there is all that they need.
        let weights =
            |file: &Path| file.file_name().is_some_and(|n| n.to_string_lossy().starts_with("model"));
        files.sort_by_key(|file| (weights(file), file.clone()));
        for file in files {
            let place = self.out.join(file.file_name().unwrap_or_default());
            let new = hidden(&place, "tmp");
            // Not every file system has links.
            fs::hard_link(&file, &new).or_else(|_| fs::copy(&file, &new).map(drop)).with_context(cannot)?;
            fs::rename(&new, &place).with_context(cannot)?;
            // A rename between two names of one file leaves both.
            let _ = fs::remove_file(&new);
        }
        sync(&self.out);
        Ok(())
    }
}

/// A name beside another for what is not there yet, or no longer.
pub(super) fn hidden(path: &Path, why: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{why}"))
}
