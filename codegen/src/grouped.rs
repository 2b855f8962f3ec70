//! Kernels that multiply with a part of a table that an index chooses: one matrix per expert, one expert per row.
//!
//! The body is a gather and a contraction: `w[p] = table[index[p]]`, then `y = w x` summed over the common axes. The axes fall
//! into the *rows* (those of the index), *m* (the table's and the result's) and *k* (the table's and the other operand's,
//! summed). All rows with the same index share a matrix, so they are one product: sorted by index, a grouped GEMM. An axis of the
//! index that the result lacks adds rows up: the experts of one token.

use latentc_ir::{AxisId, Function, Op, Type, ValueId};

use crate::coded::{Source, Table, made_in};

/// The parts of a grouped product.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupedPlan {
    /// What is gathered from: a parameter, or the two that have its codes and scales.
    pub table: Table,
    /// The table's axes.
    pub axes: Vec<AxisId>,
    /// Its axis that is indexed.
    pub along: AxisId,
    /// The index; a parameter.
    pub index: ValueId,
    /// The other operand; a parameter.
    pub x: ValueId,
    /// The axes of the index.
    pub rows: Vec<AxisId>,
    /// The table's axes that the result has.
    pub m: Vec<AxisId>,
    /// The table's axes that are summed.
    pub k: Vec<AxisId>,
}

impl GroupedPlan {
    /// Whether types of a table, an index, another operand and a result make a grouped product.
    pub fn fits(table: &Type, index: &Type, x: &Type, y: &Type) -> bool {
        let row = |a: &AxisId| index.has(*a);
        let float = table.dtype.is_float() && x.dtype.is_float() && y.dtype.is_float();
        // An axis of both table and index would pick one matrix a row, which is no matrix shared by rows.
        float
            && !table.axes.iter().any(row)
            && x.axes.iter().all(|a| row(a) || (table.has(*a) && !y.has(*a)))
            && y.axes.iter().all(|a| row(a) || (table.has(*a) && !x.has(*a)))
    }

    /// The plan of a kernel's body: what is gathered, perhaps of codes, and a contraction of that.
    pub fn of(body: &Function) -> Option<GroupedPlan> {
        let (product, others) = body.body.split_last().filter(|(last, _)| last.op == Op::Contract)?;
        let inst = made_in(body);
        let &[a, b] = &product.args[..] else { return None };
        let y = body.ty(product.result());
        [(a, b), (b, a)].into_iter().find_map(|(own, x)| {
            let Source { table, elements: t, gather } = Source::of(body, &inst, own);
            let gather = gather.filter(|_| table.elements().is_none() || others.len() == 1)?;
            let Op::Gather { axis } = gather.op else { return None };
            let index = gather.args[1];
            GroupedPlan::fits(&t, body.ty(index), body.ty(x), y).then(|| GroupedPlan {
                table,
                along: axis,
                index,
                x,
                rows: body.ty(index).axes.clone(),
                m: t.axes.iter().copied().filter(|&a| y.has(a)).collect(),
                k: t.axes.iter().copied().filter(|&a| a != axis && !y.has(a)).collect(),
                axes: t.axes,
            })
        })
    }
}
