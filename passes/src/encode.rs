//! Weights in 8 bits: codes, and a scale for each group of elements that lie behind one another.
//!
//! What   w  =>  decode (codes w, scales w),   gather w, i  =>  decode (gather (codes w), i, gather (scales w), i)
//! Why    weights are most of what decode reads, and of the memory of serving
//! Cost   bytes, scales included: a weight that would not get smaller stays as it is
//! Needs  products of two, in their order.  Leaves  weights that hold codes and scales, made of what is stored when they are loaded
//! Cases  encode.ir
//!
//! Only weights with two axes or more that are multiplied with, or of which rows are gathered: an element of these is one of many that are
//! added up, or one of a row. What is multiplied only to be compared stays, such as the scores of experts: a choice makes a large
//! difference of a small one. Groups lie along the last axis of a weight, whichever is summed, and divide it.
//!
//! As in [`quantise`](crate::quantise), rounding changes numbers ([`rounded`] is what it makes), and that a weight is read as
//! it was coded does not: `--validate` compares the two.

use std::collections::{BTreeMap, BTreeSet};

use latentc_ir::{
    AxisId, DType, Def, Factor, Function, Held, Inst, Module, Op, Stored, Type, ValueId, Weight,
};
use serde::Serialize;

use crate::codes::{Axes, Coded, Coder, Codes, Layout};
use crate::rewrite::Rebuild;
use crate::{Context, Graph, Kind, PassError, Remark};

const NAME: &str = "encode";

/// What weights are held in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct WeightForm {
    /// The most elements that share a scale.
    pub group: u64,
}

/// Elements that share a scale if no one says otherwise.
pub const GROUP: u64 = 128;

impl Default for WeightForm {
    /// In groups of [`GROUP`].
    fn default() -> WeightForm {
        WeightForm { group: GROUP }
    }
}

/// The module with weights in the form that the context asks for; as it is if it asks for none.
///
/// # Errors
/// If gradients by these weights are wanted.
pub fn encode(module: &Module, cx: &mut Context) -> Result<Module, PassError> {
    let Some(form) = cx.weights else { return Ok(module.clone()) };
    if cx.graph == Graph::Gradient
        && let Some(f) = module.entry()
    {
        let message = "there is no gradient by weights that are held in int8: train without --weights, \
                       and hold what was trained so where it serves";
        return Err(PassError::new(NAME, f, message.to_owned()));
    }
    let remarks = &mut cx.remarks;
    Ok(each(module, |f| {
        let mut e = Encoder::new(f, form, remarks);
        e.header();
        for inst in &f.body {
            match inst.op {
                Op::Gather { .. } if e.coded.contains_key(&inst.args[0]) => e.gathered(inst),
                _ => e.read(inst, |e, value, inst| e.decoded(value, inst)),
            }
        }
        e.coder.r.finish()
    }))
}

/// The module with weights rounded as they will be held: what `encode` must not change.
pub fn rounded(module: &Module, cx: &Context) -> Module {
    let Some(form) = cx.weights.filter(|_| cx.graph != Graph::Gradient) else { return module.clone() };
    each(module, |f| {
        let mut e = Encoder::new(f, form, &mut Vec::new());
        e.coder.r.header();
        for inst in &f.body {
            e.read(inst, |e, value, inst| e.rounded(value, inst));
        }
        e.coder.r.finish()
    })
}

fn each(module: &Module, function: impl FnMut(&Function) -> Function) -> Module {
    let functions = module.functions.iter().map(function).collect();
    Module { name: module.name.clone(), functions, entry: module.entry.clone() }
}

struct Encoder<'a> {
    coder: Coder<'a>,
    /// How each weight is coded that is.
    coded: BTreeMap<ValueId, Layout>,
    /// The axes that coding adds, by the one that is cut into groups.
    axes: BTreeMap<AxisId, Axes>,
    /// What stands for a weight: codes and scales.
    held: BTreeMap<ValueId, [ValueId; 2]>,
    /// Of which weights there is what they stand for.
    made: BTreeSet<ValueId>,
}

impl<'a> Encoder<'a> {
    fn new(f: &'a Function, form: WeightForm, remarks: &mut Vec<Remark>) -> Encoder<'a> {
        let (users, compared) = (f.users(), compared(f));
        let mut coded = BTreeMap::new();
        for weight in &f.weights {
            let value = weight.value;
            let Some(&first) = users[value.0 as usize].first() else { continue };
            let ty = f.ty(value);
            if ty.axes.len() < 2 || !ty.dtype.is_float() {
                continue;
            }
            let users = users[value.0 as usize].iter().map(|&n| &f.body[n]);
            let name = &f.value(value).name;
            let (kind, message) = match layout(f, weight, users, &compared, form) {
                Ok(layout) => {
                    let &Layout { groups, group, bytes: [before, after], .. } = &layout;
                    let rows =
                        f.ty(value).axes.iter().filter_map(|&a| f.axis(a).size.fixed()).product::<u64>()
                            / layout.elements;
                    coded.insert(value, layout);
                    let message = format!(
                        "`{name}` is held in int8: {} bytes in place of {}, in each row {groups} scales for groups of {group}",
                        rows * after,
                        rows * before
                    );
                    (Kind::Applied, message)
                }
                Err(why) => (Kind::Missed, format!("`{name}` is held as it is: {why}")),
            };
            remarks.push(Remark::new(kind, NAME, f, &f.body[first], message));
        }
        let coder = Coder { r: Rebuild::new(f, NAME), codes: Codes::Int8 };
        Encoder { coder, coded, axes: BTreeMap::new(), held: BTreeMap::new(), made: BTreeSet::new() }
    }

    /// Takes weights and caches over, those that are coded as codes and scales.
    fn header(&mut self) {
        let old = self.coder.r.old;
        for weight in &old.weights {
            let (value, stored) = (old.value(weight.value), &weight.stored);
            let Some(layout) = self.coded.get(&weight.value) else {
                let id = self.coder.r.new.add_weight(&value.name, value.ty.clone(), stored.clone());
                self.coder.r.replace(weight.value, id);
                continue;
            };
            let last = layout.row[0];
            let axes = self.axes.entry(last).or_insert_with(|| self.coder.axes(layout));
            let [word, field] = axes.planes[0];
            let group = axes.group;
            let part = |factor: &Factor| match factor {
                Factor::Axis(a) if *a == last => [group, word, field].map(Factor::Axis).to_vec(),
                factor => vec![factor.clone()],
            };
            let dims: Vec<Vec<_>> =
                stored.dims.iter().map(|dim| dim.iter().flat_map(part).collect()).collect();
            let mut add = |name: &str, dtype, own: &[AxisId], held| {
                let axes = [&layout.rows[..], own].concat();
                let stored = Stored { tensor: stored.tensor.clone(), dims: dims.clone(), held };
                self.coder.r.new.add_weight(&format!("{}.{name}", value.name), Type::new(dtype, axes), stored)
            };
            let codes = add("codes", DType::I32, &[group, word], Held::Codes);
            let scales = add("scales", DType::F32, &[group], Held::Scales);
            self.held.insert(weight.value, [codes, scales]);
        }
        for &cache in &old.caches {
            let value = old.value(cache);
            let id = self.coder.r.new.add_cache(&value.name, value.ty.clone());
            self.coder.r.replace(cache, id);
        }
    }

    /// Takes an instruction over. What it reads of coded weights is made before the first that does.
    fn read(&mut self, inst: &Inst, make: impl Fn(&mut Self, ValueId, &Inst) -> ValueId) {
        for &a in &inst.args {
            if self.coded.contains_key(&a) && self.made.insert(a) {
                let id = make(self, a, inst);
                self.coder.r.replace(a, id);
            }
        }
        self.coder.r.copy(inst);
    }

    /// What the codes of a weight stand for.
    fn decoded(&mut self, weight: ValueId, inst: &Inst) -> ValueId {
        let (layout, [codes, scale]) = (&self.coded[&weight], self.held[&weight]);
        let value = self.coder.r.old.value(weight);
        let coded = Coded { words: vec![codes], scale };
        let axes = &self.axes[&layout.row[0]];
        self.coder.decode(layout, axes, inst, coded, &layout.rows, (&value.name, &value.ty))
    }

    /// What is gathered of a weight: that of its codes and scales, decoded.
    fn gathered(&mut self, inst: &Inst) {
        let (layout, held) = (&self.coded[&inst.args[0]], self.held[&inst.args[0]]);
        let index = self.coder.r.get(inst.args[1]);
        let value = self.coder.r.old.value(inst.result());
        let rows: Vec<_> = value.ty.axes.iter().copied().filter(|a| *a != layout.row[0]).collect();
        let gather = |c: &mut Coder<'_>, from: ValueId| {
            let ty = c.r.new.ty(from);
            let own = ty.axes.iter().filter(|a| !layout.rows.contains(a));
            let ty = Type::new(ty.dtype, rows.iter().chain(own).copied().collect::<Vec<_>>());
            let name = format!("{}.{}", value.name, if ty.dtype.is_float() { "scales" } else { "codes" });
            c.r.emit(inst, inst.op.clone(), &[from, index], &name, ty)
        };
        let [words, scale] = held.map(|from| gather(&mut self.coder, from));
        let axes = &self.axes[&layout.row[0]];
        let coded = Coded { words: vec![words], scale };
        let id = self.coder.decode(layout, axes, inst, coded, &rows, (&value.name, &value.ty));
        self.coder.r.replace(inst.result(), id);
    }

    /// What a weight is when it has been coded.
    fn rounded(&mut self, weight: ValueId, inst: &Inst) -> ValueId {
        let (layout, id) = (&self.coded[&weight], self.coder.r.get(weight));
        let ty = self.coder.r.old.ty(weight);
        let axes = self.coder.axes(layout);
        let coded = self.coder.encode(layout, &axes, inst, id);
        self.coder.decode(layout, &axes, inst, coded, &layout.rows, ("", ty))
    }
}

/// How a weight is coded, or why it is not.
fn layout<'f>(
    f: &Function,
    weight: &Weight,
    users: impl Iterator<Item = &'f Inst>,
    compared: &BTreeSet<ValueId>,
    form: WeightForm,
) -> Result<Layout, String> {
    let (value, ty) = (weight.value, f.ty(weight.value));
    let (&last, rows) = ty.axes.split_last().ok_or("it has no axes")?;
    for user in users {
        let reads = match user.op {
            Op::Contract => true,
            Op::Gather { axis } => axis != last && user.args[1] != value,
            _ => false,
        };
        if !reads {
            return Err(format!(
                "`{}` is made of it by `{}`",
                f.value(user.results[0]).name,
                user.op.mnemonic()
            ));
        }
    }
    if f.results.contains(&value) {
        return Err("it is a result".to_owned());
    }
    if compared.contains(&value) {
        return Err("what it is multiplied with is compared".to_owned());
    }
    let axis = f.axis(last);
    if !weight.stored.dims.iter().flatten().any(|factor| *factor == Factor::Axis(last)) {
        return Err(format!("along `{}` it is one of several parts of what is stored", axis.name));
    }
    let size = axis.size.fixed().unwrap_or(0);
    let group = (1..=form.group.min(size)).rev().find(|n| size.is_multiple_of(*n) && n.is_multiple_of(4));
    let group = group.ok_or_else(|| {
        format!(
            "no group of up to {} elements divides the {size} of `{}` and fills words",
            form.group, axis.name
        )
    })?;
    let axes = (rows.to_vec(), vec![last]);
    let layout = Layout::of(f, axes, (ty.dtype, DType::F32), Codes::Int8, group);
    let smaller = layout.filter(|layout| layout.bytes[1] < layout.bytes[0]);
    smaller.ok_or_else(|| format!("in groups of {group} it would not get smaller"))
}

/// The weights of products that are only made to be compared: whose results lead to a selection with no other product between.
fn compared(f: &Function) -> BTreeSet<ValueId> {
    let defs = f.defs();
    let selections = f.body.iter().filter(|i| matches!(i.op, Op::TopK { .. } | Op::TopIndices { .. }));
    let mut work: Vec<_> = selections.map(|i| i.args[0]).collect();
    let mut seen: BTreeSet<_> = work.iter().copied().collect();
    while let Some(value) = work.pop() {
        let Def::Inst(_, inst) = defs[value.0 as usize] else { continue };
        let args = inst.args.iter().copied();
        // What a product is made of is compared no more, but for the weight.
        let weighs = |v: &ValueId| inst.op != Op::Contract || matches!(defs[v.0 as usize], Def::Weight(_));
        work.extend(args.filter(weighs).filter(|v| seen.insert(*v)));
    }
    seen.retain(|v| matches!(defs[v.0 as usize], Def::Weight(_)));
    seen
}
