//! Codes of few bits: elements as words that hold several, with a scale for each group of them, and back again.
//!
//! Rows of elements are cut into groups of equal size. With `m` the largest magnitude of a group, rounded as it is stored:
//!
//! ```text
//! int8   scale = m / 127,  x / scale to the nearest whole number, halves up       |error| <= scale / 2
//! int6   scale = m / 31    the same                                              |error| <= scale / 2
//! fp8    scale = m / 448,  x / scale to the nearest e4m3 (arXiv 2209.05433),     |error| <= |x| / 16 or scale / 1024,
//!        halves away from 0                                                        whichever is more
//! ```
//!
//! Six bits are kept as four and two, so that fields do not cross words. A group of zeros has the scale 0 and reads as zeros. A
//! group with an infinity in it is not finite when it is read; what is no number reads as some number of its group, or none.

use std::fmt;

use latentc_ir::coded::LEAST;
use latentc_ir::{AxisId, Binary, DType, Function, Inst, Op, Real, Reduce, Size, Type, Unary, ValueId};
use serde::Serialize;

use crate::rewrite::Rebuild;

/// How elements are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Codes {
    /// bfloat16, without scales.
    Bf16,
    /// Floats of 8 bits: sign, 4 of exponent, 3 of significand (e4m3).
    Fp8,
    /// Whole numbers from -127 to 127.
    Int8,
    /// Whole numbers from -31 to 31.
    Int6,
}

impl Codes {
    /// All of them, the widest first.
    pub const ALL: [Codes; 4] = [Codes::Bf16, Codes::Fp8, Codes::Int8, Codes::Int6];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Codes::Bf16 => "bf16",
            Codes::Fp8 => "fp8",
            Codes::Int8 => "int8",
            Codes::Int6 => "int6",
        }
    }

    /// The widths of the fields that a code is cut into, lowest bits first. None if elements are not coded.
    pub(crate) fn planes(self) -> &'static [u64] {
        match self {
            Codes::Bf16 => &[],
            Codes::Fp8 | Codes::Int8 => &[8],
            Codes::Int6 => &[4, 2],
        }
    }

    /// What the largest magnitude of a group is coded as.
    pub(crate) fn most(self) -> f64 {
        match self {
            Codes::Bf16 => 1.0,
            Codes::Fp8 => 448.0,
            Codes::Int8 => 127.0,
            Codes::Int6 => 31.0,
        }
    }
}

impl fmt::Display for Codes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How the elements of rows are coded.
pub(crate) struct Layout {
    /// The axes that number rows.
    pub rows: Vec<AxisId>,
    /// The axes of a row's elements, in memory order.
    pub row: Vec<AxisId>,
    /// Elements of a row.
    pub elements: u64,
    /// Groups of a row.
    pub groups: u64,
    /// Elements of a group, with those that fill it up.
    pub group: u64,
    /// The dtype of scales.
    pub scale: DType,
    /// Bytes of a row before and after.
    pub bytes: [u64; 2],
}

impl Layout {
    /// In groups of so many elements at most, for rows of elements of this dtype. `None` if a row has none, or not a fixed number.
    pub(crate) fn of(
        f: &Function,
        (rows, row): (Vec<AxisId>, Vec<AxisId>),
        (dtype, scale): (DType, DType),
        codes: Codes,
        most: u64,
    ) -> Option<Layout> {
        let elements = row.iter().try_fold(1u64, |n, &a| n.checked_mul(f.axis(a).size.fixed()?))?;
        if row.is_empty() || elements == 0 {
            return None;
        }
        let before = elements * dtype.bytes();
        if codes == Codes::Bf16 {
            let bytes = [before, elements * DType::Bf16.bytes()];
            return Some(Layout { rows, row, elements, groups: 1, group: elements, scale, bytes });
        }
        // Groups of equal size, of as many elements as fill words of each plane.
        let unit = codes.planes().iter().map(|width| 32 / width).max().unwrap_or(1);
        let groups = elements.div_ceil(most.max(1));
        let group = elements.div_ceil(groups).next_multiple_of(unit);
        let groups = elements.div_ceil(group);
        let bits: u64 = codes.planes().iter().sum();
        let after = groups * (group * bits / 8 + scale.bytes());
        Some(Layout { rows, row, elements, groups, group, scale, bytes: [before, after] })
    }
}

/// What a value is coded as: words for each plane, and scales.
pub(crate) struct Coded {
    pub words: Vec<ValueId>,
    pub scale: ValueId,
}

/// The axes that coding adds; those of a plane are words and fields.
pub(crate) struct Axes {
    flat: AxisId,
    padded: AxisId,
    pub group: AxisId,
    within: AxisId,
    pub planes: Vec<[AxisId; 2]>,
}

/// Writes codes into a function that is rebuilt.
pub(crate) struct Coder<'a> {
    pub r: Rebuild<'a>,
    pub codes: Codes,
}

impl Coder<'_> {
    /// Adds the axes of codes.
    pub(crate) fn axes(&mut self, layout: &Layout) -> Axes {
        let f = &mut self.r.new;
        let names: Vec<_> = layout.row.iter().map(|&a| f.axis(a).name.clone()).collect();
        let name = names.concat();
        let mut axis = |suffix: &str, n: u64| f.add_axis(&format!("{name}{suffix}"), Size::Fixed(n), None);
        let flat = match layout.row[..] {
            [one] => one,
            _ => axis("", layout.elements),
        };
        let padded = match layout.groups * layout.group {
            n if n == layout.elements => flat,
            n => axis("_full", n),
        };
        let (group, within) = (axis("_group", layout.groups), axis("_in", layout.group));
        let planes = self.codes.planes().iter().map(|width| {
            let fields = 32 / width;
            [axis("_word", layout.group / fields), axis("_field", fields)]
        });
        let planes = planes.collect();
        Axes { flat, padded, group, within, planes }
    }

    /// A value as codes, made where `inst` is.
    pub(crate) fn encode(&mut self, layout: &Layout, axes: &Axes, inst: &Inst, x: ValueId) -> Coded {
        let (Codes::Fp8 | Codes::Int8 | Codes::Int6) = self.codes else {
            unreachable!("what is not coded has no planes")
        };
        let Type { dtype, .. } = *self.r.new.ty(x);
        let name = self.r.new.value(x).name.clone();
        let mut b = Builder { c: self, inst, rows: layout.rows.clone() };
        let mut row = x;
        if axes.flat != layout.row[0] {
            let op = Op::Merge { axes: layout.row.clone(), into: axes.flat };
            row = b.add(op, &[row], "", dtype, &[axes.flat]);
        }
        if axes.padded != axes.flat {
            let missing = layout.groups * layout.group - layout.elements;
            let pad = b.c.r.new.add_axis("pad", Size::Fixed(missing), None);
            let zero = b.number(0.0, dtype);
            let all: Vec<_> = b.rows.iter().copied().chain([pad]).collect();
            let zeros = b.add(Op::Broadcast { axes: all }, &[zero], "", dtype, &[pad]);
            let op = Op::Concat { axes: vec![axes.flat, pad], into: axes.padded };
            row = b.add(op, &[row, zeros], "", dtype, &[axes.padded]);
        }
        let &Axes { padded, group, within, .. } = axes;
        let grouped = Op::Split { axis: padded, into: vec![group, within] };
        let grouped = b.add(grouped, &[row], "", dtype, &[group, within]);
        let size = b.add(Op::Unary(Unary::Abs), &[grouped], "", dtype, &[group, within]);
        let largest = Op::Reduce { by: Reduce::Max, axis: within };
        let largest = b.add(largest, &[size], "", DType::F32, &[group]);
        let per = b.number(1.0 / b.c.codes.most(), DType::F32);
        let step = b.add(Op::Binary(Binary::Mul), &[largest, per], "", DType::F32, &[group]);
        // Codes are of the scale as it is stored.
        let scale = b.add(Op::Cast, &[step], &format!("{name}.scale"), layout.scale, &[group]);
        let least = b.number(LEAST, DType::F32);
        let divisor = b.add(Op::Binary(Binary::Max), &[scale, least], "", DType::F32, &[group]);
        let mut words = Vec::new();
        let mut below = 0;
        for (&[word, field], &width) in axes.planes.iter().zip(b.c.codes.planes()) {
            let own = [group, word, field];
            let split = Op::Split { axis: padded, into: own.to_vec() };
            let elements = b.add(split, &[row], "", dtype, &own);
            let x = b.add(Op::Binary(Binary::Div), &[elements, divisor], "", DType::F32, &own);
            let mut code = match b.c.codes {
                Codes::Fp8 => b.encode_float(x, &own),
                codes => b.encode_whole(x, codes.most(), &own),
            };
            if below > 0 {
                code = b.whole(Binary::Div, code, 1 << below, &own);
            }
            let name = format!("{name}.bits{below}");
            words.push(b.add(Op::Pack { axis: field }, &[code], &name, DType::I32, &[group, word]));
            below += width;
        }
        Coded { words, scale }
    }

    /// What codes of these rows stand for, with this name and type.
    pub(crate) fn decode(
        &mut self,
        layout: &Layout,
        axes: &Axes,
        inst: &Inst,
        coded: Coded,
        rows: &[AxisId],
        (name, ty): (&str, &Type),
    ) -> ValueId {
        let codes = self.codes;
        let mut b = Builder { c: self, inst, rows: rows.to_vec() };
        let own = [axes.group, axes.within];
        let mut code = None;
        let mut below = 0;
        for ((&[word, field], &width), words) in axes.planes.iter().zip(codes.planes()).zip(coded.words) {
            let all = [axes.group, word, field];
            let fields = b.add(Op::Unpack { axis: field }, &[words], "", DType::I32, &all);
            let merge = Op::Merge { axes: vec![word, field], into: axes.within };
            let part = b.add(merge, &[fields], "", DType::I32, &own);
            code = Some(match code {
                None => part,
                Some(low) => {
                    let high = b.whole(Binary::Mul, part, 1 << below, &own);
                    b.add(Op::Binary(Binary::Add), &[low, high], "", DType::I32, &own)
                }
            });
            below += width;
        }
        let code = code.expect("codes have bits");
        let number = match codes {
            Codes::Fp8 => b.decode_float(code, &own),
            _ => {
                let centred = b.whole(Binary::Sub, code, codes.most() as i32, &own);
                b.add(Op::Cast, &[centred], "", DType::F32, &own)
            }
        };
        let x = b.add(Op::Binary(Binary::Mul), &[number, coded.scale], "", ty.dtype, &own);
        // The last of these is the value itself, with its name and its order of axes.
        let mut steps = vec![(Op::Merge { axes: own.to_vec(), into: axes.padded }, vec![axes.padded])];
        if axes.padded != axes.flat {
            steps.push((Op::Slice { axis: axes.padded, into: axes.flat, start: 0 }, vec![axes.flat]));
        }
        if axes.flat != layout.row[0] {
            steps.push((Op::Split { axis: axes.flat, into: layout.row.clone() }, layout.row.clone()));
        }
        let last = steps.pop().expect("there is one at least").0;
        let x = steps.into_iter().fold(x, |x, (op, own)| b.add(op, &[x], "", ty.dtype, &own));
        b.c.r.emit(inst, last, &[x], name, ty.clone())
    }
}

/// The bias of e4m3's exponent, and the bits of its significand.
const BIAS: f64 = 7.0;
const SIGNIFICAND: i32 = 3;

/// Elementwise arithmetic on values that have the axes of rows and some more.
struct Builder<'q, 'a> {
    c: &'q mut Coder<'a>,
    inst: &'q Inst,
    rows: Vec<AxisId>,
}

impl Builder<'_, '_> {
    fn add(&mut self, op: Op, args: &[ValueId], name: &str, dtype: DType, own: &[AxisId]) -> ValueId {
        let axes: Vec<_> = self.rows.iter().chain(own).copied().collect();
        self.c.r.emit(self.inst, op, args, name, Type::new(dtype, axes))
    }

    fn number(&mut self, x: f64, dtype: DType) -> ValueId {
        self.c.r.emit(self.inst, Op::Const(vec![Real(x)]), &[], "", Type::scalar(dtype))
    }

    fn float(&mut self, op: Binary, a: ValueId, b: f64, own: &[AxisId]) -> ValueId {
        let b = self.number(b, DType::F32);
        self.add(Op::Binary(op), &[a, b], "", DType::F32, own)
    }

    fn whole(&mut self, op: Binary, a: ValueId, b: i32, own: &[AxisId]) -> ValueId {
        let b = self.number(f64::from(b), DType::I32);
        self.add(Op::Binary(op), &[a, b], "", DType::I32, own)
    }

    /// `2^x`
    fn power(&mut self, x: ValueId, own: &[AxisId]) -> ValueId {
        let x = self.add(Op::Cast, &[x], "", DType::F32, own);
        let x = self.float(Binary::Mul, x, std::f64::consts::LN_2, own);
        self.add(Op::Unary(Unary::Exp), &[x], "", DType::F32, own)
    }

    /// The nearest whole number from `-most` to `most`, counted from `-most`. What is cut off is no less than 0, so to cut it off
    /// is to round down.
    fn encode_whole(&mut self, x: ValueId, most: f64, own: &[AxisId]) -> ValueId {
        let x = self.float(Binary::Add, x, most + 0.5, own);
        let x = self.float(Binary::Max, x, 0.0, own);
        let x = self.float(Binary::Min, x, 2.0 * most, own);
        self.add(Op::Cast, &[x], "", DType::I32, own)
    }

    /// The nearest e4m3 as its bits. With the exponent `e` of a number, counted from 1, and `m = |x| 2^(10 - e)` rounded, they
    /// are `8 (e - 1) + m`: below 2^-6 there is no implicit one, and an `m` of 16 is the next exponent. So it is no
    /// matter on which side of a power of two a logarithm falls.
    fn encode_float(&mut self, x: ValueId, own: &[AxisId]) -> ValueId {
        let size = self.add(Op::Unary(Unary::Abs), &[x], "", DType::F32, own);
        let size = self.float(Binary::Min, size, Codes::Fp8.most(), own);
        let normal = self.float(Binary::Max, size, (1.0 - BIAS).exp2(), own);
        let log = self.add(Op::Unary(Unary::Log), &[normal], "", DType::F32, own);
        let log = self.float(Binary::Mul, log, std::f64::consts::LOG2_E, own);
        let log = self.float(Binary::Add, log, BIAS, own);
        let e = self.add(Op::Cast, &[log], "", DType::I32, own);
        let e = self.whole(Binary::Max, e, 1, own);
        let ten = self.number(BIAS + f64::from(SIGNIFICAND), DType::I32);
        let up = self.add(Op::Binary(Binary::Sub), &[ten, e], "", DType::I32, own);
        let up = self.power(up, own);
        let m = self.add(Op::Binary(Binary::Mul), &[size, up], "", DType::F32, own);
        let m = self.float(Binary::Add, m, 0.5, own);
        let m = self.add(Op::Cast, &[m], "", DType::I32, own);
        let e = self.whole(Binary::Sub, e, 1, own);
        let e = self.whole(Binary::Mul, e, 1 << SIGNIFICAND, own);
        let bits = self.add(Op::Binary(Binary::Add), &[e, m], "", DType::I32, own);
        let zero = self.number(0.0, DType::F32);
        let negative = self.add(Op::Binary(Binary::Lt), &[x, zero], "", DType::Bool, own);
        let signed = self.whole(Binary::Add, bits, 128, own);
        self.add(Op::Select, &[negative, signed, bits], "", DType::I32, own)
    }

    /// The number that the bits of an e4m3 stand for.
    fn decode_float(&mut self, bits: ValueId, own: &[AxisId]) -> ValueId {
        let negative = self.whole(Binary::Div, bits, 128, own);
        let sign = self.whole(Binary::Mul, negative, 128, own);
        let bits = self.add(Op::Binary(Binary::Sub), &[bits, sign], "", DType::I32, own);
        let e = self.whole(Binary::Div, bits, 1 << SIGNIFICAND, own);
        let above = self.whole(Binary::Max, e, 1, own);
        let above = self.whole(Binary::Sub, above, 1, own);
        // Above the least exponent the significand begins with a one that is not stored.
        let stored = self.whole(Binary::Mul, above, 1 << SIGNIFICAND, own);
        let m = self.add(Op::Binary(Binary::Sub), &[bits, stored], "", DType::I32, own);
        let m = self.add(Op::Cast, &[m], "", DType::F32, own);
        let least = (1.0 - BIAS - f64::from(SIGNIFICAND)).exp2();
        let power = self.power(above, own);
        let power = self.float(Binary::Mul, power, least, own);
        let size = self.add(Op::Binary(Binary::Mul), &[m, power], "", DType::F32, own);
        let minus = self.add(Op::Unary(Unary::Neg), &[size], "", DType::F32, own);
        let one = self.number(1.0, DType::I32);
        let negative = self.add(Op::Binary(Binary::Eq), &[negative, one], "", DType::Bool, own);
        self.add(Op::Select, &[negative, minus, size], "", DType::F32, own)
    }
}
