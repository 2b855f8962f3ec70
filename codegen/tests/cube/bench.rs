//! What the tests run kernels on.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io::Write;
use std::sync::{Mutex, OnceLock};

use latentc_codegen::check::{check, launch, meaning};
use latentc_codegen::cube::{CudaDevice, WgpuDevice, cuda_source, cuda_sources};
use latentc_codegen::device::{Device, DeviceError};
use latentc_codegen::emulate::Emulator;
use latentc_codegen::nvrtc::{Nvrtc, NvrtcError, Resources, Toolkit};
use latentc_codegen::program::{Kernel, KernelKind};
use latentc_ir::{DType, SplitMix, Tensor, ValueId, parse};

/// A kernel whose body is given in the text format, without its first and last line.
pub(crate) fn kernel(kind: KernelKind, name: &str, body: &str) -> Kernel {
    let text = format!("module test entry @{name}\n\nfunc @{name} {{\n{body}\n}}\n");
    let module = parse("test", &text).unwrap_or_else(|e| panic!("{e} in\n{text}"));
    Kernel { name: name.to_owned(), kind, body: module.functions[0].clone() }
}

/// A map kernel.
pub(crate) fn map(name: &str, body: &str) -> Kernel {
    kernel(KernelKind::Map, name, body)
}

/// Says once that a part of the tests does not run. Not through `eprintln!`, which the test harness swallows.
fn skipped(what: &'static str, why: impl std::fmt::Display) {
    static SAID: Mutex<BTreeSet<&str>> = Mutex::new(BTreeSet::new());
    if SAID.lock().unwrap().insert(what) {
        let _ = writeln!(std::io::stderr(), "SKIPPED: {what}: {why}");
    }
}

/// The device if it is there.
fn present<D>(what: &'static str, opened: Result<D, DeviceError>) -> Option<D> {
    match opened {
        Ok(device) => Some(device),
        Err(DeviceError::Absent(_, why)) => {
            skipped(what, why);
            None
        }
        Err(e) => panic!("{e}"),
    }
}

/// A device for WGSL, or none here.
pub(crate) fn device() -> Option<WgpuDevice> {
    present("kernels on wgpu (scripts/setup-lavapipe.sh)", WgpuDevice::open())
}

/// A device for CUDA, or none here.
pub(crate) fn gpu() -> Option<CudaDevice> {
    present("kernels on CUDA", CudaDevice::open(0))
}

/// Works with CUDA on this CPU, if there is a C++ compiler.
pub(crate) fn emulated(work: impl FnOnce(&mut Emulator)) {
    thread_local! {
        static EMULATOR: RefCell<Option<Emulator>> =
            RefCell::new(present("CUDA kernels on the emulator (scripts/setup-cxx.sh)", Emulator::open(1)));
    }
    EMULATOR.with_borrow_mut(|emulator| {
        if let Some(emulator) = emulator {
            work(emulator);
        }
    });
}

/// Asserts that the emulator finds what is wrong with a kernel whose text lacks its only `wait` for copies, or the barrier behind that, in
/// one of a few orders of threads: what another thread has copied is there by chance in some.
#[track_caller]
pub(crate) fn shows_unawaited(kernel: &Kernel, wait: &str, sizes: &[usize]) {
    const BARRIER: &str = "__syncthreads();";
    let text = cuda_source(kernel).unwrap();
    let both = format!("{wait}\n{BARRIER}");
    assert_eq!(text.matches(&both).count(), 1, "{text}");
    for left in [BARRIER, wait] {
        emulated(|_| {
            let outcome = |seed: u64| {
                let mut emulator = Emulator::open(seed).unwrap();
                emulator.replace(kernel, text.replace(&both, left)).unwrap();
                check(&mut emulator, kernel, sizes, 5).unwrap()
            };
            let mut found = (3..9).map(outcome);
            assert!(found.any(|outcome| !outcome.passes()), "with `{left}` alone, nothing is found");
        });
    }
}

/// The assembler's report on a kernel, or none where there is no assembler. The text is the same each time.
pub(crate) fn cuda(kernel: &Kernel) -> Option<Resources> {
    let text = cuda_source(kernel).unwrap();
    let again = cuda_source(kernel).unwrap();
    let differs = text.lines().zip(again.lines()).find(|(a, b)| a != b);
    assert!(text == again, "the text of {} varies: {differs:?}", kernel.name);
    cuda_text(&kernel.name, &text)
}

/// The same for the text of a kernel of that name.
pub(crate) fn cuda_text(name: &str, text: &str) -> Option<Resources> {
    static TOOLS: OnceLock<Option<(Toolkit, Nvrtc)>> = OnceLock::new();
    let tools = TOOLS.get_or_init(|| match Toolkit::find() {
        Ok(kit) => Some((kit.clone(), Nvrtc::load(&kit).unwrap())),
        Err(e @ NvrtcError::Absent(_)) => {
            skipped("CUDA kernels through nvrtc and ptxas", e);
            None
        }
        Err(e) => panic!("{e}"),
    });
    let (kit, nvrtc) = tools.as_ref()?;
    let ptx = nvrtc.compile(text, "sm_90a").unwrap_or_else(|e| panic!("{e}\n{text}"));
    assert!(ptx.contains(&format!(".entry {name}(")), "the entry has another name");
    // What grids ahead may write is not read as what stays as it is: that is moved before the wait for them.
    let early = text.contains("ld.global.L1::no_allocate");
    // CUDA's functions of angles have a table that is read so.
    let table = ptx.contains("__cudart_i2opi_f");
    assert!(
        early || table || !ptx.contains("ld.global.nc"),
        "{name} reads what may still be written\n{text}"
    );
    let dir = tempfile::tempdir().unwrap();
    Some(kit.assemble(&ptx, "sm_90a", dir.path()).unwrap())
}

/// Inputs of a kernel: random numbers, but for the parameters given.
pub(crate) fn inputs(kernel: &Kernel, sizes: &[usize], given: &[(usize, &[f64])]) -> Vec<Tensor> {
    let extents = kernel.extents(sizes);
    let mut rng = SplitMix(7);
    let tensor = |(n, p): (usize, &ValueId)| {
        let ty = kernel.body.ty(*p);
        let shape: Vec<_> = ty.axes.iter().map(|a| extents[a.0 as usize]).collect();
        match given.iter().find(|(g, _)| *g == n) {
            Some((_, data)) => Tensor::new(ty.dtype, shape, data.to_vec()).unwrap(),
            None => Tensor::random(ty.dtype, shape, &mut rng),
        }
    };
    kernel.body.params.iter().enumerate().map(tensor).collect()
}

/// The kernel gives on the device what it means, to `tolerance` relative to numbers above 1 and absolute below, and its
/// CUDA text compiles without spills.
pub(crate) fn agree_on(kernel: &Kernel, args: &[Tensor], sizes: &[usize], tolerance: f64) {
    means_the_same(kernel, args, sizes, tolerance);
    if let Some(resources) = cuda(kernel) {
        assert_eq!(resources.spill_bytes, 0, "{} spills: {resources:?}", kernel.name);
    }
}

/// The first half of [`agree_on`], on each device there is.
pub(crate) fn means_the_same(kernel: &Kernel, args: &[Tensor], sizes: &[usize], tolerance: f64) {
    means_the_same_on_wgpu(kernel, args, sizes, tolerance);
    means_the_same_on_cuda(kernel, args, sizes, tolerance);
}

/// [`means_the_same`] for a kernel that tensor cores round in a way of their own.
pub(crate) fn means_the_same_on_wgpu(kernel: &Kernel, args: &[Tensor], sizes: &[usize], tolerance: f64) {
    if let Some(mut device) = device() {
        on(&mut device, kernel, args, sizes, tolerance);
    }
}

/// [`agree_on`] for a kernel that there is for CUDA only.
pub(crate) fn on_cuda(kernel: &Kernel, args: &[Tensor], sizes: &[usize], tolerance: f64) {
    means_the_same_on_cuda(kernel, args, sizes, tolerance);
    for source in cuda_sources(kernel).unwrap() {
        if let Some(resources) = cuda_text(&source.name, &source.text) {
            assert_eq!(resources.spill_bytes, 0, "{} spills: {resources:?}", source.name);
        }
    }
}

fn on<D: Device>(device: &mut D, kernel: &Kernel, args: &[Tensor], sizes: &[usize], t: f64) {
    let got = launch(device, kernel, args, sizes).unwrap_or_else(|e| panic!("{e}\n{}", kernel.body));
    let want = meaning(kernel, args, sizes).unwrap();
    if let Err(e) = got.close_to(&want, t, t) {
        panic!("{}, sizes {sizes:?}: {e}\n{}", device.name(), kernel.body);
    }
}

fn means_the_same_on_cuda(kernel: &Kernel, args: &[Tensor], sizes: &[usize], tolerance: f64) {
    // On CUDA, what is stored is rounded.
    let rounded = tolerance
        + match kernel.output().dtype {
            DType::Bf16 => 1.0 / 256.0,
            DType::F16 => 1.0 / 2048.0,
            DType::F64 | DType::F32 | DType::I32 | DType::Bool => 0.0,
        };
    if let Some(mut gpu) = gpu() {
        on(&mut gpu, kernel, args, sizes, rounded);
    }
    emulated(|emulator| on(emulator, kernel, args, sizes, rounded));
}

/// The same for random inputs and each of several sizes.
pub(crate) fn agree(kernel: &Kernel, sizes: &[&[usize]]) {
    for sizes in sizes {
        agree_on(kernel, &inputs(kernel, sizes, &[]), sizes, tolerance(kernel));
    }
}

/// f32 arithmetic over a few hundred numbers near 1; exact for the rest.
pub(crate) fn tolerance(kernel: &Kernel) -> f64 {
    if kernel.output().dtype == DType::I32 { 0.5 } else { 3e-5 }
}
