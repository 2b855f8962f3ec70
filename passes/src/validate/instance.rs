//! What modules are run on: sizes, steps, arguments, weights.

use std::collections::{BTreeMap, BTreeSet};

use latentc_ir::interp::{Caches, InterpError, scoped};
use latentc_ir::{
    Axis, AxisId, DType, Function, Interpreter, Module, Op, Size, SplitMix, Symbols, Tensor, Type, ValueId,
    Weight, WeightSource,
};

use super::{Numbers, close};
use crate::Pool;

/// Tokens of the steps of a program with caches: a prompt, and what is said to it.
const STEPS: [usize; 3] = [3, 1, 1];

/// What both modules of a comparison are run on.
pub(super) struct Instance {
    seed: u64,
    numbers: Numbers,
    sizes: Sizes,
    steps: Vec<Step>,
    /// From this parameter on they are positions: `derive` adds them.
    given: usize,
    /// What each parameter is, if it is an integer.
    roles: Vec<Role>,
    /// The pools of the later stage: their table is a parameter, too.
    pool: Option<Pool>,
}

/// Tokens that are read at once.
#[derive(Clone, Copy)]
struct Step {
    start: usize,
    new: usize,
}

/// What run-time sizes are.
struct Sizes {
    /// They count new tokens.
    tokens: BTreeSet<String>,
    /// They count all tokens so far.
    past: BTreeSet<String>,
    /// Sequences, and what else there is.
    others: BTreeMap<String, usize>,
}

impl Sizes {
    fn of(modules: [&Module; 2], seed: u64) -> Sizes {
        let [mut all, after] = modules.map(Symbols::of);
        all.new.extend(after.new);
        all.past.extend(after.past);
        all.other.extend(after.other.into_iter().chain(after.batch).chain(all.batch));
        // Positions without a past are positions all the same.
        for f in modules.iter().flat_map(|m| &m.functions) {
            for inst in &f.body {
                if let Op::Position { axis } = inst.op
                    && let Axis { size: Size::Sym(size), like: None, .. } = f.axis(axis)
                {
                    all.new.insert(size.clone());
                }
            }
        }
        all.past.retain(|s| !all.new.contains(s));
        all.other.retain(|s| !all.new.contains(s) && !all.past.contains(s));
        let others = all.other.into_iter().zip(seed..).map(|(s, n)| (s, 2 + (n % 2) as usize)).collect();
        Sizes { tokens: all.new, past: all.past, others }
    }
}

/// What an integer parameter is used for, which bounds it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Any,
    /// An index of so many.
    Below(u64),
    /// An index of the tokens at hand.
    Token,
    /// An index of the tokens at hand and of other things: the first of anything is always there.
    First,
    /// Where a token stands in its sequence.
    Position,
}

impl Role {
    fn and(self, other: Role) -> Role {
        match (self, other) {
            (Role::Any, role) | (role, Role::Any) => role,
            (Role::Position, _) | (_, Role::Position) => Role::Position,
            (Role::Below(m), Role::Below(n)) => Role::Below(m.min(n)),
            (Role::Token, Role::Token) => Role::Token,
            (Role::First, _) | (_, Role::First) => Role::First,
            (Role::Token, Role::Below(_)) | (Role::Below(_), Role::Token) => Role::First,
        }
    }
}

/// What the parameters of each function are, callees first.
fn roles(module: &Module, tokens: &BTreeSet<String>) -> BTreeMap<String, Vec<Role>> {
    let mut of: BTreeMap<String, Vec<Role>> = BTreeMap::new();
    for f in &module.functions {
        let mut roles = vec![Role::Any; f.values.len()];
        for inst in f.body.iter().rev() {
            let passed = match &inst.op {
                Op::Call { callee, .. } => of.get(callee).cloned().unwrap_or_default(),
                _ => Vec::new(),
            };
            for (n, a) in inst.args.iter().enumerate() {
                let role = match (&inst.op, n) {
                    (Op::Call { .. }, n) => passed.get(n).copied().unwrap_or(Role::Any),
                    (Op::Append { .. }, 2) => Role::Position,
                    (Op::Gather { axis } | Op::ScatterAdd { axis }, 1) => match &f.axis(*axis).size {
                        Size::Fixed(n) => Role::Below(*n),
                        Size::Sym(s) if tokens.contains(s) => Role::Token,
                        Size::Sym(_) => Role::Below(1),
                    },
                    _ if f.ty(inst.result()).dtype == DType::I32 => roles[inst.result().0 as usize],
                    _ => Role::Any,
                };
                let known = &mut roles[a.0 as usize];
                *known = known.and(role);
            }
        }
        of.insert(f.name.clone(), f.params.iter().map(|p| roles[p.0 as usize]).collect());
    }
    of
}

/// Whether a module is a definition: it sees as many tokens as there are, and no others.
fn defines(module: &Module) -> bool {
    module.functions.iter().any(|f| {
        let like = |a: &Axis| a.like.is_some_and(|of| f.axis(of).size == a.size && a.size.fixed().is_none());
        f.axes.iter().any(like)
    })
}

impl Instance {
    /// For two stages of one program, the earlier one first.
    pub(super) fn new(before: &Module, after: &Module, seed: u64, numbers: Numbers) -> Instance {
        let mut sizes = Sizes::of([before, after], seed);
        let entry = |m: &Module| roles(m, &sizes.tokens).remove(&m.entry).unwrap_or_default();
        let roles: Vec<_> = entry(before);
        let given = roles.len();
        let total: usize = STEPS.iter().sum();
        let mut start = 0;
        let steps = STEPS.map(|new| {
            let step = Step { start, new };
            start += new;
            step
        });
        let whole = vec![Step { start: 0, new: total }];
        let steps = if sizes.past.is_empty() || defines(after) { whole.clone() } else { steps.to_vec() };
        let pool = Pool::of(after);
        if let Some(pool) = &pool {
            // Pages for all that is read, one more of each sequence, and as many that nobody has.
            let pages = pool.pages_for(total as u64) as usize + 1;
            let entry = after.entry();
            let beside =
                entry.iter().flat_map(|f| f.params.iter().filter_map(|&p| pool.sequences(f, f.ty(p))));
            let of_table = beside.flatten().map(|size| match size {
                Size::Fixed(n) => n as usize,
                Size::Sym(s) => sizes.others.get(&s).copied().unwrap_or(1),
            });
            let sequences = of_table.product::<usize>();
            sizes.others.insert(pool.pages.clone(), pages);
            sizes.others.insert(pool.slots.clone(), 2 * sequences * pages * pool.page as usize);
        }
        let mut instance = Instance { seed, numbers, sizes, steps, given, roles, pool };
        // What a token's results are must not depend on later ones. If it does, the steps mean something else, and only a
        // whole sequence means the same. The first token of a sequence is that of its first step only.
        let first = instance.roles.contains(&Role::First);
        if defines(before) && instance.steps.len() > 1 && (first || !instance.is_causal(before)) {
            instance.steps = whole;
        }
        instance
    }

    /// Which step it is, for people.
    pub(super) fn describe(&self, step: usize) -> String {
        let Step { start, new } = self.steps[step];
        let others: Vec<_> = self.sizes.others.iter().map(|(s, n)| format!(", {s} = {n}")).collect();
        let others = others.concat();
        if self.sizes.tokens.is_empty() {
            return format!("seed {}{others}", self.seed);
        }
        format!("{new} tokens behind {start} (seed {}{others})", self.seed)
    }

    /// The results of each step.
    pub(super) fn run(
        &self,
        module: &Module,
        interpreter: &Interpreter<'_>,
    ) -> Result<Vec<Vec<Tensor>>, InterpError> {
        let mut caches = Caches::new();
        let defines = defines(module);
        let step = |step: &Step| {
            if defines {
                return self.window(module, interpreter, *step, step.start + step.new);
            }
            self.results(module, interpreter, *step, &mut caches)
        };
        self.steps.iter().map(step).collect()
    }

    /// Whether the results of a definition are the same in a sequence that goes on.
    fn is_causal(&self, definition: &Module) -> bool {
        let interpreter = Interpreter::new(definition, latentc_ir::Precision::Exact);
        let window = |step: &Step, len| self.window(definition, &interpreter, *step, len);
        let total = self.total();
        self.steps.iter().all(|step| match (window(step, step.start + step.new), window(step, total)) {
            (Ok(short), Ok(long)) => short.iter().zip(&long).all(|(s, l)| close(s, l).is_ok()),
            _ => false,
        })
    }

    fn total(&self) -> usize {
        self.steps.iter().map(|s| s.new).sum()
    }

    /// What a definition says of a sequence of `len` tokens, at those of a step.
    fn window(
        &self,
        module: &Module,
        interpreter: &Interpreter<'_>,
        step: Step,
        len: usize,
    ) -> Result<Vec<Tensor>, InterpError> {
        let Some(f) = module.entry() else { return Ok(Vec::new()) };
        let whole = Step { start: 0, new: len };
        let args = f.params.iter().enumerate().map(|(n, &p)| self.argument(f, n, p, whole, step)).collect();
        let results = self.evaluate(interpreter, args, &mut Caches::new(), len, len)?;
        let cut = |(tensor, &value): (Tensor, &ValueId)| {
            // The past is there as a whole.
            let along = |a: &AxisId| match f.axis(*a) {
                Axis { size: Size::Sym(s), like: None, .. } => self.sizes.tokens.contains(s),
                Axis { .. } => false,
            };
            let axes = f.ty(value).axes.iter().enumerate().filter(|(_, a)| along(a)).map(|(n, _)| n);
            axes.fold(tensor, |tensor, axis| part(&tensor, axis, step.start, step.new))
        };
        Ok(results.into_iter().zip(&f.results).map(cut).collect())
    }

    /// What a program with caches makes of a step.
    fn results(
        &self,
        module: &Module,
        interpreter: &Interpreter<'_>,
        step: Step,
        caches: &mut Caches,
    ) -> Result<Vec<Tensor>, InterpError> {
        let Some(f) = module.entry() else { return Ok(Vec::new()) };
        let args = f.params.iter().enumerate().map(|(n, &p)| self.argument(f, n, p, step, step)).collect();
        self.evaluate(interpreter, args, caches, step.new, self.total())
    }

    fn evaluate(
        &self,
        interpreter: &Interpreter<'_>,
        args: Vec<Tensor>,
        caches: &mut Caches,
        tokens: usize,
        past: usize,
    ) -> Result<Vec<Tensor>, InterpError> {
        let mut bound = interpreter.clone();
        for (symbol, &size) in &self.sizes.others {
            bound = bound.with_size(symbol, size);
        }
        for symbol in &self.sizes.tokens {
            bound = bound.with_size(symbol, tokens);
        }
        for symbol in &self.sizes.past {
            bound = bound.with_size(symbol, past);
        }
        bound.run(&args, &mut Stored { seed: self.seed, numbers: self.numbers }, caches)
    }

    /// The table of pages, if a parameter of this type is it: pages of all sequences in any order, each of one of them.
    fn table(&self, f: &Function, ty: &Type) -> Option<Tensor> {
        let pool = self.pool.as_ref()?;
        pool.sequences(f, ty)?;
        let extent = |a: &AxisId| match &f.axis(*a).size {
            Size::Fixed(n) => *n as usize,
            Size::Sym(s) => self.sizes.others.get(s).copied().unwrap_or(1),
        };
        let shape: Vec<_> = ty.axes.iter().map(extent).collect();
        let pages = self.sizes.others.get(&pool.slots).map_or(1, |slots| slots / pool.page as usize);
        let places = shuffled(pages, self.seed);
        let data = places.into_iter().cycle().take(shape.iter().product()).map(|n| n as f64).collect();
        Some(Tensor { dtype: ty.dtype, shape, data })
    }

    /// The parameter with that number, at the tokens of `shown`; indices of tokens point at those of `step`.
    fn argument(&self, f: &Function, n: usize, param: ValueId, shown: Step, step: Step) -> Tensor {
        let ty = f.ty(param);
        if let Some(table) = self.table(f, ty) {
            return table;
        }
        let role =
            if n >= self.given { Role::Position } else { self.roles.get(n).copied().unwrap_or(Role::Any) };
        // Of each axis: where in the whole sequence it begins, how much of it is here, and how much there is.
        let total = self.total();
        let ranges: Vec<(usize, usize, usize)> = ty
            .axes
            .iter()
            .map(|&a| match &f.axis(a).size {
                Size::Fixed(n) => (0, *n as usize, *n as usize),
                Size::Sym(s) if self.sizes.tokens.contains(s) => (shown.start, shown.new, total),
                Size::Sym(s) if self.sizes.past.contains(s) => (0, total, total),
                Size::Sym(s) => {
                    let size = self.sizes.others.get(s).copied().unwrap_or(1);
                    (0, size, size)
                }
            })
            .collect();
        let tokens = |a: &AxisId| matches!(&f.axis(*a).size, Size::Sym(s) if self.sizes.tokens.contains(s));
        let token_axis = ty.axes.iter().position(tokens);
        let shape: Vec<usize> = ranges.iter().map(|r| r.1).collect();
        let rng = SplitMix(SplitMix::mix(self.seed ^ (n as u64 + 1) << 32));
        let data = (0..shape.iter().product::<usize>())
            .map(|flat| {
                let mut rest = flat;
                let mut index = vec![0; shape.len()];
                for (i, &(start, len, _)) in index.iter_mut().zip(&ranges).rev() {
                    (*i, rest) = (start + rest % len, rest / len);
                }
                let flat = index.iter().zip(&ranges).fold(0, |flat, (i, r)| flat * r.2 + i);
                let chance = rng.nth(flat as u64);
                match role {
                    Role::Position => token_axis.map_or(step.start, |at| index[at]) as f64,
                    Role::First => 0.0,
                    Role::Below(n) if ty.dtype == DType::I32 => (chance % n.max(1)) as f64,
                    Role::Token => (step.start - shown.start + (chance % step.new as u64) as usize) as f64,
                    Role::Below(_) | Role::Any => number(ty, chance, self.numbers),
                }
            })
            .collect();
        Tensor { dtype: ty.dtype, shape, data }
    }
}

/// A random element of that type.
fn number(ty: &Type, chance: u64, numbers: Numbers) -> f64 {
    match ty.dtype {
        DType::Bool => (chance % 2) as f64,
        DType::I32 => (chance % 3) as f64,
        DType::F64 | DType::F32 | DType::Bf16 | DType::F16 => match numbers {
            Numbers::Grid => (chance % 33) as f64 / 16.0 - 1.0,
            Numbers::Reals => (chance >> 11) as f64 / (1u64 << 52) as f64 - 1.0,
        },
    }
}

/// So many numbers from 0 on, in an order that the seed chooses.
fn shuffled(n: usize, seed: u64) -> Vec<usize> {
    let mut all: Vec<usize> = (0..n).collect();
    all.sort_by_key(|&i| SplitMix::mix(seed ^ (i as u64 + 1)));
    all
}

/// A part of a tensor along one axis.
fn part(tensor: &Tensor, axis: usize, start: usize, len: usize) -> Tensor {
    let below: usize = tensor.shape[axis + 1..].iter().product();
    let size = tensor.shape[axis];
    let mut shape = tensor.shape.clone();
    shape[axis] = len;
    let inside = |n: &usize| (start..start + len).contains(&(n / below % size));
    let data = (0..tensor.data.len()).filter(inside).map(|n| tensor.data[n]).collect();
    Tensor { dtype: tensor.dtype, shape, data }
}

/// A checkpoint with random numbers in every tensor that is asked for: whoever reads a tensor reads the same, whichever part
/// of it and in whatever order.
struct Stored {
    seed: u64,
    numbers: Numbers,
}

impl WeightSource for Stored {
    fn weight(&mut self, scope: &str, f: &Function, w: &Weight) -> Result<Tensor, String> {
        let ty = w.stored.elements(f.ty(w.value));
        // Floats are f64 here, whatever they are declared to be.
        w.read(f, DType::F64, |layout, piece, elements| {
            let name = scoped(scope, &piece.tensor);
            let hash = name.bytes().fold(self.seed, |h, b| SplitMix::mix(h ^ u64::from(b)));
            let rng = SplitMix(hash);
            let stored: Vec<f64> =
                (0..layout.stored_elements()).map(|n| number(&ty, rng.nth(n), self.numbers)).collect();
            layout.load(piece, 1, &stored, elements)
        })
    }
}
