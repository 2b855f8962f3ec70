//! Random modules that verify, for property tests here and in the crates above.
//!
//! A module is built from a *tape* of numbers, one for each choice, and an exhausted tape says zero, which is always the
//! plainest choice. So a tape that proptest shortens or zeroes is a simpler module, and fuzzers can use their
//! bytes as one. Fixed axes are short and mostly of odd sizes. The symbols are `b`, `t` and, in derived
//! modules, `s`, the length of the caches, which must be bound to `t` or more.

use proptest::prelude::{Strategy, any};

use crate::graph::{Factor, Function, Held, Inst, Module, Origin, Stored, ValueId};
use crate::ops::{Binary, Op, Unary};
use crate::testing_ops::{add_call, add_step};
use crate::types::{AxisId, DType, Size, Type};
use crate::verify::Stage;

/// Random verified modules of a stage, in canonical numbering.
pub fn arb_module(stage: Stage) -> impl Strategy<Value = Module> + Clone {
    proptest::collection::vec(any::<u32>(), 0..400).prop_map(move |tape| module_from(&tape, stage))
}

/// The verified module that a tape of choices makes, in canonical numbering.
pub fn module_from(tape: &[u32], stage: Stage) -> Module {
    let mut tape = Tape { rest: tape };
    let mut functions: Vec<Function> = Vec::new();
    for n in 0..=tape.below(3) {
        let f = function(&mut tape, stage, &functions, n);
        functions.push(f);
    }
    let entry = functions.last().map(|f| f.name.clone()).unwrap_or_default();
    Module { name: tape.name("random"), functions, entry }.canonical()
}

/// The module with an entry that calls the old one and returns one number which all of its floats go into: something that has
/// a gradient.
pub fn objective(module: &Module) -> Module {
    let mut out = module.clone();
    let Some(old) = module.entry() else { return out };
    let mut name = "objective".to_owned();
    while module.function(&name).is_some() {
        name.push('\'');
    }
    let mut f = Function::new(&name);
    f.axes.clone_from(&old.axes);
    let args: Vec<_> =
        old.params.iter().map(|&p| f.add_param(&old.value(p).name, old.ty(p).clone())).collect();
    let results: Vec<_> = old.results.iter().map(|&r| ("", old.ty(r).clone())).collect();
    let op = Op::Call { callee: old.name.clone(), scope: "below".to_owned() };
    let results = f.push(op, &args, &results);
    let mut total = f.constant("", 0.0, DType::F64);
    for r in results {
        if !f.ty(r).dtype.is_float() {
            continue;
        }
        // Bounded, so that no result drowns the others.
        let ty = Type::new(DType::F64, f.ty(r).axes.clone());
        let bounded = f.push(Op::Unary(Unary::Tanh), &[r], &[("", ty)])[0];
        let sum = f.push(Op::Contract, &[bounded], &[("", Type::scalar(DType::F64))])[0];
        total = f.push(Op::Binary(Binary::Add), &[total, sum], &[("", Type::scalar(DType::F64))])[0];
    }
    f.results = vec![total];
    out.functions.push(f);
    out.entry = name;
    out.canonical()
}

fn function(tape: &mut Tape<'_>, stage: Stage, above: &[Function], n: usize) -> Function {
    let mut f = Function::new(format!("f{n}"));
    if tape.coin() {
        f.source = "models/src/random.rs".to_owned();
    }
    f.add_axis("b", "b".into(), None);
    let t = f.add_axis("t", "t".into(), None);
    let length = if stage == Stage::Traced { "t" } else { "s" };
    let s = f.add_axis("s", length.into(), Some(t));
    let mut b = Build { tape, f, t, s, above, scopes: 0 };

    for name in ["d", "e", "n", "c"] {
        let size = [3, 2, 5, 1, 4][b.tape.below(5)];
        b.f.add_axis(name, Size::Fixed(size), None);
    }
    for _ in 0..=b.tape.below(3) {
        let ty = b.random_type();
        let name = b.tape.name("h");
        b.f.add_param(&name, ty);
    }
    for n in 0..b.tape.below(3) {
        b.add_weight(n);
    }
    for _ in 0..1 + b.tape.below(12) {
        let first = b.f.body.len();
        add_step(&mut b, stage);
        b.add_origins(first);
    }
    // One op of many would call too seldom for chains to be met.
    if b.tape.coin() {
        let first = b.f.body.len();
        add_call(&mut b);
        b.add_origins(first);
    }
    let first = b.f.params.first().map(|p| b.f.ty(*p).clone());
    // Often a function that may be called of its own result, so that there are chains.
    if let Some(ty) = first.filter(|_| b.tape.coin()) {
        let result = b.pick(|f, v| *f.ty(v) == ty);
        b.f.results.extend(result);
        return b.f;
    }
    for _ in 0..=b.tape.below(2) {
        let result = b.pick(|_, _| true).unwrap_or_else(|| b.number(DType::F32));
        b.f.results.push(result);
    }
    b.f
}

/// The choices that are still to be made.
pub(crate) struct Tape<'a> {
    rest: &'a [u32],
}

impl Tape<'_> {
    /// A number below `n`; 0 if there are none.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        let Some((first, rest)) = self.rest.split_first() else { return 0 };
        self.rest = rest;
        (*first as usize).checked_rem(n).unwrap_or(0)
    }

    /// Heads or tails; tails if in doubt.
    pub(crate) fn coin(&mut self) -> bool {
        self.below(2) == 1
    }

    /// Usually this name, sometimes one that is harder to write down.
    pub(crate) fn name(&mut self, plain: &str) -> String {
        const HARD: [&str; 8] = ["return", "k'", "c.1", "odd name", "", "\"", "ü\n", "inf"];
        match self.below(24).checked_sub(24 - HARD.len()) {
            Some(n) => HARD[n].to_owned(),
            None => plain.to_owned(),
        }
    }
}

/// A function that grows by random choices.
pub(crate) struct Build<'a, 't> {
    pub(crate) tape: &'a mut Tape<'t>,
    pub(crate) f: Function,
    /// The positions, and the axis that is like them.
    pub(crate) t: AxisId,
    pub(crate) s: AxisId,
    /// What may be called.
    pub(crate) above: &'a [Function],
    pub(crate) scopes: usize,
}

impl Build<'_, '_> {
    // --- values -------------------------------------------------------------------------------------

    /// An instruction with one result.
    pub(crate) fn add(&mut self, op: Op, args: &[ValueId], ty: Type) -> ValueId {
        let name = self.tape.name("");
        self.f.push(op, args, &[(&name, ty)])[0]
    }

    /// A value that satisfies the test, the latest by default. Caches are only for `append`.
    pub(crate) fn pick(&mut self, test: impl Fn(&Function, ValueId) -> bool) -> Option<ValueId> {
        let all = (0..self.f.values.len() as u32).rev().map(ValueId);
        let fit: Vec<_> = all.filter(|v| !self.f.caches.contains(v) && test(&self.f, *v)).collect();
        let n = self.tape.below(fit.len());
        fit.get(n).copied()
    }

    /// A value of a dtype that satisfies the test, with an axis that satisfies the other; made if there is none.
    pub(crate) fn pick_with(
        &mut self,
        dtype: impl Fn(DType) -> bool,
        axis: impl Fn(&Function, AxisId) -> bool,
        fallback: AxisId,
    ) -> (ValueId, AxisId) {
        let found = self.pick(|f, v| dtype(f.ty(v).dtype) && f.ty(v).axes.iter().any(|a| axis(f, *a)));
        let v = found.unwrap_or_else(|| self.filled(Type::new(DType::F32, [fallback])));
        let fit: Vec<_> = self.f.ty(v).axes.iter().copied().filter(|a| axis(&self.f, *a)).collect();
        let n = self.tape.below(fit.len());
        (v, fit.get(n).copied().unwrap_or(fallback))
    }

    /// A float.
    pub(crate) fn float(&mut self) -> ValueId {
        self.pick(|f, v| f.ty(v).dtype.is_float()).unwrap_or_else(|| self.number(DType::F32))
    }

    /// A truth value.
    pub(crate) fn truth(&mut self) -> ValueId {
        self.pick(|f, v| f.ty(v).dtype == DType::Bool).unwrap_or_else(|| self.number(DType::Bool))
    }

    /// A number of a dtype that has it exactly.
    pub(crate) fn number(&mut self, dtype: DType) -> ValueId {
        let x = self.real(dtype);
        let name = self.tape.name("");
        self.f.constant(&name, x, dtype)
    }

    /// A number that the dtype has exactly.
    pub(crate) fn real(&mut self, dtype: DType) -> f64 {
        match dtype {
            DType::F64 | DType::F32 | DType::Bf16 | DType::F16 => {
                [1.0, 0.5, -2.0, 0.0, 3.25, -0.0][self.tape.below(6)]
            }
            DType::I32 => self.tape.below(4) as f64,
            DType::Bool => self.tape.below(2) as f64,
        }
    }

    /// One number at every index of a type.
    pub(crate) fn filled(&mut self, ty: Type) -> ValueId {
        let x = self.number(ty.dtype);
        if ty.axes.is_empty() {
            return x;
        }
        self.add(Op::Broadcast { axes: ty.axes.clone() }, &[x], ty)
    }

    // --- types --------------------------------------------------------------------------------------

    pub(crate) fn float_dtype(&mut self) -> DType {
        [DType::F32, DType::Bf16, DType::F64, DType::F16][self.tape.below(4)]
    }

    pub(crate) fn dtype(&mut self) -> DType {
        [DType::F32, DType::Bf16, DType::I32, DType::Bool, DType::F16, DType::F64][self.tape.below(6)]
    }

    fn random_type(&mut self) -> Type {
        let mut axes = Vec::new();
        for _ in 0..self.tape.below(4) {
            let a = AxisId(self.tape.below(self.f.axes.len()) as u32);
            if !axes.contains(&a) {
                axes.push(a);
            }
        }
        Type::new(self.dtype(), axes)
    }

    /// An axis of this size that is not among the given, an old one if there is one and the tape likes it.
    pub(crate) fn axis_of_size(&mut self, name: &str, size: &Size, but: &[AxisId]) -> AxisId {
        let all = (0..self.f.axes.len() as u32).map(AxisId);
        let fit: Vec<_> = all.filter(|a| self.f.axis(*a).size == *size && !but.contains(a)).collect();
        if !fit.is_empty() && !self.tape.coin() {
            let n = self.tape.below(fit.len());
            return fit[n];
        }
        self.f.add_axis(name, size.clone(), None)
    }

    // --- weights and origins ------------------------------------------------------------------------

    /// A weight that is stored in one of the ways that checkpoints know.
    fn add_weight(&mut self, n: usize) {
        let mut ty = self.random_type();
        ty.axes.retain(|a| self.f.axis(*a).size.fixed().is_some());
        ty.dtype = self.float_dtype();

        let mut tensor = format!("w{n}.weight");
        let mut dims: Vec<Vec<Factor>> = Vec::new();
        for &a in &ty.axes {
            let factor = match self.tape.below(5) {
                1 => {
                    let other = self.f.add_axis("part", Size::Fixed(1 + self.tape.below(3) as u64), None);
                    Factor::Parts(if self.tape.coin() { vec![other, a] } else { vec![a, other] })
                }
                2 => {
                    tensor = format!("{{{}}}.{tensor}", self.f.axis(a).name);
                    continue;
                }
                _ => Factor::Axis(a),
            };
            match dims.last_mut() {
                Some(dim) if self.tape.coin() => dim.push(factor),
                _ => {
                    let at = self.tape.below(dims.len() + 1);
                    dims.insert(at, vec![factor]);
                }
            }
        }
        self.f.add_weight(&format!("W{n}"), ty, Stored { tensor, dims, held: Held::Elements });
    }

    fn add_origins(&mut self, first: usize) {
        for at in first..self.f.body.len() {
            let is_call = |inst: &Inst| matches!(inst.op, Op::Call { .. });
            // The calls of a chain are of one line, but for a few that show that it matters.
            if at > first && self.f.body[at - 1..=at].iter().all(is_call) && self.tape.below(48) != 1 {
                let before = self.f.body[at - 1].clone();
                self.f.body[at].origins = before.origins;
                self.f.body[at].by = before.by;
                continue;
            }
            for _ in 0..self.tape.below(3) {
                let file =
                    if self.tape.coin() { "models/src/other.rs".to_owned() } else { self.f.source.clone() };
                let (line, col) = (1 + self.tape.below(99) as u32, 1 + self.tape.below(80) as u32);
                let tag = ["41", "A.1", "an equation", "", "4.1", "07"]
                    .get(self.tape.below(8))
                    .map(|t| (*t).to_owned());
                self.f.body[at].origins.push(Origin { file, line, col, tag });
            }
            if self.tape.coin() {
                self.f.body[at].by = Some(self.tape.name("reassociate"));
            }
        }
    }
}
