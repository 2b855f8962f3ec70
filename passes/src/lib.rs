//! The passes: what changes, and in which order.
//!
//! A pass is a law applied to a graph: one file, named by a verb. A pipeline is a list of passes, so it can be
//! printed, cut short, and dumped after each step. No pass knows a model or a device.

pub mod codes;
pub mod derive;
pub mod differentiate;
pub mod encode;
pub mod inline;
pub mod machine;
pub mod page;
pub mod place_cache;
pub mod quantise;
pub mod reassociate;
pub mod remark;
pub mod rewrite;
pub mod route;
pub mod simplify;
pub mod sizes;
pub mod stream_softmax;
pub mod stream_sums;
pub mod validate;
pub mod variants;

use latentc_ir::expand::expand_in;
use latentc_ir::{Function, Module, Op};

pub use codes::Codes;
pub use differentiate::Gradients;
pub use encode::WeightForm;
pub use machine::Machine;
pub use page::Pool;
pub use quantise::CacheForm;
pub use remark::{Candidate, Crossing, Kind, Remark, Unit};
pub use sizes::Sizes;
pub use variants::{Guard, Variant, variants};

/// Which graph of a definition is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Graph {
    /// Whole sequences, no history kept.
    Train,
    /// The same, and the gradient of what it computes by every weight.
    Gradient,
    /// Many new tokens behind a history.
    Prefill,
    /// One new token behind a history.
    Decode,
}

impl Graph {
    /// All of them.
    pub const ALL: [Graph; 4] = [Graph::Train, Graph::Gradient, Graph::Prefill, Graph::Decode];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Graph::Train => "train",
            Graph::Gradient => "gradient",
            Graph::Prefill => "prefill",
            Graph::Decode => "decode",
        }
    }

    /// Whether sequences go on from run to run, so that a history is kept.
    pub fn serves(self) -> bool {
        match self {
            Graph::Train | Graph::Gradient => false,
            Graph::Prefill | Graph::Decode => true,
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
    /// What caches are held in, if not in the dtype of what they keep.
    pub cache: Option<CacheForm>,
    /// Positions of a page, if caches lie in pages.
    pub page: Option<u64>,
    /// What weights are held in, if not as they are stored.
    pub weights: Option<WeightForm>,
    /// What gradients of weights are returned in.
    pub gradients: Gradients,
    /// New tokens of a sequence that costs are weighed for, if not as many as is usual for the graph.
    pub tokens: Option<u64>,
    /// What the passes did so far, and why.
    pub remarks: Vec<Remark>,
}

impl Context {
    /// For what is wanted, on the default machine.
    pub fn new(wanted: impl Into<Wanted>) -> Context {
        let Wanted { graph, cache, page, weights, gradients } = wanted.into();
        Context {
            graph,
            cache,
            page,
            weights,
            gradients,
            machine: Machine::default(),
            tokens: None,
            remarks: Vec::new(),
        }
    }
}

/// What to make of a definition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Which graph.
    pub graph: Graph,
    /// What its caches are held in, if not in the dtype of what they keep. Graphs that share caches want the same.
    pub cache: Option<CacheForm>,
    /// Positions of a page, if its caches lie in pages: a power of two. The same goes for graphs that share them.
    pub page: Option<u64>,
    /// What its weights are held in, if not as they are stored.
    pub weights: Option<WeightForm>,
    /// What gradients of weights are returned in, if it is the graph that returns them.
    pub gradients: Gradients,
}

impl From<Graph> for Wanted {
    fn from(graph: Graph) -> Wanted {
        Wanted { graph, cache: None, page: None, weights: None, gradients: Gradients::default() }
    }
}

/// A step of a pipeline.
#[derive(Clone, Copy)]
pub struct Pass {
    /// The verb, as in `--after NAME`.
    pub name: &'static str,
    /// The law, in a line.
    pub law: &'static str,
    /// What it takes to leave it out.
    pub without: Without,
    /// What it does; [`Pass::apply`] calls it.
    pub run: fn(&Module, &mut Context) -> Result<Module, PassError>,
    /// If it rounds values: the program that computes the rounded ones, from which it must not differ.
    pub rounds: Option<fn(&Module, &Context) -> Module>,
}

/// What it takes to leave a pass out.
#[derive(Clone, Copy)]
pub enum Without {
    /// Nothing: the program is slower or larger, that is all.
    Nothing,
    /// There are no kernels for what the pass rewrites, so it cannot be left out.
    Impossible,
    /// This in its place, which does the least that kernels need.
    Least(fn() -> Pass),
}

/// The passes that lead from a definition to the graph that is scheduled, in order.
pub fn pipeline() -> Vec<Pass> {
    vec![
        Pass {
            name: "route",
            law: "a top-k gate is zero almost everywhere: a sum over all is a sum over the few it lets through",
            without: Without::Nothing,
            run: |m, cx| Ok(route::route(m, cx)),
            rounds: None,
        },
        Pass {
            name: "differentiate",
            law: "dl/dx = sum over the uses y of x of (dl/dy)(dy/dx): the gradient of a graph is a graph",
            without: Without::Impossible,
            run: |m, cx| match cx.graph {
                Graph::Gradient => differentiate::differentiate(m, cx.gradients),
                Graph::Train | Graph::Prefill | Graph::Decode => Ok(m.clone()),
            },
            rounds: None,
        },
        Pass {
            name: "place_cache",
            law: "past (f x) = f (past x) where f works on each position alone: the fewest bytes a token are kept",
            without: Without::Nothing,
            run: |m, cx| Ok(place_cache::place_cache(m, cx)),
            rounds: None,
        },
        Pass {
            name: "quantise",
            law: "past x = decode (past (encode x)) to within half a step: what is kept has few bits, and scales",
            without: Without::Nothing,
            run: |m, cx| Ok(quantise::quantise(m, cx)),
            rounds: Some(quantise::rounded),
        },
        Pass {
            name: "derive",
            law: "past x = rename x (train), append cache, x (prefill, decode)",
            without: Without::Impossible,
            run: |m, cx| derive::derive(m, cx.graph),
            rounds: None,
        },
        Pass {
            name: "page",
            law: "append cache, x, pos = gather (append pool, x, slot pos), slot s: a table says where pages of positions lie",
            without: Without::Nothing,
            run: page::page,
            rounds: None,
        },
        Pass {
            name: "simplify",
            law: "equal things are computed once, and what does nothing is not computed",
            without: Without::Nothing,
            run: |m, _| Ok(simplify::simplify(m)),
            rounds: None,
        },
        Pass {
            name: "expand",
            law: "a norm is its definition",
            without: Without::Impossible,
            run: |m, _| Ok(expand(m)),
            rounds: None,
        },
        Pass {
            name: "reassociate",
            law: "contraction is associative and commutative: products of two, in the cheapest order",
            without: Without::Least(pair),
            run: |m, cx| Ok(reassociate::reassociate(m, cx)),
            rounds: None,
        },
        Pass {
            name: "inline",
            law: "a call is what it calls: a function called once in a caller becomes a part of it",
            without: Without::Nothing,
            run: |m, _| Ok(inline::inline(m)),
            rounds: None,
        },
        Pass {
            name: "stream_softmax",
            law: "softmax is a streaming monoid: where it weighs a sum it has no memory, elsewhere it is its definition",
            without: Without::Least(define),
            run: |m, cx| Ok(stream_softmax::stream_softmax(m, cx)),
            rounds: None,
        },
        Pass {
            name: "stream_sums",
            law: "sums over two axes are one after the other, and sums of one thing are one: what is only added up has no memory",
            without: Without::Nothing,
            run: |m, cx| Ok(stream_sums::stream_sums(m, cx)),
            rounds: None,
        },
        Pass {
            name: "tidy",
            law: "as simplify, on what the passes left behind",
            without: Without::Nothing,
            run: |m, _| Ok(simplify::simplify(m)),
            rounds: None,
        },
        Pass {
            name: "encode",
            law: "w = decode (encode w) to within half a step: weights that are multiplied with have 8 bits, and scales",
            without: Without::Nothing,
            run: encode::encode,
            rounds: Some(encode::rounded),
        },
    ]
}

/// Norms as their definitions. Softmaxes are left for `stream_softmax`, which sees the products that they end up in.
fn expand(module: &Module) -> Module {
    let norms = |f| expand_in(f, |inst| matches!(inst.op, Op::RmsNorm { .. }));
    let functions = module.functions.iter().map(norms).collect();
    Module { name: module.name.clone(), functions, entry: module.entry.clone() }
}

/// What stands in for `reassociate`.
fn pair() -> Pass {
    Pass {
        name: "pair",
        law: "a product of many is one of two after the other, as written",
        without: Without::Impossible,
        run: |m, _| Ok(reassociate::pair(m)),
        rounds: None,
    }
}

/// What stands in for `stream_softmax`.
fn define() -> Pass {
    Pass {
        name: "define",
        law: "a softmax is its definition",
        without: Without::Impossible,
        run: |m, _| Ok(stream_softmax::define(m)),
        rounds: None,
    }
}

/// The pipeline with those of its passes only that are wanted, and what kernels need of the others.
pub fn selected(wanted: impl Fn(&Pass) -> bool) -> Vec<Pass> {
    let stays = |pass: Pass| match pass.without {
        _ if wanted(&pass) => Some(pass),
        Without::Nothing => None,
        Without::Impossible => Some(pass),
        Without::Least(least) => Some(least()),
    };
    pipeline().into_iter().filter_map(stays).collect()
}

impl Pass {
    /// Applies the pass, and looks whether what it leaves is a program.
    ///
    /// # Errors
    /// Where the law's conditions do not hold, naming function and place; and where the pass is at fault.
    pub fn apply(&self, module: &Module, cx: &mut Context) -> Result<Module, PassError> {
        let after = (self.run)(module, cx)?;
        if let Err(broken) = latentc_ir::verify(&after) {
            let message = format!(
                "what the pass leaves breaks a rule of the IR ({}); this is a fault of the pass, not of the module",
                broken[0]
            );
            let function = broken[0].function.clone().unwrap_or_else(|| module.entry.clone());
            return Err(PassError { pass: self.name, function, message });
        }
        Ok(after)
    }
}

/// The module after each of these passes, the module itself first under the name `trace`.
///
/// # Errors
/// See [`Pass::apply`].
pub fn run(
    module: &Module,
    cx: &mut Context,
    passes: &[Pass],
) -> Result<Vec<(&'static str, Module)>, PassError> {
    let mut stages = vec![("trace", module.clone())];
    for pass in passes {
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
