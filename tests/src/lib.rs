//! What the whole-program tests share: reference cases and where they are.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use latentc_codegen::cube::{Machine, Target, Tuning, taken};
use latentc_codegen::program::Kernel;
use latentc_ir::DType;
use latentc_models::config::ModelConfig;
use latentc_models::{Goal, trace};
use latentc_passes::{Pass, Wanted, pipeline};
use latentc_runtime::checkpoint::{Checkpoint, TensorFile};
use latentc_runtime::compiled::{Compiled, compile};

/// A small model and what another implementation computed with it.
pub struct Case {
    /// The folder's name.
    pub name: String,
    /// The folder.
    pub path: PathBuf,
    /// Its configuration.
    pub config: ModelConfig,
    /// Its weights.
    pub checkpoint: Arc<Checkpoint>,
    /// What must come out.
    pub expect: TensorFile,
}

/// The root of the workspace.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this crate is a folder of the workspace")
}

/// The project's own cases, and those that lie beside the project. The latter are skipped by name, out loud, where they are absent.
pub fn cases() -> Vec<Case> {
    let mut found = Vec::new();
    for folder in [workspace().join("tests/cases"), workspace().join("../shared/reference/cases")] {
        let Ok(entries) = std::fs::read_dir(&folder) else {
            println!("SKIPPED: reference cases of {} (no such folder)", folder.display());
            continue;
        };
        let mut paths: Vec<_> = entries
            .filter_map(|e| Some(e.ok()?.path()))
            .filter(|p| p.join("expect.safetensors").exists())
            .collect();
        paths.sort();
        for path in paths {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let config = ModelConfig::from_path(&path).unwrap_or_else(|e| panic!("{name}: {e}"));
            let checkpoint = Arc::new(Checkpoint::open(&path).unwrap_or_else(|e| panic!("{name}: {e}")));
            let expect =
                TensorFile::open(path.join("expect.safetensors")).unwrap_or_else(|e| panic!("{name}: {e}"));
            found.push(Case { name, path, config, checkpoint, expect });
        }
    }
    assert!(!found.is_empty(), "the project has a case of its own");
    found
}

impl Case {
    /// The compiled graph, of logits or of the loss, with weights and activations of that dtype.
    pub fn compile(&self, wanted: impl Into<Wanted>, dtype: DType, passes: &[Pass]) -> Compiled {
        let wanted = wanted.into();
        let goal = if wanted.graph.serves() { Goal::Logits } else { Goal::Loss };
        let traced = trace(&self.config, goal, dtype).unwrap_or_else(|e| panic!("{}: {e}", self.name));
        compile(&traced.module, wanted, passes).unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }

    /// An expected tensor of floats and its shape.
    pub fn floats(&self, name: &str) -> (Vec<f32>, Vec<usize>) {
        let t = self.expect.require(name).unwrap_or_else(|e| panic!("{e}"));
        (t.to_f32().unwrap_or_else(|e| panic!("{e}")), t.shape.to_vec())
    }

    /// An expected tensor of integers and its shape, if the case has it.
    pub fn integers(&self, name: &str) -> Option<(Vec<i64>, Vec<usize>)> {
        let t = self.expect.tensor(name)?;
        Some((t.to_i64().unwrap_or_else(|e| panic!("{e}")), t.shape.to_vec()))
    }
}

/// The compiled graph of a model as it is bundled, in bf16.
pub fn compiled(config: &ModelConfig, wanted: impl Into<Wanted>) -> Compiled {
    let wanted = wanted.into();
    let goal = if wanted.graph.serves() { Goal::Logits } else { Goal::Loss };
    let traced = trace(config, goal, DType::Bf16).expect("the bundled models are right");
    compile(&traced.module, wanted, &pipeline()).expect("the bundled models compile")
}

/// A kernel in each way that is taken with one token, with some, or with many, also where f32 may be rounded as tf32. None twice.
pub fn ways_taken(kernel: &Kernel, target: Target, machine: &Machine) -> Vec<Kernel> {
    let some = [16, 100].map(|n| vec![n; kernel.size_symbols().len()]);
    let mut all: Vec<Kernel> = Vec::new();
    for tf32 in [false, true] {
        let tuning = Tuning::default().with_tf32(tf32);
        for way in taken(kernel, target, machine, &some, &tuning).expect("nothing is tuned") {
            if all.iter().all(|known| known.kind != way.kind) {
                all.push(way);
            }
        }
    }
    all
}

/// What a kernel does and how, whatever it is called.
pub fn nameless(kernel: &Kernel) -> String {
    format!("{:?}\n{}", kernel.kind, kernel.nameless())
}

/// The largest difference of two slices of equal length.
pub fn max_diff(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(x, y)| if x == y { 0.0 } else { (x - y).abs() })
        .fold(0.0, |m, d| if d > m || d.is_nan() { d } else { m })
}
