//! What each op computes: one arm per op, slow and obvious.

use std::borrow::Cow;
use std::cmp::Ordering;

use super::contract::{Array, contract};
use crate::graph::Function;
use crate::ops::{Fields, Op};
use crate::tensor::Tensor;
use crate::types::{AxisId, Type};

/// An operand: its type says which axis each extent of its tensor belongs to.
#[derive(Clone, Copy)]
pub(crate) struct Arg<'a> {
    pub(crate) ty: &'a Type,
    pub(crate) tensor: &'a Tensor,
}

impl Arg<'_> {
    /// How far apart neighbours along each of `axes` lie; 0 for axes that the operand lacks.
    fn along(&self, axes: &[AxisId]) -> Vec<usize> {
        along(&self.ty.axes, &self.tensor.shape, axes)
    }

    fn stride(&self, axis: AxisId) -> usize {
        self.along(&[axis])[0]
    }

    fn extent(&self, axis: AxisId) -> usize {
        self.ty.position(axis).map_or(1, |n| self.tensor.shape[n])
    }
}

/// For a row-major array with the axes `of`, how far apart neighbours along each of `axes` lie; 0 for axes that it lacks.
pub(crate) fn along(of: &[AxisId], shape: &[usize], axes: &[AxisId]) -> Vec<usize> {
    let stride = |a: &AxisId| match of.iter().position(|x| x == a) {
        Some(n) => shape[n + 1..].iter().product(),
        None => 0,
    };
    axes.iter().map(stride).collect()
}

/// Visits every index of `shape` in row-major order with the offset it has in each of `N` strided arrays.
pub(crate) fn walk<const N: usize>(
    shape: &[usize],
    strides: [&[usize]; N],
    mut visit: impl FnMut([usize; N]),
) {
    if shape.contains(&0) {
        return;
    }
    let Some((&inner, outer)) = shape.split_last() else { return visit([0; N]) };
    let last = outer.len();
    let mut index = vec![0; last];
    let mut row = [0; N];
    loop {
        let mut at = row;
        for _ in 0..inner {
            visit(at);
            for n in 0..N {
                at[n] += strides[n][last];
            }
        }
        let mut axis = last;
        loop {
            if axis == 0 {
                return;
            }
            axis -= 1;
            index[axis] += 1;
            for n in 0..N {
                row[n] += strides[n][axis];
            }
            if index[axis] < outer[axis] {
                break;
            }
            index[axis] = 0;
            for n in 0..N {
                row[n] -= strides[n][axis] * outer[axis];
            }
        }
    }
}

/// The elements of the result of `op`, not yet rounded, in the order of `out`, whose extents are `shape`.
///
/// # Errors
/// An index or a position out of range, naming both. Types are taken to be right.
pub(crate) fn eval(
    f: &Function,
    op: &Op,
    args: &[Arg<'_>],
    out: &Type,
    shape: &[usize],
) -> Result<Vec<f64>, String> {
    let mut data = vec![0.0; shape.iter().product()];
    let here = along(&out.axes, shape, &out.axes);
    // The result as an array to write to, along the axes of an operand.
    let there = |axes: &[AxisId]| along(&out.axes, shape, axes);
    match op {
        Op::Const(values) => data.iter_mut().zip(values).for_each(|(y, x)| *y = x.0),
        Op::Position { axis } => {
            let index: Vec<_> = out.axes.iter().map(|a| usize::from(a == axis)).collect();
            walk(shape, [&here, &index], |[o, i]| data[o] = i as f64);
        }

        Op::Unary(u) => {
            let x = args[0];
            walk(shape, [&here, &x.along(&out.axes)], |[o, i]| data[o] = u.apply(x.tensor.data[i]));
        }
        Op::Binary(b) => {
            let (x, y) = (args[0], args[1]);
            walk(shape, [&here, &x.along(&out.axes), &y.along(&out.axes)], |[o, i, j]| {
                data[o] = b.apply(x.tensor.data[i], y.tensor.data[j]);
            });
        }
        Op::Select => {
            let (c, x, y) = (args[0], args[1], args[2]);
            let strides = [&here[..], &c.along(&out.axes), &x.along(&out.axes), &y.along(&out.axes)];
            walk(shape, strides, |[o, n, i, j]| {
                data[o] = if c.tensor.data[n] != 0.0 { x.tensor.data[i] } else { y.tensor.data[j] };
            });
        }
        Op::Cast | Op::Broadcast { .. } => {
            let x = args[0];
            walk(shape, [&here, &x.along(&out.axes)], |[o, i]| data[o] = x.tensor.data[i]);
        }

        Op::Contract => {
            let arrays = args.iter().map(|a| Array {
                axes: a.ty.axes.clone(),
                shape: a.tensor.shape.clone(),
                data: Cow::Borrowed(&a.tensor.data),
            });
            data = contract(arrays.collect(), &out.axes);
        }
        Op::Reduce { by, .. } => {
            let x = args[0];
            data.fill(by.identity());
            walk(&x.tensor.shape, [&x.along(&x.ty.axes), &there(&x.ty.axes)], |[i, o]| {
                data[o] = by.combine(data[o], x.tensor.data[i]);
            });
        }

        // The mask that hides what lies ahead is the author's, so the past is the same elements under another name.
        Op::Rename { from, to } | Op::Past { from, to } => {
            let x = args[0];
            let axes: Vec<_> = out.axes.iter().map(|a| if a == to { *from } else { *a }).collect();
            walk(shape, [&here, &x.along(&axes)], |[o, i]| data[o] = x.tensor.data[i]);
        }
        Op::Split { axis, into } => {
            let x = args[0];
            let strides = parts(x.stride(*axis), into, |a| extent(out, shape, a));
            let of = |a: &AxisId| into.iter().position(|p| p == a).map_or(x.stride(*a), |n| strides[n]);
            let strides: Vec<_> = out.axes.iter().map(of).collect();
            walk(shape, [&here, &strides], |[o, i]| data[o] = x.tensor.data[i]);
        }
        Op::Merge { axes, into } => {
            let x = args[0];
            let strides = parts(there(&[*into])[0], axes, |a| x.extent(a));
            let of = |a: &AxisId| axes.iter().position(|p| p == a).map_or(there(&[*a])[0], |n| strides[n]);
            let strides: Vec<_> = x.ty.axes.iter().map(of).collect();
            walk(&x.tensor.shape, [&x.along(&x.ty.axes), &strides], |[i, o]| data[o] = x.tensor.data[i]);
        }
        Op::Slice { axis, into, start } => {
            let x = args[0];
            let axes: Vec<_> = out.axes.iter().map(|a| if a == into { *axis } else { *a }).collect();
            let first = *start as usize * x.stride(*axis);
            walk(shape, [&here, &x.along(&axes)], |[o, i]| data[o] = x.tensor.data[first + i]);
        }
        Op::Concat { axes, into } => {
            let mut start = 0;
            for (x, axis) in args.iter().zip(axes) {
                let to: Vec<_> = x.ty.axes.iter().map(|a| if a == axis { *into } else { *a }).collect();
                let first = start * there(&[*into])[0];
                walk(&x.tensor.shape, [&x.along(&x.ty.axes), &there(&to)], |[i, o]| {
                    data[first + o] = x.tensor.data[i];
                });
                start += x.extent(*axis);
            }
        }

        Op::Pack { axis } => {
            let x = args[0];
            let fields = Fields(x.extent(*axis) as u32);
            let index: Vec<_> = x.ty.axes.iter().map(|a| usize::from(a == axis)).collect();
            walk(&x.tensor.shape, [&x.along(&x.ty.axes), &there(&x.ty.axes), &index], |[i, o, p]| {
                let word = data[o] as i32 | fields.pack(p as u32, x.tensor.data[i] as i32);
                data[o] = f64::from(word);
            });
        }
        Op::Unpack { axis } => {
            let x = args[0];
            let fields = Fields(extent(out, shape, *axis) as u32);
            let index: Vec<_> = out.axes.iter().map(|a| usize::from(a == axis)).collect();
            walk(shape, [&here, &x.along(&out.axes), &index], |[o, i, p]| {
                data[o] = f64::from(fields.unpack(p as u32, x.tensor.data[i] as i32));
            });
        }

        Op::Gather { axis } => {
            let (x, index) = (args[0], args[1]);
            let (size, stride) = (x.extent(*axis), x.stride(*axis));
            // The result may have an axis of the table's name only through the index, never the gathered one.
            let mut wrong = None;
            walk(shape, [&here, &x.along(&out.axes), &index.along(&out.axes)], |[o, i, n]| {
                let at = index.tensor.data[n];
                if at >= 0.0 && (at as usize) < size {
                    data[o] = x.tensor.data[i + at as usize * stride];
                } else {
                    wrong = wrong.or(Some(at));
                }
            });
            if let Some(at) = wrong {
                let name = &f.axis(*axis).name;
                return Err(format!("the index {at} is outside the axis `{name}` of size {size}"));
            }
        }
        Op::TopK { axis, k } => {
            let x = args[0];
            let n = x.extent(*axis);
            let out_step = there(&[*axis])[0];
            rows(x, *axis, &there(&x.ty.axes), |step, i, o| {
                let mut order: Vec<usize> = (0..n).collect();
                // The sort is stable: of equals, the first stays first.
                order.sort_by(|&p, &q| descending(x.tensor.data[i + p * step], x.tensor.data[i + q * step]));
                for &p in order.iter().take(*k as usize) {
                    data[o + p * out_step] = 1.0;
                }
            });
        }

        Op::TopIndices { axis, into } => {
            let x = args[0];
            let n = x.extent(*axis);
            let out_step = there(&[*into])[0];
            let others: Vec<_> = x.ty.axes.iter().copied().filter(|a| a != axis).collect();
            let step = x.along(&[*axis])[0];
            let extents: Vec<_> = others.iter().map(|&a| x.extent(a)).collect();
            walk(&extents, [&x.along(&others)[..], &there(&others)], |[i, o]| {
                let mut order: Vec<usize> = (0..n).collect();
                order.sort_by(|&p, &q| descending(x.tensor.data[i + p * step], x.tensor.data[i + q * step]));
                for (j, &p) in order.iter().take(shape[out.position(*into).unwrap_or(0)]).enumerate() {
                    data[o + j * out_step] = p as f64;
                }
            });
        }

        Op::ScatterAdd { axis } => {
            let (x, index) = (args[0], args[1]);
            let (size, step) = (extent(out, shape, *axis), there(&[*axis])[0]);
            let mut wrong = None;
            let strides = [&x.along(&x.ty.axes)[..], &index.along(&x.ty.axes), &there(&x.ty.axes)];
            walk(&x.tensor.shape, strides, |[i, n, o]| {
                let at = index.tensor.data[n];
                if at >= 0.0 && (at as usize) < size {
                    data[o + at as usize * step] += x.tensor.data[i];
                } else {
                    wrong = wrong.or(Some(at));
                }
            });
            if let Some(at) = wrong {
                let name = &f.axis(*axis).name;
                return Err(format!("the index {at} is outside the axis `{name}` of size {size}"));
            }
        }

        Op::Append { from, to } => {
            let (cache, x, pos) = (args[0], args[1], args[2]);
            walk(shape, [&here, &cache.along(&out.axes)], |[o, i]| data[o] = cache.tensor.data[i]);
            let capacity = cache.extent(*to);
            let step = there(&[*to])[0];
            // `from` is no axis of the cache, so that it moves nothing here but the position.
            let mut wrong = None;
            let strides = [&x.along(&x.ty.axes)[..], &pos.along(&x.ty.axes), &there(&x.ty.axes)];
            walk(&x.tensor.shape, strides, |[i, p, o]| {
                let at = pos.tensor.data[p];
                if at >= 0.0 && (at as usize) < capacity {
                    data[o + at as usize * step] = x.tensor.data[i];
                } else {
                    wrong = wrong.or(Some(at));
                }
            });
            if let Some(at) = wrong {
                let (to, from) = (&f.axis(*to).name, &f.axis(*from).name);
                return Err(format!(
                    "the position {at} along `{from}` is outside the cache's capacity {capacity} along `{to}`"
                ));
            }
        }
        Op::Rope { axis, pairs } => {
            let (x, pos, freq) = (args[0], args[1], args[2]);
            let n = x.extent(*axis);
            let out_step = there(&[*axis])[0];
            let others: Vec<_> = x.ty.axes.iter().copied().filter(|a| a != axis).collect();
            let extents: Vec<_> = others.iter().map(|&a| x.extent(a)).collect();
            let step = x.stride(*axis);
            walk(&extents, [&x.along(&others), &pos.along(&others), &there(&others)], |[i, p, o]| {
                for r in 0..n {
                    let (pair, partner, second) = pairs.of(r, n);
                    let (sin, cos) = (pos.tensor.data[p] * freq.tensor.data[pair]).sin_cos();
                    let (this, that) = (x.tensor.data[i + r * step], x.tensor.data[i + partner * step]);
                    data[o + r * out_step] =
                        if second { this * cos + that * sin } else { this * cos - that * sin };
                }
            });
        }

        Op::Softmax { axis } => {
            let x = args[0];
            let n = x.extent(*axis);
            let out_step = there(&[*axis])[0];
            rows(x, *axis, &there(&x.ty.axes), |step, i, o| {
                let row = |p: usize| x.tensor.data[i + p * step];
                let largest = (0..n).map(row).fold(f64::NEG_INFINITY, f64::max);
                // A row of nothing but -inf, one that is masked as a whole, gives zeros.
                let largest = largest.max(f64::from(f32::MIN));
                let sum: f64 = (0..n).map(|p| (row(p) - largest).exp()).sum();
                let sum = if sum == 0.0 { 1.0 } else { sum };
                for p in 0..n {
                    data[o + p * out_step] = (row(p) - largest).exp() / sum;
                }
            });
        }
        Op::RmsNorm { axis, eps } => {
            let x = args[0];
            let n = x.extent(*axis);
            let out_step = there(&[*axis])[0];
            rows(x, *axis, &there(&x.ty.axes), |step, i, o| {
                let row = |p: usize| x.tensor.data[i + p * step];
                let mean = (0..n).map(|p| row(p) * row(p)).sum::<f64>() / n as f64;
                let scale = 1.0 / (mean + eps.0).sqrt();
                for p in 0..n {
                    data[o + p * out_step] = row(p) * scale;
                }
            });
        }

        Op::Call { callee, .. } => return Err(format!("@{callee} is called outside a function")),
    }
    Ok(data)
}

/// Visits the first element of every row of `x` along `axis`: the distance of neighbours in the row, the offset in
/// `x`, and the offset in the array of those strides.
fn rows(x: Arg<'_>, axis: AxisId, to: &[usize], mut visit: impl FnMut(usize, usize, usize)) {
    let step = x.stride(axis);
    let first =
        |n: usize| if x.ty.axes[n] == axis { usize::from(x.tensor.shape[n] > 0) } else { x.tensor.shape[n] };
    let shape: Vec<_> = (0..x.ty.axes.len()).map(first).collect();
    walk(&shape, [&x.along(&x.ty.axes), to], |[i, o]| visit(step, i, o));
}

fn extent(ty: &Type, shape: &[usize], axis: AxisId) -> usize {
    ty.position(axis).map_or(1, |n| shape[n])
}

/// The strides of the parts, slowest first, of an axis whose neighbours lie `stride` apart.
fn parts(stride: usize, parts: &[AxisId], extent: impl Fn(AxisId) -> usize) -> Vec<usize> {
    let after = |n: usize| parts[n + 1..].iter().map(|&a| extent(a)).product::<usize>();
    (0..parts.len()).map(|n| stride * after(n)).collect()
}

/// The larger first; NaN counts as less than every number.
fn descending(x: f64, y: f64) -> Ordering {
    y.partial_cmp(&x).unwrap_or_else(|| x.is_nan().cmp(&y.is_nan()))
}
