//! The instructions of the vector machine: each makes a row from rows.

use half::{bf16, f16};
use latentc_ir::{Binary, Fields, Pairs, Reduce, Unary};

use super::simd::{exp, on_best_unit};
use super::spare::Room;
use super::walk::Nest;
use super::{View, ViewMut};

/// What an instruction does. A nest's first tensor is the result, the others are the operands in order.
pub(super) enum What {
    /// One number everywhere.
    Fill(f64),
    /// The index along an outer axis.
    OuterIndex(usize),
    /// 0, 1, 2, … along a row axis, from some number on; the second tensor is the index itself.
    Iota(Nest<2>, usize),
    Unary(Unary, Nest<2>),
    Binary(Binary, Nest<3>),
    Select(Nest<4>),
    /// Whether an element is anything but 0.
    Truth(Nest<2>),
    /// Elements move between strided places, from one offset to another, and may change their kind.
    Copy {
        nest: Nest<2>,
        into: usize,
        from: usize,
    },
    /// The loops are the operand's; the result stands still along the axis that is folded.
    Reduce(Reduce, Nest<2>),
    /// The loops are the operand's; the third tensor is the number of the field, and the result its word.
    Pack(Fields, Nest<3>),
    /// The loops are the result's; the third tensor is the number of the field, and the operand its word.
    Unpack(Fields, Nest<3>),
    /// For each index (result, index, data), all that is read there (result, data).
    Gather {
        indices: Nest<3>,
        rest: Nest<2>,
        step: usize,
        size: usize,
    },
    /// For each row, along an axis of `n`: which of its elements are among the `k` largest.
    TopK {
        rows: Nest<2>,
        n: usize,
        steps: [usize; 2],
        k: usize,
    },
    /// For each row, along an axis of `n`: where its `k` largest elements are, the largest first.
    TopIndices {
        rows: Nest<2>,
        n: usize,
        steps: [usize; 2],
        k: usize,
    },
    /// For each row (result, operand, position), along an axis of `n`.
    Rope {
        rows: Nest<3>,
        n: usize,
        steps: [usize; 2],
        pairs: Pairs,
    },
}

/// Why a row could not be made.
pub(super) enum Fault {
    /// An index outside of its axis, and the axis's size.
    Index(i64, usize),
    /// An operand is no float where one is needed, or the other way round.
    Kind,
}

impl What {
    /// Elements of the rows that it looks at as a whole.
    pub(super) fn row(&self) -> usize {
        match self {
            What::TopK { n, .. } | What::TopIndices { n, .. } | What::Rope { n, .. } => *n,
            What::Fill(_)
            | What::OuterIndex(_)
            | What::Iota(..)
            | What::Unary(..)
            | What::Binary(..)
            | What::Select(_)
            | What::Truth(_)
            | What::Copy { .. }
            | What::Reduce(..)
            | What::Pack(..)
            | What::Unpack(..)
            | What::Gather { .. } => 0,
        }
    }

    /// Makes the row. `outer` gives the index along an outer axis.
    pub(super) fn run<'a>(
        &self,
        arg: &impl Fn(usize) -> View<'a>,
        result: ViewMut<'_>,
        outer: &impl Fn(usize) -> usize,
        room: &mut Room,
    ) -> Result<(), Fault> {
        match self {
            What::Fill(x) => match result {
                ViewMut::F(y) => y.fill(*x as f32),
                ViewMut::I(y) => y.fill(*x as i32),
                ViewMut::Bf16(_) | ViewMut::F16(_) => return Err(Fault::Kind),
            },
            What::OuterIndex(axis) => match result {
                ViewMut::I(y) => y.fill(outer(*axis) as i32),
                ViewMut::F(_) | ViewMut::Bf16(_) | ViewMut::F16(_) => return Err(Fault::Kind),
            },
            What::Iota(nest, start) => {
                let ViewMut::I(y) = result else { return Err(Fault::Kind) };
                nest.each(|[to, from], n, s| {
                    for i in 0..n {
                        y[to + i * s[0]] = (start + from + i * s[1]) as i32;
                    }
                });
            }
            What::Unary(u, nest) => match (result, arg(0)) {
                (ViewMut::F(y), View::F(x)) => unary(*u, nest, y, x),
                (ViewMut::I(y), View::I(x)) => {
                    let f: fn(i32) -> i32 = match u {
                        Unary::Neg => i32::wrapping_neg,
                        Unary::Abs => i32::wrapping_abs,
                        Unary::Not => |x| i32::from(x == 0),
                        Unary::Exp
                        | Unary::Log
                        | Unary::Sqrt
                        | Unary::Rsqrt
                        | Unary::Sigmoid
                        | Unary::Silu
                        | Unary::Tanh
                        | Unary::Sin
                        | Unary::Cos => return Err(Fault::Kind),
                    };
                    map1(nest, y, x, f);
                }
                _ => return Err(Fault::Kind),
            },
            What::Binary(b, nest) => match (result, arg(0), arg(1)) {
                (ViewMut::F(y), View::F(a), View::F(c)) => {
                    let done = arithmetic(*b, nest, y, a, c);
                    return if done { Ok(()) } else { Err(Fault::Kind) };
                }
                (ViewMut::I(y), View::F(a), View::F(c)) => match b {
                    Binary::Lt => map2(nest, y, a, c, |x, z| i32::from(x < z)),
                    Binary::Le => map2(nest, y, a, c, |x, z| i32::from(x <= z)),
                    Binary::Eq => map2(nest, y, a, c, |x, z| i32::from(x == z)),
                    Binary::Add
                    | Binary::Sub
                    | Binary::Mul
                    | Binary::Div
                    | Binary::Max
                    | Binary::Min
                    | Binary::And
                    | Binary::Or => return Err(Fault::Kind),
                },
                (ViewMut::I(y), View::I(a), View::I(c)) => integers(*b, nest, y, a, c),
                _ => return Err(Fault::Kind),
            },
            What::Select(nest) => match (result, arg(0), arg(1), arg(2)) {
                (ViewMut::F(y), View::I(c), View::F(a), View::F(b)) => select(nest, y, c, a, b),
                (ViewMut::I(y), View::I(c), View::I(a), View::I(b)) => pick(nest, y, c, a, b),
                _ => return Err(Fault::Kind),
            },
            What::Truth(nest) => match (result, arg(0)) {
                (ViewMut::I(y), View::F(x)) => map1(nest, y, x, |x| i32::from(x != 0.0)),
                (ViewMut::I(y), View::I(x)) => map1(nest, y, x, |x| i32::from(x != 0)),
                (ViewMut::F(_) | ViewMut::Bf16(_) | ViewMut::F16(_), _)
                | (ViewMut::I(_), View::Bf16(_) | View::F16(_) | View::Stack(_)) => return Err(Fault::Kind),
            },
            What::Copy { nest, into, from } => match (result, arg(0)) {
                (ViewMut::F(y), View::F(x)) => map1(nest, &mut y[*into..], &x[*from..], |x| x),
                (ViewMut::I(y), View::I(x)) => map1(nest, &mut y[*into..], &x[*from..], |x| x),
                (ViewMut::F(y), View::I(x)) => map1(nest, &mut y[*into..], &x[*from..], |x| x as f32),
                (ViewMut::I(y), View::F(x)) => map1(nest, &mut y[*into..], &x[*from..], |x| x as i32),
                (ViewMut::Bf16(_) | ViewMut::F16(_), _)
                | (ViewMut::F(_) | ViewMut::I(_), View::Bf16(_) | View::F16(_) | View::Stack(_)) => {
                    return Err(Fault::Kind);
                }
            },
            What::Reduce(by, nest) => {
                let (ViewMut::F(y), View::F(x)) = (result, arg(0)) else { return Err(Fault::Kind) };
                reduce(*by, nest, y, x);
            }
            What::Pack(fields, nest) => {
                let (ViewMut::I(y), View::I(x)) = (result, arg(0)) else { return Err(Fault::Kind) };
                y.fill(0);
                nest.each(|[to, from, p], n, s| {
                    for i in 0..n {
                        y[to + i * s[0]] |= fields.pack((p + i * s[2]) as u32, x[from + i * s[1]]);
                    }
                });
            }
            What::Unpack(fields, nest) => {
                let (ViewMut::I(y), View::I(x)) = (result, arg(0)) else { return Err(Fault::Kind) };
                nest.each(|[to, from, p], n, s| {
                    for i in 0..n {
                        y[to + i * s[0]] = fields.unpack((p + i * s[2]) as u32, x[from + i * s[1]]);
                    }
                });
            }
            What::Gather { indices, rest, step, size } => {
                let View::I(index) = arg(1) else { return Err(Fault::Kind) };
                return match (result, arg(0)) {
                    (ViewMut::F(y), View::F(x)) => gather(indices, rest, (*step, *size), y, index, x, |x| x),
                    (ViewMut::F(y), View::Bf16(x)) => {
                        gather(indices, rest, (*step, *size), y, index, x, bf16::to_f32)
                    }
                    (ViewMut::F(y), View::F16(x)) => {
                        gather(indices, rest, (*step, *size), y, index, x, f16::to_f32)
                    }
                    (ViewMut::I(y), View::I(x)) => gather(indices, rest, (*step, *size), y, index, x, |x| x),
                    _ => Err(Fault::Kind),
                };
            }
            What::TopK { rows, n, steps, k } => {
                let (ViewMut::I(y), View::F(x)) = (result, arg(0)) else { return Err(Fault::Kind) };
                rank(rows, *n, steps[1], x, &mut room.order, |to, rank, e| {
                    y[to + e * steps[0]] = i32::from(rank < *k)
                });
            }
            What::TopIndices { rows, n, steps, k } => {
                let (ViewMut::I(y), View::F(x)) = (result, arg(0)) else { return Err(Fault::Kind) };
                rank(rows, *n, steps[1], x, &mut room.order, |to, rank, e| {
                    if rank < *k {
                        y[to + rank * steps[0]] = e as i32;
                    }
                });
            }
            What::Rope { rows, n, steps, pairs } => {
                let (ViewMut::F(y), View::F(x), View::I(pos), View::F(freq)) =
                    (result, arg(0), arg(1), arg(2))
                else {
                    return Err(Fault::Kind);
                };
                rope(rows, *n, *steps, *pairs, y, x, (pos, freq), &mut room.angles);
            }
        }
        Ok(())
    }
}

#[inline(always)]
fn map1<A: Copy, Y>(nest: &Nest<2>, y: &mut [Y], x: &[A], f: impl Fn(A) -> Y) {
    let (n, steps) = nest.last();
    for [to, from] in nest.starts() {
        match steps {
            [1, 1] => {
                for (y, x) in y[to..to + n].iter_mut().zip(&x[from..from + n]) {
                    *y = f(*x);
                }
            }
            [s, t] => {
                for i in 0..n {
                    y[to + i * s] = f(x[from + i * t]);
                }
            }
        }
    }
}

#[inline(always)]
fn map2<A: Copy, Y>(nest: &Nest<3>, y: &mut [Y], a: &[A], b: &[A], f: impl Fn(A, A) -> Y) {
    let (n, steps) = nest.last();
    for [to, p, q] in nest.starts() {
        match steps {
            [1, 1, 1] => {
                for ((y, a), b) in y[to..to + n].iter_mut().zip(&a[p..p + n]).zip(&b[q..q + n]) {
                    *y = f(*a, *b);
                }
            }
            [1, 1, 0] => {
                let b = b[q];
                for (y, a) in y[to..to + n].iter_mut().zip(&a[p..p + n]) {
                    *y = f(*a, b);
                }
            }
            [1, 0, 1] => {
                let a = a[p];
                for (y, b) in y[to..to + n].iter_mut().zip(&b[q..q + n]) {
                    *y = f(a, *b);
                }
            }
            [s, t, u] => {
                for i in 0..n {
                    y[to + i * s] = f(a[p + i * t], b[q + i * u]);
                }
            }
        }
    }
}

#[inline(always)]
fn pick<T: Copy>(nest: &Nest<4>, y: &mut [T], c: &[i32], a: &[T], b: &[T]) {
    let pick = |c: i32, a: T, b: T| if c != 0 { a } else { b };
    let (n, s) = nest.last();
    for [to, p, q, r] in nest.starts() {
        match s {
            [1, 1, 1, 0] => {
                let b = b[r];
                for ((y, c), a) in y[to..to + n].iter_mut().zip(&c[p..p + n]).zip(&a[q..q + n]) {
                    *y = pick(*c, *a, b);
                }
            }
            _ => {
                for i in 0..n {
                    y[to + i * s[0]] = pick(c[p + i * s[1]], a[q + i * s[2]], b[r + i * s[3]]);
                }
            }
        }
    }
}

on_best_unit! {
    fn select(nest: &Nest<4>, y: &mut [f32], c: &[i32], a: &[f32], b: &[f32]) {
        pick(nest, y, c, a, b);
    }
}

on_best_unit! {
    fn unary(u: Unary, nest: &Nest<2>, y: &mut [f32], x: &[f32]) {
        match u {
            Unary::Neg => map1(nest, y, x, |x| -x),
            Unary::Abs => map1(nest, y, x, f32::abs),
            Unary::Exp => map1(nest, y, x, exp),
            Unary::Log => map1(nest, y, x, f32::ln),
            Unary::Sqrt => map1(nest, y, x, f32::sqrt),
            Unary::Rsqrt => map1(nest, y, x, |x| 1.0 / x.sqrt()),
            Unary::Sigmoid => map1(nest, y, x, |x| 1.0 / (1.0 + exp(-x))),
            Unary::Silu => map1(nest, y, x, |x| x / (1.0 + exp(-x))),
            Unary::Tanh => map1(nest, y, x, f32::tanh),
            Unary::Sin => map1(nest, y, x, f32::sin),
            Unary::Cos => map1(nest, y, x, f32::cos),
            Unary::Not => map1(nest, y, x, |x| f32::from(u8::from(x == 0.0))),
        }
    }
}

on_best_unit! {
    /// Whether the function makes a float of floats; if so, it is applied.
    fn arithmetic(b: Binary, nest: &Nest<3>, y: &mut [f32], p: &[f32], q: &[f32]) -> bool {
        match b {
            Binary::Add => map2(nest, y, p, q, |a, b| a + b),
            Binary::Sub => map2(nest, y, p, q, |a, b| a - b),
            Binary::Mul => map2(nest, y, p, q, |a, b| a * b),
            Binary::Div => map2(nest, y, p, q, |a, b| a / b),
            Binary::Max => map2(nest, y, p, q, f32::max),
            Binary::Min => map2(nest, y, p, q, f32::min),
            Binary::Lt | Binary::Le | Binary::Eq | Binary::And | Binary::Or => return false,
        }
        true
    }
}

fn integers(b: Binary, nest: &Nest<3>, y: &mut [i32], p: &[i32], q: &[i32]) {
    match b {
        Binary::Add => map2(nest, y, p, q, i32::wrapping_add),
        Binary::Sub => map2(nest, y, p, q, i32::wrapping_sub),
        Binary::Mul => map2(nest, y, p, q, i32::wrapping_mul),
        // As the oracle does: a quotient of infinite size saturates, 0/0 is 0.
        Binary::Div => map2(nest, y, p, q, |a, b| (f64::from(a) / f64::from(b)) as i32),
        Binary::Max => map2(nest, y, p, q, Ord::max),
        Binary::Min => map2(nest, y, p, q, Ord::min),
        Binary::Lt => map2(nest, y, p, q, |a, b| i32::from(a < b)),
        Binary::Le => map2(nest, y, p, q, |a, b| i32::from(a <= b)),
        Binary::Eq => map2(nest, y, p, q, |a, b| i32::from(a == b)),
        Binary::And => map2(nest, y, p, q, |a, b| i32::from(a != 0 && b != 0)),
        Binary::Or => map2(nest, y, p, q, |a, b| i32::from(a != 0 || b != 0)),
    }
}

/// Accumulators side by side, so that the sum is a vector loop; they also bound the rounding error.
#[inline(always)]
fn fold(by: Reduce, x: &[f32]) -> f32 {
    const SIDE: usize = 32;
    let mut lanes = [by.identity() as f32; SIDE];
    let (chunks, rest) = x.as_chunks::<SIDE>();
    match by {
        Reduce::Sum => {
            for chunk in chunks {
                for (l, x) in lanes.iter_mut().zip(chunk) {
                    *l += x;
                }
            }
            let mut half = SIDE / 2;
            while half > 0 {
                (0..half).for_each(|i| lanes[i] += lanes[i + half]);
                half /= 2;
            }
            lanes[0] + rest.iter().sum::<f32>()
        }
        Reduce::Max => {
            for chunk in chunks {
                for (l, x) in lanes.iter_mut().zip(chunk) {
                    *l = l.max(*x);
                }
            }
            lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
        }
    }
}

on_best_unit! {
    fn reduce(by: Reduce, nest: &Nest<2>, y: &mut [f32], x: &[f32]) {
        y.fill(by.identity() as f32);
        let combine = |a: f32, b: f32| match by {
            Reduce::Sum => a + b,
            Reduce::Max => a.max(b),
        };
        let (n, steps) = nest.last();
        for [to, from] in nest.starts() {
            match steps {
                [0, 1] => y[to] = combine(y[to], fold(by, &x[from..from + n])),
                [1, 1] => {
                    for (y, x) in y[to..to + n].iter_mut().zip(&x[from..from + n]) {
                        *y = combine(*y, *x);
                    }
                }
                [s, t] => {
                    for i in 0..n {
                        y[to + i * s] = combine(y[to + i * s], x[from + i * t]);
                    }
                }
            }
        }
    }
}

on_best_unit! {
    /// The sum or the largest of some numbers.
    pub(super) fn folded(by: Reduce, x: &[f32]) -> f32 {
        fold(by, x)
    }
}

on_best_unit! {
    /// Makes of scores their exponentials, less the largest of them and of earlier ones; gives that and their sum.
    pub(super) fn exponentials(scores: &mut [f32], earlier: f32) -> (f32, f32) {
        let max = earlier.max(fold(Reduce::Max, scores));
        scores.iter_mut().for_each(|x| *x = exp(*x - max));
        (max, fold(Reduce::Sum, scores))
    }
}

fn gather<A: Copy, Y>(
    indices: &Nest<3>,
    rest: &Nest<2>,
    (step, size): (usize, usize),
    y: &mut [Y],
    index: &[i32],
    x: &[A],
    wide: impl Fn(A) -> Y + Copy,
) -> Result<(), Fault> {
    let (mut fault, end) = (None, y.len());
    indices.each(|[to, at, from], n, s| {
        for i in 0..n {
            let j = index[at + i * s[1]];
            if j < 0 || j as usize >= size {
                fault = Some(i64::from(j));
                continue;
            }
            let (to, from) = (to + i * s[0], from + i * s[2] + j as usize * step);
            // Where the rest is empty, so are the rows.
            map1(rest, &mut y[to.min(end)..], &x[from.min(x.len())..], wide);
        }
    });
    fault.map_or(Ok(()), |j| Err(Fault::Index(j, size)))
}

/// Tells for each row, by its place in the result, the rank of each of its elements.
fn rank(
    rows: &Nest<2>,
    n: usize,
    step: usize,
    x: &[f32],
    order: &mut Vec<usize>,
    mut tell: impl FnMut(usize, usize, usize),
) {
    rows.each(|[to, from], count, s| {
        for r in 0..count {
            let (to, from) = (to + r * s[0], from + r * s[1]);
            order.clear();
            order.extend(0..n);
            // Larger first, of equals the first, NaN last. Adding 0 makes -0 and 0 equal.
            let value = |e: usize| x[from + e * step] + 0.0;
            order.sort_unstable_by(|&a, &b| {
                let (x, y) = (value(a), value(b));
                x.is_nan().cmp(&y.is_nan()).then(y.total_cmp(&x)).then(a.cmp(&b))
            });
            order.iter().enumerate().for_each(|(rank, &e)| tell(to, rank, e));
        }
    });
}

#[expect(clippy::too_many_arguments, reason = "loops, axis, the four tensors of the op, and room")]
fn rope(
    rows: &Nest<3>,
    n: usize,
    steps: [usize; 2],
    pairs: Pairs,
    y: &mut [f32],
    x: &[f32],
    (pos, freq): (&[i32], &[f32]),
    angles: &mut Vec<(f32, f32)>,
) {
    // Heads of one token share their angles. These are computed in f64: at position 100,000 an f32 angle is off by 0.004.
    let mut of = None;
    rows.each(|[to, from, p], count, s| {
        for r in 0..count {
            let (to, from, pos) = (to + r * s[0], from + r * s[1], pos[p + r * s[2]]);
            if of != Some(pos) {
                of = Some(pos);
                angles.clear();
                angles.extend(freq[..n / 2].iter().map(|&f| {
                    let (sin, cos) = (f64::from(pos) * f64::from(f)).sin_cos();
                    (sin as f32, cos as f32)
                }));
            }
            for i in 0..n {
                let (j, partner, second) = pairs.of(i, n);
                let (sin, cos) = angles[j];
                let (own, other) = (x[from + i * steps[1]], x[from + partner * steps[1]]);
                y[to + i * steps[0]] = if second { own * cos + other * sin } else { own * cos - other * sin };
            }
        }
    });
}
