//! What is kept between the halves beside the results of calls.
//!
//! A value that is kept takes its bytes from the moment it is made until its gradient reads it, in every call of its function; one that is
//! not takes the time to make it again. Products are what takes time, so they are the candidates; where `route` has come before, those
//! of experts have the rows that chose them. Left out are those that a gate still makes sparse, and those that grow with the
//! square of a sequence, which no memory should ever hold.

use std::collections::{BTreeMap, BTreeSet};

use latentc_ir::cost::{bytes, cost};
use latentc_ir::sparsity::{Need, Support, sparsity};
use latentc_ir::{Function, Inst, Module, Op, Poly, Size};

use super::reached;

/// Values to keep, by function and name in the definition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Keep(BTreeMap<String, BTreeSet<String>>);

impl Keep {
    /// Whether a value is to be kept.
    pub fn has(&self, function: &str, value: &str) -> bool {
        self.0.get(function).is_some_and(|values| values.contains(value))
    }
}

impl<'a> FromIterator<(&'a str, &'a str)> for Keep {
    /// Of pairs of a function and a value.
    fn from_iter<I: IntoIterator<Item = (&'a str, &'a str)>>(pairs: I) -> Keep {
        let mut keep = Keep::default();
        for (function, value) in pairs {
            keep.0.entry(function.to_owned()).or_default().insert(value.to_owned());
        }
        keep
    }
}

/// A value that may be kept or made again, in all calls of its function together.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Its function.
    pub function: String,
    /// Its name there.
    pub value: String,
    /// What it takes to keep it.
    pub bytes: Poly,
    /// The operations that it takes to make it again.
    pub flops: Poly,
}

/// The candidates of a definition, in the order of its text.
///
/// # Errors
/// If the module calls what it does not define.
pub fn candidates(module: &Module) -> Result<Vec<Candidate>, String> {
    let reached = reached(module);
    let calls = calls(module);
    let mut found = Vec::new();
    for f in module.functions.iter().filter(|f| f.name != module.entry && reached.contains(f.name.as_str())) {
        let times = i128::from(calls.get(f.name.as_str()).copied().unwrap_or(0));
        let costs = cost(module, &f.name)?.insts;
        let facts = sparsity(f);
        for (inst, cost) in f.body.iter().zip(&costs) {
            let v = match (&inst.op, &inst.results[..]) {
                (Op::Contract, [v]) if inst.args.len() > 1 && !f.results.contains(v) => *v,
                _ => continue,
            };
            let dense = matches!(&facts.support[v.0 as usize], Support::Within(gates) if gates.is_empty())
                && matches!(&facts.need[v.0 as usize], Need::Within(gates) if gates.is_empty());
            if dense && f.ty(v).dtype.is_float() && is_linear(f, inst) {
                found.push(Candidate {
                    function: f.name.clone(),
                    value: f.value(v).name.clone(),
                    bytes: &bytes(f, v) * times,
                    flops: &cost.flops * times,
                });
            }
        }
    }
    Ok(found)
}

/// Whether no run-time size is there twice.
fn is_linear(f: &Function, inst: &Inst) -> bool {
    let mut sizes = BTreeSet::new();
    f.ty(inst.result()).axes.iter().all(|&a| match &f.axis(a).size {
        Size::Sym(s) => sizes.insert(s.clone()),
        Size::Fixed(_) => true,
    })
}

/// How often each function is called in a run.
fn calls(module: &Module) -> BTreeMap<&str, u64> {
    let mut times = BTreeMap::from([(module.entry.as_str(), 1)]);
    // Callers stand behind what they call.
    for f in module.functions.iter().rev() {
        let of = times.get(f.name.as_str()).copied().unwrap_or(0);
        for inst in &f.body {
            if let Op::Call { callee, .. } = &inst.op
                && let Some(callee) = module.function(callee)
            {
                *times.entry(callee.name.as_str()).or_insert(0) += of;
            }
        }
    }
    times
}
