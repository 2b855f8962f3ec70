//! What nothing uses need not be computed.
//!
//! What   an instruction without uses and without effect  =>  nothing
//! Why    other passes leave operands behind
//! Needs  any graph.  Keeps  results, caches, parameters; weights that nothing reads go too
//! Cases  eliminate.ir

use latentc_ir::{Function, Module};

use crate::rewrite::{Rebuild, live};

/// Drops dead instructions and unread weights from every function.
pub fn eliminate(module: &Module) -> Module {
    let functions = module.functions.iter().map(function).collect();
    Module { name: module.name.clone(), functions, entry: module.entry.clone() }
}

fn function(f: &Function) -> Function {
    let live = live(f);
    let mut read = vec![false; f.values.len()];
    for (inst, _) in f.body.iter().zip(&live).filter(|(_, live)| **live) {
        for a in &inst.args {
            read[a.0 as usize] = true;
        }
    }
    for r in &f.results {
        read[r.0 as usize] = true;
    }
    let mut kept = f.clone();
    kept.weights.retain(|w| read[w.value.0 as usize]);
    let mut r = Rebuild::new(&kept, "eliminate");
    r.header();
    for (inst, _) in f.body.iter().zip(&live).filter(|(_, live)| **live) {
        r.copy(inst);
    }
    r.finish()
}
