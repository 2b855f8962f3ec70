//! What a kernel takes of a target: buffers, and registers of a unit.
//!
//! A kernel is the same for all targets, so it keeps to the least that any gives. One that takes more stores what costs least to store of
//! all that it makes on the way: an operand, a product that meets others, a part of what is made of them. Streams share out registers
//! by themselves.

use std::collections::BTreeSet;

use latentc_ir::{Op, ValueId};
use latentc_passes::Kind;

use super::{Storage, gathered, is_view};

/// Buffers of a kernel, the result and the run-time sizes among them. WebGPU promises eight; what it runs on has more, as far as we know, and
/// two products with weights in codes, of rows that choose among them, take ten.
pub(super) const BUFFERS: usize = 10;

/// Registers of a unit that hold numbers, where two cubes of 256 units share the 65,536 of a CUDA multiprocessor. Addresses and loops
/// take a quarter of all.
const REGISTERS: usize = 65_536 / 512 / 4 * 3;

/// Sums of a product that a unit of a tile keeps, and elements of an operand that it multiplies at once.
const SUMS: usize = 16;
const ELEMENTS: usize = 4;

/// What a kernel takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Takes {
    buffers: usize,
    registers: usize,
}

impl Takes {
    fn fits(self) -> bool {
        self.buffers <= BUFFERS && self.registers <= REGISTERS
    }

    fn less_than(self, other: Takes) -> bool {
        self.buffers <= other.buffers && self.registers <= other.registers && self != other
    }
}

impl Storage<'_> {
    /// Stores values until each kernel keeps to what there is, as far as that can be reached.
    pub(super) fn limit(&mut self) {
        let f = self.f;
        // From the last on: what a kernel stores is one before it.
        for inst in f.body.iter().rev().filter(|inst| !matches!(inst.op, Op::Call { .. })) {
            while self.is_stored(inst.result()) && self.relieve(inst.result()) {}
        }
    }

    /// Stores one value that the kernel of another makes on the way, if that takes too much and then takes less.
    fn relieve(&mut self, root: ValueId) -> bool {
        let before = self.takes(root);
        if before.fits() {
            return false;
        }
        let f = self.f;
        let (part, _) = self.part(root);
        if part.iter().any(|inst| self.streamed[inst.result().0 as usize] > 0) {
            return false;
        }
        let chosen: BTreeSet<_> =
            part.iter().filter_map(|i| gathered(f, i, &self.defs)).map(|gather| gather.result()).collect();
        // What codes of weights stand for is larger than all else.
        let wide: BTreeSet<_> = part
            .iter()
            .filter(|i| i.op == Op::Contract)
            .flat_map(|i| i.args.iter().filter(|&&a| self.is_coded(i, a)))
            .flat_map(|&a| self.part(a).0)
            .map(latentc_ir::Inst::result)
            .collect();
        let made = part.iter().map(|inst| inst.result()).filter(|&v| {
            let free = self.inst(v).is_some_and(|i| is_view(f, i) && self.is_stored(i.args[0]));
            v != root && !free && !f.ty(v).axes.is_empty() && !chosen.contains(&v) && !wide.contains(&v)
        });
        let mut best: Option<(f64, ValueId, Takes)> = None;
        for v in made.collect::<Vec<_>>() {
            self.stored[v.0 as usize] = true;
            let after = self.takes(root);
            self.stored[v.0 as usize] = false;
            // What does not get by with it alone comes after all that does.
            let time = self.machine.launch + self.seconds(0.0, 2.0 * self.bytes(v));
            let time = if after.fits() { time } else { time + 1.0 };
            if after.less_than(before) && best.is_none_or(|(least, ..)| time < least) {
                best = Some((time, v, after));
            }
        }
        let Some((_, v, after)) = best else { return false };
        self.store(v);
        let message = format!(
            "is stored, since the kernel of {} would take {} buffers of {BUFFERS} and {} registers of {REGISTERS}; so it takes {} \
             and {}",
            self.names([&root]),
            before.buffers,
            before.registers,
            after.buffers,
            after.registers
        );
        self.say(Kind::Missed, v, message);
        true
    }

    fn takes(&self, root: ValueId) -> Takes {
        let (part, leaves) = self.part(root);
        let appends = usize::from(part.last().is_some_and(|i| matches!(i.op, Op::Append { .. })));
        let products: Vec<_> = part.iter().filter(|i| i.op == Op::Contract).collect();
        let operands: BTreeSet<_> = products.iter().flat_map(|i| &i.args).collect();
        // The elements that are alive at once: of what is read from its first reader on, of all from where they are made to the last.
        let last_use = |v: ValueId| part.iter().rposition(|i| i.args.contains(&v));
        let (mut alive, mut most): (BTreeSet<ValueId>, usize) = (BTreeSet::new(), 0);
        for (n, inst) in part.iter().enumerate() {
            if inst.op != Op::Contract {
                alive.extend(inst.args.iter().filter(|a| leaves.contains(a)));
                alive.insert(inst.result());
            }
            most = most.max(alive.len());
            alive.retain(|&v| last_use(v).is_some_and(|last| last > n));
        }
        Takes {
            // What is appended to is the result.
            buffers: leaves.len() - appends + 2,
            registers: SUMS * products.len() + ELEMENTS * operands.len() + most,
        }
    }
}
