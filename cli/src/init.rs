//! `latentc init`: a model folder with random weights.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use latentc_models::config;
use latentc_passes::Graph;
use latentc_runtime::checkpoint::DType;
use latentc_runtime::init::Init;
use serde_json::Value;

use crate::folder::NewFolder;
use crate::model::{DTypeArg, Model};
use crate::{print, progress};

/// Makes a model folder in Hugging Face form with random weights: config.json and safetensors.
///
/// Matrices are drawn from a normal distribution with the configuration's initializer_range, norms are 1. A tokenizer.json that lies
/// beside the configuration comes along.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A folder, a config.json, or a bundled name.
    config: String,
    /// The folder to make; there must be nothing in it.
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// The same seed gives the same weights.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// What the weights are stored in; the configuration's if not given.
    #[arg(long, value_enum)]
    dtype: Option<DTypeArg>,
}

pub(crate) fn init(args: &Args) -> anyhow::Result<()> {
    let model = Model::find(&args.config)?;
    let common = model.config.common();
    let mut json = model.config.to_json();
    if let (Some(dtype), Value::Object(map)) = (args.dtype, &mut json) {
        map.insert("torch_dtype".to_owned(), dtype.torch_name().into());
    }
    let dtype = match (args.dtype, common.dtype) {
        (Some(DTypeArg::F32), _) | (None, config::DType::F32) => DType::F32,
        (Some(DTypeArg::F16), _) | (None, config::DType::F16) => DType::F16,
        (Some(DTypeArg::Bf16), _) | (None, config::DType::BF16) => DType::BF16,
    };
    let module = model.trace(Graph::Prefill, model.dtype(args.dtype))?;
    let inventory = module.inventory().map_err(anyhow::Error::msg)?;

    let folder = NewFolder::begin(&args.out, |_| false, "init overwrites nothing")?;
    folder.write("config.json", &(serde_json::to_string_pretty(&json)? + "\n"))?;
    let given = Path::new(&args.config);
    // A bundled name is no path.
    let beside = if given.is_file() { given.parent() } else { Some(given).filter(|dir| dir.is_dir()) };
    if let Some(tokenizer) = beside.map(|dir| dir.join("tokenizer.json")).filter(|file| file.is_file()) {
        let bytes = fs::read(&tokenizer).with_context(|| format!("{}: cannot read", tokenizer.display()))?;
        folder.write("tokenizer.json", &bytes)?;
    }
    let total = inventory.elements() * dtype.bytes() as u64;
    let bar = progress::bytes("writing weights", total);
    let with = Init { seed: args.seed, std: common.initializer_range, dtype };
    latentc_runtime::init::init(folder.path(), &inventory, with, |bytes| bar.advance(bytes))?;
    folder.publish()?;
    drop(bar);
    print(&format!(
        "{}: {} tensors, {} parameters, {total} bytes\n",
        args.out.display(),
        inventory.tensors.len(),
        inventory.elements()
    ))
}
