//! A function that its caller calls once becomes a part of the caller.
//!
//! What   y = call @f(x) under "s", @f called once there  =>  @f's instructions, its weights and caches under "s"
//! Why    functions are how authors group equations; what may be one kernel should not end where a paragraph does
//! Needs  any graph.  Keeps  runs of calls, one working on the result of another: a stack of layers is what people read a dump
//!        by, and that equal layers are one function is why compile time does not grow with depth
//! Cost   none: nothing is computed twice. The text grows by a function for each caller
//! Cases  inline.ir

use std::collections::{BTreeMap, BTreeSet};

use latentc_ir::interp::scoped;
use latentc_ir::{Axis, AxisId, Factor, Function, Inst, Module, Op, Size, Stored, Type, ValueId};

/// Inlines single calls in every function, and drops functions that are no longer called.
pub fn inline(module: &Module) -> Module {
    let mut functions: Vec<Function> = Vec::new();
    for f in &module.functions {
        functions.push(function(f, &functions));
    }
    let mut called = BTreeSet::from([module.entry.clone()]);
    for f in functions.iter().rev() {
        if called.contains(&f.name) {
            called.extend(callees(f).map(str::to_owned));
        }
    }
    functions.retain(|f| called.contains(&f.name));
    Module { name: module.name.clone(), functions, entry: module.entry.clone() }
}

fn callees(f: &Function) -> impl Iterator<Item = &str> {
    f.body.iter().filter_map(|inst| match &inst.op {
        Op::Call { callee, .. } => Some(callee.as_str()),
        _ => None,
    })
}

/// A function with what it calls once in the place of the calls. Callees have been done before.
fn function(f: &Function, done: &[Function]) -> Function {
    if !f.body.iter().any(|inst| once(f, inst, done).is_some()) {
        return f.clone();
    }
    let mut new = f.clone();
    new.body.clear();
    // What stands for each result of a call that is gone.
    let mut gone: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    for inst in &f.body {
        let args: Vec<_> = inst.args.iter().map(|a| gone.get(a).copied().unwrap_or(*a)).collect();
        match once(f, inst, done) {
            None => new.body.push(Inst { args, ..inst.clone() }),
            Some((callee, scope)) => match tied(&new, callee, &args, inst) {
                Some(axes) => {
                    let results = paste(&mut new, callee, scope, axes, &args);
                    gone.extend(inst.results.iter().copied().zip(results));
                }
                None => new.body.push(Inst { args, ..inst.clone() }),
            },
        }
    }
    for r in &mut new.results {
        *r = gone.get(r).copied().unwrap_or(*r);
    }
    drop_values(new, &gone)
}

/// The callee and the scope of a call, if the function has no other call of it, and it is no part of a run.
fn once<'a>(f: &Function, inst: &'a Inst, done: &'a [Function]) -> Option<(&'a Function, &'a str)> {
    let Op::Call { callee, scope } = &inst.op else { return None };
    let g = done.iter().find(|g| g.name == *callee)?;
    let follows = |x: &Inst, y: &Inst| y.args.iter().any(|a| x.results.contains(a));
    let is_call = |x: &&Inst| matches!(x.op, Op::Call { .. });
    if f.body.iter().filter(is_call).any(|x| follows(x, inst) || follows(inst, x)) {
        return None;
    }
    (callees(f).filter(|c| c == callee).count() == 1).then_some((g, scope.as_str()))
}

/// The caller's axes for those of the callee that the call ties down; `None` if the callee takes one for the positions of a
/// sequence that the caller does not.
fn tied(
    new: &Function,
    callee: &Function,
    args: &[ValueId],
    call: &Inst,
) -> Option<BTreeMap<AxisId, AxisId>> {
    let mut axes: BTreeMap<AxisId, AxisId> = BTreeMap::new();
    let (given, named) = (args.iter().chain(&call.results), callee.params.iter().chain(&callee.results));
    for (&mine, &theirs) in given.zip(named) {
        let pairs = callee.ty(theirs).axes.iter().copied().zip(new.ty(mine).axes.iter().copied());
        axes.extend(pairs);
    }
    let same = |(theirs, mine): (&AxisId, &AxisId)| match callee.axis(*theirs).like {
        Some(of) => axes.contains_key(&of) && new.axis(*mine).like == axes.get(&of).copied(),
        None => true,
    };
    axes.iter().all(same).then_some(axes)
}

/// Appends what a callee computes to the caller; returns the callee's results there.
fn paste(
    new: &mut Function,
    callee: &Function,
    scope: &str,
    mut axes: BTreeMap<AxisId, AxisId>,
    args: &[ValueId],
) -> Vec<ValueId> {
    // An axis that the call does not tie down is the callee's own. Those that others are positions of go first.
    let own = callee.axes.iter().enumerate().map(|(n, axis)| (AxisId(n as u32), axis));
    let (positions, others): (Vec<_>, Vec<_>) = own.partition(|(_, axis)| axis.like.is_some());
    for (id, axis) in others.into_iter().chain(positions) {
        if !axes.contains_key(&id) {
            let like = axis.like.map(|of| axes[&of]);
            // Positions of the same sequence counted by the same symbol are one axis, wherever they were declared.
            let same = |a: &Axis| {
                like.is_some() && a.like == like && a.size == axis.size && matches!(a.size, Size::Sym(_))
            };
            let known = new.axes.iter().position(same).map(|n| AxisId(n as u32));
            let taken = |a: &AxisId| axes.values().any(|b| b == a);
            let to = known.filter(|a| !taken(a));
            let to = to.unwrap_or_else(|| new.add_axis(&axis.name, axis.size.clone(), like));
            axes.insert(id, to);
        }
    }
    let ty = |v: ValueId| {
        let ty = callee.ty(v);
        Type::new(ty.dtype, ty.axes.iter().map(|a| axes[a]).collect::<Vec<_>>())
    };
    let mut values: BTreeMap<ValueId, ValueId> =
        callee.params.iter().copied().zip(args.iter().copied()).collect();
    for w in &callee.weights {
        let part = |x: &Factor| match x {
            Factor::Axis(a) => Factor::Axis(axes[a]),
            Factor::Parts(parts) => Factor::Parts(parts.iter().map(|a| axes[a]).collect()),
        };
        let stored = Stored {
            tensor: scoped(scope, &numbered_by(&w.stored.tensor, callee, new, &axes)),
            dims: w.stored.dims.iter().map(|dim| dim.iter().map(part).collect()).collect(),
            held: w.stored.held,
        };
        values.insert(w.value, new.add_weight(&callee.value(w.value).name, ty(w.value), stored));
    }
    for &c in &callee.caches {
        // A cache is known by its path, so the name is no choice: the verifier has seen that no other cache has it.
        let name = scoped(scope, &callee.value(c).name);
        values.insert(c, new.add_cache(&name, ty(c)));
    }
    for inst in &callee.body {
        let args: Vec<_> = inst.args.iter().map(|a| values[a]).collect();
        let results: Vec<_> = inst.results.iter().map(|&r| (callee.value(r).name.as_str(), ty(r))).collect();
        let op = match inst.op.on_axes(|a| axes[&a]) {
            Op::Call { callee, scope: below } => Op::Call { callee, scope: scoped(scope, &below) },
            op => op,
        };
        let made = new.push(op, &args, &results);
        let last = new.body.last_mut().expect("one was just pushed");
        last.origins.clone_from(&inst.origins);
        last.by.clone_from(&inst.by);
        values.extend(inst.results.iter().copied().zip(made));
    }
    callee.results.iter().map(|r| values[r]).collect()
}

/// A tensor's name with the axes that number tensors (`{e}`) called as the caller calls them.
fn numbered_by(tensor: &str, callee: &Function, new: &Function, axes: &BTreeMap<AxisId, AxisId>) -> String {
    let mut parts = tensor.split('{');
    let mut name = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (axis, rest) = part.split_once('}').unwrap_or((part, ""));
        let here = callee.axis_named(axis).map_or(axis, |a| &new.axis(axes[&a]).name);
        name += &format!("{{{here}}}{rest}");
    }
    name
}

/// The function without the results of calls that are gone, in canonical order; what stands for them takes their names,
/// which the caller's author chose for them.
fn drop_values(mut f: Function, gone: &BTreeMap<ValueId, ValueId>) -> Function {
    let mut names: BTreeMap<ValueId, String> = BTreeMap::new();
    {
        let defs_body: BTreeSet<ValueId> =
            f.body.iter().flat_map(|inst| inst.results.iter().copied()).collect();
        for (old, new) in gone {
            if defs_body.contains(new) && !names.contains_key(new) {
                names.insert(*new, f.value(*old).name.clone());
            }
        }
    }
    for (n, old) in gone.keys().enumerate() {
        f.values[old.0 as usize].name = format!("\u{0}{n}");
    }
    for (new, name) in names {
        f.values[new.0 as usize].name = name;
    }
    let mut f = f.canonical();
    f.values.truncate(f.values.len() - gone.len());
    f
}
