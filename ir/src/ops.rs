//! The op set: one table, one enum, one place.
//!
//! Floats of any dtypes meet in one op: it reads them exactly, computes in f32 or wider, and rounds once, to the
//! dtype of its result, which the author chooses. `cast` is for all other changes of dtype.
//!
//! Every op is a pure function of its operands, and an equation says which. A row of [`OPS`] gives an
//! op's mnemonic, operands, attributes and equation; printer, parser and the op reference
//! (`docs/ir.md`) are driven by it. To add an op, add a variant and a row, then follow the compiler:
//! no match over ops anywhere has a wildcard arm.

use std::fmt;
use std::hash::{Hash, Hasher};

use serde::{Deserialize, Serialize};

use crate::types::AxisId;

/// What an instruction computes from its operands.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "attributes are described by the op's equation")]
pub enum Op {
    // --- 1. constants -----------------------------------------------------------------------------
    /// One number, or a table along one axis.
    Const(Vec<Real>),
    /// The place in its sequence of each entry of an axis: 0, 1, 2, … from the sequence's start. With a
    /// batch axis in its type, each row has its own.
    Position { axis: AxisId },

    // --- 2. elementwise: operands meet by axis, a missing axis broadcasts ---------------------------
    /// A function of one element.
    Unary(Unary),
    /// A function of two elements.
    Binary(Binary),
    /// `c ? a : b`.
    Select,
    /// The nearest value in the result's dtype.
    Cast,

    // --- 3. contraction and reduction --------------------------------------------------------------
    /// The product of all operands, summed over the axes that the result lacks.
    Contract,
    /// One axis folded by an associative function.
    Reduce { by: Reduce, axis: AxisId },

    // --- 4. axes -----------------------------------------------------------------------------------
    /// The same elements with another axis of equal size in an axis's place.
    Rename { from: AxisId, to: AxisId },
    /// The same elements for every index of new axes.
    Broadcast { axes: Vec<AxisId> },
    /// One axis seen as several, slowest first.
    Split { axis: AxisId, into: Vec<AxisId> },
    /// Several axes seen as one, slowest first.
    Merge { axes: Vec<AxisId>, into: AxisId },
    /// A contiguous part of an axis.
    Slice { axis: AxisId, into: AxisId, start: u64 },
    /// Operands one behind the other: operand `n` has the axis `axes[n]` where the result has `into`.
    Concat { axes: Vec<AxisId>, into: AxisId },
    /// Fields as words: as many fields of equal width as the axis is long share the 32 bits of an integer.
    Pack { axis: AxisId },
    /// Words as fields: what `pack` made, along a new axis.
    Unpack { axis: AxisId },

    // --- 5. indexing -------------------------------------------------------------------------------
    /// Reads an axis of the first operand at the indices in the second. Axes that both have run together.
    Gather { axis: AxisId },
    /// Whether each element is among the `k` largest along the axis; of equals, the first wins.
    TopK { axis: AxisId, k: u64 },
    /// Where the largest elements along the axis are, the largest first: as many as `into` is long. Of equals, the first wins.
    TopIndices { axis: AxisId, into: AxisId },
    /// Adds elements up where the second operand says: what `gather` read from, it writes to. The axes of the index that the
    /// result lacks are summed; the others run together.
    ScatterAdd { axis: AxisId },

    // --- 6. sequences ------------------------------------------------------------------------------
    /// The history: a value of each position `from`, seen from a later one along `to` (`to like from`).
    /// What lies ahead may be in it and must be masked. Exists before `derive` only.
    Past { from: AxisId, to: AxisId },
    /// Writes rows of `from` into a cache's axis `to` at given positions; the result is the whole cache after
    /// the write. It is the only op with an effect: the cache keeps the result for the next run. What else the positions have and the
    /// cache lacks is written where they say, too: rows of all sequences go into a pool that they share, whose axis is like none.
    Append { from: AxisId, to: AxisId },
    /// Rotates pairs along an axis by position times frequency (RoPE, arXiv 2104.09864, equation 34).
    Rope { axis: AxisId, pairs: Pairs },

    // --- 7. composites: one line in a dump, defined by the ops above (`expand`) -----------------------
    /// Exponentials that sum to one.
    Softmax { axis: AxisId },
    /// Scaled to root mean square one (arXiv 1910.07467).
    RmsNorm { axis: AxisId, eps: Real },

    // --- 8. functions ------------------------------------------------------------------------------
    /// The results of another function. Its weights and caches are found under `scope`.
    Call { callee: String, scope: String },
}

/// A function of one element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unary {
    /// `-x`
    Neg,
    /// `|x|`
    Abs,
    /// `e^x`
    Exp,
    /// `ln x`
    Log,
    /// `x^½`
    Sqrt,
    /// `x^-½`
    Rsqrt,
    /// `1/(1+e^-x)`
    Sigmoid,
    /// `x/(1+e^-x)` (arXiv 1702.03118)
    Silu,
    /// `tanh x`
    Tanh,
    /// `sin x`
    Sin,
    /// `cos x`
    Cos,
    /// `¬x`
    Not,
}

/// A function of two elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Binary {
    /// `x + y`
    Add,
    /// `x - y`
    Sub,
    /// `x · y`
    Mul,
    /// `x / y`; of integers, truncated towards zero
    Div,
    /// the larger
    Max,
    /// the smaller
    Min,
    /// `x < y`
    Lt,
    /// `x ≤ y`
    Le,
    /// `x = y`
    Eq,
    /// `x ∧ y`
    And,
    /// `x ∨ y`
    Or,
}

/// How an axis is folded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reduce {
    /// the sum; 0 if empty
    Sum,
    /// the largest; -inf if empty
    Max,
}

/// Which two elements a rotation mixes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pairs {
    /// `2j` and `2j+1`, as the paper writes it and DeepSeek-V2's weights are stored.
    Interleaved,
    /// `j` and `j + r/2`, as Llama's weights are stored.
    Halves,
}

impl Unary {
    /// All, in order of the op table.
    pub const ALL: [Unary; 12] = [
        Unary::Neg,
        Unary::Abs,
        Unary::Exp,
        Unary::Log,
        Unary::Sqrt,
        Unary::Rsqrt,
        Unary::Sigmoid,
        Unary::Silu,
        Unary::Tanh,
        Unary::Sin,
        Unary::Cos,
        Unary::Not,
    ];

    /// The function itself, in f64.
    pub fn apply(self, x: f64) -> f64 {
        match self {
            Unary::Neg => -x,
            Unary::Abs => x.abs(),
            Unary::Exp => x.exp(),
            Unary::Log => x.ln(),
            Unary::Sqrt => x.sqrt(),
            Unary::Rsqrt => 1.0 / x.sqrt(),
            Unary::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            Unary::Silu => x / (1.0 + (-x).exp()),
            Unary::Tanh => x.tanh(),
            Unary::Sin => x.sin(),
            Unary::Cos => x.cos(),
            Unary::Not => f64::from(u8::from(x == 0.0)),
        }
    }
}

impl Binary {
    /// All, in order of the op table.
    pub const ALL: [Binary; 11] = [
        Binary::Add,
        Binary::Sub,
        Binary::Mul,
        Binary::Div,
        Binary::Max,
        Binary::Min,
        Binary::Lt,
        Binary::Le,
        Binary::Eq,
        Binary::And,
        Binary::Or,
    ];

    /// The function itself, in f64 (integer division truncates where the caller rounds to i32).
    pub fn apply(self, x: f64, y: f64) -> f64 {
        let truth = |b: bool| f64::from(u8::from(b));
        match self {
            Binary::Add => x + y,
            Binary::Sub => x - y,
            Binary::Mul => x * y,
            Binary::Div => x / y,
            Binary::Max => x.max(y),
            Binary::Min => x.min(y),
            Binary::Lt => truth(x < y),
            Binary::Le => truth(x <= y),
            Binary::Eq => truth(x == y),
            Binary::And => truth(x != 0.0 && y != 0.0),
            Binary::Or => truth(x != 0.0 || y != 0.0),
        }
    }

    /// Whether numbers go in and a truth value comes out.
    pub fn is_comparison(self) -> bool {
        matches!(self, Binary::Lt | Binary::Le | Binary::Eq)
    }

    /// Whether truth values go in and come out.
    pub fn is_logical(self) -> bool {
        matches!(self, Binary::And | Binary::Or)
    }
}

impl Reduce {
    /// All, in order of the op table.
    pub const ALL: [Reduce; 2] = [Reduce::Sum, Reduce::Max];

    /// What the fold starts from.
    pub fn identity(self) -> f64 {
        match self {
            Reduce::Sum => 0.0,
            Reduce::Max => f64::NEG_INFINITY,
        }
    }

    /// One step of the fold.
    pub fn combine(self, x: f64, y: f64) -> f64 {
        match self {
            Reduce::Sum => x + y,
            Reduce::Max => x.max(y),
        }
    }
}

impl Pairs {
    /// The name in the text format.
    pub fn name(self) -> &'static str {
        match self {
            Pairs::Interleaved => "interleaved",
            Pairs::Halves => "halves",
        }
    }

    /// For index `r` of `n`: the pair `j` it belongs to, its partner, and whether it is the second of the two.
    pub fn of(self, r: usize, n: usize) -> (usize, usize, bool) {
        match self {
            Pairs::Interleaved => (r / 2, r ^ 1, r % 2 == 1),
            Pairs::Halves if r < n / 2 => (r, r + n / 2, false),
            Pairs::Halves => (r - n / 2, r - n / 2, true),
        }
    }
}

/// The bits of a 32-bit word that each of so many fields has: see [`Op::Pack`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fields(pub u32);

impl Fields {
    /// The most fields in a word.
    pub const MOST: u64 = 32;

    /// Bits of a field. What is over at the top of the word is 0.
    pub fn width(self) -> u32 {
        32 / self.0.clamp(1, 32)
    }

    /// What a field can hold, as a number.
    pub fn mask(self) -> u32 {
        u32::MAX >> (32 - self.width())
    }

    /// The lowest bits of a number in the place of field `p`.
    pub fn pack(self, p: u32, x: i32) -> i32 {
        ((x as u32 & self.mask()) << (self.width() * p)) as i32
    }

    /// Field `p` of a word.
    pub fn unpack(self, p: u32, word: i32) -> i32 {
        ((word as u32 >> (self.width() * p)) & self.mask()) as i32
    }
}

/// A real attribute. Equal if the bits are, so that ops compare and hash; infinities survive JSON.
#[derive(Clone, Copy, Debug)]
pub struct Real(pub f64);

impl PartialEq for Real {
    fn eq(&self, other: &Self) -> bool {
        self.0.to_bits() == other.0.to_bits()
    }
}
impl Eq for Real {}
impl Hash for Real {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.to_bits().hash(state);
    }
}
impl fmt::Display for Real {
    /// The shortest text that reads back as the same number: `1.0`, `1e-6`, `-inf`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}
impl Serialize for Real {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        if self.0.is_finite() { s.serialize_f64(self.0) } else { s.collect_str(self) }
    }
}
impl<'de> Deserialize<'de> for Real {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Repr {
            Number(f64),
            Text(String),
        }
        match Repr::deserialize(d)? {
            Repr::Number(x) => Ok(Real(x)),
            Repr::Text(t) => t.parse().map(Real).map_err(serde::de::Error::custom),
        }
    }
}

/// How an attribute is written: a keyword and what follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttrKind {
    /// One axis.
    Axis,
    /// A comma-separated list of axes.
    Axes,
    /// A natural number.
    Int,
    /// A number.
    Real,
    /// A bare word.
    Word,
    /// A string in double quotes.
    Text,
}

impl AttrKind {
    /// What stands for it where an op is explained.
    pub const fn placeholder(self) -> &'static str {
        match self {
            AttrKind::Axis => "AXIS",
            AttrKind::Axes => "AXES",
            AttrKind::Int => "INT",
            AttrKind::Real => "NUMBER",
            AttrKind::Word => "WORD",
            AttrKind::Text => "\"TEXT\"",
        }
    }
}

/// An attribute's value, as the text format sees it.
#[derive(Clone, Debug, PartialEq)]
pub enum Attr {
    /// One axis.
    Axis(AxisId),
    /// Several.
    Axes(Vec<AxisId>),
    /// A natural number.
    Int(u64),
    /// A number.
    Real(Real),
    /// A bare word.
    Word(String),
    /// A string.
    Text(String),
}

/// A row of the op table.
#[derive(Debug)]
pub struct OpRow {
    /// The word in the text format.
    pub mnemonic: &'static str,
    /// The operands' roles; `…` after the last one stands for any number more.
    pub operands: &'static [&'static str],
    /// Keyword and form of each attribute, in the order in which they are written.
    pub attrs: &'static [(&'static str, AttrKind)],
    /// What the op computes; `y` is the result.
    pub equation: &'static str,
}

impl OpRow {
    /// The number of operands, or the least number where any may follow.
    pub fn arity(&self) -> Arity {
        match self.operands.split_last() {
            Some((&"…", rest)) => Arity::AtLeast(rest.len()),
            _ => Arity::Exactly(self.operands.len()),
        }
    }

    /// How the op is written: `slice x axis AXIS into AXIS start INT`.
    pub fn usage(&self) -> String {
        match self.mnemonic {
            "const" => return "const NUMBER or const [NUMBERS]".to_owned(),
            "call" => return "call @NAME(…) under \"SCOPE\"".to_owned(),
            _ => {}
        }
        let mut text = self.mnemonic.to_owned();
        if !self.operands.is_empty() {
            text += &format!(" {}", self.operands.join(", "));
        }
        for (keyword, kind) in self.attrs {
            text += &format!(" {keyword} {}", kind.placeholder());
        }
        text
    }
}

/// How many operands an op takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arity {
    /// Just so many.
    Exactly(usize),
    /// So many or more.
    AtLeast(usize),
}

impl Arity {
    /// Whether `n` operands are right.
    pub fn admits(self, n: usize) -> bool {
        match self {
            Arity::Exactly(k) => n == k,
            Arity::AtLeast(k) => n >= k,
        }
    }
}

const fn row(
    mnemonic: &'static str,
    operands: &'static [&'static str],
    attrs: &'static [(&'static str, AttrKind)],
    equation: &'static str,
) -> OpRow {
    OpRow { mnemonic, operands, attrs, equation }
}

use AttrKind::{Axes, Axis, Int, Real as Number, Text, Word};

/// The op table.
#[rustfmt::skip]
pub static OPS: &[OpRow] = &[
    // 1. constants (the numbers of `const` are written like operands)
    row("const",     &[],                    &[],                                                "y = 1.0, or y[j] = [1.0, 0.1, …][j]"),
    row("position",  &[],                    &[("of", Axis)],                                    "y[t] = t, counted from the start of the sequence"),
    // 2. elementwise
    row("neg",       &["x"],                 &[],                                                "y = -x"),
    row("abs",       &["x"],                 &[],                                                "y = |x|"),
    row("exp",       &["x"],                 &[],                                                "y = e^x"),
    row("log",       &["x"],                 &[],                                                "y = ln x"),
    row("sqrt",      &["x"],                 &[],                                                "y = x^(1/2)"),
    row("rsqrt",     &["x"],                 &[],                                                "y = x^(-1/2)"),
    row("sigmoid",   &["x"],                 &[],                                                "y = 1/(1 + e^-x)"),
    row("silu",      &["x"],                 &[],                                                "y = x/(1 + e^-x)"),
    row("tanh",      &["x"],                 &[],                                                "y = tanh x"),
    row("sin",       &["x"],                 &[],                                                "y = sin x"),
    row("cos",       &["x"],                 &[],                                                "y = cos x"),
    row("not",       &["x"],                 &[],                                                "y = not x"),
    row("add",       &["a", "b"],            &[],                                                "y = a + b"),
    row("sub",       &["a", "b"],            &[],                                                "y = a - b"),
    row("mul",       &["a", "b"],            &[],                                                "y = a * b"),
    row("div",       &["a", "b"],            &[],                                                "y = a / b (integers: towards zero)"),
    row("max",       &["a", "b"],            &[],                                                "y = the larger of a and b"),
    row("min",       &["a", "b"],            &[],                                                "y = the smaller of a and b"),
    row("lt",        &["a", "b"],            &[],                                                "y = a < b"),
    row("le",        &["a", "b"],            &[],                                                "y = a <= b"),
    row("eq",        &["a", "b"],            &[],                                                "y = (a = b)"),
    row("and",       &["a", "b"],            &[],                                                "y = a and b"),
    row("or",        &["a", "b"],            &[],                                                "y = a or b"),
    row("select",    &["c", "a", "b"],       &[],                                                "y = a where c, else b"),
    row("cast",      &["x"],                 &[],                                                "y = x, rounded to the dtype of y"),
    // 3. contraction and reduction (`over` lists the axes summed; the parser checks it against the types)
    row("contract",  &["a", "…"],            &[("over", Axes)],                                  "y[i] = sum over k of a[i,k] * b[i,k] * …"),
    row("reduce_sum",&["x"],                 &[("over", Axis)],                                  "y[i] = sum over k of x[i,k]"),
    row("reduce_max",&["x"],                 &[("over", Axis)],                                  "y[i] = max over k of x[i,k]"),
    // 4. axes
    row("rename",    &["x"],                 &[("from", Axis), ("to", Axis)],                    "y[…to…] = x[…from…]"),
    row("broadcast", &["x"],                 &[("over", Axes)],                                  "y[i,k] = x[i]"),
    row("split",     &["x"],                 &[("axis", Axis), ("into", Axes)],                  "y[g,j] = x[g*|j| + j]"),
    row("merge",     &["x"],                 &[("axes", Axes), ("into", Axis)],                  "y[g*|j| + j] = x[g,j]"),
    row("slice",     &["x"],                 &[("axis", Axis), ("into", Axis), ("start", Int)],  "y[j] = x[start + j]"),
    row("concat",    &["a", "…"],            &[("axes", Axes), ("into", Axis)],                  "y = a, then b, … along `into`"),
    row("pack",      &["x"],                 &[("over", Axis)],                                  "y = sum over p of (x[p] mod 2^w) 2^(w p), mod 2^32, with w = 32 / |p|; so many fields share a word"),
    row("unpack",    &["x"],                 &[("over", Axis)],                                  "y[p] = bits w p to w p + w - 1 of x, with w = 32 / |p|"),
    // 5. indexing
    row("gather",    &["x", "index"],        &[("along", Axis)],                                 "y[i] = x[index[i]]"),
    row("top_k",     &["x"],                 &[("over", Axis), ("k", Int)],                      "y[e] = x[e] is among the k largest over e; of equals, the first"),
    row("top_indices",&["x"],                &[("over", Axis), ("into", Axis)],                  "y[j] = the index e of the j-th largest x[e]; of equals, the first"),
    row("scatter_add",&["x", "index"],       &[("along", Axis)],                                 "y[e] = sum of x[i] over all i with index[i] = e"),
    // 6. sequences
    row("past",      &["x"],                 &[("from", Axis), ("to", Axis)],                    "y[s] = x[t=s], for s up to the position of t"),
    row("append",    &["cache", "x", "pos"], &[("from", Axis), ("to", Axis)],                    "y = cache, with y[s=pos[t]] = x[t]; axes of pos that cache lacks run with t"),
    row("rope",      &["x", "pos", "freq"],  &[("over", Axis), ("pairs", Word)],                 "(y[p], y[q]) = (x[p] cos a - x[q] sin a, x[q] cos a + x[p] sin a), a = pos * freq[j], for pair j = (p, q)"),
    // 7. composites
    row("softmax",   &["x"],                 &[("over", Axis)],                                  "y[s] = e^x[s] / sum over s of e^x[s]"),
    row("rms_norm",  &["x"],                 &[("over", Axis), ("eps", Number)],                 "y[d] = x[d] / sqrt(mean over d of x[d]^2 + eps)"),
    // 8. functions
    row("call",      &["…"],                 &[("to", Text), ("under", Text)],                   "the results of a function, whose weights and caches are found `under` a scope"),
];

impl Op {
    /// The word in the text format.
    pub fn mnemonic(&self) -> &'static str {
        match self {
            Op::Const(_) => "const",
            Op::Position { .. } => "position",
            Op::Unary(u) => match u {
                Unary::Neg => "neg",
                Unary::Abs => "abs",
                Unary::Exp => "exp",
                Unary::Log => "log",
                Unary::Sqrt => "sqrt",
                Unary::Rsqrt => "rsqrt",
                Unary::Sigmoid => "sigmoid",
                Unary::Silu => "silu",
                Unary::Tanh => "tanh",
                Unary::Sin => "sin",
                Unary::Cos => "cos",
                Unary::Not => "not",
            },
            Op::Binary(b) => match b {
                Binary::Add => "add",
                Binary::Sub => "sub",
                Binary::Mul => "mul",
                Binary::Div => "div",
                Binary::Max => "max",
                Binary::Min => "min",
                Binary::Lt => "lt",
                Binary::Le => "le",
                Binary::Eq => "eq",
                Binary::And => "and",
                Binary::Or => "or",
            },
            Op::Select => "select",
            Op::Cast => "cast",
            Op::Contract => "contract",
            Op::Reduce { by: Reduce::Sum, .. } => "reduce_sum",
            Op::Reduce { by: Reduce::Max, .. } => "reduce_max",
            Op::Rename { .. } => "rename",
            Op::Broadcast { .. } => "broadcast",
            Op::Split { .. } => "split",
            Op::Merge { .. } => "merge",
            Op::Slice { .. } => "slice",
            Op::Concat { .. } => "concat",
            Op::Pack { .. } => "pack",
            Op::Unpack { .. } => "unpack",
            Op::Gather { .. } => "gather",
            Op::TopK { .. } => "top_k",
            Op::TopIndices { .. } => "top_indices",
            Op::ScatterAdd { .. } => "scatter_add",
            Op::Past { .. } => "past",
            Op::Append { .. } => "append",
            Op::Rope { .. } => "rope",
            Op::Softmax { .. } => "softmax",
            Op::RmsNorm { .. } => "rms_norm",
            Op::Call { .. } => "call",
        }
    }

    /// This op's row of the table.
    pub fn row(&self) -> &'static OpRow {
        let name = self.mnemonic();
        OPS.iter().find(|r| r.mnemonic == name).expect("every mnemonic has a row; a test walks them all")
    }

    /// The attributes in the order of the table, but for `contract`, whose summed axes follow from the
    /// types, and `const`, whose numbers are written in the operands' place.
    pub fn attrs(&self) -> Vec<Attr> {
        match self {
            Op::Const(_) | Op::Unary(_) | Op::Binary(_) | Op::Select | Op::Cast | Op::Contract => vec![],
            Op::Position { axis }
            | Op::Reduce { axis, .. }
            | Op::Pack { axis }
            | Op::Unpack { axis }
            | Op::Gather { axis }
            | Op::ScatterAdd { axis }
            | Op::Softmax { axis } => vec![Attr::Axis(*axis)],
            Op::Rename { from, to } | Op::Past { from, to } | Op::Append { from, to } => {
                vec![Attr::Axis(*from), Attr::Axis(*to)]
            }
            Op::Broadcast { axes } => vec![Attr::Axes(axes.clone())],
            Op::Split { axis, into } => vec![Attr::Axis(*axis), Attr::Axes(into.clone())],
            Op::Merge { axes, into } | Op::Concat { axes, into } => {
                vec![Attr::Axes(axes.clone()), Attr::Axis(*into)]
            }
            Op::Slice { axis, into, start } => vec![Attr::Axis(*axis), Attr::Axis(*into), Attr::Int(*start)],
            Op::TopK { axis, k } => vec![Attr::Axis(*axis), Attr::Int(*k)],
            Op::TopIndices { axis, into } => vec![Attr::Axis(*axis), Attr::Axis(*into)],
            Op::Rope { axis, pairs } => vec![Attr::Axis(*axis), Attr::Word(pairs.name().to_owned())],
            Op::RmsNorm { axis, eps } => vec![Attr::Axis(*axis), Attr::Real(*eps)],
            Op::Call { callee, scope } => vec![Attr::Text(callee.clone()), Attr::Text(scope.clone())],
        }
    }

    /// The same op on other axes.
    #[must_use]
    pub fn on_axes(&self, mut to: impl FnMut(AxisId) -> AxisId) -> Op {
        let mut all = |axes: &[AxisId]| axes.iter().map(|&a| to(a)).collect::<Vec<_>>();
        match self {
            Op::Const(_)
            | Op::Unary(_)
            | Op::Binary(_)
            | Op::Select
            | Op::Cast
            | Op::Contract
            | Op::Call { .. } => self.clone(),
            Op::Position { axis } => Op::Position { axis: to(*axis) },
            Op::Reduce { by, axis } => Op::Reduce { by: *by, axis: to(*axis) },
            Op::Rename { from, to: into } => Op::Rename { from: to(*from), to: to(*into) },
            Op::Broadcast { axes } => Op::Broadcast { axes: all(axes) },
            Op::Split { axis, into } => {
                let into = all(into);
                Op::Split { axis: to(*axis), into }
            }
            Op::Merge { axes, into } => {
                let axes = all(axes);
                Op::Merge { axes, into: to(*into) }
            }
            Op::Slice { axis, into, start } => Op::Slice { axis: to(*axis), into: to(*into), start: *start },
            Op::Concat { axes, into } => {
                let axes = all(axes);
                Op::Concat { axes, into: to(*into) }
            }
            Op::Pack { axis } => Op::Pack { axis: to(*axis) },
            Op::Unpack { axis } => Op::Unpack { axis: to(*axis) },
            Op::Gather { axis } => Op::Gather { axis: to(*axis) },
            Op::ScatterAdd { axis } => Op::ScatterAdd { axis: to(*axis) },
            Op::TopK { axis, k } => Op::TopK { axis: to(*axis), k: *k },
            Op::TopIndices { axis, into } => Op::TopIndices { axis: to(*axis), into: to(*into) },
            Op::Past { from, to: into } => Op::Past { from: to(*from), to: to(*into) },
            Op::Append { from, to: into } => Op::Append { from: to(*from), to: to(*into) },
            Op::Rope { axis, pairs } => Op::Rope { axis: to(*axis), pairs: *pairs },
            Op::Softmax { axis } => Op::Softmax { axis: to(*axis) },
            Op::RmsNorm { axis, eps } => Op::RmsNorm { axis: to(*axis), eps: *eps },
        }
    }

    /// The op of that mnemonic with these attributes, given in the table's order and of the table's kinds. `None`
    /// if there is no such op or a word is unknown; `const` and `contract` take their extras from the parser.
    pub fn from_parts(mnemonic: &str, attrs: &[Attr]) -> Option<Op> {
        if attrs.is_empty() {
            if let Some(u) = Unary::ALL.into_iter().find(|u| Op::Unary(*u).mnemonic() == mnemonic) {
                return Some(Op::Unary(u));
            }
            if let Some(b) = Binary::ALL.into_iter().find(|b| Op::Binary(*b).mnemonic() == mnemonic) {
                return Some(Op::Binary(b));
            }
        }
        Some(match (mnemonic, attrs) {
            ("const", []) => Op::Const(vec![]),
            ("position", [Attr::Axis(axis)]) => Op::Position { axis: *axis },
            ("select", []) => Op::Select,
            ("cast", []) => Op::Cast,
            ("contract", _) => Op::Contract,
            ("reduce_sum", [Attr::Axis(axis)]) => Op::Reduce { by: Reduce::Sum, axis: *axis },
            ("reduce_max", [Attr::Axis(axis)]) => Op::Reduce { by: Reduce::Max, axis: *axis },
            ("rename", [Attr::Axis(from), Attr::Axis(to)]) => Op::Rename { from: *from, to: *to },
            ("broadcast", [Attr::Axes(axes)]) => Op::Broadcast { axes: axes.clone() },
            ("split", [Attr::Axis(axis), Attr::Axes(into)]) => Op::Split { axis: *axis, into: into.clone() },
            ("merge", [Attr::Axes(axes), Attr::Axis(into)]) => Op::Merge { axes: axes.clone(), into: *into },
            ("slice", [Attr::Axis(axis), Attr::Axis(into), Attr::Int(start)]) => {
                Op::Slice { axis: *axis, into: *into, start: *start }
            }
            ("concat", [Attr::Axes(axes), Attr::Axis(into)]) => {
                Op::Concat { axes: axes.clone(), into: *into }
            }
            ("pack", [Attr::Axis(axis)]) => Op::Pack { axis: *axis },
            ("unpack", [Attr::Axis(axis)]) => Op::Unpack { axis: *axis },
            ("gather", [Attr::Axis(axis)]) => Op::Gather { axis: *axis },
            ("scatter_add", [Attr::Axis(axis)]) => Op::ScatterAdd { axis: *axis },
            ("top_k", [Attr::Axis(axis), Attr::Int(k)]) => Op::TopK { axis: *axis, k: *k },
            ("top_indices", [Attr::Axis(axis), Attr::Axis(into)]) => {
                Op::TopIndices { axis: *axis, into: *into }
            }
            ("past", [Attr::Axis(from), Attr::Axis(to)]) => Op::Past { from: *from, to: *to },
            ("append", [Attr::Axis(from), Attr::Axis(to)]) => Op::Append { from: *from, to: *to },
            ("rope", [Attr::Axis(axis), Attr::Word(pairs)]) => {
                let pairs = [Pairs::Interleaved, Pairs::Halves].into_iter().find(|p| p.name() == pairs)?;
                Op::Rope { axis: *axis, pairs }
            }
            ("softmax", [Attr::Axis(axis)]) => Op::Softmax { axis: *axis },
            ("rms_norm", [Attr::Axis(axis), Attr::Real(eps)]) => Op::RmsNorm { axis: *axis, eps: *eps },
            ("call", [Attr::Text(callee), Attr::Text(scope)]) => {
                Op::Call { callee: callee.clone(), scope: scope.clone() }
            }
            _ => return None,
        })
    }

    /// Whether each element of the result depends on one element of each operand alone, at the same index.
    pub fn is_elementwise(&self) -> bool {
        matches!(self, Op::Unary(_) | Op::Binary(_) | Op::Select | Op::Cast)
    }

    /// Whether the result has the elements of its one operand, in whichever order and number.
    pub fn moves(&self) -> bool {
        match self {
            Op::Rename { .. }
            | Op::Broadcast { .. }
            | Op::Split { .. }
            | Op::Merge { .. }
            | Op::Slice { .. } => true,
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
            | Op::Concat { .. }
            | Op::Gather { .. }
            | Op::ScatterAdd { .. }
            | Op::TopK { .. }
            | Op::TopIndices { .. }
            | Op::Rope { .. }
            | Op::Past { .. }
            | Op::Append { .. }
            | Op::Softmax { .. }
            | Op::RmsNorm { .. }
            | Op::Call { .. } => false,
        }
    }
}
