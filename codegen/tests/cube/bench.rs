//! What the tests run kernels on.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::sync::{Mutex, OnceLock};

use latentc_codegen::cube::{CubeDevice, CubeRuntime, CudaDevice, Target, WgpuDevice, cuda_source};
use latentc_codegen::device::{Data, Device, DeviceError};
use latentc_codegen::nvrtc::{Nvrtc, NvrtcError, Resources, Toolkit};
use latentc_codegen::program::{Kernel, KernelKind};
use latentc_ir::{DType, Function, Interpreter, Module, Precision, SplitMix, Tensor, ValueId, parse};

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

/// The assembler's report on a kernel, or none where there is no assembler. The text is the same each time.
pub(crate) fn cuda(kernel: &Kernel) -> Option<Resources> {
    static TOOLS: OnceLock<Option<(Toolkit, Nvrtc)>> = OnceLock::new();
    let text = cuda_source(kernel).unwrap();
    assert_eq!(text, cuda_source(kernel).unwrap(), "the text varies");
    let tools = TOOLS.get_or_init(|| match Toolkit::find() {
        Ok(kit) => Some((kit.clone(), Nvrtc::load(&kit).unwrap())),
        Err(e @ NvrtcError::Absent(_)) => {
            skipped("CUDA kernels through nvrtc and ptxas", e);
            None
        }
        Err(e) => panic!("{e}"),
    });
    let (kit, nvrtc) = tools.as_ref()?;
    let ptx = nvrtc.compile(&text, "sm_90a").unwrap_or_else(|e| panic!("{e}\n{text}"));
    assert!(ptx.contains(&format!(".entry {}(", kernel.name)), "the entry has another name");
    let dir = tempfile::tempdir().unwrap();
    Some(kit.assemble(&ptx, "sm_90a", dir.path()).unwrap().resources)
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

fn data(t: &Tensor) -> Data {
    if t.dtype.is_float() {
        Data::F32(t.data.iter().map(|&x| x as f32).collect())
    } else {
        Data::I32(t.data.iter().map(|&x| x as i32).collect())
    }
}

/// What the device makes of these inputs. Memory that a kernel does not write is 7s.
pub(crate) fn run<R: CubeRuntime>(
    device: &mut CubeDevice<R>,
    kernel: &Kernel,
    args: &[Tensor],
    sizes: &[usize],
) -> Tensor {
    let body = &kernel.body;
    let extents = kernel.extents(sizes);
    let ty = kernel.output();
    let shape: Vec<_> = ty.axes.iter().map(|a| extents[a.0 as usize]).collect();
    let mut buffers: Vec<_> = args.iter().map(|t| Some(device.upload(t.dtype, data(t)).unwrap())).collect();
    let mut output = if let Some(cache) = kernel.cache() {
        let cache = body.params.iter().position(|p| *p == cache).unwrap();
        buffers[cache].take().unwrap()
    } else {
        let sevens =
            Tensor { dtype: ty.dtype, data: vec![7.0; shape.iter().product()], shape: shape.clone() };
        device.upload(ty.dtype, data(&sevens)).unwrap()
    };
    let inputs: Vec<_> = buffers.iter().map(Option::as_ref).collect();
    device.launch(kernel, &inputs, &mut output, sizes).unwrap();
    let data = match device.read(&output, shape.iter().product()).unwrap() {
        Data::F32(v) => v.into_iter().map(f64::from).collect(),
        Data::I32(v) => v.into_iter().map(f64::from).collect(),
    };
    Tensor::new(ty.dtype, shape, data).unwrap()
}

/// What the kernel means.
pub(crate) fn meaning(kernel: &Kernel, args: &[Tensor], sizes: &[usize]) -> Tensor {
    let function = Function { name: "kernel".to_owned(), ..kernel.body.clone() };
    let module = Module { name: "test".to_owned(), functions: vec![function], entry: "kernel".to_owned() };
    let mut interpreter = Interpreter::new(&module, Precision::Exact);
    for (symbol, &size) in kernel.size_symbols().into_iter().zip(sizes) {
        interpreter = interpreter.with_size(symbol, size);
    }
    let no_weights = &mut |_: &str, _: &Function, _: &latentc_ir::Weight| Err("no weights".to_owned());
    interpreter.run(args, no_weights, &mut BTreeMap::new()).unwrap().remove(0)
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
    fn on<R: CubeRuntime>(
        mut device: CubeDevice<R>,
        kernel: &Kernel,
        args: &[Tensor],
        sizes: &[usize],
        t: f64,
    ) {
        // On CUDA, what is stored is rounded.
        let t = match (R::TARGET, kernel.output().dtype) {
            (Target::Cuda, DType::Bf16) => t + 1.0 / 256.0,
            (Target::Cuda, DType::F16) => t + 1.0 / 2048.0,
            _ => t,
        };
        let (got, want) = (run(&mut device, kernel, args, sizes), meaning(kernel, args, sizes));
        if let Err(e) = got.close_to(&want, t, t) {
            panic!("{}, sizes {sizes:?}: {e}\n{}", device.name(), kernel.body);
        }
    }
    if let Some(device) = device() {
        on(device, kernel, args, sizes, tolerance);
    }
    if let Some(gpu) = gpu() {
        on(gpu, kernel, args, sizes, tolerance);
    }
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
