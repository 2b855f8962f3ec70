//! Caches in fewer bits: codes of a few bits, and a scale for each group of elements of a token.
//!
//! What   past x  =>  decode (past (encode x)), where decode (encode x) is x to within half a step
//! Why    a cache is most of the memory of serving, and reading it most of the time of decode; DeepSeek-V2 keeps 6 bits
//!        an element (section 3.2.3)
//! Cost   bytes a token, scales included: a cache that would not get smaller stays as it is
//! Needs  a placed cache: what `past` reads is kept.  Leaves  codes packed in 32-bit words, which every target can store
//! Cases  quantise.ir
//!
//! How a token's elements are coded, and how far off they read, is said in [`codes`](crate::codes).
//!
//! The pass is two laws. That of rounding changes numbers, [`rounded`] is what it makes; that the past of what works on each
//! position alone is the same of the past does not, and that is what `--validate` compares.

use latentc_ir::{AxisId, DType, Function, Inst, Module, Op, Type, ValueId};
use serde::Serialize;

use crate::codes::{Coded, Coder, Codes, Layout};
use crate::rewrite::Rebuild;
use crate::{Context, Kind, Remark};

const NAME: &str = "quantise";

/// What caches are held in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct CacheForm {
    /// The elements.
    pub codes: Codes,
    /// The most elements of a token that share a scale.
    pub group: u64,
    /// Whether what is rotated by its position stays as it is: of rounded keys it is the part that tells places apart.
    pub rotated_wide: bool,
}

/// Elements that share a scale if no one says otherwise.
pub const GROUP: u64 = 128;

impl CacheForm {
    /// These codes in groups of [`GROUP`], in all caches.
    pub fn new(codes: Codes) -> CacheForm {
        CacheForm { codes, group: GROUP, rotated_wide: false }
    }
}

/// The module with caches in the form that the context asks for; as it is if it asks for none, or if nothing is kept.
pub fn quantise(module: &Module, cx: &mut Context) -> Module {
    let (form, graph) = (cx.cache, cx.graph);
    let Some(form) = form.filter(|_| graph.serves()) else { return module.clone() };
    let remarks = &mut cx.remarks;
    each(module, form, |q, layout, inst| {
        remarks.push(q.remark(layout, inst));
        q.kept(layout, inst)
    })
}

/// The module with values rounded as caches will hold them, before they are kept: what `quantise` must not change.
pub fn rounded(module: &Module, cx: &Context) -> Module {
    let Some(form) = cx.cache.filter(|_| cx.graph.serves()) else { return module.clone() };
    each(module, form, |q, layout, inst| q.rounded(layout, inst))
}

/// The module with each `past` of something that gets smaller replaced.
fn each(
    module: &Module,
    form: CacheForm,
    mut replace: impl FnMut(&mut Quantiser<'_>, &Layout, &Inst) -> ValueId,
) -> Module {
    let function = |f: &Function| {
        let mut r = Rebuild::new(f, NAME);
        r.header();
        let mut q = Quantiser { coder: Coder { r, codes: form.codes }, form };
        for inst in &f.body {
            match q.layout(inst) {
                Some(layout) => {
                    let id = replace(&mut q, &layout, inst);
                    q.coder.r.replace(inst.result(), id);
                }
                None => q.coder.r.copy(inst),
            }
        }
        q.coder.r.finish()
    };
    let functions = module.functions.iter().map(function).collect();
    Module { name: module.name.clone(), functions, entry: module.entry.clone() }
}

struct Quantiser<'a> {
    coder: Coder<'a>,
    form: CacheForm,
}

impl Quantiser<'_> {
    /// How the value that an instruction keeps is coded, if it is.
    fn layout(&self, inst: &Inst) -> Option<Layout> {
        let f = self.coder.r.old;
        let Op::Past { from, .. } = inst.op else { return None };
        let ty = f.ty(inst.args[0]);
        if !ty.dtype.is_float() || (self.form.rotated_wide && is_rotated(f, inst.args[0])) {
            return None;
        }
        let layout = layout(f, ty, from, self.form.codes, self.form.group)?;
        (layout.bytes[1] < layout.bytes[0]).then_some(layout)
    }

    fn remark(&self, layout: &Layout, inst: &Inst) -> Remark {
        let f = self.coder.r.old;
        let ty = f.ty(inst.args[0]);
        let Op::Past { from, .. } = inst.op else { unreachable!("layouts are of what is kept") };
        let others = Codes::ALL
            .into_iter()
            .filter(|&c| c != self.form.codes)
            .filter_map(|c| Some(format!("{c} {}", self::layout(f, ty, from, c, self.form.group)?.bytes[1])));
        let others: Vec<_> = others.collect();
        let &Layout { elements, groups, group, bytes: [before, after], .. } = layout;
        let scales = match (self.form.codes, groups) {
            (Codes::Bf16, _) => String::new(),
            (_, 1) => format!(", with one scale for {elements} elements"),
            (_, n) => format!(", with {n} scales for {elements} elements, one for each {group}"),
        };
        let name = &f.value(inst.args[0]).name;
        let message = format!(
            "`{name}` is kept in {}: {after} bytes a token in place of {before}{scales}; others would take: {}",
            self.form.codes,
            others.join(", ")
        );
        Remark::new(Kind::Applied, NAME, f, inst, message)
    }

    /// The past of the codes, decoded.
    fn kept(&mut self, layout: &Layout, inst: &Inst) -> ValueId {
        let Op::Past { from, to } = inst.op else { unreachable!("layouts are of what is kept") };
        let x = self.coder.r.get(inst.args[0]);
        let past = |q: &mut Self, v: ValueId| {
            let ty = q.coder.r.new.ty(v).clone();
            let axes: Vec<_> = ty.axes.iter().map(|&a| if a == from { to } else { a }).collect();
            let name = q.coder.r.new.value(v).name.clone();
            q.coder.r.emit(
                inst,
                Op::Past { from, to },
                &[v],
                &format!("{name}.past"),
                Type::new(ty.dtype, axes),
            )
        };
        if self.form.codes == Codes::Bf16 {
            let narrow = self.narrow(inst, x);
            let kept = past(self, narrow);
            let value = self.coder.r.old.value(inst.result());
            return self.coder.r.emit(inst, Op::Cast, &[kept], &value.name, value.ty.clone());
        }
        let axes = self.coder.axes(layout);
        let coded = self.coder.encode(layout, &axes, inst, x);
        let words = coded.words.into_iter().map(|w| past(self, w)).collect();
        let coded = Coded { words, scale: past(self, coded.scale) };
        let value = self.coder.r.old.value(inst.result()).clone();
        let tokens: Vec<_> = layout.rows.iter().map(|&a| if a == from { to } else { a }).collect();
        self.coder.decode(layout, &axes, inst, coded, &tokens, (&value.name, &value.ty))
    }

    /// The past of what is coded and decoded.
    fn rounded(&mut self, layout: &Layout, inst: &Inst) -> ValueId {
        let x = self.coder.r.get(inst.args[0]);
        let ty = self.coder.r.new.ty(x).clone();
        let back = if self.form.codes == Codes::Bf16 {
            let narrow = self.narrow(inst, x);
            self.coder.r.emit(inst, Op::Cast, &[narrow], "", ty)
        } else {
            let axes = self.coder.axes(layout);
            let coded = self.coder.encode(layout, &axes, inst, x);
            self.coder.decode(layout, &axes, inst, coded, &layout.rows, ("", &ty))
        };
        let value = self.coder.r.old.value(inst.result());
        self.coder.r.emit(inst, inst.op.clone(), &[back], &value.name, value.ty.clone())
    }

    fn narrow(&mut self, inst: &Inst, x: ValueId) -> ValueId {
        let value = self.coder.r.new.value(x).clone();
        let ty = Type::new(DType::Bf16, value.ty.axes);
        self.coder.r.emit(inst, Op::Cast, &[x], &format!("{}.narrow", value.name), ty)
    }
}

/// How a type's elements of a token are coded; `None` if it has none.
fn layout(f: &Function, ty: &Type, token: AxisId, codes: Codes, most: u64) -> Option<Layout> {
    let fixed = |&a: &AxisId| a != token && f.axis(a).size.fixed().is_some();
    let (row, tokens): (Vec<_>, Vec<_>) = ty.axes.iter().copied().partition(fixed);
    Layout::of(f, (tokens, row), (ty.dtype, ty.dtype), codes, most)
}

/// Whether a value is what `rope` makes, perhaps with other axes or in another dtype.
fn is_rotated(f: &Function, value: ValueId) -> bool {
    let Some(inst) = f.body.iter().find(|i| i.results.contains(&value)) else { return false };
    let moved = matches!(
        inst.op,
        Op::Cast
            | Op::Rename { .. }
            | Op::Broadcast { .. }
            | Op::Split { .. }
            | Op::Merge { .. }
            | Op::Concat { .. }
    );
    matches!(inst.op, Op::Rope { .. }) || (moved && inst.args.iter().any(|&a| is_rotated(f, a)))
}
