//! From a graph to launches: which values get memory, and what is computed where it is needed.
//!
//! Contractions and calls work on memory, so their operands and results have buffers. All else is an expression of
//! what has: it is fused into the one kernel that wants it, and computed again if several do. Two things are not
//! worth repeating and get a buffer when shared: reductions, and what a selection compares many times.
//!
//! A kernel that reduces works row by row, so the reductions in it must agree on what a row is: their results have the same axes.

use std::collections::{BTreeMap, BTreeSet};

use latentc_ir::{AxisId, Def, Function, Inst, Module, Op, Origin, Size, Type, ValueId};

use crate::grouped::GroupedPlan;
use crate::program::{Buffer, BufferId, Kernel, KernelKind, Program, Role, Routine, Step};

/// Schedules every function of a module that has been through the passes.
///
/// # Errors
/// If the module holds an op that has no kernel, which a pass should have replaced; names function and value.
pub fn schedule(module: &Module) -> Result<Program, ScheduleError> {
    let mut kernels = Vec::new();
    let mut routines = Vec::new();
    for f in &module.functions {
        routines.push(Scheduler::new(f)?.run(&mut kernels)?);
    }
    Ok(Program { name: module.name.clone(), kernels, routines, entry: module.entry.clone() })
}

/// An op without a kernel.
#[derive(Debug, thiserror::Error)]
#[error("@{function}: `{value}` is made by `{op}`, which has no kernel; {why}")]
pub struct ScheduleError {
    /// The function.
    pub function: String,
    /// The value.
    pub value: String,
    /// The op's mnemonic.
    pub op: &'static str,
    /// What should have happened.
    pub why: &'static str,
}

struct Scheduler<'a> {
    f: &'a Function,
    defs: Vec<Def<'a>>,
    /// Which values have memory of their own or share that of another.
    stored: Vec<bool>,
    /// The buffer of each stored value that has been scheduled.
    buffers: BTreeMap<ValueId, BufferId>,
    routine: Routine,
}

impl<'a> Scheduler<'a> {
    fn new(f: &'a Function) -> Result<Self, ScheduleError> {
        for inst in &f.body {
            let why = match inst.op {
                Op::Past { .. } => "run the pass `derive` first",
                Op::Softmax { .. } | Op::RmsNorm { .. } => "run the pass `expand` first",
                Op::Contract if !is_matrix_product(f, inst) => "run the pass `reassociate` first",
                _ => continue,
            };
            return Err(ScheduleError {
                function: f.name.clone(),
                value: f.value(inst.result()).name.clone(),
                op: inst.op.mnemonic(),
                why,
            });
        }
        let routine = Routine {
            name: f.name.clone(),
            buffers: Vec::new(),
            params: Vec::new(),
            results: Vec::new(),
            steps: Vec::new(),
        };
        let defs = f.defs();
        let stored = Storage::decide(f, &defs);
        Ok(Scheduler { f, defs, stored, buffers: BTreeMap::new(), routine })
    }

    fn run(mut self, kernels: &mut Vec<Kernel>) -> Result<Routine, ScheduleError> {
        let f = self.f;
        for &p in &f.params {
            let id = self.add_buffer(p, Role::Param);
            self.routine.params.push(id);
        }
        for (index, w) in f.weights.iter().enumerate() {
            self.add_buffer(w.value, Role::Weight { index });
        }
        for &c in &f.caches {
            self.add_buffer(c, Role::Cache);
        }
        for inst in &f.body {
            if !inst.results.iter().any(|r| self.stored[r.0 as usize]) {
                continue;
            }
            match &inst.op {
                Op::Call { callee, scope } => {
                    let inputs = inst.args.iter().map(|a| self.buffers[a]).collect();
                    let outputs = inst.results.iter().map(|&r| self.add_buffer(r, Role::Temp)).collect();
                    self.routine.steps.push(Step::Call {
                        routine: callee.clone(),
                        scope: scope.clone(),
                        inputs,
                        outputs,
                    });
                }
                Op::Const(values) if !f.ty(inst.result()).axes.is_empty() => {
                    self.add_buffer(inst.result(), Role::Constant { values: values.clone() });
                }
                Op::Append { .. } => {
                    let cache = self.buffers[&inst.args[0]];
                    self.launch(inst.result(), cache, kernels);
                    self.buffers.insert(inst.result(), cache);
                }
                _ if is_view(f, inst) && self.stored[inst.args[0].0 as usize] => {
                    let base = self.buffers[&inst.args[0]];
                    self.buffers.insert(inst.result(), base);
                }
                _ => {
                    let output = self.add_buffer(inst.result(), Role::Temp);
                    self.launch(inst.result(), output, kernels);
                }
            }
        }
        let mut taken = BTreeSet::new();
        for &r in &f.results {
            let mut id = self.buffers[&r];
            // Callers bring memory for each result: what lies elsewhere, or is a result already, is copied there.
            if self.routine.buffer(id).role != Role::Temp || !taken.insert(id) {
                id = self.copy(r, kernels);
                taken.insert(id);
            }
            // A view is the same memory under other axes; callers are told the result's.
            self.routine.buffers[id.0 as usize].dims = self.dims(r);
            self.routine.results.push(id);
        }
        Ok(self.routine)
    }

    fn dims(&self, value: ValueId) -> Vec<Size> {
        self.f.ty(value).axes.iter().map(|&a| self.f.axis(a).size.clone()).collect()
    }

    fn add_buffer(&mut self, value: ValueId, role: Role) -> BufferId {
        let v = self.f.value(value);
        let dims = self.dims(value);
        let id = BufferId(self.routine.buffers.len() as u32);
        self.routine.buffers.push(Buffer { name: v.name.clone(), dtype: v.ty.dtype, dims, role });
        self.buffers.insert(value, id);
        id
    }

    /// Launches the kernel that computes a value into a buffer.
    fn launch(&mut self, root: ValueId, output: BufferId, kernels: &mut Vec<Kernel>) {
        let Def::Inst(_, inst) = self.defs[root.0 as usize] else {
            unreachable!("only results are launched")
        };
        let kind = match inst.op {
            Op::Contract if inst.args.iter().all(|a| self.stored[a.0 as usize]) => KernelKind::Contract,
            Op::Contract => KernelKind::Grouped,
            Op::ScatterAdd { .. } => KernelKind::Scatter,
            _ => KernelKind::Map,
        };
        let mut body = Body::new(self.f, &self.defs, &self.stored);
        let result = body.make(root, inst);
        body.spec.function.results = vec![result];
        let spec = body.spec;
        self.push_launch(root, spec, kind, output, kernels);
    }

    /// A launch that copies a stored value into a buffer of its own.
    fn copy(&mut self, value: ValueId, kernels: &mut Vec<Kernel>) -> BufferId {
        let source = self.buffers[&value];
        let output = self.add_buffer(value, Role::Temp);
        self.buffers.insert(value, source);
        let mut body = Body::new(self.f, &self.defs, &self.stored);
        let x = body.leaf(value);
        let ty = body.spec.function.ty(x).clone();
        body.spec.function.results = body.spec.function.push(Op::Cast, &[x], &[("", ty)]);
        let spec = body.spec;
        self.push_launch(value, spec, KernelKind::Map, output, kernels);
        output
    }

    fn push_launch(
        &mut self,
        root: ValueId,
        spec: Spec,
        kind: KernelKind,
        output: BufferId,
        kernels: &mut Vec<Kernel>,
    ) {
        let Spec { mut function, leaves, sizes, origins } = spec;
        let inputs = leaves.iter().map(|v| self.buffers[v]).collect();
        let mut same = |k: &Kernel| {
            function.name.clone_from(&k.name);
            k.kind == kind && k.body == function
        };
        let kernel = kernels.iter().position(&mut same).unwrap_or(kernels.len());
        if kernel == kernels.len() {
            let wanted = kernel_name(&self.f.name, &self.f.value(root).name);
            let taken = |n: &str| kernels.iter().any(|k| k.name == n);
            let name = if taken(&wanted) {
                (1..)
                    .map(|n| format!("{wanted}_{n}"))
                    .find(|n| !taken(n))
                    .expect("there are more numbers than kernels")
            } else {
                wanted
            };
            function.name.clone_from(&name);
            kernels.push(Kernel { name, kind, body: function });
        }
        self.routine.steps.push(Step::Launch { kernel, inputs, output, sizes, origins });
    }
}

/// `mla` and `c_KV.1` make `mla_c_KV_1`: a name in any target's language.
fn kernel_name(function: &str, value: &str) -> String {
    format!("{function}_{value}").chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect()
}

/// Whether both operands have every summed axis and there is one.
fn is_matrix_product(f: &Function, inst: &Inst) -> bool {
    let summed = f.summed(&inst.args, f.ty(inst.result()));
    inst.args.len() == 2
        && !summed.is_empty()
        && summed.iter().all(|&a| inst.args.iter().all(|&x| f.ty(x).has(a)))
}

/// Whether the result is the operand's memory under other axes.
fn is_view(f: &Function, inst: &Inst) -> bool {
    let ty = f.ty(inst.result());
    let in_place = |x: &Type, from: &[AxisId], to: &[AxisId]| {
        let Some(at) = x.position(from[0]) else { return false };
        x.axes[at..].starts_with(from) && {
            let mut axes = x.axes[..at].to_vec();
            axes.extend_from_slice(to);
            axes.extend_from_slice(&x.axes[at + from.len()..]);
            axes == ty.axes && x.dtype == ty.dtype
        }
    };
    match &inst.op {
        Op::Rename { from, to } => in_place(f.ty(inst.args[0]), &[*from], &[*to]),
        Op::Split { axis, into } => in_place(f.ty(inst.args[0]), &[*axis], into),
        Op::Merge { axes, into } => in_place(f.ty(inst.args[0]), axes, &[*into]),
        _ => false,
    }
}

/// The gather that makes one operand of a contraction, if a grouped kernel can do without its result.
fn gathered<'f>(f: &'f Function, inst: &Inst, defs: &[Def<'f>]) -> Option<&'f Inst> {
    let (Op::Contract, &[a, b]) = (&inst.op, &inst.args[..]) else { return None };
    [(a, b), (b, a)].into_iter().find_map(|(x, other)| {
        let Def::Inst(_, gather) = defs[x.0 as usize] else { return None };
        let fits = matches!(gather.op, Op::Gather { .. })
            && GroupedPlan::fits(
                f.ty(gather.args[0]),
                f.ty(gather.args[1]),
                f.ty(other),
                f.ty(inst.result()),
            );
        fits.then_some(gather)
    })
}

/// Whether an operand is read at other places than the one where the result is made.
fn moves(op: &Op, operand: usize) -> bool {
    match op {
        Op::Rename { .. } | Op::Split { .. } | Op::Merge { .. } | Op::Slice { .. } | Op::Concat { .. } => {
            true
        }
        Op::Rope { .. } | Op::Gather { .. } | Op::TopK { .. } | Op::TopIndices { .. } => operand == 0,
        Op::Const(_)
        | Op::Position { .. }
        | Op::Unary(_)
        | Op::Binary(_)
        | Op::Select
        | Op::Cast
        | Op::Contract
        | Op::Reduce { .. }
        | Op::Broadcast { .. }
        | Op::ScatterAdd { .. }
        | Op::Past { .. }
        | Op::Append { .. }
        | Op::Softmax { .. }
        | Op::RmsNorm { .. }
        | Op::Call { .. } => false,
    }
}

/// Decides which values get memory.
struct Storage<'a> {
    f: &'a Function,
    stored: Vec<bool>,
}

impl<'a> Storage<'a> {
    fn decide(f: &'a Function, defs: &[Def<'a>]) -> Vec<bool> {
        let mut s = Storage { f, stored: vec![false; f.values.len()] };
        for (v, def) in defs.iter().enumerate() {
            s.stored[v] = match def {
                Def::Param(_) | Def::Weight(_) | Def::Cache(_) => true,
                Def::Inst(_, inst) => match inst.op {
                    Op::Contract | Op::ScatterAdd { .. } | Op::Call { .. } | Op::Append { .. } => true,
                    Op::Const(_) => !f.values[v].ty.axes.is_empty(),
                    _ => false,
                },
            };
        }
        for &r in &f.results {
            s.stored[r.0 as usize] = true;
        }
        for inst in f.body.iter().rev() {
            let grouped = gathered(f, inst, defs);
            for (n, &a) in inst.args.iter().enumerate() {
                let wanted = match inst.op {
                    // A gathered operand is read where it lies, at the indices; these must be there to be sorted.
                    Op::Contract if grouped.is_some_and(|g| g.result() == a) => {
                        for &x in grouped.iter().flat_map(|g| &g.args) {
                            s.stored[x.0 as usize] = true;
                        }
                        false
                    }
                    Op::Contract | Op::ScatterAdd { .. } | Op::Call { .. } => true,
                    // Each element is compared with all others, or read at any place.
                    Op::TopK { .. } | Op::TopIndices { .. } | Op::Gather { .. } => n == 0,
                    _ => s.stored[inst.result().0 as usize] && is_view(f, inst),
                };
                s.stored[a.0 as usize] |= wanted;
            }
        }
        // Storing a value takes it out of a row, which can only settle conflicts, so this ends.
        while s.settle() {}
        s.stored
    }

    /// Stores one value more if the rows of some kernel disagree or two kernels would repeat a reduction.
    fn settle(&mut self) -> bool {
        let f = self.f;
        // What a row is for each expression that holds a reduction: the axes of its result.
        let mut rows: Vec<Option<BTreeSet<AxisId>>> = vec![None; f.values.len()];
        for inst in &f.body {
            let Some(&result) = inst.results.first() else { continue };
            let mut row: Option<BTreeSet<AxisId>> = match inst.op {
                Op::Reduce { .. } => Some(f.ty(result).axes.iter().copied().collect()),
                _ => None,
            };
            for (n, &a) in inst.args.iter().enumerate() {
                let Some(other) = &rows[a.0 as usize] else { continue };
                let agree = row.as_ref().is_none_or(|r| r == other);
                if moves(&inst.op, n) || !agree {
                    self.stored[a.0 as usize] = true;
                    return true;
                }
                row = Some(other.clone());
            }
            rows[result.0 as usize] = if self.stored[result.0 as usize] { None } else { row };
        }
        // The kernels that each expression would be computed in, by the value that the kernel makes.
        let mut homes: Vec<BTreeSet<ValueId>> = vec![BTreeSet::new(); f.values.len()];
        for inst in f.body.iter().rev() {
            for &r in &inst.results {
                let i = r.0 as usize;
                if !self.stored[i] && rows[i].is_some() && homes[i].len() > 1 {
                    self.stored[i] = true;
                    return true;
                }
                let into = if self.stored[i] { BTreeSet::from([r]) } else { homes[i].clone() };
                for a in &inst.args {
                    homes[a.0 as usize].extend(&into);
                }
            }
        }
        false
    }
}

/// What a launch computes, in canonical form and in the terms of the function that it comes from.
struct Spec {
    function: Function,
    /// The values that the parameters stand for.
    leaves: Vec<ValueId>,
    /// The sizes that the symbols stand for.
    sizes: Vec<Size>,
    origins: Vec<Origin>,
}

/// The body of a kernel under construction: the expression of one value down to what is stored.
struct Body<'a> {
    f: &'a Function,
    defs: &'a [Def<'a>],
    stored: &'a [bool],
    spec: Spec,
    axes: BTreeMap<AxisId, AxisId>,
    made: BTreeMap<ValueId, ValueId>,
    appends: bool,
}

impl<'a> Body<'a> {
    fn new(f: &'a Function, defs: &'a [Def<'a>], stored: &'a [bool]) -> Body<'a> {
        Body {
            f,
            defs,
            stored,
            spec: Spec {
                function: Function::new(""),
                leaves: Vec::new(),
                sizes: Vec::new(),
                origins: Vec::new(),
            },
            axes: BTreeMap::new(),
            made: BTreeMap::new(),
            appends: false,
        }
    }

    /// The instruction that makes a value, and everything below it that is not stored.
    fn make(&mut self, root: ValueId, inst: &Inst) -> ValueId {
        self.appends = matches!(inst.op, Op::Append { .. });
        // Parameters come first in a function, so the leaves are found before the first instruction is written. The
        // root's axes are met first, which names them in memory order.
        for &a in &self.f.ty(root).axes {
            self.axis(a);
        }
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        self.visit(inst, &mut order, &mut seen);
        for inst in order {
            let args: Vec<_> = inst.args.iter().map(|a| self.made[a]).collect();
            let op = self.map_op(&inst.op);
            let ty = self.ty(self.f.ty(inst.result()));
            let id = self.spec.function.push(op, &args, &[("", ty)])[0];
            self.made.insert(inst.result(), id);
        }
        self.made[&root]
    }

    /// Collects instructions in order, operands first, and registers leaves on the way.
    fn visit<'i>(&mut self, inst: &'i Inst, order: &mut Vec<&'i Inst>, seen: &mut BTreeSet<ValueId>)
    where
        'a: 'i,
    {
        // An explicit stack: an expression can be as long as a function.
        let mut stack = vec![(inst, 0)];
        seen.insert(inst.result());
        while let Some((inst, n)) = stack.pop() {
            let Some(&a) = inst.args.get(n) else {
                let new: Vec<_> =
                    inst.origins.iter().filter(|o| !self.spec.origins.contains(o)).cloned().collect();
                self.spec.origins.extend(new);
                order.push(inst);
                continue;
            };
            stack.push((inst, n + 1));
            if self.stored[a.0 as usize] {
                self.leaf(a);
            } else if let Def::Inst(_, producer) = self.defs[a.0 as usize]
                && seen.insert(a)
            {
                stack.push((producer, 0));
            }
        }
    }

    /// A stored value as a parameter of the kernel.
    fn leaf(&mut self, value: ValueId) -> ValueId {
        if let Some(&id) = self.made.get(&value) {
            return id;
        }
        let ty = self.ty(self.f.ty(value));
        let id = self.spec.function.add_param(&format!("p{}", self.spec.leaves.len()), ty);
        self.made.insert(value, id);
        self.spec.leaves.push(value);
        id
    }

    fn ty(&mut self, ty: &Type) -> Type {
        Type::new(ty.dtype, ty.axes.iter().map(|&a| self.axis(a)).collect::<Vec<_>>())
    }

    fn axis(&mut self, axis: AxisId) -> AxisId {
        if let Some(&a) = self.axes.get(&axis) {
            return a;
        }
        // Whose positions an axis counts matters where `append` states it; elsewhere it would keep equal kernels apart.
        let like = if self.appends { self.f.axis(axis).like.map(|t| self.axis(t)) } else { None };
        // Sizes are numbered in the order of the axes, as [`Kernel::size_symbols`] finds them.
        let size = match &self.f.axis(axis).size {
            Size::Fixed(n) => Size::Fixed(*n),
            symbol @ Size::Sym(_) => {
                let n = self.spec.sizes.iter().position(|s| s == symbol).unwrap_or_else(|| {
                    self.spec.sizes.push(symbol.clone());
                    self.spec.sizes.len() - 1
                });
                Size::Sym(format!("n{n}"))
            }
        };
        let id = self.spec.function.add_axis(&format!("a{}", self.spec.function.axes.len()), size, like);
        self.axes.insert(axis, id);
        id
    }

    fn map_op(&mut self, op: &Op) -> Op {
        let mut axis = |a: &AxisId| self.axis(*a);
        match op {
            Op::Const(_)
            | Op::Unary(_)
            | Op::Binary(_)
            | Op::Select
            | Op::Cast
            | Op::Contract
            | Op::Call { .. } => op.clone(),
            Op::Position { axis: a } => Op::Position { axis: axis(a) },
            Op::Reduce { by, axis: a } => Op::Reduce { by: *by, axis: axis(a) },
            Op::Rename { from, to } => Op::Rename { from: axis(from), to: axis(to) },
            Op::Broadcast { axes } => Op::Broadcast { axes: axes.iter().map(axis).collect() },
            Op::Split { axis: a, into } => Op::Split { axis: axis(a), into: into.iter().map(axis).collect() },
            Op::Merge { axes, into } => {
                let axes = axes.iter().map(&mut axis).collect();
                Op::Merge { axes, into: axis(into) }
            }
            Op::Slice { axis: a, into, start } => {
                Op::Slice { axis: axis(a), into: axis(into), start: *start }
            }
            Op::Concat { axes, into } => {
                let axes = axes.iter().map(&mut axis).collect();
                Op::Concat { axes, into: axis(into) }
            }
            Op::Gather { axis: a } => Op::Gather { axis: axis(a) },
            Op::ScatterAdd { axis: a } => Op::ScatterAdd { axis: axis(a) },
            Op::TopK { axis: a, k } => Op::TopK { axis: axis(a), k: *k },
            Op::TopIndices { axis: a, into } => Op::TopIndices { axis: axis(a), into: axis(into) },
            Op::Past { from, to } => Op::Past { from: axis(from), to: axis(to) },
            Op::Append { from, to } => Op::Append { from: axis(from), to: axis(to) },
            Op::Rope { axis: a, pairs } => Op::Rope { axis: axis(a), pairs: *pairs },
            Op::Softmax { axis: a } => Op::Softmax { axis: axis(a) },
            Op::RmsNorm { axis: a, eps } => Op::RmsNorm { axis: axis(a), eps: *eps },
        }
    }
}
