//! What an instruction costs: arithmetic and memory traffic, as polynomials in the run-time sizes.
//!
//! Conventions, for instructions that run one by one, each reading its operands from memory and writing its result:
//!
//! - An elementwise op is one operation for each element of its result, whatever the function.
//! - A contraction of n operands is `2 (n - 1)` operations for each point of the space of all its axes: n - 1
//!   products and as many sums. A better order costs less, but is another graph, and it is for passes to make it.
//!   With one operand it is one sum a point.
//! - A reduction is one operation for each element of its operand. `rope` is three for each element (two products
//!   and a sum), `top_k` is k comparisons for each, composites cost what their definitions in
//!   [`expand`](mod@crate::expand) cost but keep what is in between out of memory.
//! - `rename`, `past`, `split`, `merge`, `slice` and `broadcast` cost nothing: whoever reads the result reads the
//!   operand in another way. `concat` copies.
//! - `gather` reads the indices and the elements they select. `scatter_add` is a sum for each element of its operand. `append` reads and writes the new rows, not the cache.
//! - `call` costs what the callee's instructions cost.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::graph::{Function, Inst, Module, ValueId};
use crate::ops::Op;
use crate::poly::Poly;
use crate::types::AxisId;

/// Arithmetic and memory traffic.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cost {
    /// Operations on floats, or on integers and bools where those are all there is.
    pub flops: Poly,
    /// Bytes read from memory.
    pub bytes_read: Poly,
    /// Bytes written to memory.
    pub bytes_written: Poly,
}

impl Cost {
    fn add(&mut self, other: &Cost) {
        self.flops += &other.flops;
        self.bytes_read += &other.bytes_read;
        self.bytes_written += &other.bytes_written;
    }
}

/// What a function costs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionCost {
    /// Each instruction of the body; a call with all that it runs.
    pub insts: Vec<Cost>,
    /// The sum.
    pub total: Cost,
}

/// The cost of a function and, through calls, of all that it runs.
///
/// # Errors
/// A function that does not exist, or is called before it is defined.
pub fn cost(module: &Module, function: &str) -> Result<FunctionCost, String> {
    // Callees stand before callers, so that one walk down the list knows every callee.
    let mut known: BTreeMap<&str, FunctionCost> = BTreeMap::new();
    for f in &module.functions {
        let mut insts = Vec::with_capacity(f.body.len());
        let mut total = Cost::default();
        for inst in &f.body {
            let c = if let Op::Call { callee, .. } = &inst.op {
                let callee_cost = known.get(callee.as_str()).map(|c| c.total.clone());
                callee_cost.ok_or_else(|| format!("@{}: @{callee} is called before it is defined", f.name))?
            } else {
                inst_cost(f, &inst.op, inst)
            };
            total.add(&c);
            insts.push(c);
        }
        let cost = FunctionCost { insts, total };
        if f.name == function {
            return Ok(cost);
        }
        known.insert(&f.name, cost);
    }
    Err(format!("@{function}: there is no such function"))
}

/// The product of the extents of these axes.
pub fn extent(f: &Function, axes: &[AxisId]) -> Poly {
    axes.iter().fold(Poly::constant(1), |n, &a| &n * &Poly::from(&f.axis(a).size))
}

/// Elements of a value.
pub fn elements(f: &Function, value: ValueId) -> Poly {
    extent(f, &f.ty(value).axes)
}

/// Bytes of a value.
pub fn bytes(f: &Function, value: ValueId) -> Poly {
    &elements(f, value) * i128::from(f.ty(value).dtype.bytes())
}

pub(crate) fn inst_cost(f: &Function, op: &Op, inst: &Inst) -> Cost {
    let points = || elements(f, inst.result());
    let operand = || elements(f, inst.args[0]);
    // What an op costs that reads all of its operands once and writes its result.
    let plain = |flops: Poly| {
        let mut read: Vec<ValueId> = inst.args.clone();
        read.sort_unstable();
        read.dedup();
        let mut bytes_read = Poly::default();
        read.iter().for_each(|&a| bytes_read += &bytes(f, a));
        Cost { flops, bytes_read, bytes_written: bytes(f, inst.result()) }
    };
    // An op over one axis of its operand.
    let along = |axis: &AxisId| {
        let rows: Vec<_> = f.ty(inst.args[0]).axes.iter().copied().filter(|a| a != axis).collect();
        extent(f, &rows)
    };
    match op {
        Op::Const(_) | Op::Position { .. } => plain(Poly::default()),
        Op::Unary(_) | Op::Binary(_) | Op::Select => plain(points()),
        Op::Cast => plain(Poly::default()),
        Op::Contract => {
            let mut axes = f.ty(inst.result()).axes.clone();
            axes.extend(f.summed(&inst.args, f.ty(inst.result())));
            let per_point = (2 * (inst.args.len() as i128 - 1)).max(1);
            plain(&extent(f, &axes) * per_point)
        }
        Op::Reduce { .. } => plain(operand()),
        Op::Rename { .. }
        | Op::Past { .. }
        | Op::Split { .. }
        | Op::Merge { .. }
        | Op::Slice { .. }
        | Op::Broadcast { .. } => Cost::default(),
        Op::Concat { .. } => plain(Poly::default()),
        Op::Pack { .. } => plain(operand()),
        Op::Unpack { .. } => plain(points()),
        Op::Gather { .. } => {
            let selected = bytes(f, inst.result());
            let bytes_read = &selected + &bytes(f, inst.args[1]);
            Cost { flops: Poly::default(), bytes_read, bytes_written: selected }
        }
        Op::TopK { k, .. } => plain(&operand() * i128::from(*k)),
        Op::TopIndices { into, .. } => plain(&operand() * &extent(f, &[*into])),
        Op::ScatterAdd { .. } => plain(operand()),
        Op::Append { .. } => {
            let (rows, positions) = (inst.args[1], inst.args[2]);
            let written = &elements(f, rows) * i128::from(f.ty(inst.args[0]).dtype.bytes());
            let bytes_read = &bytes(f, rows) + &bytes(f, positions);
            Cost { flops: Poly::default(), bytes_read, bytes_written: written }
        }
        Op::Rope { .. } => plain(&operand() * 3),
        // For each element: the maximum, the difference, the exponential, the sum, the quotient; for
        // each row: the bound of the maximum, the comparison and the choice of the divisor.
        Op::Softmax { axis } => plain(&(&operand() * 5) + &(&along(axis) * 3)),
        // For each element: its square and their sum, the product; for each row: the quotient, the sum, the root.
        Op::RmsNorm { axis, .. } => plain(&(&operand() * 3) + &(&along(axis) * 3)),
        Op::Call { .. } => Cost::default(),
    }
}
