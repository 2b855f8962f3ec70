//! A top-k gate is zero almost everywhere: a sum over all of an axis is a sum over the few that the gate lets through.
//!
//! What   sum over e of g[e] x[e], g zero but for k  =>  sum over j < k of g[i[j]] x[i[j]],  i = top_indices
//!        sum over t of g[t,e] x[t,e]                =>  scatter_add of g[t,i[t,j]] x[t,i[t,j]] at i[t,j]
//!        x[e] where it is of the k, else 0          =>  scatter_add of x[i[j]] at i[j], if x is made by a product
//!        and x[i[j]] moves up: through all that works on each index alone, to a gather of what that starts from
//!        The second and third are what gradients of a sum under a gate are: of the weights of what is gated, and of the gate.
//! Why    six of 160 experts work for a token (DeepSeek-V2, section 2.2); no token is dropped, no expert padded
//! Needs  a graph before contractions are split into pairs: best the definition, so that what goes back from the few is of the few as
//!        well, and can be kept for it.  Leaves  the dense sum's operands for `simplify`
//! Cost   k of |e| of the multiply-adds; the remark has both
//! Cases  route.ir

use std::collections::{BTreeMap, BTreeSet};

use latentc_ir::cost::{Cost, extent};
use latentc_ir::ops::Attr;
use latentc_ir::sparsity::{Gate, Support, sparsity};
use latentc_ir::{AxisId, DType, Def, Function, Inst, Module, Op, Size, Type, ValueId};

use crate::rewrite::{Rebuild, live};
use crate::{Context, Kind, Remark, Unit};

const NAME: &str = "route";

/// Rewrites every sum over a gated axis.
pub fn route(module: &Module, cx: &mut Context) -> Module {
    let functions = module.functions.iter().map(|f| function(f, cx)).collect();
    Module { name: module.name.clone(), functions, entry: module.entry.clone() }
}

/// Rounds, since what a gate lets through may be a sum under another gate.
fn function(f: &Function, cx: &mut Context) -> Function {
    let mut f = f.clone();
    while let Some(next) = round(&f, cx) {
        f = next;
    }
    f
}

/// What becomes of an instruction under a gate.
#[derive(Clone, Copy, PartialEq)]
enum Root {
    /// The gated axis is summed: a sum over the few.
    Sum,
    /// The gated axis stays, and what the gate is given is summed: the few are added up where they belong.
    Spread,
    /// What is zero where the gate is closed, of products that nothing else wants: the few, put where they belong.
    Masked,
}

/// Rewrites the outermost instructions under gates, if there are any: the inner ones are of less then.
fn round(f: &Function, cx: &mut Context) -> Option<Function> {
    let facts = sparsity(f);
    let defs = f.defs();
    let users = users(f);
    let live = live(f);
    let mut roots: BTreeMap<usize, (Gate, Root)> = BTreeMap::new();
    for (n, inst) in f.body.iter().enumerate().filter(|(n, _)| live[*n]) {
        if let Some(root) = gate(f, inst, &facts.support, &defs) {
            roots.insert(n, root);
        }
    }
    let mut groups = grouped(f, &roots, &users);
    loop {
        let before = roots.len();
        roots.retain(|n, (gate, root)| {
            let tree = &groups[&(gate.mask, gate.axes[0])].tree;
            *root != Root::Masked || multiplies(f, &f.body[*n], tree, &defs)
        });
        if roots.len() == before {
            break;
        }
        groups = grouped(f, &roots, &users);
    }
    let inner = |n: usize| groups.values().any(|g| !g.roots.contains(&n) && g.tree.contains(&n));
    let chosen: BTreeSet<usize> = roots.keys().copied().filter(|n| !inner(*n)).collect();
    if chosen.is_empty() {
        return None;
    }
    let mut r = Rebuild::new(f, NAME);
    r.header();
    for (n, inst) in f.body.iter().enumerate() {
        let Some((gate, root)) = roots.get(&n).filter(|_| chosen.contains(&n)) else {
            r.copy(inst);
            continue;
        };
        let e = gate.axes[0];
        let group = groups.get_mut(&(gate.mask, e)).expect("every root is in a group");
        let (slot, at) = *group.at.get_or_insert_with(|| indices(&mut r, inst, gate, e, &defs));
        let mut open =
            Open { r: &mut r, defs: &defs, tree: &group.tree, gate, e, slot, at, made: &mut group.made };
        let result = f.value(inst.result());
        let id = match root {
            Root::Sum => {
                let args: Vec<_> = inst.args.iter().map(|&a| open.value(a, inst)).collect();
                r.emit(inst, Op::Contract, &args, &result.name, result.ty.clone())
            }
            Root::Spread => {
                let args: Vec<_> = inst.args.iter().map(|&a| open.value(a, inst)).collect();
                let index = r.new.ty(at).axes.clone();
                let others = result.ty.axes.iter().filter(|a| **a != e && !index.contains(a));
                let axes: Vec<_> = index.iter().chain(others).copied().collect();
                let name = format!("{}.open", result.name);
                let x = r.emit(inst, Op::Contract, &args, &name, Type::new(result.ty.dtype, axes));
                r.emit(inst, Op::ScatterAdd { axis: e }, &[x, at], &result.name, result.ty.clone())
            }
            Root::Masked => {
                let x = open.value(inst.args[1], inst);
                r.emit(inst, Op::ScatterAdd { axis: e }, &[x, at], &result.name, result.ty.clone())
            }
        };
        cx.remarks.push(remark(f, inst, gate, *root));
        r.replace(inst.result(), id);
    }
    Some(r.finish())
}

/// The roots of each gate, which share what only they use.
fn grouped(
    f: &Function,
    roots: &BTreeMap<usize, (Gate, Root)>,
    users: &[Vec<usize>],
) -> BTreeMap<(ValueId, AxisId), Group> {
    let mut groups: BTreeMap<(ValueId, AxisId), Group> = BTreeMap::new();
    for (n, (gate, _)) in roots {
        groups.entry((gate.mask, gate.axes[0])).or_default().roots.insert(*n);
    }
    for ((_, e), group) in &mut groups {
        group.tree = tree(f, &group.roots, *e, users);
    }
    groups
}

/// The instructions that are rewritten under one gate.
#[derive(Default)]
struct Group {
    roots: BTreeSet<usize>,
    /// What only they use.
    tree: BTreeSet<usize>,
    /// The short axis, and the indices that the gate lets through.
    at: Option<(AxisId, ValueId)>,
    /// What was computed along the short axis.
    made: BTreeMap<ValueId, ValueId>,
}

/// Where a gate is open: its own operand says so.
fn indices(r: &mut Rebuild<'_>, inst: &Inst, gate: &Gate, e: AxisId, defs: &[Def<'_>]) -> (AxisId, ValueId) {
    let f = r.old;
    let Def::Inst(_, mask) = defs[gate.mask.0 as usize] else { unreachable!("a gate is made by top_k") };
    let slot = r.new.add_axis(&format!("{}.open", f.axis(e).name), Size::Fixed(gate.k), None);
    let axes: Vec<_> = f.ty(gate.mask).axes.iter().map(|&a| if a == e { slot } else { a }).collect();
    let scores = r.get(mask.args[0]);
    let name = format!("{}.at", f.value(gate.mask).name);
    let op = Op::TopIndices { axis: e, into: slot };
    (slot, r.emit(inst, op, &[scores], &name, Type::new(DType::I32, axes)))
}

/// The narrowest gate that an instruction is under, and what that makes of it.
fn gate(f: &Function, inst: &Inst, support: &[Support], defs: &[Def<'_>]) -> Option<(Gate, Root)> {
    if !matches!(inst.op, Op::Contract | Op::Select) {
        return None;
    }
    let ty = f.ty(inst.result());
    let summed = f.summed(&inst.args, ty);
    // Sums are made in f32 or wider, and rounded by whoever asked for less.
    let adds = matches!(ty.dtype, DType::F32 | DType::F64);
    let mut best: Option<(Gate, Root)> = None;
    for (n, a) in inst.args.iter().enumerate() {
        let Support::Within(gates) = &support[a.0 as usize] else { continue };
        for g in gates {
            let Def::Inst(_, mask) = defs[g.mask.0 as usize] else { continue };
            let &[e] = &g.axes[..] else { continue };
            let one = matches!(mask.op, Op::TopK { axis, .. } if axis == e);
            let has_all = |v: &ValueId| f.ty(*v).has(e) && g.given.iter().all(|&x| f.ty(*v).has(x));
            let product = inst.op == Op::Contract;
            let root = if product && summed.contains(&e) {
                Root::Sum
            } else if product
                && adds
                && inst.args.len() > 1
                && has_all(a)
                && g.given.iter().any(|x| summed.contains(x))
                // Without other axes there is less to multiply than to look up.
                && ty.axes.iter().any(|x| *x != e && !g.given.contains(x))
            {
                Root::Spread
            } else if !product
                && adds
                && n == 0
                && *a == g.mask
                && support[inst.args[2].0 as usize] == Support::Nowhere
                && has_all(&inst.args[1])
                && f.ty(inst.args[1]).dtype == ty.dtype
            {
                Root::Masked
            } else {
                continue;
            };
            let narrow = one && f.axis(e).size.fixed().is_some_and(|n| g.k < n);
            if narrow && best.as_ref().is_none_or(|(b, _)| g.k < b.k) {
                best = Some((g.clone(), root));
            }
        }
    }
    best
}

/// Whether there is a product in what only these roots use of a masked value: else there is nothing to spare.
fn multiplies(f: &Function, inst: &Inst, tree: &BTreeSet<usize>, defs: &[Def<'_>]) -> bool {
    let mut work = vec![inst.args[1]];
    while let Some(v) = work.pop() {
        if let Def::Inst(n, inst) = defs[v.0 as usize]
            && tree.contains(&n)
        {
            if inst.op == Op::Contract && !f.summed(&inst.args, f.ty(v)).is_empty() {
                return true;
            }
            work.extend(&inst.args);
        }
    }
    false
}

/// The instructions that use each value, by index of the body; `usize::MAX` for the function's results.
fn users(f: &Function) -> Vec<Vec<usize>> {
    let mut users = f.users();
    for r in &f.results {
        users[r.0 as usize].push(usize::MAX);
    }
    users
}

/// What only these roots use, by index of the body: computing it where the gate is open spares it elsewhere.
fn tree(f: &Function, roots: &BTreeSet<usize>, e: AxisId, users: &[Vec<usize>]) -> BTreeSet<usize> {
    let mut tree = roots.clone();
    for (n, inst) in f.body.iter().enumerate().rev() {
        let [result] = inst.results[..] else { continue };
        let uses = &users[result.0 as usize];
        let only = !uses.is_empty() && uses.iter().all(|u| tree.contains(u));
        if f.ty(result).has(e) && only && index_wise(&inst.op, e) {
            tree.insert(n);
        }
    }
    tree
}

/// Computes values where the gate is open: with the axis `slot` in place of `e`.
struct Open<'r, 'f> {
    r: &'r mut Rebuild<'f>,
    defs: &'r [Def<'f>],
    tree: &'r BTreeSet<usize>,
    gate: &'r Gate,
    e: AxisId,
    slot: AxisId,
    at: ValueId,
    made: &'r mut BTreeMap<ValueId, ValueId>,
}

impl Open<'_, '_> {
    fn value(&mut self, v: ValueId, root: &Inst) -> ValueId {
        let f = self.r.old;
        if !f.ty(v).has(self.e) {
            return self.r.get(v);
        }
        if let Some(&made) = self.made.get(&v) {
            return made;
        }
        // What is the same for all that the gate is given (a weight, say) is worth computing once, and reading where it is needed.
        let given = self.gate.given.iter().all(|&a| f.ty(v).has(a));
        let id = match self.defs[v.0 as usize] {
            // The gate's condition holds at each of these places.
            Def::Inst(_, inst) if inst.op == Op::Select && inst.args[0] == self.gate.mask => {
                self.value(inst.args[1], root)
            }
            Def::Inst(n, inst) if given && (inst.op.is_elementwise() || self.tree.contains(&n)) => {
                let args: Vec<_> = inst.args.iter().map(|&a| self.value(a, root)).collect();
                let axes = f.ty(v).axes.iter().map(|&a| if a == self.e { self.slot } else { a });
                let ty = Type::new(f.ty(v).dtype, axes.collect::<Vec<_>>());
                let name = format!("{}.open", f.value(v).name);
                self.r.emit_at(&inst.origins, inst.op.clone(), &args, &name, ty)
            }
            _ => {
                let index = self.r.new.ty(self.at).axes.clone();
                let rest = f.ty(v).axes.iter().copied().filter(|a| *a != self.e && !index.contains(a));
                let ty = Type::new(f.ty(v).dtype, index.iter().copied().chain(rest).collect::<Vec<_>>());
                let name = format!("{}.open", f.value(v).name);
                let source = self.r.get(v);
                self.r.emit_at(&root.origins, Op::Gather { axis: self.e }, &[source, self.at], &name, ty)
            }
        };
        self.made.insert(v, id);
        id
    }
}

/// Whether the result at an index of an axis follows from the operands at that index.
fn index_wise(op: &Op, axis: AxisId) -> bool {
    let apart = op.attrs().iter().all(|attr| match attr {
        Attr::Axis(a) => *a != axis,
        Attr::Axes(axes) => !axes.contains(&axis),
        Attr::Int(_) | Attr::Real(_) | Attr::Word(_) | Attr::Text(_) => true,
    });
    match op {
        Op::Unary(_)
        | Op::Binary(_)
        | Op::Select
        | Op::Cast
        | Op::Contract
        | Op::Reduce { .. }
        | Op::Pack { .. }
        | Op::Unpack { .. }
        | Op::Rename { .. }
        | Op::Broadcast { .. }
        | Op::Split { .. }
        | Op::Merge { .. }
        | Op::Slice { .. }
        | Op::Concat { .. }
        | Op::Gather { .. }
        | Op::TopK { .. }
        | Op::TopIndices { .. }
        | Op::Rope { .. }
        | Op::Softmax { .. }
        | Op::RmsNorm { .. } => apart,
        // A table, a sum over indices, and what is not a function of its operands alone.
        Op::Const(_)
        | Op::Position { .. }
        | Op::ScatterAdd { .. }
        | Op::Past { .. }
        | Op::Append { .. }
        | Op::Call { .. } => false,
    }
}

fn remark(f: &Function, inst: &Inst, gate: &Gate, root: Root) -> Remark {
    let e = gate.axes[0];
    let axis = f.axis(e);
    let size = axis.size.fixed().unwrap_or(1);
    let all: BTreeSet<AxisId> = inst.args.iter().flat_map(|&a| f.ty(a).axes.iter().copied()).collect();
    let others: Vec<_> = all.into_iter().filter(|a| *a != e).collect();
    let steps = 2 * (inst.args.len() as i128 - 1);
    let flops = |n: u64| &extent(f, &others) * (steps * i128::from(n));
    let candidate = |n: u64| {
        let flops = flops(n);
        let token: BTreeMap<String, u64> = flops.symbols().into_iter().map(|s| (s.to_owned(), 1)).collect();
        let weight = flops.eval(&token).unwrap_or(i128::MAX) as f64;
        (format!("{n} of {size}"), Cost { flops, ..Cost::default() }, weight)
    };
    let (few, dense) = (candidate(gate.k), candidate(size));
    let what = match root {
        Root::Sum => "summed",
        Root::Spread => "multiplied, and added up at their indices",
        Root::Masked => "computed, and put at their indices",
    };
    let message = format!(
        "the gate `{}` lets {} of {size} indices of `{}` through, so only these are {what}",
        f.value(gate.mask).name,
        gate.k,
        axis.name
    );
    [few, dense]
        .into_iter()
        .fold(Remark::new(Kind::Applied, NAME, f, inst, message), |remark, (what, cost, weight)| {
            remark.candidate(what, cost, weight, Unit::OperationsPerToken)
        })
}
