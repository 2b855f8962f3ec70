//! Whether a kernel computes what it means, on any device: the interpreter runs its body in f64, the device runs the kernel.

use latentc_ir::interp::Caches;
use latentc_ir::{Function, Interpreter, Precision, Tensor, Weight};

use crate::device::{Data, Device, DeviceError};
use crate::program::Kernel;

/// What the kernel means: its result for one argument per parameter, what it appends to included.
///
/// # Errors
/// An index that is out of range.
pub fn meaning(kernel: &Kernel, args: &[Tensor], sizes: &[usize]) -> Result<Tensor, String> {
    let module = kernel.module();
    let mut interpreter = Interpreter::new(&module, Precision::Exact);
    for (symbol, &size) in kernel.size_symbols().into_iter().zip(sizes) {
        interpreter = interpreter.with_size(symbol, size);
    }
    let (mut caches, mut given) = (Caches::new(), Vec::new());
    for (&param, arg) in kernel.body.params.iter().zip(args) {
        if Some(param) == kernel.cache() {
            caches.insert(kernel.body.value(param).name.clone(), arg.clone());
        } else {
            given.push(arg.clone());
        }
    }
    let mut no_weights = |_: &str, _: &Function, _: &Weight| Err("a kernel has no weights".to_owned());
    let mut results = interpreter.run(&given, &mut no_weights, &mut caches).map_err(|e| e.to_string())?;
    Ok(results.remove(0))
}

/// What a device makes of these arguments. Elements that the kernel does not write are 7.
///
/// # Errors
/// Those of the device.
pub fn launch<D: Device>(
    device: &mut D,
    kernel: &Kernel,
    args: &[Tensor],
    sizes: &[usize],
) -> Result<Tensor, DeviceError> {
    let extents = kernel.extents(sizes);
    let ty = kernel.output();
    let shape: Vec<_> = ty.axes.iter().map(|a| extents[a.0 as usize]).collect();
    let len = shape.iter().product();
    let mut buffers = Vec::new();
    let mut output = None;
    for (&param, arg) in kernel.body.params.iter().zip(args) {
        let buffer = device.upload(arg.dtype, data(arg))?;
        if Some(param) == kernel.cache() {
            output = Some(buffer);
            buffers.push(None);
        } else {
            buffers.push(Some(buffer));
        }
    }
    let mut output = match output {
        Some(cache) => cache,
        None => device
            .upload(ty.dtype, data(&Tensor { dtype: ty.dtype, shape: vec![len], data: vec![7.0; len] }))?,
    };
    let inputs: Vec<_> = buffers.iter().map(Option::as_ref).collect();
    device.launch(kernel, &inputs, &mut output, sizes)?;
    let data = match device.read(&output, len)? {
        Data::F32(v) => v.into_iter().map(f64::from).collect(),
        Data::I32(v) => v.into_iter().map(f64::from).collect(),
    };
    Ok(Tensor { dtype: ty.dtype, shape, data })
}

fn data(t: &Tensor) -> Data {
    if t.dtype.is_float() {
        Data::F32(t.data.iter().map(|&x| x as f32).collect())
    } else {
        Data::I32(t.data.iter().map(|&x| x as i32).collect())
    }
}
