//! What a run of a program computes and moves through memory, by formula: every launch reads each of its inputs once and writes its
//! result once.
//!
//! That is what a good kernel does, not a measurement: what a tile reads again, or a cache of the device saves, is not in it.
//! Set beside the least that any program for the same equations needs (`docs/decode.md`) it shows what the *schedule* wastes:
//! values that make a trip through memory between two launches, and operands that several launches read.
//!
//! - An input of which rows are gathered is read where they are chosen, at most whole; one that is cut, where it is.
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

/// The bytes that a body reads of a parameter, or of what is the same memory with other axes.
fn read_of(body: &Function, value: ValueId, sizes: &BTreeMap<String, u64>) -> Result<f64, String> {
    let number = |p: Poly| p.eval(sizes).map(|n| n as f64);
    let whole = number(bytes(body, value))?;
    let mut read: f64 = 0.0;
    for inst in &body.body {
        for (n, _) in inst.args.iter().enumerate().filter(|(_, a)| **a == value) {
            read += match inst.op {
                Op::Gather { .. } if n == 0 => number(bytes(body, inst.result()))?,
                Op::Append { .. } if n == 0 => 0.0,
                Op::Slice { .. } | Op::Split { .. } | Op::Merge { .. } | Op::Rename { .. } => {
                    read_of(body, inst.result(), sizes)?
                }
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

#[cfg(test)]
mod tests {
    use latentc_ir::parse;

    use super::*;
    use crate::program::KernelKind;

    #[test]
    fn of_what_is_cut_only_the_pieces_are_read() {
        let text = "module test entry @k\n\nfunc @k {\n\
                    axes a0=n0, a1=24, a2=4, a3=6, a4=2, a5=3\nparam p0: bf16[a0, a1]\nparam p1: f32[a0, a1]\n\
                    x: bf16[a0, a2, a3] = split p0 axis a1 into a2, a3\n\
                    u: bf16[a0, a2, a4] = slice x axis a3 into a4 start 0\n\
                    v: bf16[a0, a2, a4] = slice x axis a3 into a4 start 4\n\
                    uv: f32[a0, a2, a4] = mul u, v\nw: f32[a0, a5] = slice p1 axis a1 into a5 start 1\n\
                    s: f32[a0] = reduce_sum w over a5\ny: f32[a0, a2, a4] = mul uv, s\nreturn y\n}\n";
        let body = parse("test", text).unwrap_or_else(|e| panic!("{e}")).functions[0].clone();
        let kernel = Kernel { name: "k".to_owned(), kind: KernelKind::Map, body };
        // Two of three pieces in two bytes each, and three numbers of four.
        assert_eq!(Traffic::read_by_launch(&kernel, &[5]), Ok(vec![5.0 * 16.0 * 2.0, 5.0 * 3.0 * 4.0]));
    }
}
