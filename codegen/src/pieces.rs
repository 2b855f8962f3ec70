//! A kernel with prologues and epilogues as a sequence of plain ones, for devices that gain nothing by doing all at once. What lies in
//! memory as codes of a byte each is multiplied with as it is.

use std::collections::BTreeSet;

use latentc_ir::{Function, Inst, Op, ValueId};

use crate::fuse::{gathered, read_as_codes};
use crate::program::{Kernel, KernelKind};

/// One of the kernels that a kernel falls into. Its body shares the tables of values and axes with the whole kernel's.
#[derive(Clone, Debug)]
pub struct Piece {
    /// What it computes: the value is its result, what it reads are its parameters.
    pub kernel: Kernel,
    /// The value that it makes.
    pub value: ValueId,
}

/// The pieces of a kernel, each after those that it reads; the last makes the kernel's result. A plain kernel is its own.
pub fn pieces(kernel: &Kernel) -> Vec<Piece> {
    let body = &kernel.body;
    let defs = body.defs();
    let mut known: BTreeSet<ValueId> = body.params.iter().copied().collect();
    let mut pieces = Vec::new();
    let mut make = |value: ValueId, known: &mut BTreeSet<ValueId>| {
        if known.contains(&value) {
            return;
        }
        let body = part(body, value, known);
        let kind = KernelKind::of(&body);
        pieces.push(Piece { kernel: Kernel { name: kernel.name.clone(), kind, body }, value });
        known.insert(value);
    };
    for inst in body.body.iter().filter(|i| i.op == Op::Contract) {
        let gather = gathered(body, inst, &defs).map(Inst::result);
        let coded = |a: ValueId| read_as_codes(body, inst, a, &defs, |v| body.params.contains(&v));
        let as_it_is = |a: ValueId| gather == Some(a) || coded(a).is_some_and(|c| c.is_bytes());
        for &a in inst.args.iter().filter(|&&a| !as_it_is(a)) {
            make(a, &mut known);
        }
        make(inst.result(), &mut known);
    }
    make(body.results[0], &mut known);
    pieces
}

/// What computes a value from those that are known.
fn part(body: &Function, value: ValueId, known: &BTreeSet<ValueId>) -> Function {
    let mut needed = BTreeSet::from([value]);
    let mut insts: Vec<Inst> = Vec::new();
    for inst in body.body.iter().rev() {
        if needed.contains(&inst.result()) && !known.contains(&inst.result()) {
            needed.extend(&inst.args);
            insts.push(inst.clone());
        }
    }
    insts.reverse();
    let params = needed.into_iter().filter(|v| known.contains(v)).collect();
    Function { params, body: insts, results: vec![value], ..body.clone() }
}
