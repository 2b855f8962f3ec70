//! The syntax tree of an equation, and the plain-Rust way to build one.
//!
//! `spec!` makes these values from tokens; Rust code may as well make them itself:
//!
//! ```
//! use latentc_frontend::expr::{apply, along, val};
//! let c_kv = val("g_KV", ["c"]) * apply("rms_norm", [along("c")], [1e-6.into()], [val("W", ["c", "d"]) * val("h", ["t", "d"])]);
//! ```
//!
//! Nothing here has a meaning yet: that an index is summed, or that there is a function `rms_norm`, is the
//! business of `lower.rs` and `stdlib.rs`.

use std::ops;
use std::panic::Location;

use latentc_ir::Binary;

/// A place in a source file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Spot {
    /// Relative to the workspace, as the Rust compiler gives it.
    pub file: &'static str,
    /// From 1.
    pub line: u32,
    /// From 1.
    pub col: u32,
}

impl Spot {
    /// That place.
    pub fn new(file: &'static str, line: u32, col: u32) -> Spot {
        Spot { file, line, col }
    }

    /// Where the caller of the function that says this was called.
    #[track_caller]
    pub fn here() -> Spot {
        let here = Location::caller();
        Spot::new(here.file(), here.line(), here.column())
    }
}

/// A word of the author's and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Name {
    /// The word.
    pub text: String,
    /// Its place.
    pub at: Spot,
}

impl Name {
    /// A word at a place.
    pub fn at(text: impl Into<String>, at: Spot) -> Name {
        Name { text: text.into(), at }
    }

    /// A word in Rust code.
    #[track_caller]
    pub fn here(text: impl Into<String>) -> Name {
        Name::at(text, Spot::here())
    }
}

/// What stands between the brackets of a value.
#[derive(Clone, Debug, PartialEq)]
pub enum Index {
    /// `x[t]`: the axis `t`.
    Axis(Name),
    /// `x[(g, j)]`: an axis seen as several; on the left `y[(g, j) as e]`, several seen as one.
    Group {
        /// The axes that it is seen as, slowest first.
        parts: Vec<Name>,
        /// On the left, the one axis that they become.
        whole: Option<Name>,
        /// The opening parenthesis.
        at: Spot,
    },
    /// `x[tok[t]]`: the element that an integer value points to.
    Value(Expr),
}

/// The axes that a function works along: `f[s]`, `f[s <= t]`, `f[r at t]`.
#[derive(Clone, Debug, PartialEq)]
pub enum Along {
    /// The whole axis.
    Axis(Name),
    /// The axis up to the position on another one.
    UpTo(Name, Name),
    /// The axis, at the positions of another one.
    At(Name, Name),
}

/// What follows the semicolon in `f[d; 1e-6](x)`: numbers that Rust computes.
#[derive(Clone, Debug, PartialEq)]
pub enum Param {
    /// One.
    Number(f64),
    /// Several.
    Table(Vec<f64>),
}

/// The right side of an equation.
#[derive(Clone, Debug, PartialEq)]
pub enum Expr {
    /// `2.0`, or `{rust}`.
    Number {
        /// The number.
        value: f64,
        /// Its place.
        at: Spot,
    },
    /// `x[t,d]`; without brackets a single number: a value without axes, or the size of an axis.
    Use {
        /// The value.
        name: Name,
        /// How it is read.
        indices: Vec<Index>,
    },
    /// `-x`
    Neg {
        /// The operand.
        value: Box<Expr>,
        /// The sign.
        at: Spot,
    },
    /// `!x`
    Not {
        /// The operand.
        value: Box<Expr>,
        /// The sign.
        at: Spot,
    },
    /// `a * b` and the like.
    Infix {
        /// The function of two elements.
        op: Binary,
        /// Left operand.
        left: Box<Expr>,
        /// Right operand.
        right: Box<Expr>,
        /// The operator.
        at: Spot,
    },
    /// `f[along; params](args)`
    Apply {
        /// Its name.
        function: Name,
        /// What it works along.
        along: Vec<Along>,
        /// Numbers that it needs.
        params: Vec<Param>,
        /// Its operands.
        args: Vec<Expr>,
    },
}

impl Expr {
    /// Where to point when the whole expression is meant.
    pub fn at(&self) -> Spot {
        match self {
            Expr::Number { at, .. }
            | Expr::Neg { at, .. }
            | Expr::Not { at, .. }
            | Expr::Infix { at, .. } => *at,
            Expr::Use { name, .. } => name.at,
            Expr::Apply { function, .. } => function.at,
        }
    }
}

/// `name[indices]: dtype`: what an equation defines, or a function takes or gives.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// The value's name.
    pub name: Name,
    /// Its axes.
    pub indices: Vec<Index>,
    /// The dtype, if it is not the model's.
    pub dtype: Option<Name>,
}

/// `target = value @tag;`
#[derive(Clone, Debug, PartialEq)]
pub struct Equation {
    /// The left side.
    pub target: Target,
    /// The right side.
    pub value: Expr,
    /// The paper's number.
    pub tag: Option<String>,
    /// The author asserts that later tokens read this value, and so it is what a cache should hold.
    pub cached: bool,
}

/// `(targets) = call f(…)(args) in scope;`
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// What the results are called here.
    pub targets: Vec<Target>,
    /// What is passed; each a use of a value.
    pub args: Vec<Expr>,
    /// Where the callee's weights are found, below the scope of the caller.
    pub scope: String,
    /// The paper's number.
    pub tag: Option<String>,
}

/// How long an axis is.
#[derive(Clone, Debug, PartialEq)]
pub enum Extent {
    /// Known at run time only; the size is a symbol of the axis's name.
    Runtime,
    /// Known from the configuration.
    Fixed(u64),
    /// The positions of the sequence of another axis.
    Like(Name),
    /// A number that is no size, for the error that says so.
    Bad(String),
}

macro_rules! extents {
    ($($t:ty),*) => { $(
        impl From<$t> for Extent {
            fn from(n: $t) -> Extent {
                match u64::try_from(n) {
                    Ok(n) if n > 0 => Extent::Fixed(n),
                    _ => Extent::Bad(n.to_string()),
                }
            }
        }
        impl From<$t> for Param {
            fn from(n: $t) -> Param {
                Param::Number(n as f64)
            }
        }
        impl From<$t> for Number {
            fn from(n: $t) -> Number {
                Number(n as f64)
            }
        }
    )* };
}
extents!(u64, u32, usize, i32, i64);

impl From<f64> for Param {
    fn from(x: f64) -> Param {
        Param::Number(x)
    }
}
impl From<Vec<f64>> for Param {
    fn from(table: Vec<f64>) -> Param {
        Param::Table(table)
    }
}
impl From<&[f64]> for Param {
    fn from(table: &[f64]) -> Param {
        Param::Table(table.to_vec())
    }
}
impl From<&Vec<f64>> for Param {
    fn from(table: &Vec<f64>) -> Param {
        Param::Table(table.clone())
    }
}

/// Any number of Rust's as an equation reads it.
#[derive(Clone, Copy, Debug)]
pub struct Number(f64);

impl From<f64> for Number {
    fn from(x: f64) -> Number {
        Number(x)
    }
}

/// A row of `axes { … }`.
#[derive(Clone, Debug, PartialEq)]
pub struct AxisDecl {
    /// The letter.
    pub name: Name,
    /// Its size.
    pub extent: Extent,
    /// Whether all that is computed from inputs carries it unwritten, as a batch.
    pub each: bool,
}

/// A row of `weights { … }`.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightDecl {
    /// What equations call it, with its axes.
    pub target: Target,
    /// The tensor of the checkpoint, `{e}` for an axis that numbers tensors.
    pub tensor: Name,
    /// Its dimensions: of each the factors, slowest first, and of a factor its parts, one behind the other.
    pub dims: Vec<Vec<Vec<Name>>>,
}

// --- constructors: the ones with a place are for the macro, the rest for people -----------------------

/// A number.
pub fn number(value: impl Into<Number>, at: Spot) -> Expr {
    Expr::Number { value: value.into().0, at }
}

/// A number, in Rust code.
#[track_caller]
pub fn num(value: impl Into<Number>) -> Expr {
    number(value, Spot::here())
}

/// `name[axes]`
#[track_caller]
pub fn val<const N: usize>(name: &str, axes: [&str; N]) -> Expr {
    let at = Spot::here();
    let indices = axes.iter().map(|a| Index::Axis(Name::at(*a, at))).collect();
    Expr::Use { name: Name::at(name, at), indices }
}

/// `name[axes]`, on the left.
#[track_caller]
pub fn target<const N: usize>(name: &str, axes: [&str; N]) -> Target {
    let at = Spot::here();
    let indices = axes.iter().map(|a| Index::Axis(Name::at(*a, at))).collect();
    Target { name: Name::at(name, at), indices, dtype: None }
}

/// The whole axis, for [`apply`].
#[track_caller]
pub fn along(axis: &str) -> Along {
    Along::Axis(Name::here(axis))
}

/// `function[along; params](args)`
#[track_caller]
pub fn apply(
    function: &str,
    along: impl Into<Vec<Along>>,
    params: impl Into<Vec<Param>>,
    args: impl Into<Vec<Expr>>,
) -> Expr {
    Expr::Apply {
        function: Name::here(function),
        along: along.into(),
        params: params.into(),
        args: args.into(),
    }
}

/// `-value`
pub fn neg(value: Expr, at: Spot) -> Expr {
    Expr::Neg { value: Box::new(value), at }
}

/// `!value`
pub fn not(value: Expr, at: Spot) -> Expr {
    Expr::Not { value: Box::new(value), at }
}

/// An operator between two operands.
fn infix(op: Binary, left: Expr, right: Expr, at: Spot) -> Expr {
    Expr::Infix { op, left: Box::new(left), right: Box::new(right), at }
}

/// `left + right`
pub fn add(left: Expr, right: Expr, at: Spot) -> Expr {
    infix(Binary::Add, left, right, at)
}

/// `left - right`
pub fn sub(left: Expr, right: Expr, at: Spot) -> Expr {
    infix(Binary::Sub, left, right, at)
}

/// `left * right`
pub fn mul(left: Expr, right: Expr, at: Spot) -> Expr {
    infix(Binary::Mul, left, right, at)
}

/// `left / right`
pub fn div(left: Expr, right: Expr, at: Spot) -> Expr {
    infix(Binary::Div, left, right, at)
}

/// `left < right`
pub fn lt(left: Expr, right: Expr, at: Spot) -> Expr {
    infix(Binary::Lt, left, right, at)
}

/// `left <= right`
pub fn le(left: Expr, right: Expr, at: Spot) -> Expr {
    infix(Binary::Le, left, right, at)
}

/// `left == right`
pub fn eq(left: Expr, right: Expr, at: Spot) -> Expr {
    infix(Binary::Eq, left, right, at)
}

/// `left > right`
pub fn gt(left: Expr, right: Expr, at: Spot) -> Expr {
    infix(Binary::Lt, right, left, at)
}

/// `left >= right`
pub fn ge(left: Expr, right: Expr, at: Spot) -> Expr {
    infix(Binary::Le, right, left, at)
}

/// `left && right`
pub fn and(left: Expr, right: Expr, at: Spot) -> Expr {
    infix(Binary::And, left, right, at)
}

/// `left || right`
pub fn or(left: Expr, right: Expr, at: Spot) -> Expr {
    infix(Binary::Or, left, right, at)
}

impl ops::Add for Expr {
    type Output = Expr;
    #[track_caller]
    fn add(self, right: Expr) -> Expr {
        add(self, right, Spot::here())
    }
}

impl ops::Sub for Expr {
    type Output = Expr;
    #[track_caller]
    fn sub(self, right: Expr) -> Expr {
        sub(self, right, Spot::here())
    }
}

impl ops::Mul for Expr {
    type Output = Expr;
    #[track_caller]
    fn mul(self, right: Expr) -> Expr {
        mul(self, right, Spot::here())
    }
}

impl ops::Div for Expr {
    type Output = Expr;
    #[track_caller]
    fn div(self, right: Expr) -> Expr {
        div(self, right, Spot::here())
    }
}

impl ops::Neg for Expr {
    type Output = Expr;
    #[track_caller]
    fn neg(self) -> Expr {
        neg(self, Spot::here())
    }
}
