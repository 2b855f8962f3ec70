//! What a run of a program computes and moves through memory, by formula: every launch reads each of its inputs once and writes its
//! result once.
//!
//! That is what a good kernel does, not a measurement: what a tile reads again, or a cache of the device saves, is not in it.
//! Set beside the least that any program for the same equations needs (`docs/decode.md`) it shows what the *schedule* wastes:
//! values that make a trip through memory between two launches, and operands that several launches read.
//!
//! - An input of which rows are gathered is read where they are chosen, at most whole.
//! - A cache that a launch appends to is written where the new rows go.
//! - Operations are those of the kernel's body ([`latentc_ir::cost`]), each once, whatever a tile computes again.

use std::collections::BTreeMap;
use std::iter::Sum;
use std::ops::AddAssign;

use latentc_ir::cost::{bytes, cost};
use latentc_ir::{Function, Op, Poly, Size, ValueId};
use serde::Serialize;

use crate::map::made;
use crate::program::{Kernel, Program, Step};

/// Arithmetic and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Traffic {
    /// Operations on elements.
    pub flops: f64,
    /// Bytes read.
    pub read: f64,
    /// Bytes written.
    pub written: f64,
}

impl Traffic {
    /// Bytes read and written.
    pub fn bytes(&self) -> f64 {
        self.read + self.written
    }

    /// One launch of a kernel with these run-time sizes, in the order of [`Kernel::size_symbols`].
    ///
    /// # Errors
    /// A size that is missing, by name.
    pub fn of_launch(kernel: &Kernel, sizes: &[u64]) -> Result<Traffic, String> {
        let body = &kernel.body;
        let symbols = kernel.size_symbols().into_iter().map(str::to_owned);
        let sizes: BTreeMap<String, u64> = symbols.zip(sizes.iter().copied()).collect();
        let number = |p: Poly| p.eval(&sizes).map(|n| n as f64);
        let flops = number(cost(&kernel.module(), &body.name)?.total.flops)?;
        let mut traffic = Traffic { flops, read: 0.0, written: 0.0 };
        for &param in &body.params {
            traffic.read += read_of(body, param, &sizes)?;
        }
        traffic.written = number(bytes(body, made(body)))?;
        Ok(traffic)
    }

    /// The bytes that one launch of a kernel reads of each of its parameters.
    ///
    /// # Errors
    /// A size that is missing, by name.
    pub fn read_by_launch(kernel: &Kernel, sizes: &[u64]) -> Result<Vec<f64>, String> {
        let symbols = kernel.size_symbols().into_iter().map(str::to_owned);
        let sizes: BTreeMap<String, u64> = symbols.zip(sizes.iter().copied()).collect();
        kernel.body.params.iter().map(|&p| read_of(&kernel.body, p, &sizes)).collect()
    }

    /// A run of a program at these sizes, calls and all.
    ///
    /// # Errors
    /// A size that is missing, by name.
    pub fn of_run(program: &Program, sizes: &BTreeMap<String, u64>) -> Result<Traffic, String> {
        let mut known: BTreeMap<&str, Traffic> = BTreeMap::new();
        // Callees stand before callers.
        for routine in &program.routines {
            let steps = routine.steps.iter().map(|step| match step {
                Step::Launch { kernel, sizes: own, .. } => {
                    let own = own.iter().map(|size| match size {
                        Size::Fixed(n) => Ok(*n),
                        Size::Sym(s) => sizes.get(s).copied().ok_or_else(|| s.clone()),
                    });
                    Traffic::of_launch(&program.kernels[*kernel], &own.collect::<Result<Vec<_>, _>>()?)
                }
                Step::Call { routine: callee, .. } => known
                    .get(callee.as_str())
                    .copied()
                    .ok_or_else(|| format!("@{}: @{callee} does not stand above it", routine.name)),
            });
            let sum = steps.sum::<Result<Traffic, String>>()?;
            known.insert(&routine.name, sum);
        }
        known.remove(program.entry.as_str()).ok_or_else(|| format!("there is no routine @{}", program.entry))
    }
}

/// The bytes that a body reads of a parameter.
fn read_of(body: &Function, param: ValueId, sizes: &BTreeMap<String, u64>) -> Result<f64, String> {
    let number = |p: Poly| p.eval(sizes).map(|n| n as f64);
    let whole = number(bytes(body, param))?;
    let mut read: f64 = 0.0;
    for inst in &body.body {
        for (n, _) in inst.args.iter().enumerate().filter(|(_, a)| **a == param) {
            read += match inst.op {
                Op::Gather { .. } if n == 0 => number(bytes(body, inst.result()))?,
                Op::Append { .. } if n == 0 => 0.0,
                _ => whole,
            };
        }
    }
    Ok(read.min(whole))
}

impl AddAssign for Traffic {
    fn add_assign(&mut self, other: Traffic) {
        self.flops += other.flops;
        self.read += other.read;
        self.written += other.written;
    }
}

impl Sum for Traffic {
    fn sum<I: Iterator<Item = Traffic>>(items: I) -> Traffic {
        items.fold(Traffic::default(), |mut all, one| {
            all += one;
            all
        })
    }
}
