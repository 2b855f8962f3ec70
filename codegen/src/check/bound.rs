//! How far off a kernel may be: a bound on the rounding of f32 arithmetic, element by element.
//!
//! The body is evaluated in f64, and beside each value runs a bound on the error of a kernel that computes in f32 and rounds what
//! has a narrower dtype (a kernel may keep such a value in a register as it is; the bound holds for both). Errors
//! of operands go through an op by its derivative, and the op adds its own: half a unit in the last place of an exact operation,
//! a few of a function, one for each addition of a sum. A way of a kernel that rounds more than its body says, as products on tensor
//! cores do, is bounded by the body that it computes. Terms of second order are left out, so [`SLACK`] goes on top.
//!
//! Where a comparison may fall either way, what depends on it has the difference of the two ways as its error.

use std::collections::BTreeMap;

use latentc_ir::expand::expand_in;
use latentc_ir::interp::Caches;
use latentc_ir::{
    Binary, DType, Fields, Function, Inst, Interpreter, Module, Op, Precision, Reduce, Tensor, Type, Unary,
    ValueId,
};

use super::{given, interpreter, no_weights};
use crate::map::made;
use crate::program::{Kernel, KernelKind};
use crate::scatter::ScatterPlan;
use crate::stream::StreamPlan;

/// How many times the bound of first order is allowed.
const SLACK: f64 = 2.0;

/// What a kernel should give, and how far off each element may be.
#[derive(Clone, Debug)]
pub struct Expected {
    /// What the body means, in f64.
    pub value: Tensor,
    /// For each element, the largest difference that arithmetic explains. Infinite where a tie decides.
    pub tolerance: Vec<f64>,
    /// If the elements are words of several codes, how many there are: the tolerance is that of each code.
    pub fields: Option<Fields>,
}

impl Expected {
    /// For one argument per parameter, what the kernel appends to included.
    ///
    /// # Errors
    /// An index out of range, or an op that is no part of a kernel.
    pub fn of(kernel: &Kernel, args: &[Tensor], sizes: &[usize]) -> Result<Expected, String> {
        let mut kernel = kernel.clone();
        if matches!(kernel.kind, KernelKind::StreamMatrix { .. }) {
            kernel.body = rounded(&kernel.body)?;
        }
        // A softmax that is streamed errs no more than its definition does.
        kernel.body = expand_in(&kernel.body, |_| true);
        let (kernel, module) = (&kernel, kernel.module());
        let body = &kernel.body;
        let bound: BTreeMap<_, _> = kernel.size_symbols().into_iter().zip(sizes.iter().copied()).collect();
        let (given, mut caches) = given(kernel, args);
        let interpreter = interpreter(kernel, &module, sizes);
        let trace = interpreter.trace(&given, &mut no_weights, &mut caches).map_err(|e| e.to_string())?;
        let values: Vec<Tensor> = trace.into_iter().map(|(_, t)| t).collect();
        if values.len() != body.values.len() {
            return Err("the body has values that nothing defines".to_owned());
        }
        let mut errors: Vec<Vec<f64>> = values.iter().map(|v| vec![0.0; v.data.len()]).collect();
        let shortened = match kernel.kind {
            KernelKind::ScatterMatrix { .. } => split(body),
            KernelKind::Matrix { tf32: true, .. } => short(body),
            _ => BTreeMap::new(),
        };
        let shorten = |v: ValueId, value: &Tensor, errors: &mut [f64]| {
            let off = shortened.get(&v).copied().unwrap_or(0.0);
            errors.iter_mut().zip(&value.data).for_each(|(error, x)| *error += off * x.abs());
        };
        for &v in &body.params {
            shorten(v, &values[v.0 as usize], &mut errors[v.0 as usize]);
        }
        let mut run = Run { body, sizes: bound, values, errors };
        for inst in &body.body {
            let (v, mut error) = (inst.result(), run.error(inst)?);
            shorten(v, &run.values[v.0 as usize], &mut error);
            run.errors[v.0 as usize] = error;
        }
        let result = body.results[0].0 as usize;
        let fields = packed(body);
        // Codes are whole: what tips them over has its slack.
        let slack = if fields.is_some() { 1.0 } else { SLACK };
        let tolerance = run.errors[result].iter().map(|e| slack * e).collect();
        Ok(Expected { value: run.values.swap_remove(result), tolerance, fields })
    }

    /// How far an element is off.
    pub(super) fn apart(&self, got: f64, want: f64) -> f64 {
        let Some(fields) = self.fields else { return (got - want).abs() };
        let [got, want] = [got, want].map(|x| x as i64 as u32);
        // A code of several fields goes from the last number of one to the first, and to the next of another.
        let off = (0..fields.0).map(|n| {
            let [got, want] = [got, want].map(|x| x >> (n * fields.width()) & fields.mask());
            let off = got.wrapping_sub(want) & fields.mask();
            off.min(off.wrapping_neg() & fields.mask())
        });
        f64::from(off.max().unwrap_or(0))
    }
}

/// The codes in each element of what a body makes, if these are words.
fn packed(body: &Function) -> Option<Fields> {
    let made = made(body);
    let Op::Pack { axis } = body.body.iter().find(|inst| inst.result() == made)?.op else { return None };
    Some(Fields(body.axis(axis).size.fixed()? as u32))
}

/// What tensor cores make of a streamed softmax: they multiply numbers of one dtype, that of the values. Weights are rounded to it before
/// they weigh, and so are operands of scores that are wider. That the weights are not yet divided by their sum is no matter: an
/// error relative to a weight, or to the largest one, stays what it is when both are divided.
fn rounded(body: &Function) -> Result<Function, String> {
    let plan = StreamPlan::of(body)?;
    let Some(dtype) = plan.narrow(body) else { return Ok(body.clone()) };
    let mut out = body.clone();
    for mut inst in std::mem::take(&mut out.body) {
        if inst.op == Op::Contract {
            for arg in &mut inst.args {
                let ty = out.ty(*arg).clone();
                if unit(ty.dtype) < unit(dtype) {
                    let name = format!("{}.rounded", out.value(*arg).name);
                    *arg = out.push(Op::Cast, &[*arg], &[(&name, Type { dtype, ..ty })])[0];
                }
            }
        }
        out.body.push(inst);
    }
    Ok(out)
}

/// The factors of a sum of outer products that tensor cores multiply as two numbers each, and how far off that is, by element:
/// 2^-17. Of two such factors the second numbers, 2^-8 of each at most, are not multiplied with each other.
fn split(body: &Function) -> BTreeMap<ValueId, f64> {
    let Some(plan) = ScatterPlan::of(body) else { return BTreeMap::new() };
    let pieces = plan.narrow(body).1;
    let bits = if pieces.iter().all(|&n| n == 2) { 16 } else { 17 };
    let off = (-f64::from(bits)).exp2();
    plan.factors.iter().copied().zip(pieces).filter(|(_, n)| *n == 2).map(|(v, _)| (v, off)).collect()
}

/// The factors of products that tensor cores multiply as tf32: what is cut off is less than 2^-10 of each.
fn short(body: &Function) -> BTreeMap<ValueId, f64> {
    let products = body.body.iter().filter(|inst| inst.op == Op::Contract);
    products.flat_map(|inst| &inst.args).map(|&v| (v, (-10f64).exp2())).collect()
}

/// Half a unit in the last place of 1.
fn unit(dtype: DType) -> f64 {
    match dtype {
        DType::F64 | DType::F32 => F32,
        DType::Bf16 => 1.0 / 256.0,
        DType::F16 => 1.0 / 2048.0,
        DType::I32 | DType::Bool => 0.0,
    }
}

const F32: f64 = 1.0 / 16_777_216.0;

/// What becomes zero, or loses bits, because it is small.
fn tiny(dtype: DType) -> f64 {
    match dtype {
        DType::F64 | DType::F32 | DType::Bf16 => f64::from(f32::MIN_POSITIVE),
        DType::F16 => 1.0 / 33_554_432.0,
        DType::I32 | DType::Bool => 0.0,
    }
}

struct Run<'a> {
    body: &'a Function,
    sizes: BTreeMap<&'a str, usize>,
    values: Vec<Tensor>,
    errors: Vec<Vec<f64>>,
}

impl Run<'_> {
    /// The bound on the result of an instruction, whose operands have theirs.
    fn error(&self, inst: &Inst) -> Result<Vec<f64>, String> {
        let result = inst.result();
        let ty = self.body.ty(result);
        let y = &self.values[result.0 as usize].data;
        let args = &inst.args[..];
        let moved = |op: &Op| self.eval(op, &[self.error_of(args[0])], ty);
        let mut made = match &inst.op {
            Op::Const(_) | Op::Position { .. } => vec![0.0; y.len()],
            Op::Unary(op) => {
                let (x, e) = (self.spread(args[0], ty)?, self.spread_error(args[0], ty)?);
                each(y, |n| unary(*op, x[n], y[n], e[n]))
            }
            Op::Binary(op) => {
                let [a, b] = [self.spread(args[0], ty)?, self.spread(args[1], ty)?];
                let [ea, eb] = [self.spread_error(args[0], ty)?, self.spread_error(args[1], ty)?];
                each(y, |n| binary(*op, (a[n], ea[n]), (b[n], eb[n]), y[n], ty.dtype))
            }
            Op::Select => {
                let [c, a, b] =
                    [self.spread(args[0], ty)?, self.spread(args[1], ty)?, self.spread(args[2], ty)?];
                let [ec, ea, eb] = [0, 1, 2].map(|n| self.spread_error(args[n], ty));
                let (ec, ea, eb) = (ec?, ea?, eb?);
                each(y, |n| match (ec[n] > 0.0, c[n] != 0.0) {
                    (false, true) => ea[n],
                    (false, false) => eb[n],
                    (true, _) => (a[n] - b[n]).abs() + ea[n].max(eb[n]),
                })
            }
            Op::Cast => {
                let (x, e) = (self.spread(args[0], ty)?, self.spread_error(args[0], ty)?);
                // Of what is truncated, an error may tip it over.
                let tipped = |n: usize| {
                    let at = |off: f64| (ty.dtype.round(x[n] + off) - y[n]).abs();
                    at(SLACK * e[n]).max(at(-SLACK * e[n]))
                };
                let whole = matches!(ty.dtype, DType::I32 | DType::Bool);
                each(y, |n| if whole && e[n] > 0.0 { tipped(n) } else { e[n] })
            }
            Op::Contract => self.contract(inst, ty)?,
            Op::Reduce { by: Reduce::Max, .. } => {
                self.eval(&inst.op, &[self.error_of(args[0])], ty)?.into_iter().map(|e| e.max(0.0)).collect()
            }
            Op::Reduce { by: Reduce::Sum, axis } => {
                let terms = self.extent(*axis) as f64;
                let size = self.eval(&inst.op, &[self.magnitude(args[0])], ty)?;
                let sum = moved(&inst.op)?;
                each(y, |n| sum[n] + terms * F32 * size[n])
            }
            Op::Rename { .. }
            | Op::Broadcast { .. }
            | Op::Split { .. }
            | Op::Merge { .. }
            | Op::Slice { .. } => moved(&inst.op)?,
            // The error of a word is that of its fields.
            Op::Pack { axis } => {
                let fold = Op::Reduce { by: Reduce::Max, axis: *axis };
                self.eval(&fold, &[self.error_of(args[0])], ty)?
            }
            Op::Unpack { .. } => {
                let e = self.spread_error(args[0], ty)?;
                each(y, |n| if e[n] > 0.0 { f64::INFINITY } else { 0.0 })
            }
            Op::Concat { .. } => {
                let errors: Vec<_> = args.iter().map(|&a| self.error_of(a)).collect();
                self.eval(&inst.op, &errors, ty)?
            }
            Op::Gather { .. } => {
                let index = (self.body.ty(args[1]).clone(), self.values[args[1].0 as usize].clone());
                let wrong = self.spread_error(args[1], ty)?;
                let e = self.eval(&inst.op, &[self.error_of(args[0]), index], ty)?;
                each(y, |n| if wrong[n] > 0.0 { f64::INFINITY } else { e[n] })
            }
            Op::TopK { axis, k } => {
                let row = self.body.ty(args[0]).axes.iter().copied().filter(|a| a != axis).collect();
                let tied = self.tied(args[0], *axis, *k as usize..*k as usize + 1, row)?;
                self.eval(&Op::Cast, &[tied], ty)?
            }
            Op::TopIndices { axis, into } => {
                let row = ty.axes.iter().copied().filter(|a| a != into).collect();
                let tied = self.tied(args[0], *axis, 1..self.extent(*into) + 1, row)?;
                self.eval(&Op::Cast, &[tied], ty)?
            }
            Op::ScatterAdd { .. } => {
                let index = (self.body.ty(args[1]).clone(), self.values[args[1].0 as usize].clone());
                // As many rows as may meet.
                let rows = index.0.axes.iter().filter(|a| !ty.has(**a));
                let terms: f64 = rows.map(|&a| self.extent(a) as f64).product();
                let size = self.eval(&inst.op, &[self.magnitude(args[0]), index.clone()], ty)?;
                let sum = self.eval(&inst.op, &[self.error_of(args[0]), index], ty)?;
                each(y, |n| sum[n] + terms * F32 * size[n])
            }
            Op::Append { .. } => {
                let pos = (self.body.ty(args[2]).clone(), self.values[args[2].0 as usize].clone());
                self.eval(&inst.op, &[self.error_of(args[0]), self.error_of(args[1]), pos], ty)?
            }
            Op::Rope { axis, pairs } => {
                let mut order = ty.clone();
                order.axes.retain(|a| a != axis);
                order.axes.push(*axis);
                order.dtype = DType::F64;
                let n = self.extent(*axis);
                let [x, pos] = [self.spread(args[0], &order)?, self.spread(args[1], &order)?];
                let e = self.spread_error(args[0], &order)?;
                let (freq, ef) = (&self.values[args[2].0 as usize].data, &self.errors[args[2].0 as usize]);
                let made = (0..x.len()).map(|at| {
                    let (pair, partner, _) = pairs.of(at % n, n);
                    let other = at - at % n + partner;
                    let angle = (pos[at] * freq[pair]).abs();
                    let turned = 4.0 * F32 * (1.0 + angle) + ef[pair] * pos[at].abs();
                    e[at] + e[other] + (turned + 3.0 * F32) * (x[at].abs() + x[other].abs())
                });
                let shape = self.shape(&order);
                let made = Tensor { dtype: DType::F64, shape, data: made.collect() };
                self.eval(&Op::Cast, &[(order, made)], ty)?
            }
            Op::Past { .. } | Op::Softmax { .. } | Op::RmsNorm { .. } | Op::Call { .. } => {
                return Err(format!("`{}` is no part of a kernel", inst.op.mnemonic()));
            }
        };
        let rounds = self.rounds(inst, ty.dtype);
        for (e, &y) in made.iter_mut().zip(y) {
            let exact = !rounds || (matches!(inst.op, Op::Const(_)) && ty.dtype.round(y) == y);
            // What is infinite, or no number, is so exactly.
            *e += if y.is_finite() && !exact { unit(ty.dtype) * y.abs() + tiny(ty.dtype) } else { 0.0 };
            if e.is_nan() {
                *e = 0.0;
            }
        }
        Ok(made)
    }

    /// Whether the result may be rounded: what only moves or chooses operands is not, unless its dtype is narrower.
    fn rounds(&self, inst: &Inst, dtype: DType) -> bool {
        match &inst.op {
            Op::Const(_)
            | Op::Unary(_)
            | Op::Binary(_)
            | Op::Cast
            | Op::Contract
            | Op::Reduce { by: Reduce::Sum, .. }
            | Op::ScatterAdd { .. }
            | Op::Rope { .. }
            | Op::Softmax { .. }
            | Op::RmsNorm { .. }
            | Op::Call { .. } => true,
            Op::Position { .. }
            | Op::Select
            | Op::Reduce { by: Reduce::Max, .. }
            | Op::Rename { .. }
            | Op::Broadcast { .. }
            | Op::Split { .. }
            | Op::Merge { .. }
            | Op::Slice { .. }
            | Op::Concat { .. }
            | Op::Pack { .. }
            | Op::Unpack { .. }
            | Op::Gather { .. }
            | Op::TopK { .. }
            | Op::TopIndices { .. }
            | Op::Past { .. }
            | Op::Append { .. } => inst
                .args
                .iter()
                .any(|&a| unit(self.body.ty(a).dtype) < unit(dtype) && self.body.ty(a).dtype.is_float()),
        }
    }

    /// Each operand's error times the size of the others, and one rounding for each term. What is subnormal may be zero to a product, and so may
    /// each of its sums.
    fn contract(&self, inst: &Inst, ty: &Type) -> Result<Vec<f64>, String> {
        let sizes: Vec<_> = inst.args.iter().map(|&a| self.magnitude(a)).collect();
        let summed = self.body.summed(&inst.args, ty);
        let terms: f64 = summed.iter().map(|&a| self.extent(a) as f64).product();
        let mut total = self.eval(&Op::Contract, &sizes, ty)?;
        total
            .iter_mut()
            .for_each(|s| *s = *s * (terms + inst.args.len() as f64) * F32 + terms * tiny(DType::F32));
        for (n, &arg) in inst.args.iter().enumerate() {
            let mut error = self.error_of(arg);
            let subnormal = sizes[n].1.data.iter().map(|&x| if x < tiny(DType::F32) { x } else { 0.0 });
            error.1.data.iter_mut().zip(subnormal).for_each(|(e, x)| *e = e.max(x));
            if error.1.data.iter().all(|&e| e == 0.0) {
                continue;
            }
            let mut operands = sizes.clone();
            operands[n] = error;
            let part = self.eval(&Op::Contract, &operands, ty)?;
            // Where an operand is zero and the other may be anything, there is no bound.
            total.iter_mut().zip(part).for_each(|(t, p)| *t += if p.is_nan() { f64::INFINITY } else { p });
        }
        Ok(total)
    }

    /// For each row along `axis`, infinity if the order of two neighbours in size, the second of which is in `ranks`, hangs on an error.
    fn tied(
        &self,
        x: ValueId,
        axis: latentc_ir::AxisId,
        ranks: std::ops::Range<usize>,
        row: Vec<latentc_ir::AxisId>,
    ) -> Result<(Type, Tensor), String> {
        let rows = Type::new(DType::F64, row);
        let mut order = rows.clone();
        order.axes.push(axis);
        let (x, e) = (self.spread(x, &order)?, self.spread_error(x, &order)?);
        let n = self.extent(axis).max(1);
        let data = x.chunks(n).zip(e.chunks(n)).map(|(x, e)| {
            let mut by_size: Vec<usize> = (0..x.len()).collect();
            by_size.sort_by(|&p, &q| x[q].total_cmp(&x[p]));
            let close = |&rank: &usize| {
                let (Some(&q), Some(&p)) = (by_size.get(rank), by_size.get(rank.wrapping_sub(1))) else {
                    return false;
                };
                let apart = e[p] + e[q];
                apart > 0.0 && x[p] - x[q] <= apart
            };
            if ranks.clone().any(|rank| close(&rank)) { f64::INFINITY } else { 0.0 }
        });
        let tensor = Tensor { dtype: DType::F64, shape: self.shape(&rows), data: data.collect() };
        Ok((rows, tensor))
    }

    fn extent(&self, axis: latentc_ir::AxisId) -> usize {
        self.shape(&Type::new(DType::F64, [axis]))[0]
    }

    fn shape(&self, ty: &Type) -> Vec<usize> {
        let extent = |a: &latentc_ir::AxisId| match &self.body.axis(*a).size {
            latentc_ir::Size::Fixed(n) => *n as usize,
            latentc_ir::Size::Sym(s) => self.sizes.get(s.as_str()).copied().unwrap_or(0),
        };
        ty.axes.iter().map(extent).collect()
    }

    fn typed(&self, value: ValueId, data: Vec<f64>) -> (Type, Tensor) {
        let axes = self.body.ty(value).axes.clone();
        let shape = self.values[value.0 as usize].shape.clone();
        (Type { dtype: DType::F64, axes }, Tensor { dtype: DType::F64, shape, data })
    }

    fn error_of(&self, value: ValueId) -> (Type, Tensor) {
        self.typed(value, self.errors[value.0 as usize].clone())
    }

    fn magnitude(&self, value: ValueId) -> (Type, Tensor) {
        self.typed(value, self.values[value.0 as usize].data.iter().map(|x| x.abs()).collect())
    }

    /// A value's elements for each index of a type, in its order.
    fn spread(&self, value: ValueId, ty: &Type) -> Result<Vec<f64>, String> {
        let value = self.typed(value, self.values[value.0 as usize].data.clone());
        self.eval(&Op::Cast, &[value], ty)
    }

    fn spread_error(&self, value: ValueId, ty: &Type) -> Result<Vec<f64>, String> {
        self.eval(&Op::Cast, &[self.error_of(value)], ty)
    }

    /// An op of numbers that are not those of the body.
    fn eval(&self, op: &Op, args: &[(Type, Tensor)], ty: &Type) -> Result<Vec<f64>, String> {
        let mut f = Function::new("one");
        f.axes.clone_from(&self.body.axes);
        let params: Vec<_> =
            args.iter().enumerate().map(|(n, (ty, _))| f.add_param(&format!("p{n}"), ty.clone())).collect();
        let out = Type { dtype: DType::F64, axes: ty.axes.clone() };
        f.results = f.push(op.clone(), &params, &[("y", out)]);
        let module = Module { name: "one".to_owned(), entry: "one".to_owned(), functions: vec![f] };
        let mut interpreter = Interpreter::new(&module, Precision::Exact);
        for (symbol, size) in &self.sizes {
            interpreter = interpreter.with_size(symbol, *size);
        }
        let args: Vec<_> = args.iter().map(|(_, t)| t.clone()).collect();
        let run = interpreter.run(&args, &mut no_weights, &mut Caches::new());
        Ok(run.map_err(|e| e.to_string())?.remove(0).data)
    }
}

fn each(y: &[f64], error: impl Fn(usize) -> f64) -> Vec<f64> {
    (0..y.len()).map(error).collect()
}

/// The error of `y = op(x)` when `x` is off by `e`. Functions are allowed a few units in the last place, as WGSL and CUDA are.
fn unary(op: Unary, x: f64, y: f64, e: f64) -> f64 {
    match op {
        Unary::Neg | Unary::Abs => e,
        Unary::Exp => y * e + (4.0 + 2.0 * x.abs()) * F32 * y,
        Unary::Log => e / x.abs() + 4.0 * F32 * (y.abs() + 1.0),
        Unary::Sqrt => (e / (2.0 * y)).min(e.sqrt()) + 2.0 * F32 * y,
        Unary::Rsqrt => e * y.powi(3) / 2.0 + 4.0 * F32 * y,
        Unary::Sigmoid => e * y * (1.0 - y) + (8.0 + 2.0 * x.abs()) * F32 * y,
        Unary::Silu => 1.1 * e + (8.0 + 2.0 * x.abs()) * F32 * y.abs(),
        Unary::Tanh => e * (1.0 - y * y) + 8.0 * F32 * (1.0 + y.abs()),
        Unary::Sin | Unary::Cos => e + 8.0 * F32 * (1.0 + x.abs()),
        Unary::Not => e,
    }
}

/// The error of `y = op(a, b)` when both are off.
fn binary(op: Binary, (a, ea): (f64, f64), (b, eb): (f64, f64), y: f64, dtype: DType) -> f64 {
    let falls_either_way = if ea + eb > 0.0 && (a - b).abs() <= ea + eb { 1.0 } else { 0.0 };
    match op {
        Binary::Add | Binary::Sub => ea + eb,
        // Nothing times an error that has no bound is nothing.
        Binary::Mul => {
            let times = |x: f64, y: f64| if x == 0.0 || y == 0.0 { 0.0 } else { x * y };
            times(a.abs(), eb) + times(b.abs(), ea) + times(ea, eb)
        }
        Binary::Div if dtype.is_float() => {
            let rest = b.abs() - eb;
            if rest > 0.0 { (ea + y.abs() * eb) / rest + 3.0 * F32 * y.abs() } else { f64::INFINITY }
        }
        // Of what is truncated, an error may tip it over.
        Binary::Div if eb == 0.0 => {
            let at = |off: f64| (((a + off) / b).trunc() - y).abs();
            at(ea).max(at(-ea))
        }
        Binary::Div => ea + eb,
        Binary::Max | Binary::Min => ea.max(eb),
        Binary::Lt | Binary::Le | Binary::Eq => falls_either_way,
        Binary::And | Binary::Or => ea.max(eb),
    }
}
