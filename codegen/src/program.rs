//! A scheduled program: kernels, and per function the list of their launches over buffers.
//!
//! A kernel is a small function of the IR in canonical form, so what it must compute is never in doubt: the interpreter runs the
//! same text. Two launches whose functions are equal share one kernel, whatever they were called in the model.

use std::collections::BTreeMap;
use std::fmt;

use latentc_ir::{DType, Function, Module, Op, Origin, Real, Size, Type, ValueId};
use latentc_passes::Pool;
use serde::{Deserialize, Serialize};

use crate::coded::{Source, made_in};
use crate::map::append;
use crate::stream::folds;

/// A whole program, target-independent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Program {
    /// The module it was scheduled from.
    pub name: String,
    /// Each distinct kernel once.
    pub kernels: Vec<Kernel>,
    /// Callees before callers.
    pub routines: Vec<Routine>,
    /// The routine to run.
    pub entry: String,
    /// What caches lie in, if it is pages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<Pool>,
}

impl Program {
    /// How often a run launches something, calls and all: launches that may run at the same time count as one.
    pub fn launches(&self) -> u64 {
        let mut of: BTreeMap<&str, u64> = BTreeMap::new();
        // Callees stand before callers.
        for routine in &self.routines {
            let count = routine.groups().map(|group| match &group[0] {
                Step::Launch { .. } => 1,
                Step::Call { routine, .. } => of.get(routine.as_str()).copied().unwrap_or(0),
            });
            let count = count.sum();
            of.insert(&routine.name, count);
        }
        of.get(self.entry.as_str()).copied().unwrap_or(0)
    }

    /// The kernels of each group of launches that may run at the same time, in order; equal groups once.
    pub fn together(&self) -> Vec<Vec<&Kernel>> {
        let mut all: Vec<Vec<&Kernel>> = Vec::new();
        for group in self.routines.iter().flat_map(Routine::groups).filter(|g| g.len() > 1) {
            let kernels = group.iter().filter_map(|step| match step {
                Step::Launch { kernel, .. } => Some(&self.kernels[*kernel]),
                Step::Call { .. } => None,
            });
            let kernels = kernels.collect();
            if !all.contains(&kernels) {
                all.push(kernels);
            }
        }
        all
    }

    /// The routine of that name.
    pub fn routine(&self, name: &str) -> Option<&Routine> {
        self.routines.iter().find(|r| r.name == name)
    }
}

/// What a launch computes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Kernel {
    /// Unique in the program: the function and value where it was first needed.
    pub name: String,
    /// How it is computed.
    pub kind: KernelKind,
    /// What it computes: parameters are the input buffers, each laid out in the order of its type's axes, and the one
    /// result is the output. Axes are called `a0`, `a1`, … and run-time sizes `n0`, `n1`, …. A result made by `append` is
    /// written into the buffer of the first parameter.
    pub body: Function,
}

impl Kernel {
    /// The names of the run-time sizes that a launch gives, in order.
    pub fn size_symbols(&self) -> Vec<&str> {
        let mut symbols = Vec::new();
        for axis in &self.body.axes {
            if let Size::Sym(s) = &axis.size
                && !symbols.contains(&s.as_str())
            {
                symbols.push(s.as_str());
            }
        }
        symbols
    }

    /// What it computes under no name: equal for kernels that compute the same, whatever they are called.
    pub fn nameless(&self) -> Function {
        Function { name: String::new(), ..self.body.clone() }
    }

    /// What is behind each run-time size when the sizes are these; 0 behind what is none.
    pub fn number<'k>(&'k self, sizes: &'k [usize]) -> impl Fn(&str) -> usize + 'k {
        let symbols = self.size_symbols();
        move |size| symbols.iter().position(|s| *s == size).map_or(0, |n| sizes[n])
    }

    /// The extent of each axis when the run-time sizes are these.
    ///
    /// # Panics
    /// If there are fewer sizes than [`size_symbols`](Kernel::size_symbols): launches are built with all of them.
    pub fn extents(&self, sizes: &[usize]) -> Vec<usize> {
        let symbols = self.size_symbols();
        let extent = |size: &Size| match size {
            Size::Fixed(n) => *n as usize,
            Size::Sym(s) => sizes[symbols.iter().position(|x| x == s).expect("collected from these axes")],
        };
        self.body.axes.iter().map(|a| extent(&a.size)).collect()
    }

    /// The parameter that the kernel appends to, and writes in place, if it does.
    pub fn cache(&self) -> Option<ValueId> {
        append(&self.body).map(|i| i.args[0])
    }

    /// What the kernel computes as a program of its own, which verifies: what it appends to is a cache.
    pub fn module(&self) -> Module {
        let mut body = self.body.clone();
        if let Some(cache) = self.cache() {
            body.params.retain(|&p| p != cache);
            body.caches.push(cache);
        }
        Module { name: self.name.clone(), entry: body.name.clone(), functions: vec![body] }
    }

    /// The type of the output.
    pub fn output(&self) -> &Type {
        self.body.ty(self.body.results[0])
    }
}

/// How a kernel is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KernelKind {
    /// Every element (or row, where the body reduces) on its own: see [`map`](crate::map).
    Map,
    /// A product of two tensors summed over their common axes: see [`contract`](crate::contract). Expressions may make its
    /// operands, and work on its result; several products of one shape may meet there.
    Contract,
    /// The same where one operand is gathered, as the weights of the experts that each token goes to: see
    /// [`grouped`](crate::grouped).
    Grouped,
    /// Elements added up where an index says: see [`scatter`](crate::scatter).
    Scatter,
    /// A sum or maximum of what is made of products piece by piece and never stored, such as values weighed by a softmax: see
    /// [`stream`](crate::stream).
    Stream,
    /// A product that is computed by tiles on GPUs, whatever its size.
    Tiles,
    /// What a device makes of a product with few rows at a launch: see [`few`](crate::few).
    Few {
        /// The side of the operands that are read once: 0 has the axes *m*, 1 the axes *n*.
        wide: u8,
        /// Rows that are multiplied with what was read.
        rows: u8,
    },
    /// What a device with tensor cores makes of a sum of outer products by index at a launch. It is several on the device.
    ScatterMatrix {
        /// Rows and columns of a tile.
        side: u8,
        /// Who multiplies: no boxes are brought.
        by: By,
    },
    /// What a device with tensor cores makes of a stream at a launch.
    StreamMatrix {
        /// Times 16 rows that a cube has: 1, 2, 4 or 8.
        tall: u8,
        /// Who multiplies.
        by: By,
    },
    /// What a device with tensor cores makes of a product with many rows, or many for each group, at a launch. It may be several on the
    /// device.
    Matrix {
        /// The side of the operands that has the columns of the result's tiles, as in `Few`.
        wide: u8,
        /// Rows of a tile.
        rows: u16,
        /// Columns of a tile, of all products together.
        columns: u16,
        /// Who multiplies.
        by: By,
        /// Parts that what is summed is cut into, each added up by other cubes.
        parts: u8,
        /// Whether operands in f32 are multiplied as tf32, without their last 13 bits; else as several numbers of 16 bits.
        tf32: bool,
    },
}

/// Who multiplies on tensor cores, and who brings what is multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    /// Planes, each by itself, what units bring.
    Planes,
    /// Groups of four planes, which devices of compute capability 9.0 have, what units bring.
    Groups,
    /// These groups, boxes of the operands that the device itself brings, as theirs can where its driver is called directly.
    Boxes,
}

impl By {
    /// Whether groups of planes multiply together.
    pub fn in_groups(self) -> bool {
        match self {
            By::Planes => false,
            By::Groups | By::Boxes => true,
        }
    }
}

impl KernelKind {
    /// The kind of the kernel with that body.
    pub fn of(body: &Function) -> KernelKind {
        let inst = made_in(body);
        let gathers = |v: &ValueId| Source::of(body, &inst, *v).gather.is_some();
        let mut kind = KernelKind::Map;
        if body.body.iter().any(|i| matches!(i.op, Op::Softmax { .. })) || !folds(body).is_empty() {
            return KernelKind::Stream;
        }
        for inst in &body.body {
            match inst.op {
                Op::ScatterAdd { .. } => kind = KernelKind::Scatter,
                Op::Contract if inst.args.iter().any(gathers) => kind = KernelKind::Grouped,
                Op::Contract if kind == KernelKind::Map => kind = KernelKind::Contract,
                _ => {}
            }
        }
        kind
    }
}

impl KernelKind {
    /// Whether it is a stream, in whichever way.
    pub fn streams(self) -> bool {
        matches!(self, KernelKind::Stream | KernelKind::StreamMatrix { .. })
    }

    /// Whether groups of planes multiply together, which devices of compute capability 9.0 can and no others.
    pub fn in_groups(self) -> bool {
        matches!(
            self,
            KernelKind::Matrix { by, .. } | KernelKind::StreamMatrix { by, .. } | KernelKind::ScatterMatrix { by, .. }
                if by.in_groups()
        )
    }
}

impl fmt::Display for KernelKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KernelKind::Map => "map",
            KernelKind::Contract => "contract",
            KernelKind::Grouped => "grouped",
            KernelKind::Scatter => "scatter",
            KernelKind::Stream => "stream",
            KernelKind::ScatterMatrix { .. } => "scatter matrix",
            KernelKind::StreamMatrix { .. } => "stream matrix",
            KernelKind::Tiles => "tiles",
            KernelKind::Few { .. } => "few rows",
            KernelKind::Matrix { .. } => "matrix",
        })
    }
}

/// A buffer of one routine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BufferId(pub u32);

/// A function as launches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Routine {
    /// The function's name.
    pub name: String,
    /// All buffers that the steps name.
    pub buffers: Vec<Buffer>,
    /// What callers pass, in order.
    pub params: Vec<BufferId>,
    /// What callers get, in order; these are temporaries of the routine that the caller provides.
    pub results: Vec<BufferId>,
    /// What happens, in order.
    pub steps: Vec<Step>,
}

/// A piece of memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Buffer {
    /// The value that it holds first.
    pub name: String,
    /// The element type.
    pub dtype: DType,
    /// The extents, slowest first.
    pub dims: Vec<Size>,
    /// Where it comes from.
    pub role: Role,
}

/// Where a buffer comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The caller.
    Param,
    /// The checkpoint, below the scope of the call.
    Weight {
        /// Its place among the function's weights.
        index: usize,
    },
    /// The previous run; grows along its first dimension.
    Cache,
    /// The program text.
    Constant {
        /// Its elements.
        values: Vec<Real>,
    },
    /// A step of this routine.
    Temp,
}

/// One thing that happens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// A kernel runs.
    Launch {
        /// An index into [`Program::kernels`].
        kernel: usize,
        /// One buffer per parameter of the kernel's body.
        inputs: Vec<BufferId>,
        /// Where the result goes. An appending kernel's is its first input.
        output: BufferId,
        /// The kernel's run-time sizes in the routine's terms.
        sizes: Vec<Size>,
        /// Whether it may run at the same time as the launch before it: see [`together`](crate::together).
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        beside: bool,
        /// The lines of the model that it computes.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        origins: Vec<Origin>,
    },
    /// Another routine runs.
    Call {
        /// Its name.
        routine: String,
        /// Where its weights and caches are found, below this one's scope.
        scope: String,
        /// Its parameters.
        inputs: Vec<BufferId>,
        /// Its results.
        outputs: Vec<BufferId>,
    },
}

impl Step {
    /// The buffers read.
    pub fn inputs(&self) -> &[BufferId] {
        match self {
            Step::Launch { inputs, .. } | Step::Call { inputs, .. } => inputs,
        }
    }

    /// The buffers written.
    pub fn outputs(&self) -> &[BufferId] {
        match self {
            Step::Launch { output, .. } => std::slice::from_ref(output),
            Step::Call { outputs, .. } => outputs,
        }
    }
}

impl Routine {
    /// Its steps, with launches that may run at the same time in one slice.
    pub fn groups(&self) -> impl Iterator<Item = &[Step]> {
        self.steps.chunk_by(|_, next| matches!(next, Step::Launch { beside: true, .. }))
    }

    /// A buffer's description.
    pub fn buffer(&self, id: BufferId) -> &Buffer {
        &self.buffers[id.0 as usize]
    }
}

impl fmt::Display for Program {
    /// The launch list: one line per step. `&` stands before a launch that may run at the same time as the one above it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for routine in &self.routines {
            let names = |ids: &[BufferId]| {
                ids.iter().map(|&b| routine.buffer(b).name.clone()).collect::<Vec<_>>().join(", ")
            };
            let mark = if routine.name == self.entry { " entry" } else { "" };
            writeln!(
                f,
                "routine @{}{mark} ({}) -> ({}) {{",
                routine.name,
                names(&routine.params),
                names(&routine.results)
            )?;
            for step in &routine.steps {
                match step {
                    Step::Launch { kernel, inputs, output, sizes, beside, .. } => {
                        let sizes: Vec<_> = sizes.iter().map(Size::to_string).collect();
                        let out = routine.buffer(*output);
                        let dims: Vec<_> = out.dims.iter().map(Size::to_string).collect();
                        write!(
                            f,
                            "{} {}: {}[{}] = launch {}({})",
                            if *beside { "&" } else { " " },
                            out.name,
                            out.dtype,
                            dims.join(", "),
                            self.kernels[*kernel].name,
                            names(inputs)
                        )?;
                        if !sizes.is_empty() {
                            write!(f, " over {}", sizes.join(", "))?;
                        }
                        writeln!(f)?;
                    }
                    Step::Call { routine: callee, scope, inputs, outputs } => {
                        write!(f, "  {} = call @{callee}({})", names(outputs), names(inputs))?;
                        if !scope.is_empty() {
                            write!(f, " under {scope:?}")?;
                        }
                        writeln!(f)?;
                    }
                }
            }
            writeln!(f, "}}\n")?;
        }
        Ok(())
    }
}

/// A kernel for tests, of the text of a body without its return of `y`.
#[cfg(test)]
pub(crate) fn parsed(kind: KernelKind, body: &str) -> Kernel {
    let text = format!("module m entry @f\n\nfunc @f {{\n{body}  return y\n}}\n");
    let body = latentc_ir::parse("m.ir", &text).expect("it parses").functions.remove(0);
    Kernel { name: "f".to_owned(), kind, body }
}
