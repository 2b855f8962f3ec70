//! `latentc run`: a model continues a text.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use latentc_codegen::device::Device;
use latentc_passes::Graph;
use latentc_runtime::generate::{Sampler, generate};
use serde::Serialize;
use tokenizers::Tokenizer;

use crate::edits;
use crate::held::HeldArgs;
use crate::model::{self, DTypeArg, Model};
use crate::target::{Job, Target, with_texts};
use crate::tuning::TuningArgs;
use crate::{print_json, size};

/// Continues a prompt, token by token. The likeliest token is taken unless a temperature is given.
///
/// Tokens appear as they are made: as text if the model folder has a tokenizer.json, else as ids.
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("text").required(true).args(["prompt", "prompt_ids"]))]
pub(crate) struct Args {
    /// A folder with config.json and weights.
    model: PathBuf,
    /// The text to continue; needs a tokenizer.json.
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// The tokens to continue, with commas between them.
    #[arg(long, value_name = "IDS", allow_hyphen_values = true)]
    prompt_ids: Option<String>,
    /// How many tokens to make at most.
    #[arg(long, value_name = "N")]
    steps: usize,
    /// What to run on.
    #[arg(long, value_enum, default_value = "host")]
    target: Target,
    /// Weights and activations; the configuration's if not given. The host computes in f32 in any case.
    #[arg(long, value_enum)]
    dtype: Option<DTypeArg>,
    #[command(flatten)]
    held: HeldArgs,
    /// Pages of the pool, if it is not to have as many as the prompt and all steps fill.
    #[arg(long, value_name = "PAGES", requires = "cache_page", value_parser = clap::value_parser!(u64).range(1..=1 << 30))]
    cache_pool: Option<u64>,
    /// Read so many tokens of the prompt at once at most; if not given, as many as memory beside the weights allows: docs/peers.md.
    #[arg(long, value_name = "N", value_parser = size())]
    prefill_chunk: Option<u64>,
    #[command(flatten)]
    from: edits::From,
    #[command(flatten)]
    tuning: TuningArgs,
    /// Draw tokens, from a flatter distribution the higher it is; 0 takes the likeliest.
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_hyphen_values = true)]
    temperature: f64,
    /// Draw only from the likeliest tokens that together have this probability.
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_hyphen_values = true)]
    top_p: f64,
    /// The same seed draws the same tokens.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Go on after the token that ends a text.
    #[arg(long)]
    ignore_eos: bool,
    /// Print one JSON object at the end, nothing before it.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    prompt_ids: Vec<i32>,
    /// The new tokens.
    ids: Vec<i32>,
    /// The new text, if there is a tokenizer.
    text: Option<String>,
    target: &'static str,
    device: String,
    /// From the start of the run to the first token.
    prefill_s: f64,
    /// Of the tokens after the first.
    decode_tokens_per_s: Option<f64>,
}

/// A run whose arguments were checked.
struct Run<'a> {
    args: &'a Args,
    model: Model,
    tokenizer: Option<Tokenizer>,
    prompt: Vec<i32>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let model = model::open(&args.model)?;
    if !(args.temperature.is_finite() && args.temperature >= 0.0) {
        bail!("--temperature is {}, but must be a finite number, 0 or more", args.temperature);
    }
    if !(args.top_p > 0.0 && args.top_p <= 1.0) {
        bail!("--top-p is {}, but must be greater than 0 and at most 1", args.top_p);
    }
    let tokenizer = tokenizer(&args.model)?;
    let prompt = match (&args.prompt, &args.prompt_ids, &tokenizer) {
        (_, Some(ids), _) => parse_ids(ids)?,
        (Some(_), None, None) => bail!(
            "{}: there is no tokenizer.json here, so a text cannot be read; give --prompt-ids",
            args.model.display()
        ),
        (Some(text), None, Some(tokenizer)) => {
            let encoded = tokenizer.encode(text.as_str(), true).map_err(|e| anyhow!("--prompt: {e}"))?;
            let ids: Result<Vec<_>, _> = encoded.get_ids().iter().map(|&id| i32::try_from(id)).collect();
            ids.context("--prompt: a token id of tokenizer.json does not fit 31 bits")?
        }
        (None, None, _) => Vec::new(),
    };
    let common = model.config.common();
    if prompt.is_empty() {
        bail!("the prompt is empty; a text begins with at least one token");
    }
    if let Some(id) = prompt.iter().find(|&&id| id < 0 || id as usize >= common.vocab_size) {
        bail!("token id {id} of the prompt is outside of the vocabulary of {}", common.vocab_size);
    }
    let most = common.max_position_embeddings;
    if prompt.len().checked_add(args.steps).is_none_or(|n| n > most) {
        bail!(
            "a prompt of {} tokens and {} steps go beyond the {most} positions of the model \
             (max_position_embeddings); give fewer steps or a shorter prompt",
            prompt.len(),
            args.steps
        );
    }
    let (texts, tuned) = (args.from.read(args.target)?, args.tuning.read(args.target)?);
    with_texts(args.target, &texts, &tuned, Run { args, model, tokenizer, prompt })
}

/// The tokenizer of a model folder, if it has one.
pub(crate) fn tokenizer(folder: &Path) -> anyhow::Result<Option<Tokenizer>> {
    let file = folder.join("tokenizer.json");
    if !file.exists() {
        return Ok(None);
    }
    let tokenizer = Tokenizer::from_file(&file).map_err(|e| anyhow!("{}: {e}", file.display()))?;
    Ok(Some(tokenizer))
}

fn parse_ids(text: &str) -> anyhow::Result<Vec<i32>> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let id = |word: &str| {
        let word = word.trim();
        word.parse()
            .map_err(|_| anyhow!("--prompt-ids: `{word}` is no token id; write numbers with commas between"))
    };
    text.split(',').map(id).collect()
}

impl Job for Run<'_> {
    fn on<D: Device>(self, device: D) -> anyhow::Result<()> {
        let Run { args, model, tokenizer, prompt } = self;
        let dtype = model.dtype(args.dtype);
        let mut engine = model.load(
            &args.model,
            device,
            dtype,
            &[Graph::Prefill, Graph::Decode].map(|g| args.held.of(g)),
        )?;
        engine.set_chunk(args.prefill_chunk.map(|tokens| tokens as usize));
        engine.set_pool_pages(args.cache_pool.map(|pages| pages as usize));
        let ends: &[u32] = if args.ignore_eos { &[] } else { &model.config.common().eos_token_ids };
        let mut sampler = Sampler::new(args.temperature, args.top_p, args.seed);
        let mut writer = Writer::new(tokenizer.as_ref(), args.json);
        let mut trouble = None;
        let start = Instant::now();
        let mut times: Vec<Duration> = Vec::new();
        let ids = generate(&mut engine, &prompt, args.steps, &mut sampler, |id| {
            times.push(start.elapsed());
            let end = u32::try_from(id).is_ok_and(|id| ends.contains(&id));
            match writer.token(id) {
                Ok(()) => !end,
                Err(e) => {
                    trouble = Some(e);
                    false
                }
            }
        })?;
        if let Some(trouble) = trouble {
            return Err(trouble);
        }
        writer.end()?;
        if !args.json {
            return Ok(());
        }
        let text = match &tokenizer {
            Some(tokenizer) => {
                let ids: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
                Some(tokenizer.decode(&ids, true).map_err(|e| anyhow!("tokenizer.json: {e}"))?)
            }
            None => None,
        };
        let first = times.first().copied().unwrap_or_default();
        let decoding = times.last().copied().unwrap_or_default().saturating_sub(first).as_secs_f64();
        print_json(&Report {
            prompt_ids: prompt,
            text,
            target: args.target.name(),
            device: engine.device().name(),
            prefill_s: first.as_secs_f64(),
            decode_tokens_per_s: (decoding > 0.0).then(|| (ids.len() - 1) as f64 / decoding),
            ids,
        })
    }
}

type Decoder<'t> = tokenizers::DecodeStream<
    't,
    tokenizers::ModelWrapper,
    tokenizers::NormalizerWrapper,
    tokenizers::PreTokenizerWrapper,
    tokenizers::PostProcessorWrapper,
    tokenizers::DecoderWrapper,
>;

/// Shows tokens as they come.
struct Writer<'t> {
    quiet: bool,
    /// Holds back the beginning of a character that several tokens make.
    decoder: Option<Decoder<'t>>,
    begun: bool,
}

impl<'t> Writer<'t> {
    fn new(tokenizer: Option<&'t Tokenizer>, quiet: bool) -> Writer<'t> {
        Writer { quiet, decoder: tokenizer.map(|t| t.decode_stream(true)), begun: false }
    }

    fn token(&mut self, id: i32) -> anyhow::Result<()> {
        if self.quiet {
            return Ok(());
        }
        let text = match &mut self.decoder {
            Some(decoder) => {
                decoder.step(id as u32).map_err(|e| anyhow!("tokenizer.json: {e}"))?.unwrap_or_default()
            }
            None if self.begun => format!(" {id}"),
            None => id.to_string(),
        };
        self.begun = true;
        crate::print(&text)
    }

    fn end(&self) -> anyhow::Result<()> {
        if self.begun {
            writeln!(io::stdout())?;
        }
        Ok(())
    }
}
