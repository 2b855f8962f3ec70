//! Kernels that compute each element, or each row, on its own.
//!
//! The body of a map kernel is an expression of its parameters. Without more, every element of the domain is independent and
//! computes what it needs again. Some values are not worth that and are *shared*: what a reduction or a selection yields, what a
//! selection compares, and what a gather reads of these. A *row* is what is computed together: the axes that number the
//! rows are those of the domain that every shared value has and along which no instruction moves, selects or folds. For each
//! index of these, everything else is local.
//!
//! A shared value with axes besides is *resident*: all of its row is kept where those who compute the row see it, a lane of the
//! host's vector machine or the shared memory of a cube. Through CubeCL such rows must be of fixed sizes and fit: see [`fits`].

use latentc_ir::{AxisId, Function, Inst, Op, ValueId};
use smallvec::{SmallVec, smallvec};

/// What the resident values of a row may take, in bytes. With what a cube folds over, it makes the 32 KiB of shared memory
/// that every driver has.
pub const RESIDENT_BYTES: u64 = 30 << 10;

/// What computing a row may take, in elements that are computed, folded or compared: about a thousand for each unit of a cube.
/// More is worth several launches, which spread over the whole machine.
pub const ROW_WORK: u64 = 1 << 18;

/// Bytes of a resident element. Floats of any width are held as f32, truth values as numbers.
const ELEMENT: u64 = 4;

/// How the domain of a map kernel is walked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapPlan {
    /// The axes of the values that are stored: the output's, or of what is appended to it; in memory order.
    pub domain: Vec<AxisId>,
    /// With shared values, the axes that number the rows; some of the domain's.
    pub rows: Option<Vec<AxisId>>,
    /// The shared values with other axes than the rows', in the order in which they are computed.
    pub resident: Vec<ValueId>,
}

impl MapPlan {
    /// The plan of a kernel's body.
    pub fn of(body: &Function) -> MapPlan {
        let insts: Vec<_> = body.body.iter().collect();
        MapPlan::of_part(body, &insts, body.results[0])
    }

    /// The plan of a part of a function that makes `root` of values that are stored.
    fn of_part(f: &Function, part: &[&Inst], root: ValueId) -> MapPlan {
        let mut domain = f.ty(root).axes.clone();
        if let Some(Inst { op: Op::Append { .. }, args, .. }) = part.last() {
            domain.clone_from(&f.ty(args[1]).axes);
        }
        let shared = shared(f, part, root);
        let moved: Vec<_> = part.iter().flat_map(|inst| moved_axes(f, inst)).collect();
        let is_row = |a: &AxisId| !moved.contains(a) && shared.iter().all(|&v| f.ty(v).has(*a));
        let rows: Vec<_> = domain.iter().copied().filter(is_row).collect();
        let has_more = |v: &ValueId| f.ty(*v).axes.iter().any(|a| !rows.contains(a));
        let resident = shared.iter().copied().filter(has_more).collect();
        MapPlan { domain, rows: (!shared.is_empty()).then_some(rows), resident }
    }

    /// The axes of a value within a row, in the order of its type.
    pub fn in_row(&self, f: &Function, value: ValueId) -> Vec<AxisId> {
        let rows = self.rows.as_deref().unwrap_or_default();
        f.ty(value).axes.iter().copied().filter(|a| !rows.contains(a)).collect()
    }
}

/// Whether a part of a function can be one map kernel: instructions in order, the last of which makes the result; what
/// they read and do not make lies in memory.
///
/// # Errors
/// If they cannot, with the reason: an op that is no part of a map, or rows that hold too much or have no fixed size.
pub fn fits(f: &Function, part: &[&Inst]) -> Result<MapPlan, String> {
    let Some(last) = part.last() else { return Err("a kernel has an instruction".to_owned()) };
    for inst in part {
        let known = match inst.op {
            Op::Contract
            | Op::ScatterAdd { .. }
            | Op::Past { .. }
            | Op::Softmax { .. }
            | Op::RmsNorm { .. }
            | Op::Call { .. } => false,
            Op::Append { .. } => inst.results == last.results,
            Op::Const(_)
            | Op::Position { .. }
            | Op::Unary(_)
            | Op::Binary(_)
            | Op::Select
            | Op::Cast
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
            | Op::Rope { .. } => true,
        };
        if !known {
            return Err(format!("`{}` has no place there in a map", inst.op.mnemonic()));
        }
    }
    let plan = MapPlan::of_part(f, part, last.result());
    // Where all that is shared is one number a row, a row may be as long as it likes.
    if plan.resident.is_empty() {
        return Ok(plan);
    }
    let name = |v: ValueId| &f.value(v).name;
    let size = |v: ValueId, axes: &[AxisId]| {
        axes.iter().try_fold(1u64, |total, &a| match f.axis(a).size.fixed() {
            Some(n) => Ok(total.saturating_mul(n)),
            None => Err(format!("`{}` has the run-time size {} within a row", name(v), f.axis(a).size)),
        })
    };
    let (mut bytes, mut work) = (0u64, 0u64);
    for inst in part {
        let v = if matches!(inst.op, Op::Append { .. }) { inst.args[1] } else { inst.result() };
        let own = size(v, &plan.in_row(f, v))?;
        if plan.resident.contains(&v) {
            bytes = bytes.saturating_add(own.saturating_mul(ELEMENT).next_multiple_of(16));
        }
        let steps = if let Op::Reduce { axis, .. } = inst.op {
            size(v, &[axis])?.saturating_mul(own)
        } else if let Op::TopK { axis, .. } | Op::TopIndices { axis, .. } = inst.op {
            // Each of a row is compared with each.
            let x = inst.args[0];
            size(x, &plan.in_row(f, x))?.saturating_mul(size(x, &[axis])?)
        } else if plan.resident.contains(&v) || inst.result() == last.result() {
            own
        } else {
            0
        };
        work = work.saturating_add(steps);
    }
    if bytes > RESIDENT_BYTES {
        return Err(format!("a row of `{}` keeps {bytes} bytes, {RESIDENT_BYTES} fit", name(last.result())));
    }
    if work > ROW_WORK {
        return Err(format!("a row of `{}` takes {work} steps, the most is {ROW_WORK}", name(last.result())));
    }
    Ok(plan)
}

/// The values that are computed once for all who want them, in order.
fn shared(f: &Function, part: &[&Inst], root: ValueId) -> Vec<ValueId> {
    let made = |v: ValueId| part.iter().any(|inst| inst.results.contains(&v));
    let mut is_shared = vec![false; f.values.len()];
    // Whether a value follows from a reduction or selection.
    let mut follows = vec![false; f.values.len()];
    for inst in part {
        let from_shared = inst.args.iter().any(|a| follows[a.0 as usize]);
        let Some(&result) = inst.results.first() else { continue };
        let dear = match inst.op {
            Op::Reduce { .. } => true,
            // Each unit that stores an element of it can as well decide on that alone.
            Op::TopK { .. } | Op::TopIndices { .. } => {
                is_shared[inst.args[0].0 as usize] |= made(inst.args[0]);
                result != root || matches!(inst.op, Op::TopIndices { .. })
            }
            Op::Gather { .. } => {
                is_shared[inst.args[0].0 as usize] |= follows[inst.args[0].0 as usize];
                false
            }
            Op::Const(_)
            | Op::Position { .. }
            | Op::Unary(_)
            | Op::Binary(_)
            | Op::Select
            | Op::Cast
            | Op::Contract
            | Op::Rename { .. }
            | Op::Broadcast { .. }
            | Op::Split { .. }
            | Op::Merge { .. }
            | Op::Slice { .. }
            | Op::Concat { .. }
            | Op::Pack { .. }
            | Op::Unpack { .. }
            | Op::ScatterAdd { .. }
            | Op::Past { .. }
            | Op::Append { .. }
            | Op::Rope { .. }
            | Op::Softmax { .. }
            | Op::RmsNorm { .. }
            | Op::Call { .. } => false,
        };
        is_shared[result.0 as usize] |= dear;
        follows[result.0 as usize] = dear || from_shared;
    }
    part.iter().filter_map(|inst| inst.results.first().copied()).filter(|v| is_shared[v.0 as usize]).collect()
}

/// The axes along which an instruction reads at other places than the one where it writes, or folds.
pub fn moved_axes(f: &Function, inst: &Inst) -> Vec<AxisId> {
    match &inst.op {
        Op::Rename { from, to } => vec![*from, *to],
        Op::Split { axis, into } => [&[*axis], &into[..]].concat(),
        Op::Merge { axes, into } | Op::Concat { axes, into } => [&[*into], &axes[..]].concat(),
        Op::Slice { axis, into, .. } | Op::TopIndices { axis, into } => vec![*axis, *into],
        Op::Gather { axis }
        | Op::TopK { axis, .. }
        | Op::Reduce { axis, .. }
        | Op::Pack { axis }
        | Op::Unpack { axis } => vec![*axis],
        // The frequencies are read at the pair's number.
        Op::Rope { axis, .. } => [&[*axis], &f.ty(inst.args[2]).axes[..]].concat(),
        Op::Contract => f.summed(&inst.args, f.ty(inst.result())),
        Op::Const(_)
        | Op::Position { .. }
        | Op::Unary(_)
        | Op::Binary(_)
        | Op::Select
        | Op::Cast
        | Op::Broadcast { .. }
        | Op::ScatterAdd { .. }
        | Op::Past { .. }
        | Op::Append { .. }
        | Op::Softmax { .. }
        | Op::RmsNorm { .. }
        | Op::Call { .. } => vec![],
    }
}

/// The last instruction of a body, if it appends: such a kernel writes into its cache in place.
pub fn append(body: &Function) -> Option<&Inst> {
    body.body.last().filter(|i| matches!(i.op, Op::Append { .. }))
}

/// What a body computes: its result, or what it appends to a cache.
pub fn made(body: &Function) -> ValueId {
    append(body).map_or(body.results[0], |append| append.args[1])
}

/// Steps along the axes of a tensor, of which few have more.
pub type Steps = SmallVec<[usize; 6]>;

/// The steps between neighbours along each axis of a dense tensor, in elements.
pub fn strides(axes: &[AxisId], extents: &[usize]) -> Steps {
    let mut strides: Steps = smallvec![1; axes.len()];
    for n in (1..axes.len()).rev() {
        strides[n - 1] = strides[n] * extents[axes[n].0 as usize];
    }
    strides
}
