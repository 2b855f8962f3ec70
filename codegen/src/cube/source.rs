//! The text of a kernel, made without a device.

use std::fmt::Write;
use std::sync::{Arc, Mutex};

use cubecl_core::Compiler;
use cubecl_core::ir::StorageType;
use cubecl_core::prelude::{CompiledKernel, ExecutionMode, KernelId, KernelMetadata, KernelTask};
use cubecl_cpp::cuda::CudaDialect;
use cubecl_cpp::cuda::mma::CudaWmmaCompiler;
use cubecl_cpp::shared::{CompilationOptions, CppCompiler, CppSupportedFeatures};
use cubecl_runtime::compiler::{CompilationError, CubeTask};

use super::bulk;
use super::edits::Edit;
use super::emit::{COPIES, CUBES, GRIDS, GROUPS};
use super::feed::TURNED_BYTES;
use super::kernel::{CubeIr, Form};
use super::overlap;
use super::refuse;
use super::shape::{Cubes, LaunchShape};
use super::split::Role;
use super::stages::{Stage, Stages};
use super::target::Target;
use super::warpgroup;
use crate::device::DeviceError;
use crate::program::{Kernel, KernelKind};

type CudaCompiler = CppCompiler<CudaDialect<CudaWmmaCompiler>>;

/// Temporaries of the C++ printer are numbered by one counter of the process: two kernels at once would mix their numbers.
static PRINTER: Mutex<()> = Mutex::new(());

/// The kernel in CUDA C++ for sm_90, headed by a comment that says what it computes and how it is launched. The entry
/// has the kernel's name, and equal kernels have equal text.
///
/// # Errors
/// If the kernel cannot be expressed, or is several: see [`sources`].
pub fn cuda_source(kernel: &Kernel) -> Result<String, DeviceError> {
    written(&CubeIr::new(kernel, Target::Cuda)?)
}

/// The kernel in WGSL, with the same header. The entry has the kernel's name.
///
/// # Errors
/// If the kernel cannot be expressed.
#[cfg(feature = "wgpu")]
pub fn wgsl_source(kernel: &Kernel) -> Result<String, DeviceError> {
    written(&CubeIr::new(kernel, Target::Wgsl)?)
}

/// One of the kernels that a launch may come to.
#[derive(Clone, Debug)]
pub struct Source {
    /// The entry.
    pub name: String,
    /// As of [`cuda_source`].
    pub text: String,
    /// How it is launched.
    pub launch: LaunchShape,
    /// Products of tensor cores that a plane takes part in for a stage of its tile, or a block of positions; none where it multiplies so
    /// nothing.
    pub tensor: u32,
    /// What it is known by in any program, whatever it is called: by this number [`Edits`](super::Edits) put other texts in its place.
    pub identity: u64,
}

/// All kernels that launches of a kernel may come to in the way that its kind says. Mostly that is one. A product on tensor cores may have
/// others before it and behind it; a streamed softmax is one, or two (`_part` and `_merge`) that share out the positions.
///
/// # Errors
/// If one of them cannot be expressed.
pub fn sources(kernel: &Kernel, target: Target) -> Result<Vec<Source>, DeviceError> {
    launched(kernel).iter().map(|stage| stage_source(stage, target)).collect()
}

/// What the kernels that launches of a kernel may come to are known by, in the order of [`sources`].
///
/// # Errors
/// As for those.
pub fn identities(kernel: &Kernel, target: Target) -> Result<Vec<u64>, DeviceError> {
    let all = launched(kernel);
    all.iter().map(|stage| Ok(stage.ir(target)?.identity())).collect()
}

/// What a kernel is known by in any program, whatever it is called and in whichever way it is computed.
pub fn identity(kernel: &Kernel, target: Target) -> u64 {
    super::kernel::identity(kernel, target)
}

/// Whether code can be made of a kernel in the way that its kind says.
pub fn is_expressible(kernel: &Kernel, target: Target) -> bool {
    launched(kernel).iter().all(|stage| stage.ir(target).is_ok())
}

/// The kernels that launches of a kernel may come to.
fn launched(kernel: &Kernel) -> Vec<Stage> {
    let mut all = Vec::new();
    for stage in Stages::of(kernel).all {
        let split = if stage.kernel.kind.streams() { &[Role::Part, Role::Merge][..] } else { &[] };
        let parts: Vec<_> = split.iter().map(|&role| Stage { role, ..stage.clone() }).collect();
        all.push(stage);
        all.extend(parts);
    }
    all
}

/// [`sources`] in CUDA C++.
///
/// # Errors
/// As for those.
pub fn cuda_sources(kernel: &Kernel) -> Result<Vec<Source>, DeviceError> {
    sources(kernel, Target::Cuda)
}

/// One of the launches of a kernel.
fn stage_source(stage: &Stage, target: Target) -> Result<Source, DeviceError> {
    let name = format!("{}{}", stage.kernel.name, stage.role.suffix());
    source(name, &stage.ir(target)?, stage.shape(target))
}

fn source(name: String, ir: &CubeIr, launch: LaunchShape) -> Result<Source, DeviceError> {
    let all = ir.kernels();
    let tensor = all.into_iter().map(|(kernel, role)| products(kernel, role, ir.target())).sum();
    Ok(Source { name, text: written(ir)?, launch, tensor, identity: ir.identity() })
}

/// As [`Source::tensor`] says.
fn products(kernel: &Kernel, role: Role, target: Target) -> u32 {
    match (role, Form::of(kernel, target)) {
        (Role::Whole, Form::Matrix(plan, tile)) => tile.products(&kernel.body, &plan),
        (Role::Whole, Form::ScatterMatrix(plan, tile)) => plan.products(tile),
        (Role::Whole | Role::Part, Form::StreamMatrix(plan, tiling)) => plan.products(tiling),
        (Role::Whole | Role::Part | Role::Merge | Role::Sort, _) => 0,
    }
}

/// Kernels side by side in one grid, in CUDA C++ for sm_90. The entry is called as [`together_name`] says. `None` if there are none.
///
/// # Errors
/// As for [`cuda_source`].
pub fn cuda_together_source(kernels: &[Kernel]) -> Result<Option<Source>, DeviceError> {
    let irs = kernels.iter().map(|k| CubeIr::new(k, Target::Cuda)).collect::<Result<Vec<_>, _>>()?;
    let Some(launch) = kernels.iter().map(LaunchShape::of).reduce(LaunchShape::beside) else {
        return Ok(None);
    };
    let ir = CubeIr::together(&irs);
    source(together_name(kernels), &ir, launch).map(Some)
}

/// The name of the entry of kernels side by side.
pub fn together_name(kernels: &[Kernel]) -> String {
    super::kernel::together_name(kernels.iter().map(|k| k.name.as_str()))
}

/// A kernel as people read it: headed by what it computes and how it is launched, unless it is a part of what another does.
pub(crate) fn written(ir: &CubeIr) -> Result<String, DeviceError> {
    let target = ir.target();
    let mut head = String::new();
    let all = ir.kernels();
    if all.len() > 1 {
        head += "// Kernels side by side: each has the buffers, the sizes and the cubes behind those of the one before it. Behind all\n\
                 // sizes comes the number of cubes up to the end of each.\n\n";
    }
    for (kernel, _) in all.iter().filter(|(_, role)| *role == Role::Whole) {
        head += &header(kernel, target);
    }
    let text = match target {
        Target::Cuda => cuda_text(ir)?,
        #[cfg(feature = "wgpu")]
        Target::Wgsl => text::<cubecl_wgpu::WgslCompiler>(ir, &Default::default())?,
        #[cfg(not(feature = "wgpu"))]
        Target::Wgsl => return Err(refuse(all[0].0, "this build has no WGSL: its feature `wgpu` is off")),
    };
    Ok(head + &text)
}

/// What CubeCL sets for compute capability 9.0 and CUDA 12.8 or later.
fn cuda_options() -> CompilationOptions {
    CompilationOptions {
        warp_size: 32,
        supports_features: CppSupportedFeatures {
            grid_constants: true,
            clusters: true,
            fast_math: true,
            fast_tanh: true,
            elect_sync: true,
        },
    }
}

fn cuda_text(ir: &CubeIr) -> Result<String, DeviceError> {
    let _alone = PRINTER.lock().unwrap_or_else(|e| e.into_inner());
    let text = text::<CudaCompiler>(ir, &cuda_options())?;
    Ok(ordered_types(&ordered_shared_arrays(&text)))
}

/// A kernel as a driver is given it.
#[cfg(feature = "cuda")]
pub(super) struct Text {
    pub(super) source: String,
    pub(super) entry: String,
    pub(super) units: u32,
    pub(super) shared_bytes: u32,
}

/// A kernel in CUDA C++ for compute capability 9.0 and later.
#[cfg(feature = "cuda")]
pub(super) fn cuda_launched(ir: &CubeIr) -> Result<Text, String> {
    let _alone = PRINTER.lock().unwrap_or_else(|e| e.into_inner());
    let compiled = compiled::<CudaCompiler>(ir, &cuda_options())?;
    let shared_bytes = compiled.repr.map_or(0, |repr| repr.shared_memory_size()) as u32;
    let (source, entry, units) = (compiled.source, compiled.entrypoint_name, compiled.cube_dim.num_elems());
    Ok(Text { source, entry, units, shared_bytes })
}

fn text<C>(ir: &CubeIr, options: &C::CompilationOptions) -> Result<String, DeviceError>
where
    C: Compiler + Default,
{
    compiled(ir, options).map(|c: CompiledKernel<C>| c.source).map_err(|why| refuse(ir.kernels()[0].0, why))
}

fn compiled<C>(ir: &CubeIr, options: &C::CompilationOptions) -> Result<CompiledKernel<C>, String>
where
    C: Compiler + Default,
{
    let task = Task::<C>::new(ir.clone());
    // Accesses are in bounds by construction, so none is guarded.
    task.compile(&mut C::default(), options, ExecutionMode::Unchecked, ir.address_type())
        .map_err(|e| e.to_string())
}

/// A kernel on its way to a compiler, with the instructions that CubeCL has no name for.
pub(super) struct Task<C: Compiler> {
    kernel: KernelTask<C, CubeIr>,
    edit: Option<Arc<Edit>>,
}

impl<C: Compiler> Task<C> {
    pub(super) fn new(ir: CubeIr) -> Task<C> {
        let edit = ir.edit().cloned();
        Task { kernel: KernelTask::new(ir), edit }
    }
}

impl<C: Compiler> KernelMetadata for Task<C> {
    fn id(&self) -> KernelId {
        self.kernel.id()
    }

    fn address_type(&self) -> StorageType {
        self.kernel.address_type()
    }
}

impl<C: Compiler> CubeTask<C> for Task<C> {
    fn compile(
        &self,
        compiler: &mut C,
        options: &C::CompilationOptions,
        mode: ExecutionMode,
        address: StorageType,
    ) -> Result<CompiledKernel<C>, CompilationError> {
        let mut compiled = self.kernel.compile(compiler, options, mode, address)?;
        if compiled.source.contains(COPIES) {
            compiled.source = with_copies(&compiled.source);
        }
        if compiled.source.contains(GROUPS) {
            compiled.source = warpgroup::expand(&compiled.source);
        }
        if compiled.source.contains(bulk::MAP) {
            compiled.source = bulk::with_maps(&compiled.source);
        }
        if compiled.source.contains(GRIDS) {
            compiled.source = overlap::expand(&compiled.source);
        }
        if compiled.source.contains(CUBES) {
            compiled.source = for_cubes(&compiled.source);
        }
        if let Some(edit) = &self.edit {
            edit.take();
            compiled.source.clone_from(&edit.text);
            compiled.entrypoint_name.clone_from(&edit.entry);
        }
        Ok(compiled)
    }
}

/// CubeCL 0.10 begins copies (`cp.async`) by a function of its own, and waits for them by `cuda::barrier` only, whose headers NVRTC
/// takes seconds for. This waits by plain instructions, and leaves out the function that names the barrier.
fn with_copies(text: &str) -> String {
    const FIRST: &str =
        "// Wrapper for https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization";
    const NEXT: &str =
        "// Wrappers for https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement";
    // It may stand behind something else in its line.
    let mark = format!("// {COPIES}");
    let mut parts = text.split(&mark);
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (marked, rest) = part.split_once('\n').unwrap_or((part, ""));
        let (name, operand) = match marked.split_once(' ') {
            None => (marked.to_owned(), String::new()),
            Some((name, n)) => (format!("{name} %0"), format!(" \"n\"({n}) ")),
        };
        text += &format!("asm volatile(\"cp.async.{name};\" ::{operand}: \"memory\");\n{rest}");
    }
    match (text.find(FIRST), text.find(NEXT)) {
        (Some(from), Some(to)) if from < to => [&text[..from], &text[to..]].concat(),
        _ => text,
    }
}

/// Says how many cubes are to fit on a processor, where CubeCL says only how many units each has.
fn for_cubes(text: &str) -> String {
    let said = || {
        let (before, rest) = text.split_once(&format!("// {CUBES}"))?;
        let (count, after) = rest.split_once('\n')?;
        let (head, body) = before.split_once("__launch_bounds__(")?;
        let (units, body) = body.split_once(')')?;
        Some(format!("{head}__launch_bounds__({units}, {count}){body}{after}"))
    };
    said().unwrap_or_else(|| text.to_owned())
}

/// What the kernel computes and how it is launched.
fn header(kernel: &Kernel, target: Target) -> String {
    let body = &kernel.body;
    let mut text = format!("// {}: {} kernel of latentc\n//\n", kernel.name, kernel.kind);
    for line in body.to_string().lines() {
        let _ = writeln!(text, "{}", format!("// {line}").trim_end());
    }
    let _ = writeln!(text, "//\n// launch: {}", LaunchShape::of(kernel));
    if kernel.kind.in_groups() {
        let _ = writeln!(text, "// for sm_90a and no other: groups of planes multiply together");
    }
    if kernel.kind.streams() {
        let name = &kernel.name;
        let _ = writeln!(
            text,
            "// few cubes and many positions: {name}_part for parts of these, then {name}_merge"
        );
    }
    let inputs: Vec<_> = body.params.iter().copied().filter(|&p| CubeIr::reads(body, p)).collect();
    // The order of rows comes behind the parameters.
    let ordered = matches!(LaunchShape::of(kernel).cubes, Cubes::Groups { .. })
        || matches!(kernel.kind, KernelKind::ScatterMatrix { .. });
    let output = inputs.len() + usize::from(ordered);
    if ordered {
        let n = inputs.len();
        let _ = writeln!(
            text,
            "// buffer_{n}: in, where each group of rows begins, and the rows by groups, 4 B an element"
        );
    }
    for (n, (v, map)) in bulk::told(kernel).iter().enumerate() {
        let name = &body.value(*v).name;
        let _ = writeln!(text, "// map_{n}: {name} as the device copies it, {map}, swizzled by 128 bytes");
    }
    let places = (0..).zip(inputs.iter().map(|&p| (p, "in"))).chain([(output, (body.results[0], "out"))]);
    for (n, (v, role)) in places {
        let value = body.value(v);
        let dims: Vec<_> = value.ty.axes.iter().map(|&a| body.axis(a).size.to_string()).collect();
        let bytes = target.bytes(value.ty.dtype).unwrap_or(0);
        let _ = writeln!(
            text,
            "// buffer_{n}: {role} {} {}[{}], dense, {bytes} B an element",
            value.name,
            value.ty.dtype,
            dims.join(", ")
        );
    }
    let sizes = kernel.size_symbols();
    if target == Target::Cuda && !sizes.is_empty() {
        let _ = writeln!(text, "// sizes, from info.scalars_uint32[0] on: {}", sizes.join(", "));
    }
    text + "\n"
}

/// CubeCL prints the types of vectors in the order of a hash map too: this prints them by name.
fn ordered_types(text: &str) -> String {
    const HEAD: &str = "struct __align__(";
    let Some(start) = text.find(HEAD) else { return text.to_owned() };
    let (before, mut rest) = text.split_at(start);
    let mut types = Vec::new();
    while rest.starts_with(HEAD) {
        let Some(end) = rest.find("\n};\n") else { break };
        let (one, after) = rest.split_at(end + 4);
        types.push(one);
        rest = after;
    }
    types.sort_by_key(|t| t.split_once(") ").map(|(_, name)| name));
    [before, &types.concat(), rest].concat()
}

/// CubeCL lays out and prints shared arrays in the order of a hash map, another one in each compilation. This
/// prints them by number, one behind the other: all are multiples of 16 bytes long and live as long as the kernel, so
/// any order fits into the same total. Those that have to begin at some multiple of bytes are as long as that, and come first.
fn ordered_shared_arrays(text: &str) -> String {
    struct Array<'a> {
        comment: &'a str,
        head: &'a str,
        number: u32,
        bytes: usize,
    }
    fn array<'a>(comment: &'a str, line: &'a str) -> Option<Array<'a>> {
        let (_, bytes) = comment.strip_prefix("// Shared array size: ")?.split_once(", ")?;
        let bytes = bytes.strip_suffix(" bytes")?.parse().ok()?;
        let (head, _) = line.split_once("(&dynamic_shared_mem[")?;
        let number = head.split_once("shared_memory_")?.1.split_once(' ')?.0.parse().ok()?;
        Some(Array { comment, head, number, bytes })
    }
    let lines: Vec<&str> = text.split('\n').collect();
    let Some(first) = lines.windows(2).position(|pair| array(pair[0], pair[1]).is_some()) else {
        return text.to_owned();
    };
    let mut arrays: Vec<_> =
        lines[first..].chunks_exact(2).map_while(|pair| array(pair[0], pair[1])).collect();
    let end = first + 2 * arrays.len();
    let placed = text.contains(&format!("__align__({TURNED_BYTES}) uint8"));
    arrays.sort_by_key(|a| (placed && !a.bytes.is_multiple_of(TURNED_BYTES), a.number));
    let mut out: Vec<String> = lines[..first].iter().map(|&l| l.to_owned()).collect();
    let mut offset = 0;
    for a in arrays {
        out.push(a.comment.to_owned());
        out.push(format!("{}(&dynamic_shared_mem[{offset}]);", a.head));
        offset += a.bytes;
    }
    out.extend(lines[end..].iter().map(|&l| l.to_owned()));
    out.join("\n")
}
