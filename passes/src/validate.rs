//! Whether a pass kept what a program computes, on a small instance of it: no pass is trusted.
//!
//! Both modules are shrunk ([`latentc_ir::shrink`]), run by the float64 interpreter on equal arguments, weights and steps, and
//! compared. A program with caches reads a prompt and then token after token; before `derive` there are none, and each step
//! is the end of a longer sequence. A pass that rounds values is compared with the program that has them rounded where they
//! are made: that what it rounds to is close is for its own tests. Where they differ, the program is cut down to the smallest that the pass
//! still spoils.

mod instance;
mod smallest;

use std::fmt;

use latentc_ir::{Interpreter, Module, Precision, Scale, Tensor};

use crate::{Context, Graph, Pass};
use instance::Instance;

/// Two ways to compute one number in f64 are this close, relative to the largest of its tensor.
const CLOSE: f64 = 1e-9;

/// What the numbers are that modules are compared on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbers {
    /// Reals. A program that multiplies or sums infinities decides nothing, since laws of reals do not hold for them.
    Reals,
    /// Multiples of 1/16, so that many are equal; and infinities count.
    Grid,
}

/// What came of a comparison.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// The results are the same.
    Same,
    /// Nothing could be compared, and why.
    Unknown(String),
    /// They are not.
    Differs(Difference),
}

/// How two modules differ.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// In which way.
    pub kind: DifferenceKind,
    /// Where and how much, in a line.
    pub what: String,
}

/// In which way two modules differ. A cut-down program must differ in the same way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DifferenceKind {
    /// The second one fails, or is of another form.
    Fails,
    /// A number is another one.
    Number,
    /// A number of one is none in the other.
    NotFinite,
}

/// Runs both modules at small sizes on the same numbers, which the seed chooses.
pub fn compare(before: &Module, after: &Module, seed: u64, numbers: Numbers) -> Verdict {
    let scale = Scale::of(&[before, after]);
    let (before, after) = (scale.apply(before), scale.apply(after));
    let instance = Instance::new(&before, &after, seed, numbers);
    let interpreter = Interpreter::new(&before, Precision::Exact);
    let want = match instance.run(&before, &interpreter) {
        Ok(want) => want,
        Err(e) => return Verdict::Unknown(format!("the program itself fails: {e}")),
    };
    let unreal = numbers == Numbers::Reals && interpreter.met_infinity();
    let differs = |kind, what: String| match kind {
        _ if unreal => Verdict::Unknown("a product or a sum of it is infinite".to_owned()),
        kind => Verdict::Differs(Difference { kind, what }),
    };
    let got = match instance.run(&after, &Interpreter::new(&after, Precision::Exact)) {
        Ok(got) => got,
        Err(e) => return differs(DifferenceKind::Fails, format!("it fails: {e}")),
    };
    let names = before.entry().map_or_else(Vec::new, |f| {
        f.results.iter().map(|&r| format!("`{}` of @{}", f.value(r).name, f.name)).collect()
    });
    for (step, (want, got)) in want.iter().zip(&got).enumerate() {
        for ((want, got), name) in want.iter().zip(got).zip(&names) {
            if let Err(e) = close(got, want) {
                let finite = |t: &Tensor| t.data.iter().all(|x| x.is_finite());
                let kind = if finite(got) && finite(want) {
                    DifferenceKind::Number
                } else {
                    DifferenceKind::NotFinite
                };
                return differs(kind, format!("{name}, {}: {e}", instance.describe(step)));
            }
        }
    }
    Verdict::Same
}

/// Whether two tensors are the same but for rounding; how they differ, what is right on the right.
fn close(got: &Tensor, want: &Tensor) -> Result<(), latentc_ir::Mismatch> {
    let scale = want.data.iter().filter(|x| x.is_finite()).fold(1.0f64, |most, x| most.max(x.abs()));
    got.close_to(want, CLOSE * scale, CLOSE)
}

/// Instances that each application of a pass is tried on.
pub const INSTANCES: u64 = 2;

/// A pass that changed what a program computes, and the smallest program that was found which it does that to.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The pass.
    pub pass: &'static str,
    /// What it was told to make.
    pub graph: Graph,
    /// For how many new tokens, if it was told.
    pub tokens: Option<u64>,
    /// In pages of how many positions, if it was told.
    pub page: Option<u64>,
    /// What is different in the smallest program.
    pub difference: Difference,
    /// The smallest program, before the pass.
    pub module: Module,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (pass, graph) = (self.pass, self.graph.name());
        writeln!(f, "the pass `{pass}` changes what a {graph} graph computes: {}", self.difference.what)?;
        writeln!(f, "The smallest program found that shows it; to see it again:")?;
        let tokens = self.tokens.map_or_else(String::new, |n| format!(" --tokens {n}"));
        let page = self.page.map_or_else(String::new, |n| format!(" --cache-page {n}"));
        writeln!(f, "// latentc opt FILE --graph {graph}{tokens}{page} --passes {pass} --validate")?;
        write!(f, "{}", self.module)
    }
}

impl std::error::Error for Failure {}

/// Whether a pass, told what `cx` says, kept what a module computes. What could not be compared, if it could not: all instances must fail for that.
///
/// # Errors
/// The smallest program that the pass spoils.
pub fn validate(
    pass: &Pass,
    cx: &Context,
    before: &Module,
    after: &Module,
) -> Result<Option<String>, Box<Failure>> {
    let mut unknown = Vec::new();
    let rounded = pass.rounds.map(|rounded| rounded(before, cx));
    for seed in 0..INSTANCES {
        match compare(rounded.as_ref().unwrap_or(before), after, seed, Numbers::Reals) {
            Verdict::Same => {}
            Verdict::Unknown(why) => unknown.push(why),
            Verdict::Differs(difference) => {
                let (module, difference) =
                    smallest::smallest(before, difference, |module| spoils(pass, cx, module, seed));
                return Err(Box::new(Failure {
                    pass: pass.name,
                    graph: cx.graph,
                    tokens: cx.tokens,
                    page: cx.page,
                    difference,
                    module,
                }));
            }
        }
    }
    let none = unknown.len() as u64 == INSTANCES;
    Ok(unknown.pop().filter(|_| none))
}

/// How a pass spoils a module, if it does.
fn spoils(pass: &Pass, cx: &Context, module: &Module, seed: u64) -> Option<Difference> {
    latentc_ir::verify(module).ok()?;
    let mut cx = Context { remarks: Vec::new(), ..cx.clone() };
    let after = pass.apply(module, &mut cx).ok()?;
    let rounded = pass.rounds.map(|rounded| rounded(module, &cx));
    match compare(rounded.as_ref().unwrap_or(module), &after, seed, Numbers::Reals) {
        Verdict::Differs(difference) => Some(difference),
        Verdict::Same | Verdict::Unknown(_) => None,
    }
}
