//! Modules, functions, values.
//!
//! A [`Module`] is a list of functions, one of them the entry. A [`Function`] is in SSA form: its values are
//! the parameters, the weights, the caches and the results of its instructions, and an instruction
//! uses only what stands above it. Functions do not nest or recurse; equal layers are calls of one function.
//!
//! Weights and caches belong to a *scope*: a call names the scope under which its callee's are found, scopes of
//! nested calls join with dots, so the function `@layer` called under `model.layers.7` owns the weight
//! `model.layers.7.mlp.gate.weight`. A function text therefore stays the same for all its instances.

use serde::{Deserialize, Serialize};

use crate::ops::Op;
use crate::types::{Axis, AxisId, DType, Size, Type};

/// A program: functions that call each other, and the one to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Module {
    /// What the program is called in dumps, such as `deepseek_v2.decode`.
    pub name: String,
    /// Callees before callers.
    pub functions: Vec<Function>,
    /// The name of the function to run.
    pub entry: String,
}

impl Module {
    /// The function of that name.
    pub fn function(&self, name: &str) -> Option<&Function> {
        self.functions.iter().find(|f| f.name == name)
    }

    /// The function to run, or `None` in a module that does not verify.
    pub fn entry(&self) -> Option<&Function> {
        self.function(&self.entry)
    }
}

/// A value of one function: an index into [`Function::values`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ValueId(pub u32);

/// What is known of a value besides how it is computed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Value {
    /// The author's name for it; unique in the function.
    pub name: String,
    /// Its type.
    #[serde(rename = "type")]
    pub ty: Type,
}

/// A function: equations over the values of one axis table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Function {
    /// Its name, without the `@` of the text format.
    pub name: String,
    /// The source file that most of its values come from, relative to the workspace; empty if none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub source: String,
    /// The axis table.
    pub axes: Vec<Axis>,
    /// All values, in order of definition: parameters, weights, caches, then results of the body.
    pub values: Vec<Value>,
    /// What callers pass.
    pub params: Vec<ValueId>,
    /// What a checkpoint holds.
    pub weights: Vec<Weight>,
    /// What one run leaves for the next.
    pub caches: Vec<ValueId>,
    /// The instructions, each after what it uses.
    pub body: Vec<Inst>,
    /// What callers get.
    pub results: Vec<ValueId>,
}

/// A value read from a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Weight {
    /// The value.
    pub value: ValueId,
    /// Where its elements are stored.
    pub stored: Stored,
}

/// How a weight lies in the tensors of a checkpoint.
///
/// Printed as `"self_attn.kv_b_proj.weight"[i * (n | v), c]`: the tensor has two dimensions; the first runs over `i`
/// and, within it, over `n` followed by `v`. A weight with the axes `i`, `n`, `c` is the part of it where the
/// alternative is `n`. `{e}` in the name stands for the index of an axis that is spread over tensors.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Stored {
    /// The tensor's name below the scope, with `{axis}` for each axis that numbers tensors.
    pub tensor: String,
    /// Its dimensions, slowest first; each a product of factors, slowest first.
    pub dims: Vec<Vec<Factor>>,
    /// What of these elements the weight holds.
    #[serde(default, skip_serializing_if = "Held::is_elements")]
    pub held: Held,
}

/// What a weight holds of the elements that are stored: themselves, or what they are coded as ([`coded`](crate::coded)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Held {
    /// The elements.
    #[default]
    Elements,
    /// Codes of 8 bits. The one stored axis that the weight lacks numbers those that share a word.
    Codes,
    /// The scales of the codes. The stored axes that the weight lacks number the elements that share one.
    Scales,
}

impl Held {
    /// Whether it is the elements.
    pub fn is_elements(&self) -> bool {
        *self == Held::Elements
    }
}

/// A factor of a stored dimension.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Factor {
    /// An axis of the weight.
    Axis(AxisId),
    /// Several axes one behind the other, of which the weight has one.
    Parts(Vec<AxisId>),
}

/// An instruction: an op, what it works on, what it makes, and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inst {
    /// What is computed.
    pub op: Op,
    /// From what.
    pub args: Vec<ValueId>,
    /// One value, but for calls.
    pub results: Vec<ValueId>,
    /// The lines of the model that this computes a part of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub origins: Vec<Origin>,
    /// The pass that made it; `None` if the author did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
}

impl Inst {
    /// The result of an instruction that has one.
    pub fn result(&self) -> ValueId {
        self.results[0]
    }
}

/// A place in a model's source, and the paper's number for the equation there.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Origin {
    /// Relative to the workspace.
    pub file: String,
    /// From 1.
    pub line: u32,
    /// From 1.
    pub col: u32,
    /// The equation, such as `41`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
}

/// What defines a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Def<'f> {
    /// The n-th parameter.
    Param(usize),
    /// A weight.
    Weight(&'f Weight),
    /// The n-th cache.
    Cache(usize),
    /// The n-th result of an instruction at an index of the body.
    Inst(usize, &'f Inst),
}

impl Function {
    /// A function with nothing in it.
    pub fn new(name: impl Into<String>) -> Function {
        Function {
            name: name.into(),
            source: String::new(),
            axes: Vec::new(),
            values: Vec::new(),
            params: Vec::new(),
            weights: Vec::new(),
            caches: Vec::new(),
            body: Vec::new(),
            results: Vec::new(),
        }
    }

    /// A value's name and type.
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.0 as usize]
    }

    /// A value's type.
    pub fn ty(&self, id: ValueId) -> &Type {
        &self.value(id).ty
    }

    /// A row of the axis table.
    pub fn axis(&self, id: AxisId) -> &Axis {
        &self.axes[id.0 as usize]
    }

    /// The axis of that name.
    pub fn axis_named(&self, name: &str) -> Option<AxisId> {
        self.axes.iter().position(|a| a.name == name).map(|i| AxisId(i as u32))
    }

    /// The value of that name.
    pub fn value_named(&self, name: &str) -> Option<ValueId> {
        self.values.iter().position(|v| v.name == name).map(|i| ValueId(i as u32))
    }

    /// What defines each value, by value number.
    pub fn defs(&self) -> Vec<Def<'_>> {
        let mut defs = vec![None; self.values.len()];
        for (n, v) in self.params.iter().enumerate() {
            defs[v.0 as usize] = Some(Def::Param(n));
        }
        for w in &self.weights {
            defs[w.value.0 as usize] = Some(Def::Weight(w));
        }
        for (n, v) in self.caches.iter().enumerate() {
            defs[v.0 as usize] = Some(Def::Cache(n));
        }
        for (n, inst) in self.body.iter().enumerate() {
            for r in &inst.results {
                defs[r.0 as usize] = Some(Def::Inst(n, inst));
            }
        }
        defs.into_iter().map(|d| d.expect("a verified function defines each of its values")).collect()
    }

    /// The instructions that read each value, by index of the body, by value number. One that reads it twice is there twice.
    pub fn users(&self) -> Vec<Vec<usize>> {
        let mut users = vec![Vec::new(); self.values.len()];
        for (n, inst) in self.body.iter().enumerate() {
            for a in &inst.args {
                users[a.0 as usize].push(n);
            }
        }
        users
    }

    /// The axes over which a contraction sums: in some operand, not in the result; in order of appearance.
    pub fn summed(&self, args: &[ValueId], result: &Type) -> Vec<AxisId> {
        let mut axes = Vec::new();
        for a in args {
            for &x in &self.ty(*a).axes {
                if !result.has(x) && !axes.contains(&x) {
                    axes.push(x);
                }
            }
        }
        axes
    }

    /// Adds an axis; its name is made unique by a suffix `.1`, `.2`, … if it is taken.
    pub fn add_axis(&mut self, name: &str, size: Size, like: Option<AxisId>) -> AxisId {
        let name = unique(name, |n| self.axes.iter().any(|a| a.name == n));
        self.axes.push(Axis { name, size, like });
        AxisId(self.axes.len() as u32 - 1)
    }

    /// Adds a value without a definition; its name is made unique, `x` and a number if it is empty.
    fn add_value(&mut self, name: &str, ty: Type) -> ValueId {
        let id = ValueId(self.values.len() as u32);
        let wanted = if name.is_empty() { format!("x{}", id.0) } else { name.to_owned() };
        let name = unique(&wanted, |n| self.values.iter().any(|v| v.name == n));
        self.values.push(Value { name, ty });
        id
    }

    /// Adds a parameter.
    pub fn add_param(&mut self, name: &str, ty: Type) -> ValueId {
        let id = self.add_value(name, ty);
        self.params.push(id);
        id
    }

    /// Adds a weight.
    pub fn add_weight(&mut self, name: &str, ty: Type, stored: Stored) -> ValueId {
        let value = self.add_value(name, ty);
        self.weights.push(Weight { value, stored });
        value
    }

    /// Adds a cache.
    pub fn add_cache(&mut self, name: &str, ty: Type) -> ValueId {
        let id = self.add_value(name, ty);
        self.caches.push(id);
        id
    }

    /// Appends an instruction whose result types are known. Nothing is checked before [`verify`](crate::verify()).
    pub fn push(&mut self, op: Op, args: &[ValueId], results: &[(&str, Type)]) -> Vec<ValueId> {
        let results: Vec<_> = results.iter().map(|(name, ty)| self.add_value(name, ty.clone())).collect();
        self.body.push(Inst {
            op,
            args: args.to_vec(),
            results: results.clone(),
            origins: Vec::new(),
            by: None,
        });
        results
    }

    /// Appends a number of that dtype.
    pub fn constant(&mut self, name: &str, x: f64, dtype: DType) -> ValueId {
        self.push(Op::Const(vec![crate::ops::Real(x)]), &[], &[(name, Type::scalar(dtype))])[0]
    }
}

/// The name itself or, if it is taken, the first free of `name.1`, `name.2`, …
fn unique(name: &str, taken: impl Fn(&str) -> bool) -> String {
    if !taken(name) {
        return name.to_owned();
    }
    (1u32..).map(|n| format!("{name}.{n}")).find(|n| !taken(n)).expect("there are more numbers than names")
}
