//! A top-k gate is zero almost everywhere: a sum over all of an axis is a sum over the few that the gate lets through.
//!
//! What   sum over e of g[e] x[e], g zero but for k  =>  sum over j < k of g[i[j]] x[i[j]],  i = top_indices
//!        and x[i[j]] moves up: through all that works on each index alone, to a gather of what that starts from
//! Why    six of 160 experts work for a token (DeepSeek-V2, section 2.2); no token is dropped, no expert padded
//! Needs  a graph before contractions are split into pairs.  Leaves  the dense sum's operands for `simplify`
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

/// Rewrites the outermost sums under a gate, if there are any: the inner ones are sums of less then.
fn round(f: &Function, cx: &mut Context) -> Option<Function> {
    let facts = sparsity(f);
    let defs = f.defs();
    let users = users(f);
    let live = live(f);
    let mut sums = BTreeMap::new();
    let mut inner = BTreeSet::new();
    for (n, inst) in f.body.iter().enumerate().filter(|(n, _)| live[*n]) {
        if let Some(gate) = gate(f, inst, &facts.support, &defs) {
            let tree = tree(f, n, gate.axes[0], &users);
            inner.extend(tree.iter().copied().filter(|&i| i != n));
            sums.insert(n, (gate, tree));
        }
    }
    sums.retain(|n, _| !inner.contains(n));
    if sums.is_empty() {
        return None;
    }
    let mut r = Rebuild::new(f, NAME);
    r.header();
    for (n, inst) in f.body.iter().enumerate() {
        let Some((gate, tree)) = sums.get(&n) else {
            r.copy(inst);
            continue;
        };
        let e = gate.axes[0];
        cx.remarks.push(remark(f, inst, gate, e));
        // The gate's own operand says where it is open.
        let Def::Inst(_, mask) = defs[gate.mask.0 as usize] else { unreachable!("a gate is made by top_k") };
        let slot = r.new.add_axis(&format!("{}.open", f.axis(e).name), Size::Fixed(gate.k), None);
        let swapped = |ty: &Type| ty.axes.iter().map(|&a| if a == e { slot } else { a }).collect::<Vec<_>>();
        let ty = Type::new(DType::I32, swapped(f.ty(gate.mask)));
        let scores = r.get(mask.args[0]);
        let name = format!("{}.at", f.value(gate.mask).name);
        let at = r.emit(inst, Op::TopIndices { axis: e, into: slot }, &[scores], &name, ty);
        let mut open = Open { r: &mut r, defs: &defs, tree, gate, e, slot, at, made: BTreeMap::new() };
        let args: Vec<_> = inst.args.iter().map(|&a| open.value(a, inst)).collect();
        let result = f.value(inst.result());
        let id = r.emit(inst, Op::Contract, &args, &result.name, result.ty.clone());
        r.replace(inst.result(), id);
    }
    Some(r.finish())
}

/// The narrowest gate along one summed axis of a contraction.
fn gate(f: &Function, inst: &Inst, support: &[Support], defs: &[Def<'_>]) -> Option<Gate> {
    if inst.op != Op::Contract {
        return None;
    }
    let summed = f.summed(&inst.args, f.ty(inst.result()));
    let mut best: Option<Gate> = None;
    for a in &inst.args {
        let Support::Within(gates) = &support[a.0 as usize] else { continue };
        for g in gates {
            let Def::Inst(_, mask) = defs[g.mask.0 as usize] else { continue };
            let along =
                matches!(mask.op, Op::TopK { axis, .. } if g.axes == [axis] && summed.contains(&axis));
            let narrow = along && f.axis(g.axes[0]).size.fixed().is_some_and(|n| g.k < n);
            if narrow && best.as_ref().is_none_or(|b| g.k < b.k) {
                best = Some(g.clone());
            }
        }
    }
    best
}

/// The instructions that use each value, by index of the body; `usize::MAX` for the function's results.
fn users(f: &Function) -> Vec<Vec<usize>> {
    let mut users = vec![Vec::new(); f.values.len()];
    for (n, inst) in f.body.iter().enumerate() {
        for a in &inst.args {
            users[a.0 as usize].push(n);
        }
    }
    for r in &f.results {
        users[r.0 as usize].push(usize::MAX);
    }
    users
}

/// What only the sum at `root` uses, by index of the body: computing them where the gate is open spares them elsewhere.
fn tree(f: &Function, root: usize, e: AxisId, users: &[Vec<usize>]) -> BTreeSet<usize> {
    let mut tree = BTreeSet::from([root]);
    for (n, inst) in f.body[..root].iter().enumerate().rev() {
        let [result] = inst.results[..] else { continue };
        let uses = &users[result.0 as usize];
        if f.ty(result).has(e) && !uses.is_empty() && uses.iter().all(|u| tree.contains(u)) {
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
    made: BTreeMap<ValueId, ValueId>,
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
            Def::Inst(n, inst)
                if given
                    && (inst.op.is_elementwise()
                        || (self.tree.contains(&n) && index_wise(&inst.op, self.e))) =>
            {
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

fn remark(f: &Function, inst: &Inst, gate: &Gate, e: AxisId) -> Remark {
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
    let message = format!(
        "the gate `{}` lets {} of {size} indices of `{}` through, so only these are summed",
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
