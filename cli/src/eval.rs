//! `latentc eval`: what a model says of given texts: all logits, and the loss.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{anyhow, bail};
use clap::ValueEnum;
use latentc_codegen::device::Device;
use latentc_passes::Graph;
use latentc_runtime::checkpoint::{DType, TensorFile, TensorView, write_tensors};
use latentc_runtime::eval::{Batch, Reading};
use serde::Serialize;

use crate::edits::Texts;
use crate::gradient::Gradients;
use crate::held::HeldArgs;
use crate::model::{self, DTypeArg, Model};
use crate::target::{Job, Target, with_texts};
use crate::tuning::TuningArgs;
use crate::{print, print_json, progress, size};

/// Computes the logits of given texts, and the mean loss of their next tokens.
///
/// IN holds `input_ids` [b, s] of int64 or int32 and, where texts differ in length, `attention_mask` of the same shape, 1 on
/// tokens and 0 on padding. OUT gets `logits` [b, s, vocabulary], 0 at padding, and `loss`, both f32. With `--grad` or
/// `--adamw-step` it gets, in the place of logits, `loss`, `grad_norm` and one tensor for each of the checkpoint's, in f32.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A folder with config.json and weights.
    model: PathBuf,
    /// The texts.
    #[arg(long, value_name = "IN")]
    inputs: PathBuf,
    /// The file to write.
    #[arg(long, value_name = "OUT")]
    out: PathBuf,
    /// Read texts at once, or token by token.
    #[arg(long, value_enum, default_value = "prefill")]
    graph: EvalGraph,
    /// With `--graph decode`: read so many positions at once and the others one by one; 1 if not given.
    #[arg(long, value_name = "N")]
    prefill: Option<usize>,
    /// Read so many positions at once at most; if not given, as many as memory beside the weights allows: docs/peers.md.
    #[arg(long, value_name = "N", value_parser = size())]
    prefill_chunk: Option<u64>,
    /// Write the gradient of the loss by each tensor NAME of the checkpoint as `grad.NAME`, before any clipping.
    #[arg(long, conflicts_with_all = ["graph", "prefill", "prefill_chunk"])]
    grad: bool,
    /// Write what one step of AdamW makes of each tensor NAME of the checkpoint as `adamw1.NAME`: rate 1e-3, betas 0.9 and 0.95,
    /// weight decay 0.1, gradients clipped to the norm 1.
    #[arg(long, conflicts_with_all = ["graph", "prefill", "prefill_chunk"])]
    adamw_step: bool,
    /// What to run on.
    #[arg(long, value_enum, default_value = "host")]
    target: Target,
    /// Weights and activations; the configuration's if not given. The host computes in f32 in any case.
    #[arg(long, value_enum)]
    dtype: Option<DTypeArg>,
    #[command(flatten)]
    held: HeldArgs,
    #[command(flatten)]
    tuning: TuningArgs,
    /// Print the summary as one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum EvalGraph {
    Prefill,
    Decode,
}

#[derive(Serialize)]
struct Report {
    rows: usize,
    columns: usize,
    /// `None` if no text has two tokens.
    loss: Option<f64>,
    target: &'static str,
    device: String,
    seconds: f64,
}

/// An evaluation whose arguments were checked.
struct Eval<'a> {
    args: &'a Args,
    model: Model,
    batch: Batch,
    shape: [usize; 2],
}

pub(crate) fn eval(args: &Args) -> anyhow::Result<()> {
    let model = model::open(&args.model)?;
    if args.prefill.is_some() && args.graph != EvalGraph::Decode {
        bail!("--prefill says how much is read before decoding; give --graph decode too");
    }
    // Better now than after the work.
    let parent = args.out.parent().filter(|p| !p.as_os_str().is_empty());
    if let Some(parent) = parent.filter(|p| !p.is_dir()) {
        bail!("{}: cannot write here: {} is no folder", args.out.display(), parent.display());
    }
    let (batch, shape) = read_inputs(args, &model)?;
    let tuned = args.tuning.read(args.target)?;
    if args.grad || args.adamw_step {
        let dtype = model.dtype(args.dtype);
        let job = Gradients {
            folder: &args.model,
            out: &args.out,
            target: args.target,
            dtype,
            json: args.json,
            model,
            batch,
            wants: (args.grad, args.adamw_step),
        };
        return with_texts(args.target, &Texts::default(), &tuned, job);
    }
    with_texts(args.target, &Texts::default(), &tuned, Eval { args, model, batch, shape })
}

/// The texts and the shape of their ids.
fn read_inputs(args: &Args, model: &Model) -> anyhow::Result<(Batch, [usize; 2])> {
    let file = TensorFile::open(&args.inputs)?;
    let name = args.inputs.display();
    let Some(ids) = file.tensor("input_ids") else {
        let held: Vec<_> = file.names().map(|n| format!("`{n}`")).collect();
        let held = if held.is_empty() { "nothing".to_owned() } else { held.join(", ") };
        bail!("{name}: no tensor `input_ids` [b, s] here; it holds {held}");
    };
    if !matches!(ids.dtype, DType::I64 | DType::I32) {
        bail!("{name}: `input_ids` is {}, token ids are i64 or i32", ids.dtype);
    }
    let &[rows, columns] = ids.shape else {
        bail!(
            "{name}: `input_ids` has the shape {:?}, but must be [b, s]: texts, and tokens of each",
            ids.shape
        );
    };
    let mask = file.tensor("attention_mask").map(|mask| read_mask(args, &mask, ids.shape)).transpose()?;
    let ids = ids.to_i64()?;
    let common = model.config.common();
    for (n, &id) in ids.iter().enumerate() {
        let is_token = mask.as_ref().is_none_or(|m| m[n] != 0);
        if is_token && !usize::try_from(id).is_ok_and(|id| id < common.vocab_size) {
            let (r, c) = (n / columns, n % columns);
            bail!("{name}: input_ids[{r}, {c}] is {id}, outside of the vocabulary of {}", common.vocab_size);
        }
    }
    let batch = Batch::new(&ids, mask.as_deref(), rows, columns).map_err(|e| anyhow!("{name}: {e}"))?;
    let longest = batch.longest();
    if longest == 0 {
        bail!("{name}: there is no token in `input_ids` {:?}", [rows, columns]);
    }
    let most = common.max_position_embeddings;
    if longest > most {
        bail!(
            "{name}: a text of {longest} tokens goes beyond the {most} positions of the model \
             (max_position_embeddings)"
        );
    }
    Ok((batch, [rows, columns]))
}

fn read_mask(args: &Args, mask: &TensorView<'_>, shape: &[usize]) -> anyhow::Result<Vec<i64>> {
    let name = args.inputs.display();
    if mask.shape != shape {
        bail!(
            "{name}: `attention_mask` has the shape {:?}, `input_ids` {shape:?}; they must be equal",
            mask.shape
        );
    }
    if !matches!(mask.dtype, DType::I64 | DType::I32 | DType::U8 | DType::Bool) {
        bail!("{name}: `attention_mask` is {}, but must be i64, i32, u8 or bool", mask.dtype);
    }
    Ok(mask.to_i64()?)
}

impl Job for Eval<'_> {
    fn on<D: Device>(self, device: D) -> anyhow::Result<()> {
        let Eval { args, model, batch, shape: [rows, columns] } = self;
        let (graphs, reading): (&[Graph], _) = match args.graph {
            EvalGraph::Prefill => (&[Graph::Prefill], Reading::Whole),
            EvalGraph::Decode => {
                let reading = Reading::TokenByToken { prefill: args.prefill.unwrap_or(1) };
                (&[Graph::Prefill, Graph::Decode], reading)
            }
        };
        let graphs: Vec<_> = graphs.iter().map(|&g| args.held.of(g)).collect();
        let mut engine = model.load(&args.model, device, model.dtype(args.dtype), &graphs)?;
        engine.set_chunk(args.prefill_chunk.map(|tokens| tokens as usize));
        let start = Instant::now();
        let logits = {
            let _spinner = progress::spinner("evaluating");
            batch.logits(&mut engine, reading)?
        };
        let loss = batch.loss(&logits);
        let seconds = start.elapsed().as_secs_f64();

        let bytes: Vec<u8> = logits.data.iter().flat_map(|x| x.to_le_bytes()).collect();
        // The mean of nothing is no number, as in torch.
        let mean = (loss.unwrap_or(f64::NAN) as f32).to_le_bytes();
        let shape = [rows, columns, logits.vocab];
        let tensors =
            [("logits", DType::F32, &shape[..], &bytes[..]), ("loss", DType::F32, &[][..], &mean[..])];
        write_tensors(&args.out, tensors, &BTreeMap::new())?;

        let (target, device) = (args.target.name(), engine.device().name());
        if args.json {
            return print_json(&Report { rows, columns, loss, target, device, seconds });
        }
        let loss =
            loss.map_or("no loss, since no text has two tokens".to_owned(), |x| format!("loss {x:.6}"));
        print(&format!(
            "{}: {rows} x {columns} tokens, {loss}, {seconds:.2} s on {device}\n",
            args.out.display()
        ))
    }
}
