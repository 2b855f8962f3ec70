//! What a device can do at most, by our own kernels: how fast it copies and reads, and how fast it multiplies.

use latentc_codegen::device::{Device, DeviceError};
use latentc_codegen::program::Kernel;
use latentc_ir::DType;
use serde::Serialize;

use super::clock::{Clock, Copying};
use super::memory::Maker;
use super::{Seconds, texts};

/// Columns of the matrices that are copied and read.
const COLUMNS: usize = 4096;

/// How large the ceilings' operands are.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Probe {
    /// Bytes that are copied: many times what the device's cache has.
    pub bytes: u64,
    /// Rows and columns of the matrices that are multiplied.
    pub side: u64,
    /// Whether launches return before they are done.
    pub queues: bool,
}

/// What a device reached, in this run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ceilings {
    /// A copy, bytes read and written.
    pub copy: Ceiling,
    /// A matrix of which each element is read once.
    pub read: Ceiling,
    /// A product of square matrices.
    pub product: Ceiling,
}

/// The best that was reached at something.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ceiling {
    /// What did it.
    pub by: String,
    /// Bytes or operations of one launch.
    pub amount: f64,
    /// How long it took.
    pub seconds: Seconds,
    /// Bytes or operations a second, in the median.
    pub rate: f64,
}

impl Ceilings {
    /// Bytes a second: of a copy or of a read, whichever is more.
    pub fn bandwidth(&self) -> f64 {
        self.copy.rate.max(self.read.rate)
    }

    /// The seconds that so much takes at least.
    pub fn bound(&self, bytes: f64, flops: f64) -> f64 {
        (bytes / self.bandwidth()).max(flops / self.product.rate)
    }
}

impl Ceiling {
    fn new(by: String, amount: f64, samples: Vec<f64>) -> Ceiling {
        let seconds = Seconds::of(samples);
        Ceiling { by, amount, rate: amount / seconds.median, seconds }
    }
}

/// Measures them, in the dtype of a model's weights. The clock can fill a queue from then on.
pub(super) fn measure<D: Device>(
    device: &mut D,
    maker: &mut Maker<D>,
    dtype: DType,
    probe: Probe,
    repeat: usize,
) -> Result<(Ceilings, Clock<D>), DeviceError> {
    let mut clock = Clock { queue: None };
    let of = device.layout().bytes;

    let rows = (probe.bytes as usize / 8 / COLUMNS).max(1);
    let len = rows * COLUMNS;
    let from = maker.filled(device, DType::F32, len)?;
    let to = device.alloc(DType::F32, len)?;
    let kernel = texts::copy_rows(DType::F32, COLUMNS);
    let mut copying = Copying { kernel, from, to, rows, seconds: 0.0 };
    let samples = clock.samples(device, repeat, |device| copying.launch(device))?;
    let copy = Ceiling::new(format!("copy of {} elements of f32", len), 8.0 * len as f64, samples);
    copying.seconds = copy.seconds.median;

    // Hosts compute in f32, and read what is narrow as it is.
    let each = if maker.shares() { dtype.bytes() } else { of(dtype) };
    let rows = (probe.bytes / each / COLUMNS as u64).max(1);
    let kernel = texts::product("bench_read", dtype, rows, COLUMNS as u64);
    let read = multiply(device, maker, &mut clock, &kernel, (1, rows as usize, COLUMNS), repeat)?;
    let read = Ceiling::new(said(device, &kernel, 1), (rows * COLUMNS as u64 * each) as f64, read);

    let side = probe.side;
    let dtype = if maker.shares() { DType::F32 } else { dtype };
    let kernel = texts::product("bench_product", dtype, side, side);
    let square = side as usize;
    let product = multiply(device, maker, &mut clock, &kernel, (square, square, square), repeat)?;
    let product = Ceiling::new(said(device, &kernel, square), 2.0 * (side as f64).powi(3), product);

    clock.queue = probe.queues.then_some(copying);
    Ok((Ceilings { copy, read, product }, clock))
}

/// What a product is, and how it is computed.
fn said<D: Device>(device: &D, kernel: &Kernel, rows: usize) -> String {
    let [n, k] = [1, 2].map(|a| kernel.body.axes[a].size.to_string());
    let dtype = kernel.body.ty(kernel.body.params[0]).dtype;
    format!("product of {rows} x {k} and {k} x {n} in {dtype}, {}", device.way(kernel, &[rows]).way.kind)
}

fn multiply<D: Device>(
    device: &mut D,
    maker: &mut Maker<D>,
    clock: &mut Clock<D>,
    kernel: &Kernel,
    (m, n, k): (usize, usize, usize),
    repeat: usize,
) -> Result<Vec<f64>, DeviceError> {
    let dtype = kernel.body.ty(kernel.body.params[0]).dtype;
    let x = maker.filled(device, dtype, m * k)?;
    let weight = maker.weight(device, dtype, n * k)?;
    let mut y = device.alloc(kernel.output().dtype, m * n)?;
    clock.samples(device, repeat, |device| device.launch(kernel, &[Some(&x), Some(&weight)], &mut y, &[m]))
}
