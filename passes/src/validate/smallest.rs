//! From a program that a pass spoils to the smallest that it still spoils.
//!
//! Each step tries something smaller and keeps it if the pass spoils that in the same way: one function for all, small
//! sizes, one value for all results, parameters for what is computed.

use std::collections::BTreeSet;

use latentc_ir::{Function, Module, Op, Scale, ValueId};

use super::Difference;

/// So many programs are tried at most.
const PATIENCE: usize = 3000;

/// The smallest program found, and how it differs. `spoils` says how a program does, if it does.
pub(super) fn smallest(
    module: &Module,
    difference: Difference,
    spoils: impl Fn(&Module) -> Option<Difference>,
) -> (Module, Difference) {
    let mut hunt = Hunt { found: module.clone(), difference, spoils, tried: 0 };
    hunt.one_function();
    hunt.sizes();
    loop {
        let before = hunt.found.clone();
        hunt.results();
        hunt.parameters();
        hunt.sizes();
        if hunt.found == before || hunt.tried >= PATIENCE {
            return (hunt.found, hunt.difference);
        }
    }
}

struct Hunt<F> {
    found: Module,
    difference: Difference,
    spoils: F,
    tried: usize,
}

impl<F: Fn(&Module) -> Option<Difference>> Hunt<F> {
    /// Takes a candidate if it is spoilt too.
    fn take(&mut self, candidate: Module) -> bool {
        self.tried += 1;
        if self.tried > PATIENCE || candidate == self.found {
            return false;
        }
        let difference = (self.spoils)(&candidate).filter(|d| d.kind == self.difference.kind);
        if let Some(difference) = difference {
            (self.found, self.difference) = (candidate, difference);
            return true;
        }
        false
    }

    /// The first function that is spoilt by itself, callees first.
    fn one_function(&mut self) {
        let names: Vec<_> = self.found.functions.iter().map(|f| f.name.clone()).collect();
        for entry in names {
            let candidate = Module { entry, ..self.found.clone() };
            if self.take(reached(candidate)) {
                return;
            }
        }
    }

    fn sizes(&mut self) {
        for scale in [Scale::of(&[&self.found]), Scale::least(&[&self.found])] {
            self.take(scale.apply(&self.found));
        }
    }

    /// The first value of the body that is wrong, or else one of the results.
    fn results(&mut self) {
        let Some(f) = self.found.entry() else { return };
        let made = f.body.iter().flat_map(|i| &i.results).copied().collect::<Vec<_>>();
        let tried = made.into_iter().chain(f.results.clone());
        for result in tried.collect::<BTreeSet<_>>() {
            for effects in [false, true] {
                if self.take(cut(&self.found, &[result], &BTreeSet::new(), effects)) {
                    return;
                }
            }
        }
    }

    /// Parameters in the place of as many values as can be: of halves of the body, then quarters, then one by one.
    fn parameters(&mut self) {
        let count = self.found.entry().map_or(0, |f| f.body.len() + f.weights.len());
        let mut width = count.div_ceil(2).max(1);
        loop {
            let mut at = 0;
            while let Some(values) = self.found.entry().map(given_values) {
                if at >= values.len() {
                    break;
                }
                let given = values[at..values.len().min(at + width)].iter().copied().collect();
                let results = self.found.entry().map_or_else(Vec::new, |f| f.results.clone());
                let taken = [false, true]
                    .into_iter()
                    .any(|effects| self.take(cut(&self.found, &results, &given, effects)));
                // What was taken is no longer among the values.
                at += if taken { 0 } else { width };
            }
            if width == 1 {
                return;
            }
            width = width.div_ceil(2);
        }
    }
}

/// The values that a parameter could stand for: those of the body and weights, but for what is returned.
fn given_values(f: &Function) -> Vec<ValueId> {
    let weights = f.weights.iter().map(|w| w.value);
    let made = f.body.iter().flat_map(|i| i.results.iter().copied());
    weights.chain(made).filter(|v| !f.results.contains(v)).collect()
}

/// The module with only those functions that its entry needs.
fn reached(mut module: Module) -> Module {
    let mut needed = BTreeSet::from([module.entry.clone()]);
    for f in module.functions.iter().rev() {
        if needed.contains(&f.name) {
            for inst in &f.body {
                if let Op::Call { callee, .. } = &inst.op {
                    needed.insert(callee.clone());
                }
            }
        }
    }
    module.functions.retain(|f| needed.contains(&f.name));
    module
}

/// The module whose entry returns these values and gets those as parameters, without what is not needed then. `effects`:
/// what is left in caches is needed.
fn cut(module: &Module, results: &[ValueId], given: &BTreeSet<ValueId>, effects: bool) -> Module {
    let mut out = module.clone();
    let Some(f) = out.functions.iter_mut().find(|f| f.name == module.entry) else { return out };
    f.results = results.to_vec();
    let mut needed: BTreeSet<ValueId> = results.iter().copied().collect();
    let mut body = Vec::new();
    for inst in std::mem::take(&mut f.body).into_iter().rev() {
        let effect = effects && matches!(inst.op, Op::Append { .. } | Op::Call { .. });
        let wanted = inst.results.iter().any(|r| needed.contains(r) && !given.contains(r));
        let passed = inst.results.iter().any(|r| given.contains(r));
        if (wanted || effect) && !passed {
            needed.extend(&inst.args);
            body.push(inst);
        }
    }
    body.reverse();
    f.body = body;
    f.params.retain(|p| needed.contains(p));
    f.params.extend(given.iter().filter(|v| needed.contains(v)));
    f.weights.retain(|w| needed.contains(&w.value) && !given.contains(&w.value));
    f.caches.retain(|c| needed.contains(c));
    let mut tidy = f.canonical();
    // What nothing defines any more comes last.
    let made: usize = tidy.body.iter().map(|i| i.results.len()).sum();
    tidy.values.truncate(tidy.params.len() + tidy.weights.len() + tidy.caches.len() + made);
    *f = tidy;
    reached(out)
}
