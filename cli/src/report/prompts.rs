//! `latentc report --graph prefill`: what reading prompts has in memory, and in chunks of how many tokens they are read.

use anyhow::{Context, bail};
use latentc_ir::DType;
use latentc_passes::{Graph, Wanted, pipeline};
use latentc_runtime::chunks::Memory;
use serde::Serialize;

use super::Args;
use super::step::mib;
use crate::model::Model;
use crate::table::{grouped, table};
use crate::{print, print_json};

#[derive(Serialize)]
struct Report {
    target: &'static str,
    dtype: &'static str,
    /// What weights are held in.
    weights: &'static str,
    models: Vec<Prompts>,
}

#[derive(Serialize)]
struct Prompts {
    model: String,
    /// For each number of sequences and of tokens of each.
    runs: Vec<Sized>,
}

#[derive(Serialize)]
struct Sized {
    batch: u64,
    context: u64,
    #[serde(flatten)]
    memory: Memory,
}

pub(super) fn report(args: &Args) -> anyhow::Result<()> {
    let not_here =
        [("--function", args.function.is_some()), ("--memory-budget", args.memory_budget.is_some())];
    if let Some((flag, _)) = not_here.into_iter().find(|(_, given)| *given) {
        bail!("{flag} is for --graph train");
    }
    let models = [Some(&args.model), args.vs.as_ref()].into_iter().flatten();
    let models = models.map(|name| prompts(&Model::find(name)?, args)).collect::<anyhow::Result<Vec<_>>>()?;
    let dtype = DType::Bf16.name();
    let weights = args.weights.name().unwrap_or(dtype);
    let report = Report { target: args.target.name(), dtype, weights, models };
    if args.json { print_json(&report) } else { print(&text(&report)) }
}

fn prompts(model: &Model, args: &Args) -> anyhow::Result<Prompts> {
    let wanted = Wanted { weights: args.weights.form(), ..Wanted::from(Graph::Prefill) };
    let programs = model.compile(wanted, DType::Bf16, &pipeline())?;
    let batches = args.batches(&[1]);
    let sizes =
        args.contexts().iter().flat_map(|&context| batches.iter().map(move |&batch| (batch, context)));
    let runs = sizes.map(|(batch, context)| {
        let memory = Memory::of(&programs, (batch, context), args.prefill_chunk, &args.target.layout())
            .with_context(|| format!("{batch} prompts of {context} tokens in {}", model.name))?;
        Ok(Sized { batch, context, memory })
    });
    Ok(Prompts { model: model.name.clone(), runs: runs.collect::<anyhow::Result<_>>()? })
}

fn text(r: &Report) -> String {
    let mut out = format!("memory of prompts on {}, computed in {}, in MiB\n", r.target, r.dtype);
    let all: Vec<(&str, &Sized)> =
        r.models.iter().flat_map(|m| m.runs.iter().map(|s| (m.model.as_str(), s))).collect();
    let row = |name: &str, cell: &dyn Fn(&str, &Sized) -> String| -> Vec<String> {
        std::iter::once(name.to_owned()).chain(all.iter().map(|(m, s)| cell(m, s))).collect()
    };
    let bytes = |name: &str, of: &dyn Fn(&Memory) -> u64| row(name, &|_, s| mib(of(&s.memory)));
    let rows = [
        row("", &|m, _| m.to_owned()),
        row("sequences", &|_, s| grouped(s.batch)),
        row("tokens of each", &|_, s| grouped(s.context)),
        row("of these at once", &|_, s| grouped(s.memory.chunk)),
        bytes(&format!("weights in {}", r.weights), &|m| m.held.weights),
        bytes("caches", &|m| m.held.caches),
        bytes("temporaries of a chunk", &|m| m.temporaries),
        bytes("in all", &|m| m.peak),
        bytes("temporaries if all were read at once", &|m| m.whole),
    ];
    out.push_str(&table(&rows, 1));
    out.push_str(
        "  temporaries are as at the moment when most are alive, behind all that was read before; left out: what kernels of the host\n  \
         have for themselves, and results on their way to the caller\n",
    );
    out
}
