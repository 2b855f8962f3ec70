//! `manifest.json`: what `compile` wrote, for programs that load it.
//!
//! Nothing in it depends on where or when it was made.

use std::path::Path;

use latentc_codegen::cube::LaunchShape;
use latentc_codegen::memory::Summary;
use latentc_codegen::program::{Buffer, BufferId, Kernel, KernelKind, Program, Step};
use latentc_ir::{DType, Factor, Function, Module, Size, Weight};
use latentc_passes::Guard;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::passes::Validation;

/// The file's name in the output folder.
pub(crate) const FILE: &str = "manifest.json";

/// The whole file.
#[derive(Serialize)]
pub(crate) struct Manifest {
    /// The version of the compiler; by this key `compile` knows a folder of its own.
    pub(crate) latentc: &'static str,
    pub(crate) target: &'static str,
    pub(crate) model: Model,
    /// What a checkpoint must hold, in the order of first use.
    pub(crate) parameters: Vec<Parameter>,
    /// Each distinct kernel of all graphs.
    pub(crate) kernels: Vec<KernelEntry>,
    /// Grids of several kernels.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) together: Vec<Together>,
    pub(crate) graphs: Vec<Graph>,
    /// What `--validate` found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) validation: Option<Validation>,
}

#[derive(Serialize)]
pub(crate) struct Model {
    pub(crate) name: String,
    /// Weights and activations.
    pub(crate) dtype: DType,
    /// The configuration, as published checkpoints have it.
    pub(crate) config: Value,
}

/// Kernels that run in one grid where there is one new token of one sequence.
#[derive(Serialize)]
pub(crate) struct Together {
    /// In the ways that are taken then.
    pub(crate) kernels: Vec<String>,
    #[serde(flatten)]
    pub(crate) source: Source,
}

/// The way that launches of a kernel take at some run-time sizes, and why: by a tuning, or by the rules for its device.
#[derive(Serialize)]
pub(crate) struct Taken {
    /// In the order of the kernel's sizes.
    pub(crate) sizes: Vec<usize>,
    /// With its numbers.
    pub(crate) way: String,
    /// Whether a tuning says so.
    pub(crate) tuned: bool,
}

/// What the target compiles.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Source {
    pub(crate) file: String,
    /// The name that it is launched by.
    pub(crate) entry: String,
    /// The way to compute the kernel that it belongs to, which a device chooses by the sizes of a launch. The kernel's own kind comes first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) way: Option<KernelKind>,
    /// Units, cubes and shared memory; the host has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) launch: Option<LaunchShape>,
    /// What the kernel is known by, whatever it is called.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) identity: Option<Hex>,
    /// The FNV-1a hash of the file as it was written: one that has another was changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) digest: Option<Hex>,
}

/// A number of 64 bits, as text: readers of JSON may have no integers so long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hex(pub(crate) u64);

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:016x}", self.0))
    }
}

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Hex, D::Error> {
        let text = String::deserialize(deserializer)?;
        u64::from_str_radix(&text, 16).map(Hex).map_err(D::Error::custom)
    }
}

/// A tensor of a checkpoint.
#[derive(Serialize)]
pub(crate) struct Parameter {
    name: String,
    dtype: DType,
    shape: Vec<u64>,
}

#[derive(Serialize)]
pub(crate) struct KernelEntry {
    name: String,
    kind: KernelKind,
    /// What it computes, as IR.
    pub(crate) spec: String,
    /// What the target compiles, for each way to compute it.
    pub(crate) sources: Vec<Source>,
    /// The run-time sizes that a launch gives, in order.
    sizes: Vec<String>,
    /// The ways that launches take at the sizes that were given to `compile`, where there are several.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) taken: Vec<Taken>,
    inputs: Vec<Tensor>,
    output: Tensor,
}

#[derive(Serialize)]
struct Tensor {
    dtype: DType,
    dims: Vec<Size>,
}

#[derive(Serialize)]
pub(crate) struct Graph {
    pub(crate) graph: &'static str,
    /// For which sizes it is, unless for all; a graph that is there for several ranges has an entry for each.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) guard: Option<Guard>,
    /// The module after each pass.
    pub(crate) stages: Vec<String>,
    /// The launches, for people.
    pub(crate) schedule: String,
    /// Launches of one run; those that may run at the same time count as one.
    pub(crate) launches: u64,
    /// What temporaries take at sizes given to `compile`.
    pub(crate) memory: Summary,
    pub(crate) entry: String,
    /// Callees before callers.
    pub(crate) routines: Vec<Routine>,
}

#[derive(Serialize)]
pub(crate) struct Routine {
    name: String,
    /// What the steps name by number.
    buffers: Vec<BufferEntry>,
    params: Vec<BufferId>,
    results: Vec<BufferId>,
    steps: Vec<StepEntry>,
}

#[derive(Serialize)]
struct BufferEntry {
    #[serde(flatten)]
    buffer: Buffer,
    /// Of a weight: the tensor below the call's scope, and what its dimensions are made of.
    #[serde(skip_serializing_if = "Option::is_none")]
    stored: Option<Stored>,
}

#[derive(Serialize)]
struct Stored {
    tensor: String,
    /// Each dimension is a product of factors; a factor of several axes has them one behind the other, and the weight is
    /// one of them.
    dims: Vec<Vec<Vec<String>>>,
    /// The weight's own axes, slowest first.
    axes: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum StepEntry {
    Launch {
        kernel: String,
        inputs: Vec<BufferId>,
        output: BufferId,
        sizes: Vec<Size>,
        /// Whether it may run at the same time as the one before it.
        beside: bool,
    },
    Call {
        routine: String,
        scope: String,
        inputs: Vec<BufferId>,
        outputs: Vec<BufferId>,
    },
}

/// Whether a folder holds what `compile` once wrote.
pub(crate) fn is_ours(folder: &Path) -> bool {
    let text = std::fs::read_to_string(folder.join(FILE)).unwrap_or_default();
    let json: Value = serde_json::from_str(&text).unwrap_or_default();
    json.get("latentc").is_some_and(Value::is_string) && json.get("graphs").is_some_and(Value::is_array)
}

/// The tensors that a definition reads.
pub(crate) fn parameters(module: &Module) -> Result<Vec<Parameter>, String> {
    let tensors = module.inventory()?.tensors;
    Ok(tensors.into_iter().map(|t| Parameter { name: t.name, dtype: t.dtype, shape: t.shape }).collect())
}

impl KernelEntry {
    pub(crate) fn new(kernel: &Kernel, spec: String, sources: Vec<Source>, taken: Vec<Taken>) -> KernelEntry {
        let body = &kernel.body;
        let tensor = |v| {
            let ty = body.ty(v);
            Tensor { dtype: ty.dtype, dims: ty.axes.iter().map(|&a| body.axis(a).size.clone()).collect() }
        };
        KernelEntry {
            name: kernel.name.clone(),
            kind: kernel.kind,
            spec,
            sources,
            sizes: kernel.size_symbols().into_iter().map(str::to_owned).collect(),
            taken,
            inputs: body.params.iter().map(|&p| tensor(p)).collect(),
            output: tensor(body.results[0]),
        }
    }
}

/// Every routine of a program scheduled from this module.
pub(crate) fn routines(module: &Module, program: &Program) -> Vec<Routine> {
    let routine = |r: &latentc_codegen::program::Routine| {
        let function = module.function(&r.name);
        let buffers = r.buffers.iter().map(|b| BufferEntry {
            buffer: b.clone(),
            stored: match b.role {
                latentc_codegen::program::Role::Weight { index } => {
                    function.and_then(|f| Some(stored(f, f.weights.get(index)?)))
                }
                _ => None,
            },
        });
        let steps = r.steps.iter().map(|step| match step {
            Step::Launch { kernel, inputs, output, sizes, beside, .. } => StepEntry::Launch {
                kernel: program.kernels[*kernel].name.clone(),
                inputs: inputs.clone(),
                output: *output,
                sizes: sizes.clone(),
                beside: *beside,
            },
            Step::Call { routine, scope, inputs, outputs } => StepEntry::Call {
                routine: routine.clone(),
                scope: scope.clone(),
                inputs: inputs.clone(),
                outputs: outputs.clone(),
            },
        });
        Routine {
            name: r.name.clone(),
            buffers: buffers.collect(),
            params: r.params.clone(),
            results: r.results.clone(),
            steps: steps.collect(),
        }
    };
    program.routines.iter().map(routine).collect()
}

fn stored(f: &Function, weight: &Weight) -> Stored {
    let name = |a: &latentc_ir::AxisId| f.axis(*a).name.clone();
    let factor = |x: &Factor| match x {
        Factor::Axis(a) => vec![name(a)],
        Factor::Parts(axes) => axes.iter().map(name).collect(),
    };
    Stored {
        tensor: weight.stored.tensor.clone(),
        dims: weight.stored.dims.iter().map(|dim| dim.iter().map(factor).collect()).collect(),
        axes: f.ty(weight.value).axes.iter().map(name).collect(),
    }
}
