//! From a graph to launches: each value that has memory ([`fuse`](crate::fuse) says which) is made by one.

use std::collections::{BTreeMap, BTreeSet};

use latentc_ir::{AxisId, Def, Function, Inst, Module, Op, Origin, Size, Type, ValueId};

use latentc_passes::stream_softmax::weighed;
use latentc_passes::{Context, Machine, Pool, Remark, Sizes};

use crate::fuse::{self, Stored, is_matrix_product, is_view, storage};
use crate::program::{Buffer, BufferId, Kernel, KernelKind, Program, Role, Routine, Step};
use crate::together::{self, together};

/// Schedules every function of a module that has been through the passes, for the graph and machine that they were told.
///
/// # Errors
/// If the module holds an op that has no kernel, which a pass should have replaced; names function and value.
pub fn schedule(module: &Module, cx: &Context) -> Result<Program, ScheduleError> {
    schedule_explained(module, cx).map(|(program, _)| program)
}

/// The laws of scheduling, as `latentc explain` tells them behind those of the passes: name and law.
pub const LAWS: [(&str, &str); 2] = [
    (
        fuse::NAME,
        "a value is computed where it is read, if that takes less time than a launch and a trip through memory",
    ),
    (together::NAME, "launches of which none reads what another writes may run at the same time"),
];

/// The same, with what was decided and why.
///
/// # Errors
/// As for [`schedule`].
pub fn schedule_explained(module: &Module, cx: &Context) -> Result<(Program, Vec<Remark>), ScheduleError> {
    let sizes = Sizes::new(module, cx.graph);
    let mut kernels = Vec::new();
    let mut routines = Vec::new();
    let mut remarks = Vec::new();
    for f in &module.functions {
        let mut scheduler = Scheduler::new(f, &sizes, &cx.machine)?;
        remarks.append(&mut scheduler.remarks);
        let mut routine = scheduler.run(&mut kernels)?;
        remarks.extend(together(&mut routine, &kernels, &sizes, &cx.machine));
        routines.push(routine);
    }
    let (name, entry) = (module.name.clone(), module.entry.clone());
    let program = Program { name, kernels, routines, entry, pool: Pool::of(module) };
    Ok((program, remarks))
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
    /// What a kernel makes although it is stored, by what the kernel makes.
    again: Vec<(ValueId, ValueId)>,
    /// The buffer of each stored value that has been scheduled.
    buffers: BTreeMap<ValueId, BufferId>,
    routine: Routine,
    /// Why values are stored, or are not.
    remarks: Vec<Remark>,
}

impl<'a> Scheduler<'a> {
    fn new(f: &'a Function, sizes: &Sizes, machine: &Machine) -> Result<Self, ScheduleError> {
        let users = f.users();
        for inst in &f.body {
            let why = match inst.op {
                Op::Past { .. } => "run the pass `derive` first",
                Op::RmsNorm { .. } => "run the pass `expand` first",
                Op::Softmax { .. } if weighed(f, &users, inst).is_err() => {
                    "run the pass `stream_softmax` first"
                }
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
        let Stored { values: stored, again, remarks } = storage(f, sizes, machine);
        Ok(Scheduler { f, defs, stored, again, buffers: BTreeMap::new(), routine, remarks })
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
        let mut stored = self.stored.clone();
        self.again.iter().filter(|(by, _)| *by == root).for_each(|(_, made)| stored[made.0 as usize] = false);
        let mut body = Body::new(self.f, &self.defs, &stored);
        let result = body.make(root, inst);
        body.spec.function.results = vec![result];
        let spec = body.spec;
        let kind = KernelKind::of(&spec.function);
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
        self.routine.steps.push(Step::Launch { kernel, inputs, output, sizes, beside: false, origins });
    }
}

/// `mla` and `c_KV.1` make `mla_c_KV_1`: a name in any target's language.
fn kernel_name(function: &str, value: &str) -> String {
    format!("{function}_{value}").chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect()
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
            let op = inst.op.on_axes(|a| self.axis(a));
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
}
