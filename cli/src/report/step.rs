//! `latentc report --graph train`: what a step of training has in memory.

use anyhow::{Context, anyhow, bail};
use latentc_models::Goal;
use latentc_passes::differentiate::{self, Candidate};
use latentc_runtime::train::budget;
use latentc_runtime::train::memory::Memory;
use serde::Serialize;

use super::Args;
use crate::model::Model;
use crate::table::{grouped, short, table};
use crate::{print, print_json};

#[derive(Serialize)]
struct Report {
    target: &'static str,
    dtype: &'static str,
    /// Tokens of a sequence.
    length: u64,
    function: Option<String>,
    models: Vec<Step>,
}

#[derive(Serialize)]
struct Step {
    model: String,
    /// For each number of sequences at once.
    steps: Vec<Sized>,
}

#[derive(Serialize)]
struct Sized {
    batch: u64,
    #[serde(flatten)]
    memory: Memory,
    /// The products that are kept for the way back beside what calls return, as function and value, and those that are computed again.
    kept: Vec<(String, String)>,
    again: Vec<(String, String)>,
    /// The operations that the latter take.
    again_flops: f64,
}

pub(super) fn report(args: &Args) -> anyhow::Result<()> {
    let not_here = [
        (
            "--weights",
            args.weights.form().is_some(),
            "there is no gradient by weights that are held in codes",
        ),
        ("--context", !args.context.is_empty(), "a step reads whole sequences; give --train-length"),
        ("--prefill-chunk", args.prefill_chunk.is_some(), "a step reads whole sequences at once"),
    ];
    if let Some((flag, _, why)) = not_here.into_iter().find(|(_, given, _)| *given) {
        bail!("{flag}: {why}");
    }
    let models = [Some(&args.model), args.vs.as_ref()].into_iter().flatten();
    let models = models.map(|name| step(&Model::find(name)?, args)).collect::<anyhow::Result<Vec<_>>>()?;
    let report = Report {
        target: args.target.name(),
        dtype: latentc_ir::DType::Bf16.name(),
        length: args.train_length,
        function: args.function.clone(),
        models,
    };
    if args.json { print_json(&report) } else { print(&text(&report)) }
}

fn step(model: &Model, args: &Args) -> anyhow::Result<Step> {
    let mut definition = model.trace_to(Goal::Objective, latentc_ir::DType::Bf16)?;
    if let Some(function) = &args.function {
        definition = differentiate::single(&definition, function)
            .map_err(|e| anyhow!("--function {function}: {}: {e}", model.name))?;
    }
    let steps = args.batches(&[1]).iter().map(|&batch| {
        let sizes = (batch, args.train_length);
        let step = budget::within(&definition, args.memory_budget, sizes, &args.target.layout())
            .with_context(|| format!("the step of {} with {batch} sequences at once", model.name))?;
        let names = |of: &[Candidate]| of.iter().map(|c| (c.function.clone(), c.value.clone())).collect();
        let (kept, again) = (names(&step.kept), names(&step.again));
        Ok(Sized { batch, memory: step.memory, kept, again, again_flops: step.again_flops()? })
    });
    Ok(Step { model: model.name.clone(), steps: steps.collect::<anyhow::Result<_>>()? })
}

fn text(r: &Report) -> String {
    let what = r.function.as_ref().map_or(String::new(), |f| format!(" of `{f}` alone"));
    let mut out = format!(
        "memory of a step of training{what} on {}, computed in {}, sequences of {} tokens, in MiB\n",
        r.target, r.dtype, r.length
    );
    let all: Vec<(&str, &Sized)> =
        r.models.iter().flat_map(|m| m.steps.iter().map(|s| (m.model.as_str(), s))).collect();
    let row = |name: &str, cell: &dyn Fn(&str, &Sized) -> String| -> Vec<String> {
        std::iter::once(name.to_owned()).chain(all.iter().map(|(m, s)| cell(m, s))).collect()
    };
    let bytes = |name: &str, of: &dyn Fn(&Memory) -> u64| row(name, &|_, s| mib(of(&s.memory)));
    let weights = format!("weights in {}", r.dtype);
    let rows = [
        row("", &|m, _| m.to_owned()),
        row("sequences at once", &|_, s| s.batch.to_string()),
        bytes(&weights, &|m| m.weights),
        bytes("parameters in f32", &|m| m.masters),
        bytes("moments of AdamW", &|m| m.moments),
        bytes("sum of gradients", &|m| m.sum),
        bytes("temporaries", &|m| m.temporaries),
        bytes("  gradients", &|m| m.account.results),
        bytes("  kept for the way back", &|m| m.account.kept),
        bytes("  others", &|m| m.account.passing),
        bytes("  gaps", &|m| {
            m.temporaries.saturating_sub(m.account.results + m.account.kept + m.account.passing)
        }),
        bytes("in all", &|m| m.peak),
        bytes("kept when the loss is there", &|m| m.account.kept_at_turn),
        row("products kept, of", &|_, s| format!("{} of {}", s.kept.len(), s.kept.len() + s.again.len())),
        row("operations made again", &|_, s| short(s.again_flops as u64)),
    ];
    out.push_str(&table(&rows, 1));
    out.push_str(
        "  temporaries are as at the moment when most are alive; what calls return is kept for the way back, and\n  \
         products, as many as --memory-budget allows; all else is computed again; left out: what the optimiser's program copies while it runs,\n  \
         and texts\n",
    );
    out
}

pub(super) fn mib(bytes: u64) -> String {
    grouped(bytes.div_ceil(1 << 20))
}
