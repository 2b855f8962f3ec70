//! Caches in pages: a pool that all sequences share, and a table for each that says where its pages lie.
//!
//! What   append cache, x, pos  =>  gather (append pool, x, slot pos), slot s
//!        with slot p = table[p / page] page + p % page
//! Why    sequences of different lengths take memory as they grow, not each as much as the longest may, and what two sequences begin with
//!        can lie there once (arXiv 2309.06180)
//! Cost   four bytes of a table for each page that is read, and one more index for each position
//! Needs  a derived graph.  Leaves  pools in place of caches, and a parameter `table` of every function that has them
//! Cases  page.ir
//!
//! A page is as many positions as a power of two, so that a kernel which walks a sequence in pieces of no more finds each piece in one page,
//! whose place it looks up once. Entries of the table beyond what a sequence has filled may be any page there is: what is read there is hidden
//! by the mask of whoever reads it, as what lies behind the end of a cache is.

use latentc_ir::{AxisId, Binary, DType, Def, Function, Inst, Module, Op, Real, Size, Type, ValueId};
use serde::{Deserialize, Serialize};

use crate::derive::caller_axis;
use crate::rewrite::Rebuild;
use crate::{Context, Kind, PassError, Remark};

const NAME: &str = "page";

/// The parameter that says where pages lie.
pub const TABLE: &str = "table";

/// The most positions of a page.
pub const MOST: u64 = 1 << 16;

/// The module with caches in pages of as many positions as the context asks for; as it is if it asks for none, or if nothing is kept.
///
/// # Errors
/// If the number is no power of two, or is too large; or if a function that is called has no operand with the axes of the sequences.
pub fn page(module: &Module, cx: &mut Context) -> Result<Module, PassError> {
    let Some(page) = cx.page.filter(|_| cx.graph.serves()) else { return Ok(module.clone()) };
    if let Err(message) = fits(page) {
        return Err(PassError::new(NAME, &module.functions[0], message));
    }
    let symbols = ["pages", "slots"].map(|name| free(module, name));
    let mut out = Module { name: module.name.clone(), functions: Vec::new(), entry: module.entry.clone() };
    for f in &module.functions {
        let paged = Pager::of(f, &out, page, &symbols)?.map(|pager| pager.run(cx, &out));
        out.functions.push(paged.unwrap_or_else(|| f.clone()));
    }
    Ok(out)
}

/// Whether a page can have so many positions.
///
/// # Errors
/// If it cannot, with what it can have.
pub fn fits(page: u64) -> Result<(), String> {
    if page.is_power_of_two() && (2..=MOST).contains(&page) {
        return Ok(());
    }
    Err(format!("a page of {page} positions: take a power of two from 2 to {MOST}, such as 64"))
}

/// A size that no axis of the module has yet.
fn free(module: &Module, name: &str) -> Size {
    let taken = |s: &Size| module.functions.iter().flat_map(|f| &f.axes).any(|a| a.size == *s);
    let mut size = Size::Sym(name.to_owned());
    while taken(&size) {
        size = Size::Sym(format!("{size}_of_pool"));
    }
    size
}

/// Whether an instruction appends to a cache of its own, whose axis counts the positions of a sequence.
fn appends(f: &Function, inst: &Inst) -> bool {
    matches!(inst.op, Op::Append { to, .. } if f.axis(to).like.is_some())
}

/// A function at work.
struct Pager<'a> {
    r: Rebuild<'a>,
    page: u64,
    /// The parameter, its axis that counts pages, and that of the pools.
    table: ValueId,
    pages: AxisId,
    slots: AxisId,
    /// Where positions lie in the pool, by the value that they are.
    known: Vec<(ValueId, ValueId)>,
    /// The positions of an axis.
    positions: Vec<(AxisId, ValueId)>,
}

impl<'a> Pager<'a> {
    /// For a function, if it or one that it calls has caches.
    fn of(
        f: &'a Function,
        done: &Module,
        page: u64,
        [pages, slots]: &[Size; 2],
    ) -> Result<Option<Pager<'a>>, PassError> {
        let mut sequences: Option<Vec<AxisId>> = None;
        for inst in &f.body {
            let own = match &inst.op {
                Op::Append { from, .. } if appends(f, inst) => {
                    f.ty(inst.args[2]).axes.iter().copied().filter(|a| a != from).collect()
                }
                Op::Call { callee, .. } => {
                    let Some(g) = done.function(callee) else { continue };
                    let Some(&table) = g.params.get(inst.args.len()) else { continue };
                    let axes = &g.ty(table).axes;
                    let of_caller = axes[..axes.len() - 1].iter().map(|&a| caller_axis(f, g, &inst.args, a));
                    of_caller.collect::<Option<Vec<_>>>().ok_or_else(|| {
                        PassError::new(
                            NAME,
                            f,
                            format!("@{callee} needs a table of pages, but no operand has its axes"),
                        )
                    })?
                }
                _ => continue,
            };
            match &sequences {
                Some(other) if *other != own => {
                    let message = "its caches are of different sequences, and it has one table".to_owned();
                    return Err(PassError::new(NAME, f, message));
                }
                _ => sequences = Some(own),
            }
        }
        let Some(mut axes) = sequences else { return Ok(None) };
        let mut r = Rebuild::new(f, NAME);
        let pages = r.new.add_axis("page", pages.clone(), None);
        // Only who has pools counts slots.
        let own = f.body.iter().any(|i| appends(f, i));
        let slots = if own { r.new.add_axis("slot", slots.clone(), None) } else { pages };
        axes.push(pages);
        let table = r.new.add_param(TABLE, Type::new(DType::I32, axes));
        Ok(Some(Pager { r, page, table, pages, slots, known: Vec::new(), positions: Vec::new() }))
    }

    fn run(mut self, cx: &mut Context, done: &Module) -> Function {
        let f = self.r.old;
        // What is appended to is a pool, all else stays.
        let pools: Vec<(ValueId, Type)> =
            f.body.iter().filter(|i| appends(f, i)).map(|i| (i.args[0], self.pool(i))).collect();
        for w in &f.weights {
            let value = f.value(w.value);
            let id = self.r.new.add_weight(&value.name, value.ty.clone(), w.stored.clone());
            self.r.replace(w.value, id);
        }
        for &c in &f.caches {
            let value = f.value(c);
            let ty = pools.iter().find(|(cache, _)| *cache == c).map_or(&value.ty, |(_, ty)| ty).clone();
            let id = self.r.new.add_cache(&value.name, ty);
            self.r.replace(c, id);
        }
        for inst in &f.body {
            match &inst.op {
                &Op::Append { from, to } if appends(f, inst) => {
                    cx.remarks.push(self.remark(inst, to));
                    self.append(inst, from, to);
                }
                Op::Call { callee, .. } => {
                    self.r.copy(inst);
                    if done.function(callee).is_some_and(|g| g.params.len() > inst.args.len()) {
                        let call = self.r.new.body.last_mut().expect("one was just pushed");
                        call.args.push(self.table);
                    }
                }
                _ => self.r.copy(inst),
            }
        }
        self.r.finish()
    }

    /// The type of the pool in place of what an instruction appends to.
    fn pool(&self, inst: &Inst) -> Type {
        let f = self.r.old;
        let Op::Append { to, .. } = inst.op else { unreachable!("pools are appended to") };
        let (ty, pos) = (f.ty(inst.args[0]), f.ty(inst.args[2]));
        // Slots come first in memory: a page is one block.
        let rest = ty.axes.iter().copied().filter(|&a| a != to && !pos.has(a));
        Type::new(ty.dtype, [self.slots].into_iter().chain(rest).collect::<Vec<_>>())
    }

    fn append(&mut self, inst: &Inst, from: AxisId, to: AxisId) {
        let [pool, rows, pos] = [0, 1, 2].map(|n| self.r.get(inst.args[n]));
        let slot = self.slot(inst, pos);
        let (op, ty) = (Op::Append { from, to: self.slots }, self.r.new.ty(pool).clone());
        let value = self.r.old.value(inst.result());
        let name = format!("{}.pool", value.name);
        let pool = self.r.emit(inst, op, &[pool, rows, slot], &name, ty);
        let at = match self.positions.iter().find(|(axis, _)| *axis == to) {
            Some(&(_, at)) => at,
            None => {
                let ty = Type::new(DType::I32, [to]);
                let at = self.r.emit(inst, Op::Position { axis: to }, &[], "", ty);
                self.positions.push((to, at));
                at
            }
        };
        let slot = self.slot(inst, at);
        let read = Op::Gather { axis: self.slots };
        let id = self.r.emit(inst, read, &[pool, slot], &value.name, value.ty.clone());
        self.r.replace(inst.result(), id);
    }

    /// Where positions lie.
    fn slot(&mut self, inst: &Inst, pos: ValueId) -> ValueId {
        if let Some(&(_, slot)) = self.known.iter().find(|(of, _)| *of == pos) {
            return slot;
        }
        let one = self.r.new.ty(pos).axes.clone();
        let (table, pages) = (self.table, self.pages);
        let more = self.r.new.ty(table).axes.iter().copied().filter(|a| *a != pages && !one.contains(a));
        let of_sequence: Vec<_> = more.chain(one.iter().copied()).collect();
        let mut emit = |op: Op, args: &[ValueId], name: &str, axes: &[AxisId]| {
            self.r.emit(inst, op, args, name, Type::new(DType::I32, axes.to_vec()))
        };
        let page = emit(Op::Const(vec![Real(self.page as f64)]), &[], "", &[]);
        let number = emit(Op::Binary(Binary::Div), &[pos, page], "", &one);
        let place = emit(Op::Gather { axis: pages }, &[table, number], "", &of_sequence);
        let first = emit(Op::Binary(Binary::Mul), &[place, page], "", &of_sequence);
        let before = emit(Op::Binary(Binary::Mul), &[number, page], "", &one);
        let within = emit(Op::Binary(Binary::Sub), &[pos, before], "", &one);
        let slot = emit(Op::Binary(Binary::Add), &[first, within], "slot", &of_sequence);
        self.known.push((pos, slot));
        slot
    }

    fn remark(&self, inst: &Inst, to: AxisId) -> Remark {
        let f = self.r.old;
        let ty = self.pool(inst);
        let fixed = ty.axes.iter().filter_map(|&a| f.axes.get(a.0 as usize)?.size.fixed()).product::<u64>();
        let token = fixed * ty.dtype.bytes();
        let message = format!(
            "`{}` lies in pages of {} positions, {} bytes each, and is read where a table says for each page: a sequence takes pages as `{}` \
             grows, and not room for the longest",
            f.value(inst.args[0]).name,
            self.page,
            token * self.page,
            f.axis(to).name
        );
        Remark::new(Kind::Applied, NAME, f, inst, message)
    }
}

/// Indices of positions in a pool: what the pass makes of them, seen again in a graph or a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slots {
    /// Where the pages of each sequence lie.
    pub table: ValueId,
    /// Its axis that counts pages.
    pub pages: AxisId,
    /// The positions.
    pub positions: ValueId,
    /// Positions of a page: a power of two.
    pub page: u64,
}

impl Slots {
    /// All reads and writes of pools: the instruction, the axis of the pool, and the places along it.
    pub fn all(f: &Function) -> Vec<(&Inst, AxisId, Slots)> {
        let defs = f.defs();
        let places = |inst: &'_ Inst| match inst.op {
            Op::Append { to, .. } => Some((to, inst.args[2])),
            Op::Gather { axis } => Some((axis, inst.args[1])),
            _ => None,
        };
        let one = |inst| {
            let (axis, index) = places(inst)?;
            Some((inst, axis, Slots::of(f, &defs, index)?))
        };
        f.body.iter().filter_map(one).collect()
    }

    /// Whether a value is such an index. `defs` are the function's.
    pub fn of(f: &Function, defs: &[Def<'_>], value: ValueId) -> Option<Slots> {
        let made = |v: ValueId| match defs[v.0 as usize] {
            Def::Inst(_, inst) => Some(inst),
            Def::Param(_) | Def::Weight(_) | Def::Cache(_) => None,
        };
        let binary = |v: ValueId, by: Binary| {
            let inst = made(v).filter(|i| i.op == Op::Binary(by))?;
            Some((inst.args[0], inst.args[1]))
        };
        let (first, within) = binary(value, Binary::Add)?;
        let (place, size) = binary(first, Binary::Mul)?;
        let page = match made(size).map(|i| &i.op) {
            Some(Op::Const(numbers)) => match numbers[..] {
                [n] if n.0.fract() == 0.0 && fits(n.0 as u64).is_ok() => n.0 as u64,
                _ => return None,
            },
            _ => return None,
        };
        let looked = made(place)?;
        let Op::Gather { axis: pages } = looked.op else { return None };
        let (table, number) = (looked.args[0], looked.args[1]);
        let (positions, by) = binary(number, Binary::Div)?;
        let (whole, before) = binary(within, Binary::Sub)?;
        let same = |v: ValueId| v == size || made(v).map(|i| &i.op) == made(size).map(|i| &i.op);
        let (again, times) = binary(before, Binary::Mul)?;
        let agrees = whole == positions && again == number && same(by) && same(times);
        (agrees && f.ty(table).has(pages)).then_some(Slots { table, pages, positions, page })
    }
}

/// The pools of a module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pool {
    /// Positions of a page.
    pub page: u64,
    /// The size that counts slots of pools.
    pub slots: String,
    /// The size that counts pages of a sequence: that of the table's last axis.
    pub pages: String,
    /// The size that counts positions of the past, if they are read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub past: Option<String>,
}

impl Pool {
    /// Those of a module, if its caches are pools: of one kind, as the pass makes them.
    pub fn of(module: &Module) -> Option<Pool> {
        let mut pool: Option<Pool> = None;
        for f in &module.functions {
            let defs = f.defs();
            for (_, axis, slots) in Slots::all(f) {
                let (Size::Sym(of_pool), Size::Sym(of_table)) =
                    (&f.axis(axis).size, &f.axis(slots.pages).size)
                else {
                    continue;
                };
                let past = match defs[slots.positions.0 as usize] {
                    Def::Inst(_, Inst { op: Op::Position { axis }, .. }) => {
                        Some(f.axis(*axis).size.to_string())
                    }
                    Def::Inst(..) | Def::Param(_) | Def::Weight(_) | Def::Cache(_) => None,
                };
                let known = pool.get_or_insert_with(|| Pool {
                    page: slots.page,
                    slots: of_pool.clone(),
                    pages: of_table.clone(),
                    past: None,
                });
                known.past = known.past.take().or(past);
            }
        }
        pool
    }

    /// The sizes that count sequences in the table, if a value of this type is it.
    pub fn sequences(&self, f: &Function, ty: &Type) -> Option<Vec<Size>> {
        let (last, rest) = ty.axes.split_last()?;
        let counts = f.axis(*last).size == Size::Sym(self.pages.clone());
        (ty.dtype == DType::I32 && counts).then(|| rest.iter().map(|&a| f.axis(a).size.clone()).collect())
    }

    /// Pages for so many positions.
    pub fn pages_for(&self, positions: u64) -> u64 {
        positions.div_ceil(self.page)
    }
}
