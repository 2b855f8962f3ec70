//! The passes: what changes, and in which order.
//!
//! A pass is a law applied to a graph: one file, named by a verb. A pipeline is a list of passes, so it can be
//! printed, cut short, and dumped after each step. No pass knows a model or a device.

pub mod derive;
pub mod machine;
pub mod place_cache;
pub mod reassociate;
pub mod remark;
pub mod rewrite;
pub mod route;
pub mod simplify;

use latentc_ir::{Function, Module};

pub use machine::Machine;
pub use remark::{Candidate, Crossing, Remark};

/// Which graph of a definition is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Graph {
    /// Whole sequences, no history kept.
    Train,
    /// Many new tokens behind a history.
    Prefill,
    /// One new token behind a history.
    Decode,
}

impl Graph {
    /// All of them.
    pub const ALL: [Graph; 3] = [Graph::Train, Graph::Prefill, Graph::Decode];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Graph::Train => "train",
            Graph::Prefill => "prefill",
            Graph::Decode => "decode",
        }
    }
}

/// What a pass is told, and what it says.
#[derive(Clone, Debug)]
pub struct Context {
    /// Which graph is wanted.
    pub graph: Graph,
    /// What costs are weighed for.
    pub machine: Machine,
    /// What the passes did so far, and why.
    pub remarks: Vec<Remark>,
}

impl Context {
    /// For a graph, on the default machine.
    pub fn new(graph: Graph) -> Context {
        Context { graph, machine: Machine::default(), remarks: Vec::new() }
    }
}

/// A step of a pipeline.
#[derive(Clone, Copy)]
pub struct Pass {
    /// The verb, as in `--after NAME`.
    pub name: &'static str,
    /// The law, in a line.
    pub law: &'static str,
    run: fn(&Module, &mut Context) -> Result<Module, PassError>,
}

/// The passes that lead from a definition to the graph that is scheduled, in order.
pub fn pipeline() -> Vec<Pass> {
    vec![
        Pass {
            name: "place_cache",
            law: "past (f x) = f (past x) where f works on each position alone: the fewest bytes a token are kept",
            run: |m, cx| Ok(place_cache::place_cache(m, cx)),
        },
        Pass {
            name: "derive",
            law: "past x = rename x (train), append cache, x (prefill, decode)",
            run: |m, cx| derive::derive(m, cx.graph),
        },
        Pass {
            name: "simplify",
            law: "equal things are computed once, and what does nothing is not computed",
            run: |m, _| Ok(simplify::simplify(m)),
        },
        Pass {
            name: "route",
            law: "a top-k gate is zero almost everywhere: a sum over all is a sum over the few it lets through",
            run: |m, cx| Ok(route::route(m, cx)),
        },
        Pass {
            name: "expand",
            law: "a composite is its definition",
            run: |m, _| Ok(latentc_ir::expand::expand(m)),
        },
        Pass {
            name: "reassociate",
            law: "contraction is associative and commutative: products of two, in the cheapest order",
            run: |m, cx| Ok(reassociate::reassociate(m, cx)),
        },
        Pass {
            name: "tidy",
            law: "as simplify, on what the passes left behind",
            run: |m, _| Ok(simplify::simplify(m)),
        },
    ]
}

impl Pass {
    /// Applies the pass.
    ///
    /// # Errors
    /// Where the law's conditions do not hold, naming function and place.
    pub fn apply(&self, module: &Module, cx: &mut Context) -> Result<Module, PassError> {
        (self.run)(module, cx)
    }
}

/// The module after each pass, the definition itself first under the name `trace`.
///
/// # Errors
/// See [`Pass::apply`].
pub fn run(module: &Module, cx: &mut Context) -> Result<Vec<(&'static str, Module)>, PassError> {
    let mut stages = vec![("trace", module.clone())];
    for pass in pipeline() {
        let next = pass.apply(&stages[stages.len() - 1].1, cx)?;
        stages.push((pass.name, next));
    }
    Ok(stages)
}

/// Why a pass could not go on.
#[derive(Debug, thiserror::Error)]
#[error("{pass}: in @{function}: {message}")]
pub struct PassError {
    /// The pass.
    pub pass: &'static str,
    /// The function it was in.
    pub function: String,
    /// What is wrong, with both facts.
    pub message: String,
}

impl PassError {
    fn new(pass: &'static str, f: &Function, message: String) -> PassError {
        PassError { pass, function: f.name.clone(), message }
    }
}
