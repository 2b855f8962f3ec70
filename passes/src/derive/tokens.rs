//! Where a definition reads other tokens than a value's own, and whether serving can follow.
//!
//! A run that serves has some tokens of a sequence at hand, and what was kept of those before. So whatever goes over all tokens goes over
//! their past; along the axis of the tokens themselves nothing is summed up or ranked.
//!
//! A definition numbers the tokens of a sequence; a run that serves has some of them at hand and numbers these. Who calls it knows
//! the difference: a number that is a parameter says which of the tokens at hand is meant, such as the one whose logits are wanted. A number
//! that the definition makes would mean another token in each run. So would what is made of a picked token and kept for later
//! ones: whatever is kept of a token must follow from it and those before it, in whichever run they came.

use std::collections::{BTreeMap, BTreeSet};

use latentc_ir::{AxisId, Function, Inst, Module, Op, Size, ValueId};

use super::NAME;
use crate::PassError;

/// What callers must know of a function.
#[derive(Default)]
struct Summary {
    /// The parameters that number tokens.
    numbers: BTreeSet<usize>,
    /// The parameters that something is kept of.
    kept: BTreeSet<usize>,
    /// The results that are made of picked tokens, whatever they are called with.
    picked: BTreeSet<usize>,
}

/// Refuses what picks tokens in a way that depends on the run. `tokens` are the sizes of the axes that have a past.
pub(super) fn check(module: &Module, tokens: &dyn Fn(&Size) -> bool) -> Result<(), PassError> {
    let mut known: BTreeMap<&str, Summary> = BTreeMap::new();
    for f in &module.functions {
        let summary = summary(f, tokens, &known)?;
        known.insert(&f.name, summary);
    }
    Ok(())
}

fn summary(
    f: &Function,
    tokens: &dyn Fn(&Size) -> bool,
    known: &BTreeMap<&str, Summary>,
) -> Result<Summary, PassError> {
    let counts_tokens = |axis: AxisId| f.axis(axis).like.is_none() && tokens(&f.axis(axis).size);
    let none = Summary::default();
    let callee = |inst: &Inst| match &inst.op {
        Op::Call { callee, .. } => known.get(callee.as_str()).unwrap_or(&none),
        _ => &none,
    };
    // Which parameter's elements each value has, in whichever order; and whether it is made of picked tokens.
    let mut same_as: Vec<Option<usize>> = vec![None; f.values.len()];
    let mut picked = vec![false; f.values.len()];
    let mut summary = Summary::default();
    f.params.iter().enumerate().for_each(|(n, p)| same_as[p.0 as usize] = Some(n));
    for inst in &f.body {
        if let Some(axis) = goes_over(f, inst).into_iter().find(|a| counts_tokens(*a)) {
            return Err(PassError::new(
                NAME,
                f,
                format!(
                    "`{}` goes over all tokens of `{}`, of which a run that serves has some: go over an axis `like {1}`, their past",
                    f.value(inst.result()).name,
                    f.axis(axis).name
                ),
            ));
        }
        let at = match inst.op {
            Op::Gather { axis } | Op::ScatterAdd { axis } if counts_tokens(axis) => BTreeSet::from([1]),
            _ => callee(inst).numbers.clone(),
        };
        for n in at.iter().filter_map(|n| inst.args.get(*n)) {
            let Some(param) = same_as[n.0 as usize] else {
                let (value, number) = (&f.value(inst.result()).name, &f.value(*n).name);
                return Err(PassError::new(
                    NAME,
                    f,
                    format!(
                        "`{value}` picks tokens by `{number}`, which is made here: each run has other tokens at hand, so only a \
                         parameter can number them"
                    ),
                ));
            };
            summary.numbers.insert(param);
        }
        let from_picked = inst.args.iter().any(|a| picked[a.0 as usize]);
        let picks = matches!(inst.op, Op::Gather { .. } | Op::ScatterAdd { .. }) && !at.is_empty();
        for (n, r) in inst.results.iter().enumerate() {
            picked[r.0 as usize] = picks || from_picked || callee(inst).picked.contains(&n);
        }
        if let (true, [x]) = (inst.op.moves(), &inst.args[..]) {
            same_as[inst.result().0 as usize] = same_as[x.0 as usize];
        }
    }
    let keeps = |inst: &Inst| match inst.op {
        Op::Past { .. } => inst.args.clone(),
        _ => callee(inst).kept.iter().filter_map(|n| inst.args.get(*n).copied()).collect::<Vec<_>>(),
    };
    let kept: Vec<ValueId> = f.body.iter().flat_map(keeps).collect();
    if let Some(v) = kept.iter().find(|v| picked[v.0 as usize]) {
        return Err(PassError::new(
            NAME,
            f,
            format!(
                "`{}` is made of tokens that a parameter picks, and later tokens read it: it would be another in each run, so it \
                 cannot be kept",
                f.value(*v).name
            ),
        ));
    }
    // What is kept follows from these.
    let mut behind: BTreeSet<ValueId> = kept.into_iter().collect();
    for inst in f.body.iter().rev() {
        if inst.results.iter().any(|r| behind.contains(r)) {
            behind.extend(&inst.args);
        }
    }
    summary.kept = (0..f.params.len()).filter(|&n| behind.contains(&f.params[n])).collect();
    summary.picked = (0..f.results.len()).filter(|&n| picked[f.results[n].0 as usize]).collect();
    Ok(summary)
}

/// The axes along which an instruction folds or ranks.
fn goes_over(f: &Function, inst: &Inst) -> Vec<AxisId> {
    match &inst.op {
        Op::Contract => f.summed(&inst.args, f.ty(inst.result())),
        Op::Reduce { axis, .. }
        | Op::Softmax { axis }
        | Op::RmsNorm { axis, .. }
        | Op::TopK { axis, .. }
        | Op::TopIndices { axis, .. } => vec![*axis],
        Op::Const(_)
        | Op::Position { .. }
        | Op::Unary(_)
        | Op::Binary(_)
        | Op::Select
        | Op::Cast
        | Op::Pack { .. }
        | Op::Unpack { .. }
        | Op::Broadcast { .. }
        | Op::Rename { .. }
        | Op::Split { .. }
        | Op::Merge { .. }
        | Op::Slice { .. }
        | Op::Concat { .. }
        | Op::Gather { .. }
        | Op::ScatterAdd { .. }
        | Op::Rope { .. }
        | Op::Past { .. }
        | Op::Append { .. }
        | Op::Call { .. } => vec![],
    }
}
