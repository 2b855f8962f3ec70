//! Rebuilding a function: what most passes are written with.
//!
//! A pass walks the old function in order and says for each instruction what stands for it in the new one. Values
//! keep their names where they keep their meaning, and every new instruction remembers the lines it came from.

use latentc_ir::{Function, Inst, Op, Origin, Type, ValueId};

/// A function being rebuilt from an old one.
pub struct Rebuild<'a> {
    /// What is being replaced.
    pub old: &'a Function,
    /// What replaces it, so far.
    pub new: Function,
    map: Vec<Option<ValueId>>,
    rule: &'static str,
}

impl<'a> Rebuild<'a> {
    /// An empty function with the old one's name, axes, parameters, weights and caches. `rule` names the pass in
    /// every instruction that it makes.
    pub fn new(old: &'a Function, rule: &'static str) -> Rebuild<'a> {
        let mut new = Function::new(&old.name);
        new.source.clone_from(&old.source);
        new.axes.clone_from(&old.axes);
        let mut rebuild = Rebuild { old, new, map: vec![None; old.values.len()], rule };
        for &p in &old.params {
            let value = old.value(p);
            let id = rebuild.new.add_param(&value.name, value.ty.clone());
            rebuild.replace(p, id);
        }
        rebuild
    }

    /// Takes over the old weights and caches. Apart from [`new`](Rebuild::new), since a pass may add parameters first.
    pub fn header(&mut self) {
        for w in &self.old.weights {
            let value = self.old.value(w.value);
            let id = self.new.add_weight(&value.name, value.ty.clone(), w.stored.clone());
            self.replace(w.value, id);
        }
        for &c in &self.old.caches {
            let value = self.old.value(c);
            let id = self.new.add_cache(&value.name, value.ty.clone());
            self.replace(c, id);
        }
    }

    /// From here on, `new` stands for `old`.
    pub fn replace(&mut self, old: ValueId, new: ValueId) {
        self.map[old.0 as usize] = Some(new);
    }

    /// What stands for an old value.
    ///
    /// # Panics
    /// If the value has not been replaced yet: the pass does not walk in order.
    pub fn get(&self, old: ValueId) -> ValueId {
        self.map[old.0 as usize].expect("instructions are rebuilt in order")
    }

    /// What stands for the operands of an instruction.
    pub fn args(&self, inst: &Inst) -> Vec<ValueId> {
        inst.args.iter().map(|&a| self.get(a)).collect()
    }

    /// Takes an instruction over as it is, on what stands for its operands.
    pub fn copy(&mut self, inst: &Inst) {
        let args = self.args(inst);
        let results: Vec<_> = inst.results.iter().map(|&r| self.old.value(r)).collect();
        let results: Vec<_> = results.iter().map(|v| (v.name.as_str(), v.ty.clone())).collect();
        let made = self.new.push(inst.op.clone(), &args, &results);
        let last = self.new.body.last_mut().expect("one was just pushed");
        last.origins.clone_from(&inst.origins);
        last.by.clone_from(&inst.by);
        for (&old, new) in inst.results.iter().zip(made) {
            self.replace(old, new);
        }
    }

    /// Appends an instruction that computes (a part of) what `from` did. An empty name is numbered.
    pub fn emit(&mut self, from: &Inst, op: Op, args: &[ValueId], name: &str, ty: Type) -> ValueId {
        self.emit_at(&from.origins, op, args, name, ty)
    }

    /// Appends an instruction that computes (a part of) what stands at these lines.
    pub fn emit_at(&mut self, origins: &[Origin], op: Op, args: &[ValueId], name: &str, ty: Type) -> ValueId {
        let id = self.new.push(op, args, &[(name, ty)])[0];
        let last = self.new.body.last_mut().expect("one was just pushed");
        last.origins = origins.to_vec();
        last.by = Some(self.rule.to_owned());
        id
    }

    /// The new function.
    pub fn finish(mut self) -> Function {
        self.new.results = self.old.results.iter().map(|&r| self.get(r)).collect();
        self.new
    }
}

/// The instructions whose results are needed, by index of the body: those that results, appends and calls depend on.
pub fn live(f: &Function) -> Vec<bool> {
    let mut needed = vec![false; f.values.len()];
    for r in &f.results {
        needed[r.0 as usize] = true;
    }
    let mut live = vec![false; f.body.len()];
    for (n, inst) in f.body.iter().enumerate().rev() {
        // An append outlives the run in its cache, and a call may hold one.
        let effect = matches!(inst.op, Op::Append { .. } | Op::Call { .. });
        live[n] = effect || inst.results.iter().any(|r| needed[r.0 as usize]);
        if live[n] {
            for a in &inst.args {
                needed[a.0 as usize] = true;
            }
        }
    }
    live
}

/// The function without dead instructions and unread weights.
pub fn sweep(f: &Function) -> Function {
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
    let mut r = Rebuild::new(&kept, "sweep");
    r.header();
    for (inst, _) in f.body.iter().zip(&live).filter(|(_, live)| **live) {
        r.copy(inst);
    }
    r.finish()
}
