//! The sizes that a graph is made for: what a cost model puts in the place of run-time sizes.

use std::collections::BTreeSet;

use latentc_ir::{Axis, Module, Op, Size};

use crate::Graph;

/// The sizes that a graph is made for.
#[derive(Clone, Debug)]
pub struct Sizes {
    /// The symbols that count new tokens, and those that count all tokens so far.
    tokens: BTreeSet<Size>,
    past: BTreeSet<Size>,
    /// New tokens of a sequence in a run.
    t: u64,
    /// Tokens that they look back on.
    s: u64,
    /// Sequences in a run.
    b: u64,
}

impl Sizes {
    /// A long sequence: what the paper trains on (arXiv 2405.04434, section 3.1.2).
    pub const LONG: u64 = 4096;

    /// For a graph of a definition, whose symbols are told apart by what is done along their axes.
    pub fn new(module: &Module, graph: Graph) -> Sizes {
        let (mut tokens, mut past) = (BTreeSet::new(), BTreeSet::new());
        for f in &module.functions {
            for axis in &f.axes {
                if let Some(of) = axis.like {
                    past.insert(axis.size.clone());
                    tokens.insert(f.axis(of).size.clone());
                }
            }
            for inst in &f.body {
                if let Op::Position { axis } = inst.op
                    && f.axis(axis).like.is_none()
                    && f.axis(axis).size.fixed().is_none()
                {
                    tokens.insert(f.axis(axis).size.clone());
                }
            }
        }
        let (t, s, b) = match graph {
            // As many sequences as share the reading of the weights in a server that still answers at once.
            Graph::Decode => (1, Sizes::LONG, 32),
            // One long prompt fills a machine.
            Graph::Prefill => (Sizes::LONG, Sizes::LONG, 1),
            // One device's part of a step.
            Graph::Train | Graph::Gradient => (Sizes::LONG, Sizes::LONG, 8),
        };
        Sizes { tokens, past, t, s, b }
    }

    /// The same with another number of new tokens.
    pub fn at(&self, t: u64) -> Sizes {
        Sizes { t, ..self.clone() }
    }

    /// The least that a run of the graph has, where that is far less: one sequence that has one new token.
    pub fn least(&self) -> Sizes {
        Sizes { b: if self.t == 1 { 1 } else { self.b }, ..self.clone() }
    }

    /// The extent of an axis.
    pub fn extent(&self, axis: &Axis) -> u64 {
        self.of(&axis.size, axis.like.is_some())
    }

    fn of(&self, size: &Size, like: bool) -> u64 {
        match size {
            Size::Fixed(n) => *n,
            Size::Sym(_) if like => self.s,
            Size::Sym(_) if self.tokens.contains(size) => self.t,
            Size::Sym(_) if self.past.contains(size) => self.s,
            Size::Sym(_) => self.b,
        }
    }

    /// What a symbol stands for.
    pub fn symbol(&self, name: &str) -> u64 {
        self.of(&Size::Sym(name.to_owned()), false)
    }

    /// The one symbol that counts new tokens and nothing else, if there is one.
    pub fn token_symbol(&self) -> Option<String> {
        match self.tokens.difference(&self.past).collect::<Vec<_>>()[..] {
            [Size::Sym(name)] => Some(name.clone()),
            _ => None,
        }
    }
}
