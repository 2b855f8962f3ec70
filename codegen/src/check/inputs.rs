//! Arguments for which a kernel has a meaning: indices lie inside of their axes, and the positions of one row differ.

use std::collections::BTreeMap;

use latentc_ir::{AxisId, Binary, DType, Function, Inst, Op, SplitMix, Tensor, ValueId};

use latentc_passes::page::Slots;

use super::{given, interpreter, no_weights};
use crate::program::Kernel;

/// What the values of an integer parameter are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    /// They are compared, or added up.
    Number,
    /// Any bits may be set.
    Word,
    /// They index an axis.
    Index(AxisId),
    /// They say where rows along the first axis go along the second.
    Place(AxisId, AxisId),
    /// The same, where a table of pages, so long along the second axis, says where these lie.
    Paged(AxisId, AxisId, usize),
    /// They are pages of so many places along an axis, each another one.
    Table(AxisId, usize),
}

/// One random argument per parameter, for these run-time sizes.
pub fn random_inputs(kernel: &Kernel, sizes: &[usize], seed: u64) -> Vec<Tensor> {
    let body = &kernel.body;
    let extents = kernel.extents(sizes);
    let extent = |a: AxisId| extents[a.0 as usize];
    let mut rng = SplitMix(seed);
    let uses = uses(body);
    let one = |&param: &ValueId| {
        let ty = body.ty(param);
        let shape: Vec<_> = ty.axes.iter().map(|&a| extent(a)).collect();
        if ty.dtype != DType::I32 {
            return Tensor::random(ty.dtype, shape, &mut rng);
        }
        let mut t = Tensor::zeros(ty.dtype, shape);
        match uses[param.0 as usize] {
            // Positions of a sequence are compared with others, up to its length.
            Use::Number => {
                let most = extents.iter().copied().max().unwrap_or(0).clamp(8, 100) as u64;
                t.data.iter_mut().for_each(|x| *x = rng.below(most) as f64);
            }
            Use::Word => t.data.iter_mut().for_each(|x| *x = f64::from(rng.below(1 << 32) as u32 as i32)),
            Use::Index(axis) => {
                t.data.iter_mut().for_each(|x| *x = rng.below(extent(axis) as u64) as f64);
            }
            Use::Table(axis, page) => {
                let mut pages: Vec<usize> = (0..extent(axis) / page).collect();
                for n in (1..pages.len()).rev() {
                    pages.swap(n, rng.below(n as u64 + 1) as usize);
                }
                t.data.iter_mut().zip(pages).for_each(|(x, page)| *x = page as f64);
            }
            Use::Place(from, to) | Use::Paged(from, to, _) => {
                let step: usize = match ty.position(from) {
                    Some(n) => t.shape[n + 1..].iter().product(),
                    None => 1,
                };
                let rows = if ty.has(from) { extent(from) } else { 1 };
                let each = if let Use::Paged(.., page) = uses[param.0 as usize] { page } else { 1 };
                let room = (extent(to) * each + 1).saturating_sub(rows) as u64;
                let first = rng.below(room) as usize;
                for (n, x) in t.data.iter_mut().enumerate() {
                    *x = (first + n / step.max(1) % rows.max(1)) as f64;
                }
            }
        }
        t
    };
    let mut args = body.params.iter().map(one).collect::<Vec<_>>();
    scale(kernel, sizes, &mut args);
    args
}

/// Divides what multiplies unpacked numbers by the largest of these, so that any bits stand for numbers up to 1, as all others are. What is
/// rounded of larger ones would leave a softmax nothing to say.
fn scale(kernel: &Kernel, sizes: &[usize], args: &mut [Tensor]) {
    let body = &kernel.body;
    if !body.body.iter().any(|inst| matches!(inst.op, Op::Unpack { .. })) {
        return;
    }
    let module = kernel.module();
    let (given, mut caches) = given(kernel, args);
    let trace = interpreter(kernel, &module, sizes).trace(&given, &mut no_weights, &mut caches);
    // What fails here fails where it is told.
    let Ok(trace) = trace else { return };
    // What follows from unpacked numbers and constants alone, and which parameter's elements a value has.
    let mut unpacked = vec![false; body.values.len()];
    let mut same_as: Vec<Option<usize>> = vec![None; body.values.len()];
    body.params.iter().enumerate().for_each(|(n, p)| same_as[p.0 as usize] = Some(n));
    let mut constant = vec![false; body.values.len()];
    let mut found: BTreeMap<usize, f64> = BTreeMap::new();
    for inst in &body.body {
        let result = inst.result().0 as usize;
        let of = |v: &ValueId| (unpacked[v.0 as usize], same_as[v.0 as usize]);
        if let (Op::Binary(Binary::Mul), [a, b]) = (&inst.op, &inst.args[..]) {
            for (x, scale) in [(a, b), (b, a)] {
                if let ((true, _), (false, Some(param))) = (of(x), of(scale))
                    && let Some((_, numbers)) = trace.get(x.0 as usize)
                {
                    let most =
                        numbers.data.iter().filter(|x| x.is_finite()).fold(1.0f64, |m, x| m.max(x.abs()));
                    found.entry(param).and_modify(|m| *m = m.max(most)).or_insert(most);
                }
            }
        }
        let known = |v: &ValueId| unpacked[v.0 as usize] || constant[v.0 as usize];
        let follows = inst.args.iter().all(known) && inst.args.iter().any(|v| unpacked[v.0 as usize]);
        unpacked[result] = matches!(inst.op, Op::Unpack { .. }) || follows;
        constant[result] = inst.args.iter().all(|v| constant[v.0 as usize]);
        let moves = inst.op.moves() || inst.op == Op::Cast || matches!(inst.op, Op::Gather { .. });
        if let (true, [x, ..]) = (moves, &inst.args[..]) {
            same_as[result] = same_as[x.0 as usize];
        }
    }
    for (param, most) in found {
        let Tensor { dtype, data, .. } = &mut args[param];
        data.iter_mut().for_each(|x| *x = dtype.round(*x / most));
    }
}

/// For each value of the body, what it is for.
fn uses(body: &Function) -> Vec<Use> {
    let mut uses = vec![Use::Number; body.values.len()];
    for inst in body.body.iter().rev() {
        let here = uses[inst.results[0].0 as usize];
        let mut mark = |arg: ValueId, known: Use| uses[arg.0 as usize] = known;
        match &inst.op {
            Op::Gather { axis } => {
                mark(inst.args[1], Use::Index(*axis));
                mark(inst.args[0], here);
            }
            Op::Unpack { .. } => mark(inst.args[0], Use::Word),
            Op::ScatterAdd { axis } => mark(inst.args[1], Use::Index(*axis)),
            Op::Append { from, to } => mark(inst.args[2], Use::Place(*from, *to)),
            // The same numbers at other places. The rows of what is renamed have another name before.
            Op::Rename { from, to } => {
                let before = match here {
                    Use::Place(rows, along) if rows == *to => Use::Place(*from, along),
                    Use::Number
                    | Use::Word
                    | Use::Index(_)
                    | Use::Place(..)
                    | Use::Paged(..)
                    | Use::Table(..) => here,
                };
                pass_on(inst, before, &mut uses);
            }
            Op::Broadcast { .. }
            | Op::Split { .. }
            | Op::Merge { .. }
            | Op::Slice { .. }
            | Op::Concat { .. }
            | Op::Select
            | Op::Past { .. } => pass_on(inst, here, &mut uses),
            Op::Const(_)
            | Op::Position { .. }
            | Op::Unary(_)
            | Op::Binary(_)
            | Op::Cast
            | Op::Contract
            | Op::Reduce { .. }
            | Op::Pack { .. }
            | Op::TopK { .. }
            | Op::TopIndices { .. }
            | Op::Rope { .. }
            | Op::Softmax { .. }
            | Op::RmsNorm { .. }
            | Op::Call { .. } => {}
        }
    }
    for (inst, axis, slots) in Slots::all(body) {
        let page = slots.page as usize;
        uses[slots.table.0 as usize] = Use::Table(axis, page);
        if let Op::Append { from, .. } = inst.op {
            uses[slots.positions.0 as usize] = Use::Paged(from, slots.pages, page);
        }
    }
    uses
}

/// What is for something passes it on to what it is made of.
fn pass_on(inst: &Inst, known: Use, uses: &mut [Use]) {
    if known != Use::Number {
        inst.args.iter().for_each(|a| uses[a.0 as usize] = known);
    }
}
