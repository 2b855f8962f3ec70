//! Operands of products that lie in memory as codes, with a scale for each group of elements along their last axis: what the pass
//! [`encode`](latentc_passes::encode) makes of weights.
//!
//! In a body such an operand is an expression like any other. It is known again here so that whoever reads codes byte by byte need not
//! make it: it is never stored, and devices whose kernels take no expressions multiply with the codes.

use std::collections::{BTreeMap, BTreeSet};

use latentc_ir::{AxisId, Binary, Function, Inst, Op, Type, ValueId};

/// An operand as codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Coded {
    /// Words of codes, and scales. Their axes are those of the elements, with groups in place of the last one and words of a group behind
    /// them.
    pub held: [ValueId; 2],
    /// The last axis of the elements.
    pub along: AxisId,
    /// Elements of a group.
    pub group: u64,
    /// Codes of a word.
    pub fields: u64,
    /// The code of zero.
    pub centre: i32,
}

/// A tensor in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// Its elements.
    Elements(ValueId),
    /// Words and scales.
    Codes(Coded, [ValueId; 2]),
}

impl Table {
    /// What lies in memory of it.
    pub fn held(&self) -> &[ValueId] {
        match self {
            Table::Elements(elements) => std::slice::from_ref(elements),
            Table::Codes(_, held) => held,
        }
    }

    /// Its elements, if these lie in memory.
    pub fn elements(&self) -> Option<ValueId> {
        match *self {
            Table::Elements(elements) => Some(elements),
            Table::Codes(..) => None,
        }
    }
}

/// What an operand is read of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source<'f> {
    /// What lies in memory.
    pub table: Table,
    /// The type of its elements, in the order in which they, or their codes, lie.
    pub elements: Type,
    /// What chooses rows of it; the operand is all of it if nothing does.
    pub gather: Option<&'f Inst>,
}

impl<'f> Source<'f> {
    /// That of a value: what it is gathered of, if it is that, elements or codes.
    pub fn of(f: &'f Function, inst: Made<'f, '_>, value: ValueId) -> Source<'f> {
        if let Some(coded) = Coded::of(f, inst, value) {
            let rows = coded.rows(inst);
            let held = rows.map_or(coded.held, |rows| rows.held);
            let (table, elements) = (Table::Codes(coded, held), coded.elements(f.ty(held[1])));
            return Source { table, elements, gather: rows.map(|rows| rows.gather) };
        }
        let gather = inst(value).filter(|i| matches!(i.op, Op::Gather { .. }));
        let table = gather.map_or(value, |gather| gather.args[0]);
        Source { table: Table::Elements(table), elements: f.ty(table).clone(), gather }
    }
}

/// Has elements made of all codes that an operand is read of, so that rows of them are gathered, in place of rows of codes. Tells the value
/// that these are; `None` if the operand is not read of codes.
pub fn decode(body: &mut Function, value: ValueId) -> Option<ValueId> {
    let Source { table: Table::Codes(coded, held), gather, .. } = Source::of(body, &made_in(body), value)
    else {
        return None;
    };
    let Some(Inst { op, args, .. }) = gather.cloned() else { return Some(value) };
    let mut all: BTreeMap<ValueId, ValueId> = coded.held.into_iter().zip(held).collect();
    let rows = |body: &Function, scales: ValueId| body.ty(scales).axes.len() - 1;
    let (own, lines) = (rows(body, held[1]), rows(body, coded.held[1]));
    let at = body.body.iter().position(|inst| inst.results.contains(&value))?;
    let mut wanted = BTreeSet::from([value]);
    let mut chain = Vec::new();
    for inst in body.body[..=at].iter().rev() {
        if wanted.contains(&inst.result()) && !all.contains_key(&inst.result()) {
            wanted.extend(&inst.args);
            chain.push(inst.clone());
        }
    }
    let mut place = at;
    for inst in chain.into_iter().rev().filter(|inst| !inst.args.is_empty()) {
        let (name, ty) = (format!("{}_all", body.value(inst.result()).name), body.ty(inst.result()));
        let axes = [&body.ty(held[1]).axes[..own], &ty.axes[lines..]].concat();
        let ty = Type::new(ty.dtype, axes);
        let args: Vec<_> = inst.args.iter().map(|a| *all.get(a).unwrap_or(a)).collect();
        let made = body.push(inst.op, &args, &[(&name, ty)])[0];
        all.insert(inst.results[0], made);
        let made = body.body.pop()?;
        body.body.insert(place, made);
        place += 1;
    }
    let elements = all.get(&value).copied()?;
    body.body[place] = Inst { op, args: vec![elements, args[1]], ..body.body[place].clone() };
    Some(elements)
}

/// What rows of codes are gathered from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodedRows<'f> {
    /// What gathers words.
    pub gather: &'f Inst,
    /// Tables of words and scales.
    pub held: [ValueId; 2],
}

/// The instruction that makes a value, if there is one.
pub type Made<'f, 'm> = &'m dyn Fn(ValueId) -> Option<&'f Inst>;

/// What makes the values of a kernel's body, which are few.
pub fn made_in<'f>(body: &'f Function) -> impl Fn(ValueId) -> Option<&'f Inst> {
    move |value| body.body.iter().find(|inst| inst.results.contains(&value))
}

impl Coded {
    /// A value as codes, if it is what codes stand for.
    pub fn of<'f>(f: &'f Function, inst: Made<'f, '_>, value: ValueId) -> Option<Coded> {
        let merged = inst(value)?;
        let Op::Merge { axes: parts, into: along } = &merged.op else { return None };
        let (&[group, within], &along) = (&parts[..], along) else { return None };
        let scaled = inst(merged.args[0]).filter(|i| i.op == Op::Binary(Binary::Mul))?;
        let &[number, scales] = &scaled.args[..] else { return None };
        let number = inst(number).filter(|i| i.op == Op::Cast)?;
        let centred = inst(number.args[0]).filter(|i| i.op == Op::Binary(Binary::Sub))?;
        let &[code, centre] = &centred.args[..] else { return None };
        let Op::Const(centre) = &inst(centre)?.op else { return None };
        let &[centre] = &centre[..] else { return None };
        let code = inst(code)?;
        let Op::Merge { axes: parts, into } = &code.op else { return None };
        let (&[word, field], true) = (&parts[..], *into == within) else { return None };
        let unpacked = inst(code.args[0]).filter(|i| i.op == Op::Unpack { axis: field })?;
        let words = unpacked.args[0];
        // All of them lie in one order.
        let rows = f.ty(value).axes.strip_suffix(&[along])?;
        let lies = |v: ValueId, own: &[AxisId]| f.ty(v).axes.strip_prefix(rows) == Some(own);
        if !lies(words, &[group, word]) || !lies(scales, &[group]) {
            return None;
        }
        let (group, fields) = (f.axis(within).size.fixed()?, f.axis(field).size.fixed()?);
        Some(Coded { held: [words, scales], along, group, fields, centre: centre.0 as i32 })
    }

    /// The tables that rows of codes are gathered from, if they are.
    pub fn rows<'f>(&self, inst: Made<'f, '_>) -> Option<CodedRows<'f>> {
        let [words, scales] = self.held.map(|v| inst(v).filter(|i| matches!(i.op, Op::Gather { .. })));
        let (words, scales) = (words?, scales?);
        let same = words.op == scales.op && words.args[1] == scales.args[1];
        same.then(|| CodedRows { gather: words, held: [words.args[0], scales.args[0]] })
    }

    /// The type of elements whose scales have this type.
    pub fn elements(&self, scales: &Type) -> Type {
        let rows = &scales.axes[..scales.axes.len() - 1];
        Type::new(scales.dtype, [rows, &[self.along]].concat())
    }

    /// Whether each byte in memory is a code, in order.
    pub fn is_bytes(&self) -> bool {
        self.fields == 4 && cfg!(target_endian = "little")
    }
}
