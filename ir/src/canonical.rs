//! The one numbering that the text format can express.

use crate::graph::{Function, Module, ValueId};

impl Module {
    /// The same module with values numbered in order of definition, so that what prints alike is equal.
    #[must_use]
    pub fn canonical(&self) -> Module {
        Module {
            name: self.name.clone(),
            functions: self.functions.iter().map(Function::canonical).collect(),
            entry: self.entry.clone(),
        }
    }
}

impl Function {
    /// The same function with values numbered in order of definition: parameters, weights, caches, then the results
    /// of the body. Values that nothing defines come last, and numbers that are no value's stay as they are.
    #[must_use]
    pub fn canonical(&self) -> Function {
        let defined = (self.params.iter().copied())
            .chain(self.weights.iter().map(|w| w.value))
            .chain(self.caches.iter().copied())
            .chain(self.body.iter().flat_map(|inst| inst.results.iter().copied()));

        let mut new: Vec<Option<ValueId>> = vec![None; self.values.len()];
        let mut order = Vec::with_capacity(self.values.len());
        for old in defined.chain((0..self.values.len() as u32).map(ValueId)) {
            if let Some(place @ None) = new.get_mut(old.0 as usize) {
                *place = Some(ValueId(order.len() as u32));
                order.push(old);
            }
        }
        let renumber = |v: &mut ValueId| {
            if let Some(Some(n)) = new.get(v.0 as usize) {
                *v = *n;
            }
        };

        let mut f = self.clone();
        f.values = order.iter().map(|old| self.values[old.0 as usize].clone()).collect();
        f.params.iter_mut().for_each(renumber);
        f.weights.iter_mut().map(|w| &mut w.value).for_each(renumber);
        f.caches.iter_mut().for_each(renumber);
        for inst in &mut f.body {
            inst.args.iter_mut().for_each(renumber);
            inst.results.iter_mut().for_each(renumber);
        }
        f.results.iter_mut().for_each(renumber);
        f
    }
}
