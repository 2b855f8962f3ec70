//! The verifier's rules on calls: what is passed, and whose cache is whose.

use std::collections::{BTreeSet, HashMap};

use crate::graph::{Function, Inst, ValueId};
use crate::infer::show_type;
use crate::interp::scoped;
use crate::ops::Op;
use crate::print::Name;
use crate::types::AxisId;
use crate::verify::Checker;

/// Checks what a call passes and gets; all numbers are in range.
///
/// # Errors
/// The rule of calls that is broken.
pub(crate) fn check_call(f: &Function, inst: &Inst, callee: &Function) -> Result<(), String> {
    let of = Name(&callee.name);
    for (given, wanted, what) in
        [(&inst.args, &callee.params, "params"), (&inst.results, &callee.results, "results")]
    {
        if given.len() != wanted.len() {
            return Err(format!("@{of} has {} {what}, not {}", wanted.len(), given.len()));
        }
    }
    let mut mapping = Mapping { f, callee, to: HashMap::new(), from: HashMap::new() };
    for (&given, &wanted) in inst.args.iter().zip(&callee.params) {
        mapping.unify(given, wanted)?;
    }
    for (&given, &wanted) in inst.results.iter().zip(&callee.results) {
        mapping.unify(given, wanted)?;
    }
    Ok(())
}

/// Which axis of the caller each axis of the callee is, and back.
struct Mapping<'f> {
    f: &'f Function,
    callee: &'f Function,
    to: HashMap<AxisId, AxisId>,
    from: HashMap<AxisId, AxisId>,
}

impl Mapping<'_> {
    fn unify(&mut self, given: ValueId, wanted: ValueId) -> Result<(), String> {
        let (f, callee) = (self.f, self.callee);
        let (given, wanted) = (f.value(given), callee.value(wanted));
        let (x, y) = (&given.ty, &wanted.ty);
        let differ = || {
            format!(
                "{} is {}, {} of @{} is {}",
                Name(&given.name),
                show_type(x, &f.axes),
                Name(&wanted.name),
                Name(&callee.name),
                show_type(y, &callee.axes)
            )
        };
        if x.dtype != y.dtype || x.axes.len() != y.axes.len() {
            return Err(differ());
        }
        for (&mine, &theirs) in x.axes.iter().zip(&y.axes) {
            if f.axis(mine).size != callee.axis(theirs).size {
                let sizes = format!("{} and {}", f.axis(mine).size, callee.axis(theirs).size);
                return Err(format!("{}; axes `{}` differ in size: {sizes}", differ(), f.axis(mine).name));
            }
            let to = *self.to.entry(theirs).or_insert(mine);
            let from = *self.from.entry(mine).or_insert(theirs);
            if to != mine {
                let (theirs, to, mine) = (callee.axis(theirs), f.axis(to), f.axis(mine));
                let names = format!("`{}` here, `{}` elsewhere in the call", mine.name, to.name);
                return Err(format!("{}; axis `{}` is {names}", differ(), theirs.name));
            }
            if from != theirs {
                let (theirs, from, mine) = (callee.axis(theirs), callee.axis(from), f.axis(mine));
                let names = format!("`{}` and `{}` of @{}", from.name, theirs.name, Name(&callee.name));
                return Err(format!("{}; axis `{}` cannot be both {names}", differ(), mine.name));
            }
        }
        Ok(())
    }
}

/// The path of every cache that a function reaches, by number of the function.
#[derive(Default)]
pub(crate) struct CachePaths(HashMap<usize, Vec<String>>);

/// More caches than any model has; functions that call each other twice have exponentially many.
const MOST_CACHES: usize = 100_000;

impl CachePaths {
    /// Every cache below this function has its own path.
    pub(crate) fn check(&mut self, cx: &mut Checker<'_, '_>) {
        let f = cx.f;
        let mut paths: BTreeSet<String> = f.caches.iter().map(|v| f.value(*v).name.clone()).collect();
        for (at, inst) in f.body.iter().enumerate() {
            let Op::Call { callee, scope } = &inst.op else { continue };
            let Some((n, _, _)) = cx.callee(callee) else { continue };
            for below in self.0.get(&n).into_iter().flatten() {
                let path = scoped(scope, below);
                if paths.contains(&path) {
                    cx.inst_error(at, format!("a second cache at {}; call under another scope", Name(&path)));
                    break;
                }
                if paths.len() >= MOST_CACHES {
                    cx.function_error(format!("more than {MOST_CACHES} caches"));
                    return;
                }
                paths.insert(path);
            }
        }
        if !paths.is_empty() {
            self.0.insert(cx.number(), paths.into_iter().collect());
        }
    }
}
