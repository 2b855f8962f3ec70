//! Which values get memory: everything else is computed inside of the kernels that want it.
//!
//! What calls, selections and the sums of `scatter_add` work on has memory, and so has what they make. All else is an expression
//! of what has. Around a product of matrices may stand
//!
//! - an *epilogue*: elementwise ops on its result, as far as all that is made of the product meets in one value. That value is
//!   stored, the product is not. Products of one shape that meet there are one kernel: gate and up projection of SwiGLU. So is a
//!   rotation, whose partners are rows or columns that one processor can have; and where nothing but a cache wants the value, it is
//!   made in its place there. A fold of the result, such as a norm of latents, is no epilogue: a row of it is shared out over many
//!   processors, which would have to wait for each other;
//! - a *prologue*: expressions of its operands, where computing them once more for every tile takes less time than a launch
//!   and a trip through memory. RMS norm goes into the projections behind it when there are few rows. Where rows and columns are many,
//!   matrix units read operands from memory, so each product would store the expression for itself: it is stored once for all.
//!
//! A softmax that is left whole weighs a sum: its [`stream`] computes scores and weights piece by piece, so these have no memory. Other
//! sums and maxima of what is made of products are streams where [`regions`](latentc_passes::stream_sums::regions) says so.
//!
//! A kernel that reduces works row by row, so the reductions in it must agree on what a row is: their results have the same
//! axes. Reductions that several kernels want are repeated only where that is cheaper than a launch. A row is walked by one processor, so
//! a reduction whose rows are too few to keep a machine busy is stored where more than these rows wait for it: a sum over all of
//! a batch that every element of a matrix is divided by. Reductions and selections that feed one another are one kernel where a row of
//! them fits: see [`rows`]. No kernel takes more buffers or registers than every target gives: see [`limits`].

mod limits;
mod rows;
mod stream;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use latentc_ir::{AxisId, Def, Function, Inst, Op, Pairs, Size, Type, ValueId};
use latentc_passes::{Kind, Machine, Remark, Sizes};

use crate::coded::{Coded, Source};
use crate::contract::Rotation;
use crate::grouped::GroupedPlan;
use crate::scatter::is_product;

/// Rows or columns of a product that one tile has, about: how often what a prologue computes is computed again.
const TILE: f64 = 128.0;

/// Products with more rows and columns than this are made of tiles that matrix units read from memory.
const MANY: f64 = 32.0;

/// The same as [`TILE`] for a stream, whose tiles share a cube's memory with weights and values.
const STREAM_TILE: f64 = 32.0;

/// Operations for each element that is rotated: a sine and a cosine, mostly.
const TURN: f64 = 32.0;

/// As remarks and `latentc explain` call this.
pub(crate) const NAME: &str = "fuse";

/// What has memory, and what is made where.
pub(crate) struct Stored {
    /// For each value, whether it has memory of its own or shares that of another.
    pub(crate) values: Vec<bool>,
    /// What is made by a kernel although it is stored: by what the kernel makes.
    pub(crate) again: Vec<(ValueId, ValueId)>,
    /// Why.
    pub(crate) remarks: Vec<Remark>,
}

/// Decides which values of a function are stored.
pub(crate) fn storage(f: &Function, sizes: &Sizes, machine: &Machine) -> Stored {
    let mut s = Storage {
        f,
        defs: f.defs(),
        users: f.users(),
        sizes,
        machine,
        stored: vec![false; f.values.len()],
        fixed: vec![false; f.values.len()],
        streams: BTreeMap::new(),
        streamed: vec![0; f.values.len()],
        remarks: Vec::new(),
    };
    s.seeds();
    s.streams();
    s.epilogues();
    s.views();
    s.prologues();
    s.stream_leaves();
    s.views();
    // Storing a value takes it out of a row, which can only settle conflicts, so this ends.
    while s.settle() {
        s.views();
    }
    s.limit();
    s.views();
    s.rows();
    let again = s.chosen_again();
    // In the order of the text, each value once: what was said of it last holds.
    let last: BTreeMap<usize, Remark> = s.remarks.into_iter().collect();
    Stored { values: s.stored, again, remarks: last.into_values().collect() }
}

struct Storage<'a> {
    f: &'a Function,
    defs: Vec<Def<'a>>,
    /// The instructions that read each value, by index of the body.
    users: Vec<Vec<usize>>,
    sizes: &'a Sizes,
    machine: &'a Machine,
    stored: Vec<bool>,
    /// What is stored in any case.
    fixed: Vec<bool>,
    /// The sums that a softmax weighs and other folds of pieces, by index of the body, and the axis that they walk.
    streams: BTreeMap<usize, AxisId>,
    /// How many kernels compute each value piece by piece: from the products that scores are made of to the weights.
    streamed: Vec<usize>,
    /// What was decided, by index of the body.
    remarks: Vec<(usize, Remark)>,
}

/// What products must have in common to be one kernel: the axes of the result, those of the operands, and the index of a
/// grouped one. A stream is one by itself.
#[derive(PartialEq, Eq)]
struct Shape {
    result: BTreeSet<AxisId>,
    operands: BTreeSet<BTreeSet<AxisId>>,
    index: Option<ValueId>,
    stream: Option<usize>,
}

impl<'a> Storage<'a> {
    fn store(&mut self, v: ValueId) {
        self.stored[v.0 as usize] = true;
    }

    fn is_stored(&self, v: ValueId) -> bool {
        self.stored[v.0 as usize]
    }

    fn inst(&self, v: ValueId) -> Option<&'a Inst> {
        match self.defs[v.0 as usize] {
            Def::Inst(_, inst) => Some(inst),
            Def::Param(_) | Def::Weight(_) | Def::Cache(_) => None,
        }
    }

    /// Says what became of a value. Whoever gives it to the program is not asked.
    fn say(&mut self, kind: Kind, v: ValueId, message: String) {
        if let Def::Inst(n, inst) = self.defs[v.0 as usize] {
            self.remarks.push((n, Remark::new(kind, NAME, self.f, inst, message)));
        }
    }

    /// Values by name.
    fn names<'v>(&self, values: impl IntoIterator<Item = &'v ValueId>) -> String {
        let name = |v: &ValueId| format!("`{}`", self.f.value(*v).name);
        values.into_iter().map(name).collect::<Vec<_>>().join(", ")
    }

    fn axes(&self, v: ValueId) -> BTreeSet<AxisId> {
        self.f.ty(v).axes.iter().copied().collect()
    }

    /// The number of elements of a tensor with these axes, at the sizes that the graph is made for.
    fn elements(&self, axes: impl IntoIterator<Item = AxisId>) -> f64 {
        axes.into_iter().map(|a| self.sizes.extent(self.f.axis(a)) as f64).product()
    }

    fn bytes(&self, v: ValueId) -> f64 {
        let ty = self.f.ty(v);
        self.elements(ty.axes.iter().copied()) * ty.dtype.bytes() as f64
    }

    /// What has memory in any case, and what has it because an element is read at any place or compared with all others.
    fn seeds(&mut self) {
        let f = self.f;
        for v in 0..f.values.len() {
            let id = ValueId(v as u32);
            self.fixed[v] = match self.inst(id).map(|inst| &inst.op) {
                None | Some(Op::Call { .. } | Op::Append { .. } | Op::ScatterAdd { .. }) => true,
                Some(Op::Const(_)) => !f.ty(id).axes.is_empty(),
                Some(_) => false,
            };
        }
        for &r in &f.results {
            self.fixed[r.0 as usize] = true;
        }
        for inst in &f.body {
            let mut fix = |args: &[ValueId]| args.iter().for_each(|a| self.fixed[a.0 as usize] = true);
            match inst.op {
                Op::Call { .. } => fix(&inst.args),
                // A product that is only added up is made row by row.
                Op::ScatterAdd { .. } => match self.defs[inst.args[0].0 as usize] {
                    Def::Inst(_, product)
                        if is_product(f, product) && self.users[inst.args[0].0 as usize].len() == 1 =>
                    {
                        fix(&product.args);
                        fix(&inst.args[1..]);
                    }
                    _ => fix(&inst.args),
                },
                _ => {}
            }
            // A gathered operand is read where it lies, at the indices; these must be there to be sorted.
            if let Some(gather) = gathered(f, inst, &self.defs) {
                gather.args.iter().for_each(|a| self.fixed[a.0 as usize] = true);
            }
        }
        self.stored.clone_from(&self.fixed);
        for inst in &f.body {
            if matches!(inst.op, Op::TopK { .. } | Op::TopIndices { .. } | Op::Gather { .. }) {
                self.store(inst.args[0]);
            }
        }
    }

    /// What shares the memory of another value costs nothing to store, and what is a view of it has it stored.
    fn views(&mut self) {
        for inst in self.f.body.iter().rev() {
            if is_view(self.f, inst) && self.is_stored(inst.result()) {
                self.store(inst.args[0]);
            }
        }
    }

    /// For each product, where all that is made of it elementwise meets: there it is stored.
    fn epilogues(&mut self) {
        // The product that each value is an epilogue of. What is behind more products goes first: a sum of two is the epilogue of
        // the one that has to be waited for, so that the other need not wait.
        let mut claimed: BTreeMap<ValueId, usize> = BTreeMap::new();
        let f = self.f;
        let depths = self.depths();
        let products = (0..f.body.len()).filter(|&n| f.body[n].op == Op::Contract);
        let mut products: Vec<_> =
            products.filter(|&n| self.streamed[f.body[n].result().0 as usize] == 0).collect();
        products.sort_by_key(|&n| Reverse((depths[f.body[n].result().0 as usize], n)));
        for n in products {
            let inst = &f.body[n];
            let product = inst.result();
            let axes = self.axes(product);
            let mut rotation = None;
            let mut flow = BTreeSet::from([product]);
            let (mut work, mut exits, mut joined) = (vec![product], BTreeSet::new(), BTreeSet::new());
            while let Some(v) = work.pop() {
                if self.is_stored(v) {
                    exits.insert(v);
                    continue;
                }
                for &u in &self.users[v.0 as usize] {
                    let user = &f.body[u];
                    let next = user.result();
                    let streamed = self.streamed[next.0 as usize] > 0;
                    let turns = rotation.is_none_or(|other| other == u) && self.can_rotate(n, user, v);
                    let follows = user.op.is_elementwise() && self.axes(next) == axes;
                    if turns {
                        rotation = Some(u);
                    }
                    if !(follows || turns) || streamed {
                        exits.insert(v);
                    } else if let Some(&other) = claimed.get(&next) {
                        if self.shape(n) == self.shape(other) {
                            joined.insert(other);
                        } else {
                            exits.insert(v);
                        }
                    } else if flow.insert(next) {
                        work.push(next);
                    }
                }
            }
            let exits: Vec<_> = exits.into_iter().collect();
            let joined: Vec<_> = joined.into_iter().collect();
            match (&exits[..], &joined[..]) {
                (&[root], []) => {
                    let root = self.cache_of(n, root).unwrap_or(root);
                    self.store(root);
                    if root != product {
                        let message = format!(
                            "is made in the kernel of {}, which needs no memory",
                            self.names([&product])
                        );
                        self.say(Kind::Applied, root, message);
                    }
                    claimed.extend(flow.into_iter().map(|v| (v, n)));
                }
                ([], &[other]) => {
                    let beside = f.body[other].result();
                    let message =
                        format!("is computed in the kernel of {}, where both meet", self.names([&beside]));
                    self.say(Kind::Applied, product, message);
                    claimed.extend(flow.into_iter().map(|v| (v, other)));
                }
                // What is made of it goes several ways: it is stored where they part.
                _ => {
                    let mut last = product;
                    claimed.insert(last, n);
                    while let [u] = self.users[last.0 as usize][..]
                        && flow.contains(&f.body[u].result())
                        && !self.is_stored(last)
                    {
                        last = f.body[u].result();
                        claimed.insert(last, n);
                    }
                    self.store(last);
                }
            }
        }
    }

    /// Whether a rotation of a value can be part of the kernel of a product. Partners have to be the last of the rows or columns, and
    /// halves, which lie apart, read one by one.
    fn can_rotate(&self, product: usize, rope: &Inst, v: ValueId) -> bool {
        let Op::Rope { axis, pairs } = rope.op else { return false };
        let (f, inst) = (self.f, &self.f.body[product]);
        let rotation = Rotation { axis, pairs };
        let mut with_axis = inst.args.iter().map(|&a| f.ty(a)).filter(|ty| ty.has(axis));
        let (Some(ty), None) = (with_axis.next(), with_axis.next()) else { return false };
        let last = ty.axes.iter().rfind(|a| f.axis(**a).size != Size::Fixed(1));
        let result = f.ty(inst.result());
        let apart = pairs == Pairs::Halves && last.is_some_and(|a| result.has(*a));
        rope.args[0] == v
            && !rope.args[1..].contains(&v)
            && self.is_plain(product)
            && rotation.ends_both(f, ty, result)
            && !apart
    }

    /// The cache that what is made of a product is appended to, if nothing else wants it.
    fn cache_of(&self, product: usize, v: ValueId) -> Option<ValueId> {
        let [u] = self.users[v.0 as usize][..] else { return None };
        let inst = &self.f.body[u];
        let appends =
            matches!(inst.op, Op::Append { .. }) && inst.args[1] == v && !inst.args[2..].contains(&v);
        (appends && !self.is_stored(v) && self.is_plain(product)).then(|| inst.result())
    }

    /// Whether a product is one of matrices, neither chosen by an index nor a stream.
    fn is_plain(&self, product: usize) -> bool {
        !self.streams.contains_key(&product) && gathered(self.f, &self.f.body[product], &self.defs).is_none()
    }

    /// For each value, how many products and selections it takes to make it, one behind the other.
    fn depths(&self) -> Vec<usize> {
        let mut depths = vec![0; self.f.values.len()];
        for inst in &self.f.body {
            let before = inst.args.iter().map(|a| depths[a.0 as usize]).max().unwrap_or(0);
            let more =
                matches!(inst.op, Op::Contract | Op::TopK { .. } | Op::TopIndices { .. } | Op::Call { .. });
            inst.results.iter().for_each(|r| depths[r.0 as usize] = before + usize::from(more));
        }
        depths
    }

    fn shape(&self, n: usize) -> Shape {
        let inst = &self.f.body[n];
        Shape {
            result: self.axes(inst.result()),
            operands: inst.args.iter().map(|&a| self.axes(a)).collect(),
            index: gathered(self.f, inst, &self.defs).map(|g| g.args[1]),
            stream: self.streams.contains_key(&n).then_some(n),
        }
    }

    /// Operands of products that cost less to compute for every tile than to store once are not stored.
    fn prologues(&mut self) {
        let f = self.f;
        let mut wanted: BTreeMap<ValueId, Wanted> = BTreeMap::new();
        for (n, inst) in f.body.iter().enumerate().filter(|(_, i)| i.op == Op::Contract) {
            let again = self.streamed[inst.result().0 as usize];
            let streams = self.streams.contains_key(&n) || again > 0;
            let grouped = if streams { None } else { gathered(f, inst, &self.defs).map(Inst::result) };
            let result = self.axes(inst.result());
            for &a in &inst.args {
                // Codes are read as they are, however often: what they stand for takes more to read.
                let coded = || !streams && self.is_coded(inst, a);
                if self.is_stored(a) || self.streamed[a.0 as usize] > 0 || grouped == Some(a) || coded() {
                    continue;
                }
                let own = self.axes(a);
                let tile = if streams { STREAM_TILE } else { TILE };
                let columns = self.elements(result.difference(&own).copied());
                let rows: BTreeSet<_> = result.intersection(&own).copied().collect();
                let alone = rows.iter().filter(|x| inst.args.iter().any(|&v| !f.ty(v).has(**x)));
                let many = !streams && self.elements(alone.copied()).min(columns) > MANY;
                let first =
                    Wanted { uses: 0.0, stores: 0.0, tiles: 0.0, rows: own, folds: true, gathers: true };
                let w = wanted.entry(a).or_insert(first);
                w.uses += again.max(1) as f64;
                w.stores += f64::from(u8::from(many));
                w.tiles += if many { 0.0 } else { again.max(1) as f64 * (columns / tile).ceil() };
                w.rows.retain(|x| rows.contains(x));
                w.folds &= !streams;
                w.gathers &= streams;
            }
        }
        for (a, w) in wanted {
            let shared = self.inst(a).is_some_and(|i| is_view(f, i) && self.is_stored(i.args[0]));
            let expression = self
                .expression(a, Some(&w.rows))
                .filter(|e| (w.folds || !e.folds) && (w.gathers || !e.gathers));
            let times = expression.map(|e| {
                let each = self.machine.launch + self.seconds(e.flops, e.bytes + 2.0 * self.bytes(a));
                let inline = self.seconds(w.tiles * e.flops, (w.uses - w.stores) * e.bytes) + w.stores * each;
                let stored = self.seconds(e.flops, e.bytes + (1.0 + w.uses) * self.bytes(a));
                (inline, self.machine.launch + stored)
            });
            let cheap = times.is_some_and(|(inline, stored)| inline < stored);
            if shared || !cheap {
                self.store(a);
            }
            if let (false, Some((inline, stored))) = (shared, times) {
                let (kind, what) = match cheap {
                    true => (Kind::Applied, "is computed in the products that read it"),
                    false => (Kind::Missed, "is stored for the products that read it"),
                };
                let often = match w.stores {
                    0.0 => format!("{} of them, {} tiles", w.uses, w.tiles),
                    stores => format!("{} of them, {stores} would store it too, {} tiles", w.uses, w.tiles),
                };
                let message = format!(
                    "{what} ({often}): there {inline:.1e} s, with a launch and memory {stored:.1e} s"
                );
                self.say(kind, a, message);
            }
        }
    }

    /// Whether an operand of a product is a weight that is held as codes.
    fn is_coded(&self, product: &Inst, operand: ValueId) -> bool {
        let weight = |v: ValueId| matches!(self.defs[v.0 as usize], Def::Weight(_));
        read_as_codes(self.f, product, operand, &self.defs, weight).is_some()
    }

    fn seconds(&self, flops: f64, bytes: f64) -> f64 {
        (flops / self.machine.scalars).max(bytes / self.machine.bandwidth)
    }

    /// What it takes to compute a value from what is stored, if its parts move elements, map them and fold rows. Within a product,
    /// `rows` are the axes that its result shares with the value: what is folded must belong to one of its rows.
    fn expression(&self, root: ValueId, rows: Option<&BTreeSet<AxisId>>) -> Option<Expression> {
        let f = self.f;
        let mut e = Expression::default();
        let mut seen = BTreeSet::from([root]);
        let mut work = vec![root];
        while let Some(v) = work.pop() {
            if self.is_stored(v) {
                e.bytes += self.bytes(v);
                continue;
            }
            let inst = self.inst(v)?;
            // Of what rows are gathered from, those are read and no others.
            if let Op::Gather { .. } = inst.op {
                e.bytes += self.bytes(v);
                e.gathers = true;
                work.extend(inst.args[1..].iter().copied().filter(|a| seen.insert(*a)));
                continue;
            }
            let elements = |v: ValueId| self.elements(f.ty(v).axes.iter().copied());
            match &inst.op {
                Op::Reduce { .. } => {
                    if rows.is_some_and(|r| f.ty(v).axes.iter().any(|a| !r.contains(a))) {
                        return None;
                    }
                    e.flops += elements(inst.args[0]);
                    e.folds = true;
                }
                Op::Pack { .. } => e.flops += elements(inst.args[0]),
                Op::Const(_)
                | Op::Position { .. }
                | Op::Unary(_)
                | Op::Binary(_)
                | Op::Select
                | Op::Cast
                | Op::Rename { .. }
                | Op::Broadcast { .. }
                | Op::Split { .. }
                | Op::Merge { .. }
                | Op::Slice { .. }
                | Op::Concat { .. }
                | Op::Unpack { .. } => e.flops += elements(v),
                Op::Rope { .. } => e.flops += TURN * elements(v),
                Op::Contract
                | Op::Gather { .. }
                | Op::ScatterAdd { .. }
                | Op::TopK { .. }
                | Op::TopIndices { .. }
                | Op::Past { .. }
                | Op::Append { .. }
                | Op::Softmax { .. }
                | Op::RmsNorm { .. }
                | Op::Call { .. } => return None,
            }
            work.extend(inst.args.iter().copied().filter(|a| seen.insert(*a)));
        }
        Some(e)
    }

    /// Stores one value more if the rows of some kernel disagree, or two kernels would repeat a reduction at some cost.
    fn settle(&mut self) -> bool {
        let f = self.f;
        // What a row is for each expression that holds a reduction: the axes of its result.
        let mut rows: Vec<Option<BTreeSet<AxisId>>> = vec![None; f.values.len()];
        for inst in &f.body {
            let Some(&result) = inst.results.first() else { continue };
            // The rows of an operand are no matter of the product.
            if inst.op == Op::Contract {
                continue;
            }
            let mut row: Option<BTreeSet<AxisId>> = match inst.op {
                Op::Reduce { .. } => Some(self.axes(result)),
                _ => None,
            };
            for (n, &a) in inst.args.iter().enumerate() {
                let Some(other) = &rows[a.0 as usize] else { continue };
                let agree = row.as_ref().is_none_or(|r| r == other);
                if moves(&inst.op, n) || !agree {
                    self.store(a);
                    return true;
                }
                row = Some(other.clone());
            }
            rows[result.0 as usize] = match row {
                Some(_) if self.is_stored(result) => {
                    if self.spread(result) {
                        return true;
                    }
                    None
                }
                row => row,
            };
        }
        // The kernels that each expression would be computed in, by the value that the kernel makes.
        let mut homes: Vec<BTreeSet<ValueId>> = vec![BTreeSet::new(); f.values.len()];
        for inst in f.body.iter().rev() {
            for &r in &inst.results {
                let i = r.0 as usize;
                if !self.stored[i] && rows[i].is_some() && homes[i].len() > 1 {
                    let again = (homes[i].len() - 1) as f64;
                    let time = self.expression(r, None).map(|e| again * self.seconds(e.flops, e.bytes));
                    if time.is_none_or(|time| time >= self.machine.launch) {
                        self.store(r);
                        let why = time.map_or_else(
                            || "it cannot be computed there".to_owned(),
                            |time| {
                                format!(
                                    "computing it again takes {time:.1e} s, a launch {:.1e} s",
                                    self.machine.launch
                                )
                            },
                        );
                        let message =
                            format!("is stored for the kernels of {}: {why}", self.names(&homes[i]));
                        self.say(Kind::Missed, r, message);
                        return true;
                    }
                }
                let into = if self.stored[i] { BTreeSet::from([r]) } else { homes[i].clone() };
                for a in &inst.args {
                    homes[a.0 as usize].extend(&into);
                }
            }
        }
        false
    }
}

/// An operand of products.
struct Wanted {
    /// The products.
    uses: f64,
    /// Those of them that cannot compute it where they read it.
    stores: f64,
    /// The tiles that each part of it is wanted in.
    tiles: f64,
    /// Its axes that all of their results have.
    rows: BTreeSet<AxisId>,
    /// Whether all of them can fold rows of it.
    folds: bool,
    /// Whether all of them can read rows of it where an index says.
    gathers: bool,
}

/// What computing a value from what is stored takes.
#[derive(Default)]
struct Expression {
    flops: f64,
    bytes: f64,
    folds: bool,
    gathers: bool,
}

/// Whether both operands have every summed axis and there is one.
pub(crate) fn is_matrix_product(f: &Function, inst: &Inst) -> bool {
    let summed = f.summed(&inst.args, f.ty(inst.result()));
    inst.args.len() == 2
        && !summed.is_empty()
        && summed.iter().all(|&a| inst.args.iter().all(|&x| f.ty(x).has(a)))
}

/// Whether the result is the operand's memory under other axes.
pub(crate) fn is_view(f: &Function, inst: &Inst) -> bool {
    let ty = f.ty(inst.result());
    let in_place = |x: &Type, from: &[AxisId], to: &[AxisId]| {
        let Some(at) = x.position(from[0]) else { return false };
        x.axes[at..].starts_with(from) && {
            let mut axes = x.axes[..at].to_vec();
            axes.extend_from_slice(to);
            axes.extend_from_slice(&x.axes[at + from.len()..]);
            axes == ty.axes && x.dtype == ty.dtype
        }
    };
    match &inst.op {
        Op::Rename { from, to } => in_place(f.ty(inst.args[0]), &[*from], &[*to]),
        Op::Split { axis, into } => in_place(f.ty(inst.args[0]), &[*axis], into),
        Op::Merge { axes, into } => in_place(f.ty(inst.args[0]), axes, &[*into]),
        _ => false,
    }
}

/// The gather that makes one operand of a contraction, if a grouped kernel can do without its result.
pub(crate) fn gathered<'f>(f: &'f Function, inst: &Inst, defs: &[Def<'f>]) -> Option<&'f Inst> {
    let (Op::Contract, &[a, b]) = (&inst.op, &inst.args[..]) else { return None };
    let made = |v: ValueId| match defs[v.0 as usize] {
        Def::Inst(_, inst) => Some(inst),
        Def::Param(_) | Def::Weight(_) | Def::Cache(_) => None,
    };
    [(a, b), (b, a)].into_iter().find_map(|(x, other)| {
        // Rows of codes are gathered as words.
        let Source { elements: table, gather, .. } = Source::of(f, &made, x);
        let gather = gather?;
        // What is multiplied with itself is gathered once, to be read.
        let fits =
            x != other && GroupedPlan::fits(&table, f.ty(gather.args[1]), f.ty(other), f.ty(inst.result()));
        fits.then_some(gather)
    })
}

/// An operand of a contraction as codes, if these can be read in place of it: they are `there`, or are gathered of what is as a grouped
/// kernel does.
pub(crate) fn read_as_codes<'f>(
    f: &'f Function,
    inst: &Inst,
    operand: ValueId,
    defs: &[Def<'f>],
    there: impl Fn(ValueId) -> bool,
) -> Option<Coded> {
    let made = |v: ValueId| match defs[v.0 as usize] {
        Def::Inst(_, inst) => Some(inst),
        Def::Param(_) | Def::Weight(_) | Def::Cache(_) => None,
    };
    let coded = Coded::of(f, &made, operand)?;
    let held = match coded.rows(&made) {
        Some(rows) => gathered(f, inst, defs).filter(|g| *g == rows.gather).map(|_| rows.held)?,
        None => coded.held,
    };
    held.into_iter().all(there).then_some(coded)
}

/// Whether an operand is read at other places than the one where the result is made.
fn moves(op: &Op, operand: usize) -> bool {
    match op {
        Op::Rename { .. } | Op::Split { .. } | Op::Merge { .. } | Op::Slice { .. } | Op::Concat { .. } => {
            true
        }
        Op::Rope { .. } | Op::Gather { .. } | Op::TopK { .. } | Op::TopIndices { .. } => operand == 0,
        Op::Const(_)
        | Op::Position { .. }
        | Op::Unary(_)
        | Op::Binary(_)
        | Op::Select
        | Op::Cast
        | Op::Contract
        | Op::Reduce { .. }
        | Op::Pack { .. }
        | Op::Unpack { .. }
        | Op::Broadcast { .. }
        | Op::ScatterAdd { .. }
        | Op::Past { .. }
        | Op::Append { .. }
        | Op::Softmax { .. }
        | Op::RmsNorm { .. }
        | Op::Call { .. } => false,
    }
}
