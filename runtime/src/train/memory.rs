//! What a step of training has in memory, from the plan of its program.

use std::collections::BTreeMap;

use latentc_codegen::memory::{Account, Layout, Plan, PlanError};
use latentc_codegen::program::Program;
use latentc_ir::{DType, Module, Size, census};
use serde::Serialize;

/// Bytes, but for the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Their number.
    pub parameters: u64,
    /// The weights that programs read.
    pub weights: u64,
    /// The parameters in f32, which a step moves.
    pub masters: u64,
    /// What AdamW remembers of their gradients: two numbers in f32 for each.
    pub moments: u64,
    /// The gradients of the parts of a batch that were run so far, in f32.
    pub sum: u64,
    /// What the plan reserves for temporaries.
    pub temporaries: u64,
    /// What they are, where most of them are alive; their gradients are the results.
    pub account: Account,
    /// All of this.
    pub peak: u64,
}

/// Why nothing can be said of a step.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// There is no plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The definition contradicts itself, or takes no sequences.
    #[error("{0}")]
    Definition(String),
}

impl Memory {
    /// Of the gradient's program of a definition, run on so many sequences of a length at once.
    ///
    /// # Errors
    /// If there is no plan, or the definition's first parameter has no sequences and tokens.
    pub fn of(
        definition: &Module,
        program: &Program,
        (batch, length): (u64, u64),
        layout: &Layout,
    ) -> Result<Memory, MemoryError> {
        let sizes = sizes(definition, batch, length)?;
        let plan = Plan::new(program, &sizes, layout)?;
        let tensors = definition.inventory().map_err(MemoryError::Definition)?;
        let weights =
            tensors.tensors.iter().map(|t| t.shape.iter().product::<u64>() * (layout.bytes)(t.dtype)).sum();
        let parameters = census(definition).map_err(MemoryError::Definition)?.count.total;
        let f32s = |n: u64| n * parameters * (layout.bytes)(DType::F32);
        let (masters, moments, sum, temporaries) = (f32s(1), f32s(2), f32s(1), plan.bytes());
        Ok(Memory {
            parameters,
            weights,
            masters,
            moments,
            sum,
            temporaries,
            account: Account::of(program, &sizes, layout)?,
            peak: weights + masters + moments + sum + temporaries,
        })
    }
}

/// The run-time sizes of a definition whose first parameter has so many sequences of a length.
pub(super) fn sizes(
    definition: &Module,
    batch: u64,
    length: u64,
) -> Result<BTreeMap<String, u64>, MemoryError> {
    let wrong = |what: &str| MemoryError::Definition(format!("@{}: {what}", definition.entry));
    let entry = definition.function(&definition.entry).ok_or_else(|| wrong("there is no such function"))?;
    let first = entry.params.first().ok_or_else(|| wrong("it takes nothing"))?;
    let symbols: Vec<_> = entry.ty(*first).axes.iter().map(|a| entry.axis(*a).size.clone()).collect();
    match &symbols[..] {
        [Size::Sym(b), Size::Sym(t), ..] => Ok(BTreeMap::from([(b.clone(), batch), (t.clone(), length)])),
        _ => Err(wrong("its first parameter has no sequences of tokens")),
    }
}
