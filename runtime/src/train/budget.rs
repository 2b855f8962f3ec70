//! What the way back of a step keeps of the way forward, and what it computes again, so that the step fits a memory budget.
//!
//! At the least, functions keep what their calls returned. Every product kept beside costs bytes and saves operations, so
//! those come first that save the most operations a byte: of that order, as many are kept as the plan of the compiled step bears.

use std::collections::BTreeMap;

use latentc_codegen::memory::Layout;
use latentc_ir::Module;
use latentc_passes::differentiate::{Candidate, Gradients, Keep, candidates, keeping};
use latentc_passes::{Context, Graph, pipeline};
use serde::{Deserialize, Serialize};

use crate::compiled::{CompileError, Compiled, compile};
use crate::train::memory::{Memory, MemoryError, sizes};

/// How much of the way forward a step may keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Budget {
    /// What calls return, and no more.
    Least,
    /// As much as lets all that a step has in memory fit into so many bytes.
    Bytes(u64),
}

/// A step that fits.
#[derive(Clone, Debug)]
pub struct Budgeted {
    /// Its program.
    pub compiled: Compiled,
    /// What it has in memory.
    pub memory: Memory,
    /// What is kept beside the results of calls, the most worthwhile first.
    pub kept: Vec<Candidate>,
    /// What could be kept and is computed again.
    pub again: Vec<Candidate>,
    sizes: BTreeMap<String, u64>,
}

impl Budgeted {
    /// The operations of the products that are computed again.
    ///
    /// # Errors
    /// If they depend on another size than those of sequences.
    pub fn again_flops(&self) -> Result<f64, MemoryError> {
        let each = self.again.iter().map(|c| c.flops.eval(&self.sizes).map_err(MemoryError::Definition));
        each.map(|flops| Ok(flops? as f64)).sum()
    }
}

/// Why no step fits.
#[derive(Debug, thiserror::Error)]
pub enum BudgetError {
    /// The step does not compile.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// It has no plan.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Even what keeps least is too large.
    #[error(
        "a step takes {least} bytes at the least, where the budget is {budget}; run fewer or shorter sequences at once, or give more"
    )]
    Small {
        /// What was given, in bytes.
        budget: u64,
        /// What it takes.
        least: u64,
    },
}

/// The step of a definition that keeps as much as a budget allows, for so many sequences of a length at once. Without a budget it
/// keeps all that is worth it.
///
/// # Errors
/// See [`BudgetError`].
pub fn within(
    definition: &Module,
    budget: Option<Budget>,
    (batch, length): (u64, u64),
    layout: &Layout,
) -> Result<Budgeted, BudgetError> {
    let bound = sizes(definition, batch, length)?;
    let mut before = pipeline();
    let at = before.iter().position(|pass| pass.name == "differentiate").unwrap_or(before.len());
    let rest: Vec<_> = before.split_off(at).into_iter().skip(1).collect();
    let mut stages = latentc_passes::run(definition, &mut Context::new(Graph::Gradient), &before)
        .map_err(CompileError::from)?;
    let (_, ready) = stages.pop().unwrap_or(("trace", definition.clone()));
    let ordered = by_worth(candidates(&ready).map_err(MemoryError::Definition)?, &bound)?;
    let keep = |count: usize| -> Result<(Compiled, Memory), BudgetError> {
        let kept: Keep = ordered[..count].iter().map(|c| (c.function.as_str(), c.value.as_str())).collect();
        let both = keeping(&ready, &kept, Gradients::Sums).map_err(CompileError::from)?;
        let compiled = compile(&both, Graph::Gradient, &rest)?;
        let memory = Memory::of(definition, &compiled.program, (batch, length), layout)?;
        Ok((compiled, memory))
    };
    let mut fits = if budget.is_none() { ordered.len() } else { 0 };
    let mut best = keep(fits)?;
    if let Some(Budget::Bytes(budget)) = budget {
        let least = best.1.peak;
        if least > budget {
            return Err(BudgetError::Small { budget, least });
        }
        // All of them, if there is room; else as many as fit, if more never takes less, and in any case so many that they do.
        let (mut next, mut over) = (ordered.len(), ordered.len() + 1);
        while fits + 1 < over {
            let tried = keep(next)?;
            if tried.1.peak <= budget {
                (fits, best) = (next, tried);
            } else {
                over = next;
            }
            next = (fits + over) / 2;
        }
    }
    let (compiled, memory) = best;
    let mut kept = ordered;
    let again = kept.split_off(fits);
    Ok(Budgeted { compiled, memory, kept, again, sizes: bound })
}

/// The candidates, those first that save the most operations a byte.
fn by_worth(
    candidates: Vec<Candidate>,
    bound: &BTreeMap<String, u64>,
) -> Result<Vec<Candidate>, MemoryError> {
    let mut worth = Vec::new();
    for c in candidates {
        let number = |p: &latentc_ir::Poly| p.eval(bound).map_err(MemoryError::Definition);
        worth.push((number(&c.flops)? as f64 / number(&c.bytes)?.max(1) as f64, c));
    }
    worth.sort_by(|a, b| b.0.total_cmp(&a.0));
    Ok(worth.into_iter().map(|(_, c)| c).collect())
}
