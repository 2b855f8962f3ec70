//! Operands of products that lie in memory as codes, with a scale for each group of elements along their last axis: what the pass
//! [`encode`](latentc_passes::encode) makes of weights.
//!
//! In a body such an operand is an expression like any other. It is known again here so that whoever reads codes byte by byte need not
//! make it: it is never stored, and devices whose kernels take no expressions multiply with the codes.

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
