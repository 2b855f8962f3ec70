//! "The past" commutes with position-wise operations: of each token, keep the least that later ones can be served from.
//!
//! What   past (f x)  =>  f (past x)     where f works on each position alone
//! Why    the latent is kept, not the keys and values that are made of it (DeepSeek-V2, section 2.1.2)
//! Needs  a traced graph, for serving.  Keeps  results.  Leaves  one `past` for each value that `derive` makes a cache of
//! Cost   bytes a token, by minimum cut (see [`Cone`]); of equal cuts the later one, which leaves less to compute again
//! Cases  place_cache.ir

use std::collections::{BTreeMap, BTreeSet};

use latentc_ir::cost::{Cost, bytes, extent};
use latentc_ir::ops::Attr;
use latentc_ir::{AxisId, Binary, Function, Inst, Module, Op, Origin, Reduce, Type, Unary, ValueId};
use petgraph::Direction;
use petgraph::algo::maximum_flow::dinics;
use petgraph::graph::{DiGraph, NodeIndex};
use petgraph::visit::EdgeRef;

use crate::rewrite::{Rebuild, live, sweep};
use crate::{Context, Kind, Machine, Remark, Unit};

const NAME: &str = "place_cache";

/// More bytes a token than any cache has. What is larger, or cannot be kept at all, is never cut.
const MOST: u128 = 1 << 40;

/// More than all cuts of a graph together: there are fewer than 2^32 values.
const NEVER: u128 = 1 << 80;

/// Moves every `past` up to where the least is kept. A graph for training keeps nothing, and stays as it is.
pub fn place_cache(module: &Module, cx: &mut Context) -> Module {
    if !cx.graph.serves() {
        return module.clone();
    }
    let functions = module.functions.iter().map(|f| function(f, cx)).collect();
    Module { name: module.name.clone(), functions, entry: module.entry.clone() }
}

/// Compares what authors asserted to be kept, by function, with what a module keeps after this pass. A remark for
/// each function where the two differ.
pub fn compare<'a>(
    placed: &Module,
    asserted: impl IntoIterator<Item = (&'a str, &'a [String])>,
) -> Vec<Remark> {
    let mut remarks = Vec::new();
    for (name, values) in asserted {
        let Some(f) = placed.function(name) else { continue };
        let pasts = f.body.iter().filter(|i| matches!(i.op, Op::Past { .. }));
        let kept: BTreeSet<&str> = pasts.clone().map(|i| f.value(i.args[0]).name.as_str()).collect();
        let asserted: BTreeSet<&str> = values.iter().map(String::as_str).collect();
        if kept == asserted {
            continue;
        }
        let list = |names: &BTreeSet<&str>| match names.len() {
            0 => "nothing".to_owned(),
            _ => names.iter().copied().collect::<Vec<_>>().join(", "),
        };
        // The line of an assertion that did not hold says most; the value may be gone, since nothing reads it any more.
        let off = f.body.iter().find(|i| {
            let name = i.results.first().map(|&r| f.value(r).name.as_str());
            name.is_some_and(|name| asserted.contains(name) != kept.contains(name))
        });
        let Some(inst) = off.or_else(|| pasts.clone().next()) else { continue };
        let message = format!(
            "the author's `cache` stands before {}, but the least that later tokens can be served from is {}",
            list(&asserted),
            list(&kept)
        );
        remarks.push(Remark::new(Kind::Warning, NAME, f, inst, message));
    }
    remarks
}

fn function(f: &Function, cx: &mut Context) -> Function {
    let mut plans = Vec::new();
    for family in families(f) {
        let cone = Cone::new(f, family, &cx.machine);
        let Some(again) = cone.least() else { continue };
        cx.remarks.push(cone.remark(&again));
        plans.push(Plan { cone, again, made: BTreeMap::new() });
    }
    if plans.iter().all(|p| p.again.is_empty()) {
        return f.clone();
    }
    let mut r = Rebuild::new(f, NAME);
    r.header();
    for (n, inst) in f.body.iter().enumerate() {
        match plans.iter_mut().find(|p| p.cone.family.pasts.contains(&n)) {
            Some(plan) => plan.read(&mut r, inst),
            None => r.copy(inst),
        }
    }
    // What was only computed to be kept is not computed any more.
    sweep(&r.finish())
}

/// All that a function reads of the past of one axis along another.
struct Family {
    from: AxisId,
    to: AxisId,
    /// The instructions, by index of the body.
    pasts: Vec<usize>,
    /// The run-time axes of a position: a batch, and `from`. `derive` numbers positions along them.
    rows: BTreeSet<AxisId>,
}

fn families(f: &Function) -> Vec<Family> {
    let mut families: Vec<Family> = Vec::new();
    let live = live(f);
    for (n, inst) in f.body.iter().enumerate().filter(|(n, _)| live[*n]) {
        if let Op::Past { from, to } = inst.op {
            match families.iter_mut().find(|g| (g.from, g.to) == (from, to)) {
                Some(family) => family.pasts.push(n),
                None => families.push(Family { from, to, pasts: vec![n], rows: rows(f, inst.args[0]) }),
            }
        }
    }
    families
}

fn rows(f: &Function, v: ValueId) -> BTreeSet<AxisId> {
    f.ty(v).axes.iter().copied().filter(|&a| f.axis(a).size.fixed().is_none()).collect()
}

/// The values that what is read of the past is computed from, up to a token's own: parameters, results of calls, and
/// whatever mixes positions.
///
/// A cut through it is what is kept of each token. What lies behind the cut is computed again for all of the past:
/// a `past` moves up through it. Bytes of the cut are the capacities of a flow network whose minimum cut is looked for.
///
/// To compute again is free where it is done while reading. Two things are not. A gather reads rows from memory. And a
/// contraction takes time, unless all that is read of it is linear in it, so that another order of contraction never
/// makes it. That time is counted as the bytes that the machine reads meanwhile. So keys that are
/// rotated behind a large projection are kept as keys, even if what is projected is narrower.
struct Cone<'f> {
    f: &'f Function,
    machine: &'f Machine,
    family: Family,
    /// The instruction that makes each value, by index of the body.
    def: Vec<Option<usize>>,
    /// Whether a value is made of values of the same position only.
    wise: Vec<bool>,
    /// The values, in order of definition.
    values: Vec<ValueId>,
    /// Whether all that is read of a value is linear in it.
    linear: Vec<bool>,
}

impl<'f> Cone<'f> {
    fn new(f: &'f Function, family: Family, machine: &'f Machine) -> Cone<'f> {
        let mut def = vec![None; f.values.len()];
        let mut wise = vec![false; f.values.len()];
        // A value without the axis can depend on positions all the same: a sum over them, or what came through `past`.
        let mut moves: Vec<bool> = f.values.iter().map(|v| v.ty.has(family.from)).collect();
        for (n, inst) in f.body.iter().enumerate() {
            let mixed = |a: &&ValueId| moves[a.0 as usize] && !f.ty(**a).has(family.from);
            let single = inst.args.iter().find(mixed).is_none() && position_wise(f, inst, &family);
            let moved = inst.args.iter().any(|a| moves[a.0 as usize]);
            for &r in &inst.results {
                def[r.0 as usize] = Some(n);
                wise[r.0 as usize] = single;
                moves[r.0 as usize] |= moved;
            }
        }
        let mut cone = Cone { f, machine, family, def, wise, values: Vec::new(), linear: Vec::new() };
        cone.values = cone.reached(|_| true, cone.read());
        cone.linear = cone.linear();
        cone
    }

    /// What is read of the past, as written.
    fn read(&self) -> Vec<ValueId> {
        self.family.pasts.iter().map(|&n| self.f.body[n].args[0]).collect()
    }

    /// The operands of a value that lie along the positions.
    fn above(&self, v: ValueId) -> impl Iterator<Item = ValueId> + '_ {
        let inst = self.def[v.0 as usize].filter(|_| self.wise[v.0 as usize]).map(|n| &self.f.body[n]);
        let args = inst.map_or(&[][..], |i| &i.args);
        args.iter().copied().filter(|&a| self.f.ty(a).has(self.family.from))
    }

    /// What is needed to know these values, in order of definition, if operands are asked for where `up` says so.
    fn reached(&self, up: impl Fn(ValueId) -> bool, mut todo: Vec<ValueId>) -> Vec<ValueId> {
        let mut found = BTreeSet::new();
        while let Some(v) = todo.pop() {
            if found.insert((self.def[v.0 as usize], v)) && up(v) {
                todo.extend(self.above(v));
            }
        }
        found.into_iter().map(|(_, v)| v).collect()
    }

    /// Bytes of a value for each token, if it can be kept.
    fn kept_bytes(&self, v: ValueId) -> Option<u128> {
        let ty = self.f.ty(v);
        if ty.has(self.family.to) || rows(self.f, v) != self.family.rows {
            return None;
        }
        let n = self.fixed(&ty.axes).checked_mul(u128::from(ty.dtype.bytes()));
        n.filter(|&n| n <= MOST)
    }

    /// The product of the fixed sizes, bounded.
    fn fixed(&self, axes: &[AxisId]) -> u128 {
        let sizes = axes.iter().filter_map(|&a| self.f.axis(a).size.fixed());
        sizes.fold(1u128, |n, size| n.saturating_mul(u128::from(size))).min(NEVER)
    }

    /// Operations that computing a value again takes for each token, where they are not done while reading.
    fn operations(&self, v: ValueId) -> u128 {
        let Some(inst) = self.def[v.0 as usize].map(|n| &self.f.body[n]) else { return 0 };
        let summed = self.f.summed(&inst.args, self.f.ty(v));
        if inst.op != Op::Contract || summed.is_empty() || self.linear[v.0 as usize] {
            return 0;
        }
        let points = self.fixed(&self.f.ty(v).axes).saturating_mul(self.fixed(&summed));
        points.saturating_mul(2 * (inst.args.len() as u128 - 1).max(1))
    }

    /// What computing a value again costs, in bytes.
    fn price(&self, v: ValueId) -> u128 {
        let gather = |n: usize| matches!(self.f.body[n].op, Op::Gather { .. });
        let rows = if self.def[v.0 as usize].is_some_and(gather) {
            let ty = self.f.ty(v);
            self.fixed(&ty.axes).saturating_mul(u128::from(ty.dtype.bytes()))
        } else {
            0
        };
        let time = self.operations(v) as f64 / self.machine.flops * self.machine.bandwidth;
        // The bound keeps the sum of all prices below NEVER.
        rows.saturating_add(time as u128).min(MOST)
    }

    /// The values to compute again, so that least is kept. `None` if what is read cannot be kept as it is.
    fn least(&self) -> Option<BTreeSet<ValueId>> {
        if self.read().into_iter().any(|v| self.kept_bytes(v).is_none()) {
            return None;
        }
        let mut net: DiGraph<(), u128> = DiGraph::new();
        let (source, sink) = (net.add_node(()), net.add_node(()));
        // A value is two nodes. It is kept if the cut is between them, and computed again if both are behind the cut.
        let nodes: BTreeMap<ValueId, (NodeIndex, NodeIndex)> =
            self.values.iter().map(|&v| (v, (net.add_node(()), net.add_node(())))).collect();
        for (&v, &(into, out)) in &nodes {
            net.add_edge(into, out, self.kept_bytes(v).unwrap_or(NEVER));
            let price = if self.wise[v.0 as usize] { self.price(v) } else { NEVER };
            if price > 0 {
                net.add_edge(source, into, price);
            }
            for a in self.above(v).collect::<BTreeSet<_>>() {
                net.add_edge(nodes[&a].1, into, NEVER);
            }
        }
        for v in self.read().into_iter().collect::<BTreeSet<_>>() {
            net.add_edge(nodes[&v].1, sink, NEVER);
        }
        let (_, flow) = dinics(&net, source, sink);

        // Of all minimum cuts the latest: behind it is only what could still take flow to the sink.
        let mut behind = BTreeSet::from([sink]);
        let mut todo = vec![sink];
        while let Some(node) = todo.pop() {
            let more = net.edges_directed(node, Direction::Incoming);
            let more = more.filter(|e| flow[e.id().index()] < *e.weight()).map(|e| e.source());
            let back = net.edges_directed(node, Direction::Outgoing);
            let back = back.filter(|e| flow[e.id().index()] > 0).map(|e| e.target());
            todo.extend(more.chain(back).filter(|&next| behind.insert(next)));
        }
        let again = |v: ValueId| behind.contains(&nodes[&v].0);
        let needed = self.reached(again, self.read());
        Some(needed.into_iter().filter(|&v| again(v)).collect())
    }

    /// What is kept of each token if these values are computed again.
    fn kept(&self, again: &BTreeSet<ValueId>) -> Vec<ValueId> {
        let needed = self.reached(|v| again.contains(&v), self.read());
        needed.into_iter().filter(|v| !again.contains(v)).collect()
    }

    /// Whether all that later tokens do with each value is linear in it, and ends in a contraction with something else.
    fn linear(&self) -> Vec<bool> {
        let f = self.f;
        let inside: BTreeSet<ValueId> = self.values.iter().copied().collect();
        // What reads a `past` reads the moved value; inside the cone, only what leads there does.
        let mut read = vec![true; f.values.len()];
        let mut above = vec![true; f.values.len()];
        f.results.iter().for_each(|r| read[r.0 as usize] = false);
        for (n, inst) in f.body.iter().enumerate().rev() {
            let Some(result) = inst.results.first().map(|r| r.0 as usize) else { continue };
            for (at, a) in inst.args.iter().enumerate() {
                let once = inst.args.iter().filter(|b| *b == a).count() == 1;
                let carries = once && carries(&inst.op, at);
                read[a.0 as usize] &= carries && (inst.op == Op::Contract || read[result]);
                if self.family.pasts.contains(&n) {
                    above[a.0 as usize] &= read[result];
                } else if inside.contains(&inst.results[0]) {
                    above[a.0 as usize] &= carries && above[result];
                }
            }
        }
        above
    }

    /// The choice, beside the cut as written and the cut at a token's own values.
    fn remark(&self, again: &BTreeSet<ValueId>) -> Remark {
        let f = self.f;
        let written = BTreeSet::new();
        let own: BTreeSet<_> = self.values.iter().copied().filter(|v| self.wise[v.0 as usize]).collect();
        let names = |kept: &[ValueId]| {
            let names: Vec<_> = kept.iter().map(|&v| f.value(v).name.as_str()).collect();
            if names.is_empty() { "nothing".to_owned() } else { names.join(", ") }
        };
        let width = |kept: &[ValueId]| kept.iter().filter_map(|&v| self.kept_bytes(v)).sum::<u128>();
        let (kept, before) = (self.kept(again), self.kept(&written));
        let message = if again.is_empty() {
            format!("of each token {} is kept, as written: {} bytes", names(&kept), width(&kept))
        } else {
            let (now, was) = (width(&kept), width(&before));
            format!(
                "of each token {} is kept: {now} bytes, not the {was} of {}",
                names(&kept),
                names(&before)
            )
        };
        let kind = if again.is_empty() { Kind::Missed } else { Kind::Applied };
        let mut remark = Remark::new(kind, NAME, f, &f.body[self.family.pasts[0]], message);
        remark.value = names(&kept);
        remark.origins = kept.iter().flat_map(|&v| self.origins(v)).cloned().collect();
        remark.origins.dedup();

        let past: Vec<_> = self
            .family
            .rows
            .iter()
            .map(|&a| if a == self.family.from { self.family.to } else { a })
            .collect();
        let mut told: Vec<&BTreeSet<ValueId>> = Vec::new();
        for cut in [again, &written, &own] {
            let kept = self.kept(cut);
            if told.contains(&cut) || kept.iter().any(|&v| self.kept_bytes(v).is_none()) {
                continue;
            }
            told.push(cut);
            let mut cost = Cost::default();
            kept.iter().for_each(|&v| cost.bytes_written += &bytes(f, v));
            let operations = cut.iter().map(|&v| self.operations(v)).fold(0u128, u128::saturating_add);
            cost.flops = &extent(f, &past) * i128::try_from(operations).unwrap_or(i128::MAX);
            let price: u128 = cut.iter().map(|&v| self.price(v)).sum();
            let (what, weight) = (format!("keep {}", names(&kept)), (width(&kept) + price) as f64);
            remark = remark.candidate(what, cost, weight, Unit::BytesPerToken);
        }
        remark
    }

    fn origins(&self, v: ValueId) -> &'f [Origin] {
        self.def[v.0 as usize].map_or(&[], |n| &self.f.body[n].origins)
    }
}

/// A cut, while the function is rebuilt.
struct Plan<'f> {
    cone: Cone<'f>,
    /// What is computed again along the past.
    again: BTreeSet<ValueId>,
    /// What stands for a value of each position, along the past.
    made: BTreeMap<ValueId, ValueId>,
}

impl Plan<'_> {
    /// Stands in for a `past`: keeps or computes again what is not there yet.
    fn read(&mut self, r: &mut Rebuild<'_>, inst: &Inst) {
        let Family { from, to, .. } = self.cone.family;
        for v in self.cone.reached(|v| self.again.contains(&v), inst.args.clone()) {
            if self.made.contains_key(&v) {
                continue;
            }
            // The value that a later reader sees keeps the name and the memory order that it had there.
            let reader = self.cone.family.pasts.iter().map(|&n| &r.old.body[n]).find(|i| i.args[0] == v);
            let (name, ty) = match reader {
                Some(reader) => {
                    (r.old.value(reader.result()).name.clone(), r.old.ty(reader.result()).clone())
                }
                None => (self.fresh(r.old, v), with(r.old.ty(v), from, to)),
            };
            let id = if let Some(n) = self.cone.def[v.0 as usize].filter(|_| self.again.contains(&v)) {
                let def = &r.old.body[n];
                let arg = |a: &ValueId| if r.old.ty(*a).has(from) { self.made[a] } else { r.get(*a) };
                let args: Vec<_> = def.args.iter().map(arg).collect();
                r.emit(def, moved(&def.op, from, to), &args, &name, ty)
            } else if let Some(reader) = reader {
                let id = r.emit(reader, reader.op.clone(), &[r.get(v)], &name, ty);
                // It is what the author wrote, if perhaps a few lines further up.
                if let Some(last) = r.new.body.last_mut() {
                    last.by.clone_from(&reader.by);
                }
                id
            } else {
                let mut origins = self.cone.origins(v).to_vec();
                origins.extend(inst.origins.iter().filter(|o| !self.cone.origins(v).contains(o)).cloned());
                r.emit_at(&origins, Op::Past { from, to }, &[r.get(v)], &name, ty)
            };
            self.made.insert(v, id);
        }
        let (mut id, result) = (self.made[&inst.args[0]], r.old.value(inst.result()));
        if r.new.ty(id) != &result.ty {
            // A second reader wants the same elements in another order.
            id = r.emit(inst, Op::Cast, &[id], &result.name, result.ty.clone());
        }
        r.replace(inst.result(), id);
    }

    /// `c_KV.s` for `c_KV`, or the first number behind it that no value of the author's has.
    fn fresh(&self, f: &Function, v: ValueId) -> String {
        let base = format!("{}.{}", f.value(v).name, f.axis(self.cone.family.to).name);
        let mut name = base.clone();
        for n in 1u64.. {
            if f.value_named(&name).is_none() {
                break;
            }
            name = format!("{base}.{n}");
        }
        name
    }
}

fn with(ty: &Type, from: AxisId, to: AxisId) -> Type {
    let axes: Vec<_> = ty.axes.iter().map(|&a| if a == from { to } else { a }).collect();
    Type::new(ty.dtype, axes)
}

/// A position-wise op along the past. Of those, only two name the axis.
fn moved(op: &Op, from: AxisId, to: AxisId) -> Op {
    if let Op::Position { .. } = op {
        return Op::Position { axis: to };
    }
    if let Op::Broadcast { axes } = op {
        return Op::Broadcast { axes: axes.iter().map(|&a| if a == from { to } else { a }).collect() };
    }
    op.clone()
}

/// Whether the result at a position follows from the operands at that position. Operands without the axis are
/// the same at all positions; the caller has looked at what they are made of.
fn position_wise(f: &Function, inst: &Inst, family: &Family) -> bool {
    let &Family { from, to, .. } = family;
    let [result] = inst.results[..] else { return false };
    let along = |axis: AxisId| inst.args.iter().chain([&result]).any(|&v| f.ty(v).has(axis));
    if !f.ty(result).has(from) || along(to) {
        return false;
    }
    let apart = inst.op.attrs().iter().all(|attr| match attr {
        Attr::Axis(a) => *a != from && *a != to,
        Attr::Axes(axes) => !axes.contains(&from) && !axes.contains(&to),
        Attr::Int(_) | Attr::Real(_) | Attr::Word(_) | Attr::Text(_) => true,
    });
    match &inst.op {
        Op::Position { axis } => *axis == from,
        Op::Broadcast { .. } => true,
        // Rows of a cache that no token has written hold zeros, which are masked, but must stay finite.
        Op::Unary(u) => !matches!(u, Unary::Log | Unary::Rsqrt),
        Op::Binary(Binary::Div) => !f.ty(inst.args[1]).has(from),
        Op::RmsNorm { eps, .. } => apart && eps.0 > 0.0,
        Op::Binary(_)
        | Op::Select
        | Op::Cast
        | Op::Contract
        | Op::Reduce { .. }
        | Op::Pack { .. }
        | Op::Unpack { .. }
        | Op::Rename { .. }
        | Op::Split { .. }
        | Op::Merge { .. }
        | Op::Slice { .. }
        | Op::Concat { .. }
        | Op::Gather { .. }
        | Op::TopK { .. }
        | Op::TopIndices { .. }
        | Op::ScatterAdd { .. }
        | Op::Rope { .. }
        | Op::Softmax { .. } => apart,
        // A table along the positions, and what knows more than one of them.
        Op::Const(_) | Op::Past { .. } | Op::Append { .. } | Op::Call { .. } => false,
    }
}

/// Whether the result is linear in the operand with this number.
fn carries(op: &Op, at: usize) -> bool {
    match op {
        Op::Cast
        | Op::Contract
        | Op::Unary(Unary::Neg)
        | Op::Binary(Binary::Add | Binary::Sub | Binary::Mul)
        | Op::Reduce { by: Reduce::Sum, .. }
        | Op::Rename { .. }
        | Op::Broadcast { .. }
        | Op::Split { .. }
        | Op::Merge { .. }
        | Op::Slice { .. }
        | Op::Concat { .. }
        | Op::Past { .. } => true,
        Op::Binary(Binary::Div) => at == 0,
        Op::Select => at > 0,
        Op::Const(_)
        | Op::Position { .. }
        | Op::Unary(_)
        | Op::Binary(_)
        | Op::Reduce { .. }
        | Op::Pack { .. }
        | Op::Unpack { .. }
        | Op::Gather { .. }
        | Op::TopK { .. }
        | Op::TopIndices { .. }
        | Op::ScatterAdd { .. }
        | Op::Append { .. }
        | Op::Rope { .. }
        | Op::Softmax { .. }
        | Op::RmsNorm { .. }
        | Op::Call { .. } => false,
    }
}
