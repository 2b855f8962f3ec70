//! Where values are zero by a top-k gate, and where they are needed at all.
//!
//! A [`Gate`] says that for each index of some axes at most k of the indices of others count. Two analyses speak
//! of them, both over one function, both safe: what they do not understand is dense and needed everywhere.
//!
//! - **zero outside** (forward): `top_k` is false but for k of the axis; what multiplies by it, or selects zero where
//!   it is false, is zero there as well, and stays so through everything that maps zero to zero.
//! - **needed within** (backward): of a factor that is multiplied by something gated, only the gated indices are
//!   needed, and so is what that factor is computed from. In `g[t,e] W_2[e,d,f] z[t,e,f]` with a gate
//!   of 6 of 160 along `e`, a token needs 6/160 of `W_2`; through `z`, it needs as much of what made `z`.

use crate::graph::{Function, Inst, ValueId};
use crate::ops::{Binary, Op, Unary};
use crate::types::AxisId;

/// For each index of the axes `given`, at most `k` indices of `axes` count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gate {
    /// The gated axes, as a set; several if one was split.
    pub axes: Vec<AxisId>,
    /// How many of their indices count.
    pub k: u64,
    /// The other axes of the mask, such as the tokens.
    pub given: Vec<AxisId>,
    /// The `top_k` that chose them: gates of one mask along the same axes choose the same indices.
    pub mask: ValueId,
}

/// Where a value can be other than zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Support {
    /// Nowhere: it is zero.
    Nowhere,
    /// Only where all of these gates let it; anywhere if there are none.
    Within(Vec<Gate>),
}

/// Where a value is needed to compute the function's results and effects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Need {
    /// Nowhere: it is dead.
    Nowhere,
    /// Only at rows that indices choose: a table that is only gathered from.
    Rows,
    /// Only where all of these gates let it; everywhere if there are none.
    Within(Vec<Gate>),
}

/// Both facts for each value of a function, by value number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sparsity {
    /// Where each value can be other than zero.
    pub support: Vec<Support>,
    /// Where each value is needed.
    pub need: Vec<Need>,
}

/// Analyses a function by itself: a call needs all of its arguments, and its results are dense.
pub fn sparsity(f: &Function) -> Sparsity {
    let dense = Support::Within(Vec::new());
    let mut support = vec![dense; f.values.len()];
    for inst in &f.body {
        if let [result] = inst.results[..] {
            support[result.0 as usize] = forward(f, inst, result, &support);
        }
    }
    let mut need = vec![Need::Nowhere; f.values.len()];
    f.results.iter().for_each(|r| need[r.0 as usize] = Need::everywhere());
    for inst in f.body.iter().rev() {
        backward(f, inst, &support, &mut need);
    }
    Sparsity { support, need }
}

impl Support {
    fn gates(&self) -> &[Gate] {
        match self {
            Support::Nowhere => &[],
            Support::Within(gates) => gates,
        }
    }

    /// Of a product.
    fn and(&self, other: &Support) -> Support {
        match (self, other) {
            (Support::Within(a), Support::Within(b)) => Support::Within(union(a, b)),
            (Support::Nowhere, _) | (_, Support::Nowhere) => Support::Nowhere,
        }
    }

    /// Of a sum.
    fn or(&self, other: &Support) -> Support {
        match (self, other) {
            (Support::Nowhere, x) | (x, Support::Nowhere) => x.clone(),
            (Support::Within(a), Support::Within(b)) => Support::Within(common(a, b)),
        }
    }

    fn map(&self, gate: impl Fn(&Gate) -> Option<Gate>) -> Support {
        match self {
            Support::Nowhere => Support::Nowhere,
            Support::Within(gates) => Support::Within(gates.iter().filter_map(gate).collect()),
        }
    }
}

impl Need {
    fn everywhere() -> Need {
        Need::Within(Vec::new())
    }

    /// Needed for this and for that.
    fn or(&self, other: &Need) -> Need {
        match (self, other) {
            (Need::Nowhere, x) | (x, Need::Nowhere) => x.clone(),
            (Need::Rows, Need::Rows) => Need::Rows,
            (Need::Rows, Need::Within(_)) | (Need::Within(_), Need::Rows) => Need::everywhere(),
            (Need::Within(a), Need::Within(b)) => Need::Within(common(a, b)),
        }
    }

    fn map(&self, gate: impl Fn(&Gate) -> Option<Gate>) -> Need {
        match self {
            Need::Nowhere => Need::Nowhere,
            Need::Rows => Need::Rows,
            Need::Within(gates) => Need::Within(gates.iter().filter_map(gate).collect()),
        }
    }

    /// The fraction of a value's elements that each token needs, as a numerator and a denominator. Of gates that
    /// share an axis, the narrowest counts.
    pub fn fraction(&self, f: &Function) -> (u64, u64) {
        let gates = match self {
            Need::Nowhere => return (0, 1),
            Need::Rows => return (1, 1),
            Need::Within(gates) => gates,
        };
        let extent = |g: &Gate| g.axes.iter().filter_map(|&a| f.axis(a).size.fixed()).product::<u64>();
        let mut narrowest: Vec<_> = gates.iter().map(|g| (g, g.k, extent(g))).collect();
        narrowest.sort_by(|(_, k, n), (_, l, m)| {
            (u128::from(*k) * u128::from(*m)).cmp(&(u128::from(*l) * u128::from(*n)))
        });
        let mut taken: Vec<AxisId> = Vec::new();
        let (mut of, mut all) = (1, 1);
        for (g, k, n) in narrowest {
            if k < n && !g.axes.iter().any(|a| taken.contains(a)) {
                taken.extend(&g.axes);
                (of, all) = (of * k, all * n);
            }
        }
        (of, all)
    }
}

fn union(a: &[Gate], b: &[Gate]) -> Vec<Gate> {
    let mut all = a.to_vec();
    all.extend(b.iter().filter(|g| !a.contains(g)).cloned());
    all
}

fn common(a: &[Gate], b: &[Gate]) -> Vec<Gate> {
    a.iter().filter(|g| b.contains(g)).cloned().collect()
}

/// The gate, unless it speaks of the axis: one that is summed, sorted or indexed has no gates afterwards.
fn without(axis: AxisId) -> impl Fn(&Gate) -> Option<Gate> {
    move |g| (!g.axes.contains(&axis) && !g.given.contains(&axis)).then(|| g.clone())
}

fn renamed(from: AxisId, to: AxisId) -> impl Fn(&Gate) -> Option<Gate> {
    let swap = move |a: &AxisId| if *a == from { to } else { *a };
    move |g| {
        let (axes, given) = (g.axes.iter().map(swap).collect(), g.given.iter().map(swap).collect());
        Some(Gate { axes, given, ..g.clone() })
    }
}

/// The gate of a value one of whose axes is seen as several.
fn split(axis: AxisId, into: &[AxisId]) -> impl Fn(&Gate) -> Option<Gate> + '_ {
    let parts = move |axes: &[AxisId]| {
        let mut parts: Vec<_> = axes.iter().copied().filter(|&a| a != axis).collect();
        if parts.len() < axes.len() {
            parts.extend(into);
        }
        parts.sort_unstable();
        parts
    };
    move |g| Some(Gate { axes: parts(&g.axes), given: parts(&g.given), ..g.clone() })
}

/// The gate of a value several of whose axes are seen as one: k of a part is k times the others of the whole.
fn merged<'f>(f: &'f Function, parts: &'f [AxisId], into: AxisId) -> impl Fn(&Gate) -> Option<Gate> + 'f {
    move |g| {
        let within = |axes: &[AxisId]| axes.iter().filter(|a| parts.contains(a)).count();
        let mut g = g.clone();
        if within(&g.given) > 0 {
            // A choice for each index of a part is none for each index of the whole, unless all parts are given.
            if within(&g.given) < parts.len() {
                return None;
            }
            g.given.retain(|a| !parts.contains(a));
            g.given.push(into);
        }
        if within(&g.axes) > 0 {
            for p in parts.iter().filter(|p| !g.axes.contains(p)) {
                g.k = g.k.checked_mul(f.axis(*p).size.fixed()?)?;
            }
            g.axes.retain(|a| !parts.contains(a));
            g.axes.push(into);
            g.axes.sort_unstable();
        }
        Some(g)
    }
}

fn forward(f: &Function, inst: &Inst, result: ValueId, known: &[Support]) -> Support {
    let of = |n: usize| &known[inst.args[n].0 as usize];
    let dense = || Support::Within(Vec::new());
    match &inst.op {
        Op::Const(values) if values.iter().all(|x| x.0 == 0.0) => Support::Nowhere,
        Op::Const(_) | Op::Position { .. } => dense(),
        Op::Unary(u) => match u {
            Unary::Neg | Unary::Abs | Unary::Sqrt | Unary::Silu | Unary::Tanh | Unary::Sin => of(0).clone(),
            Unary::Exp | Unary::Log | Unary::Rsqrt | Unary::Sigmoid | Unary::Cos | Unary::Not => dense(),
        },
        Op::Binary(b) => match b {
            Binary::Mul | Binary::And => of(0).and(of(1)),
            Binary::Div => of(0).clone(),
            Binary::Add | Binary::Sub | Binary::Max | Binary::Min | Binary::Or => of(0).or(of(1)),
            // Zero is not less than zero, but it is not more and it is equal.
            Binary::Lt => of(0).or(of(1)),
            Binary::Le | Binary::Eq => dense(),
        },
        Op::Select => of(0).and(of(1)).or(of(2)),
        Op::Cast | Op::Broadcast { .. } => of(0).clone(),
        Op::Contract => {
            let product = (1..inst.args.len()).fold(of(0).clone(), |p, n| p.and(of(n)));
            f.summed(&inst.args, f.ty(result)).into_iter().fold(product, |p, a| p.map(without(a)))
        }
        // The maximum of nothing is not zero.
        Op::Reduce { axis, .. } => of(0).map(without(*axis)),
        Op::Rename { from, to } | Op::Past { from, to } => of(0).map(renamed(*from, *to)),
        Op::Split { axis, into } => of(0).map(split(*axis, into)),
        Op::Merge { axes, into } => of(0).map(merged(f, axes, *into)),
        Op::Slice { axis, .. } | Op::Pack { axis } => of(0).map(without(*axis)),
        Op::Unpack { .. } => of(0).clone(),
        Op::Concat { axes, .. } => {
            let part = |n: usize| of(n).map(without(axes[n]));
            (1..axes.len()).fold(part(0), |all, n| all.or(&part(n)))
        }
        Op::Gather { .. }
        | Op::TopIndices { .. }
        | Op::ScatterAdd { .. }
        | Op::Append { .. }
        | Op::Softmax { .. }
        | Op::Call { .. } => dense(),
        Op::TopK { axis, k } => {
            let given = f.ty(result).axes.iter().copied().filter(|a| a != axis).collect();
            Support::Within(vec![Gate { axes: vec![*axis], k: *k, given, mask: result }])
        }
        // Both map a row of zeros to a row of zeros.
        Op::Rope { axis, .. } | Op::RmsNorm { axis, .. } => of(0).map(without(*axis)),
    }
}

fn backward(f: &Function, inst: &Inst, support: &[Support], need: &mut [Need]) {
    let effect = matches!(inst.op, Op::Append { .. } | Op::Call { .. });
    let wanted = inst.results.iter().fold(Need::Nowhere, |n, r| n.or(&need[r.0 as usize]));
    if wanted == Need::Nowhere && !effect {
        return;
    }
    for n in 0..inst.args.len() {
        let arg = inst.args[n];
        let here = operand(f, inst, n, &wanted, support);
        // A gate says nothing of an operand that lacks a gated axis.
        let here = here.map(|g| g.axes.iter().all(|&a| f.ty(arg).has(a)).then(|| g.clone()));
        let slot = &mut need[arg.0 as usize];
        *slot = slot.or(&here);
    }
}

/// Where the n-th operand is needed, given where the result is.
fn operand(f: &Function, inst: &Inst, n: usize, wanted: &Need, support: &[Support]) -> Need {
    // Where the operands that this one is multiplied by are other than zero.
    let others = |wanted: &Need, others: &mut dyn Iterator<Item = usize>| {
        let mut gates = match wanted {
            Need::Within(gates) => gates.clone(),
            Need::Nowhere | Need::Rows => Vec::new(),
        };
        for o in others {
            gates = union(&gates, support[inst.args[o].0 as usize].gates());
        }
        Need::Within(gates)
    };
    // A table of which only rows are read may be renamed or converted first.
    let mixed = || if *wanted == Need::Rows { Need::everywhere() } else { wanted.clone() };
    match &inst.op {
        Op::Const(_) | Op::Position { .. } => Need::Nowhere,
        Op::Unary(_) | Op::Cast => wanted.clone(),
        Op::Rename { from, to } | Op::Past { from, to } => wanted.map(renamed(*to, *from)),
        Op::Binary(Binary::Mul | Binary::And) => others(wanted, &mut std::iter::once(1 - n)),
        Op::Binary(_) => mixed(),
        // The condition lets the first choice through; the second is needed where it does not.
        Op::Select if n == 1 => others(wanted, &mut std::iter::once(0)),
        Op::Select => mixed(),
        Op::Contract => others(wanted, &mut (0..inst.args.len()).filter(|&o| o != n)),
        Op::Reduce { .. } | Op::Broadcast { .. } | Op::Pack { .. } | Op::Unpack { .. } => mixed(),
        Op::Split { axis, into } => mixed().map(merged(f, into, *axis)),
        Op::Merge { axes, into } => mixed().map(split(*into, axes)),
        Op::Slice { into, .. } | Op::Concat { into, .. } => mixed().map(without(*into)),
        Op::Gather { .. } if n == 0 => Need::Rows,
        Op::Gather { .. } => Need::everywhere(),
        Op::TopK { axis, .. } | Op::Rope { axis, .. } | Op::Softmax { axis } | Op::RmsNorm { axis, .. } => {
            mixed().map(without(*axis))
        }
        Op::TopIndices { into, .. } => mixed().map(without(*into)),
        Op::ScatterAdd { .. } | Op::Append { .. } | Op::Call { .. } => Need::everywhere(),
    }
}
