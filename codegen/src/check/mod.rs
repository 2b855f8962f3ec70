//! Whether a kernel computes what it means, on any device.
//!
//! The interpreter runs a kernel's body in f64, so what it means is never in doubt, and [`bound`] says how far off f32 arithmetic
//! may be at each element. Kernels of a model are too large for that as they are: [`shrink`] makes the same kernel
//! with small axes, and [`cases`] chooses run-time sizes, with tails.

pub mod bound;
mod inputs;
mod shrink;

use latentc_ir::interp::Caches;
use latentc_ir::{AxisId, Function, Interpreter, Module, Op, Precision, Size, Tensor, Weight};
use latentc_passes::page::Slots;
use serde::Serialize;

use crate::cube::LaunchShape;
use crate::device::{Data, Device, DeviceError, Launch};
use crate::program::Kernel;
pub use bound::Expected;
pub use inputs::random_inputs;
pub use shrink::{Style, shrink};

/// How far a result is from what it should be.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// The run-time sizes.
    pub sizes: Vec<usize>,
    /// What the arguments and the device's random choices follow from.
    pub seed: u64,
    /// The largest error in units of its tolerance. Not above 1 if all is well; infinite for what is no number and should be one.
    pub ratio: f64,
    /// The error there.
    pub error: f64,
    /// The tolerance there.
    pub tolerance: f64,
    /// How many elements are off by more than their tolerances.
    pub wrong: usize,
    /// How many elements there are.
    pub elements: usize,
    /// The element with the largest error in units of its tolerance.
    pub index: Vec<usize>,
    /// What the result is known by: equal for results that are equal to the bit.
    pub digest: String,
}

impl Outcome {
    /// Whether every element is within its tolerance.
    pub fn passes(&self) -> bool {
        self.wrong == 0
    }
}

/// Runs a kernel on random arguments and compares.
///
/// # Errors
/// Those of the device, and what the interpreter refuses.
pub fn check<D: Device>(
    device: &mut D,
    kernel: &Kernel,
    sizes: &[usize],
    seed: u64,
) -> Result<Outcome, DeviceError> {
    let trial = Trial { kernel: kernel.clone(), sizes: sizes.to_vec() };
    Ok(check_together(device, &[trial], seed)?.remove(0))
}

/// Runs kernels on random arguments, at the same time where the device can, and compares.
///
/// # Errors
/// Those of the device, and what the interpreter refuses.
pub fn check_together<D: Device>(
    device: &mut D,
    trials: &[Trial],
    seed: u64,
) -> Result<Vec<Outcome>, DeviceError> {
    let args: Vec<_> = trials.iter().map(|t| random_inputs(&t.kernel, &t.sizes, seed)).collect();
    let work: Vec<_> =
        trials.iter().zip(&args).map(|(t, args)| (&t.kernel, &args[..], &t.sizes[..])).collect();
    let got = launch_together(device, &work)?;
    let outcome = |((kernel, args, sizes), got): (&(&Kernel, &[Tensor], &[usize]), Tensor)| {
        let way = Kernel { kind: device.way(kernel, sizes).way.kind, ..(*kernel).clone() };
        let expected = Expected::of(&way, args, sizes);
        let expected = expected.map_err(|why| DeviceError::Kernel { kernel: kernel.name.clone(), why })?;
        Ok(expected.compare(&got, sizes, seed))
    };
    work.iter().zip(got).map(outcome).collect()
}

impl Expected {
    /// How far off a result is.
    pub fn compare(&self, got: &Tensor, sizes: &[usize], seed: u64) -> Outcome {
        let (mut worst, mut wrong) = ((0.0, 0.0, 0.0, 0), 0);
        for (n, (&got, &want)) in got.data.iter().zip(&self.value.data).enumerate() {
            let tolerance = self.tolerance[n];
            if got == want || (got.is_nan() && want.is_nan()) || tolerance == f64::INFINITY {
                continue;
            }
            let error = self.apart(got, want);
            let ratio = if error.is_nan() { f64::INFINITY } else { error / tolerance };
            wrong += usize::from(ratio > 1.0);
            if ratio > worst.0 {
                worst = (ratio, error, tolerance, n);
            }
        }
        let mut index = vec![0; self.value.shape.len()];
        let mut rest = worst.3;
        for (i, &n) in index.iter_mut().zip(&self.value.shape).rev() {
            (*i, rest) = (rest % n.max(1), rest / n.max(1));
        }
        let (ratio, error, tolerance, _) = worst;
        let elements = self.value.data.len();
        let digest = digest(got);
        Outcome { sizes: sizes.to_vec(), seed, ratio, error, tolerance, wrong, elements, index, digest }
    }
}

/// What a tensor's elements are known by.
fn digest(t: &Tensor) -> String {
    let hash = crate::digest::digest(t.data.iter().flat_map(|x| x.to_bits().to_le_bytes()));
    format!("{hash:016x}")
}

/// A kernel with small axes, and run-time sizes.
#[derive(Clone, Debug, PartialEq)]
pub struct Trial {
    /// The kernel that is run.
    pub kernel: Kernel,
    /// In the order of [`Kernel::size_symbols`].
    pub sizes: Vec<usize>,
}

/// What to try a kernel on: its axes small in each [`Style`], with all of their [`cases`].
pub fn trials(kernel: &Kernel) -> Vec<Trial> {
    let mut trials: Vec<Trial> = Vec::new();
    for style in Style::ALL {
        let kernel = shrink(kernel, style);
        if trials.iter().all(|t| t.kernel != kernel) {
            let sizes = cases(&kernel).into_iter();
            trials.extend(sizes.map(|sizes| Trial { kernel: kernel.clone(), sizes }));
        }
    }
    trials
}

/// The one trial that says most: whole tiles and aligned rows stay what they are, and the run-time sizes are odd, each as large as the
/// [`cases`] have it while the work allows.
pub fn main_trial(kernel: &Kernel) -> Trial {
    let kernel = shrink(kernel, Style::Round);
    let symbols = kernel.size_symbols();
    let mut sizes = few(symbols.len());
    for n in 0..sizes.len() {
        let with = |large| {
            let mut sizes = sizes.clone();
            sizes[n] = large;
            sizes
        };
        let fits = |sizes: &Vec<usize>| work(&kernel, sizes) <= WORK;
        if let Some(larger) = LARGE.map(with).into_iter().find(fits) {
            sizes = larger;
        }
    }
    make_room(&kernel, &symbols, &mut sizes);
    Trial { kernel: kernel.clone(), sizes }
}

/// What to try kernels on that run at the same time: those of each [`Style`] with its first two [`cases`].
pub fn trials_together(kernels: &[Kernel]) -> Vec<Vec<Trial>> {
    let mut trials: Vec<Vec<Trial>> = Vec::new();
    for style in Style::ALL {
        let shrunk: Vec<_> = kernels.iter().map(|k| shrink(k, style)).collect();
        for case in [0, 1] {
            let trial = |kernel: &Kernel| {
                let cases = cases(kernel);
                let sizes = cases[case.min(cases.len() - 1)].clone();
                Trial { kernel: kernel.clone(), sizes }
            };
            let together: Vec<_> = shrunk.iter().map(trial).collect();
            if !trials.contains(&together) {
                trials.push(together);
            }
        }
    }
    trials
}

/// Run-time sizes to try: ones, small ones that differ, and each in turn beyond a tile and a warp, as far as the work is not too much.
/// Where rows go into a cache, it has room for them.
pub fn cases(kernel: &Kernel) -> Vec<Vec<usize>> {
    let symbols = kernel.size_symbols();
    let mut cases = vec![vec![1; symbols.len()], few(symbols.len())];
    for n in 0..symbols.len() {
        // Not beyond what the work allows: its other sizes are as small as may be.
        for large in LARGE {
            let mut sizes = vec![2; symbols.len()];
            sizes[n] = large;
            if work(kernel, &sizes) <= WORK {
                cases.push(sizes);
                break;
            }
        }
    }
    for sizes in &mut cases {
        make_room(kernel, &symbols, sizes);
    }
    cases.dedup();
    cases
}

/// Small sizes that differ.
fn few(symbols: usize) -> Vec<usize> {
    [3, 5, 2, 7].into_iter().cycle().take(symbols).collect()
}

/// Sizes beyond a tile or a warp, the first of which is taken that the work allows.
const LARGE: [usize; 3] = [67, 35, 11];

/// What a trial may cost: see [`work`].
const WORK: u64 = 1 << 20;

/// What a launch costs the interpreter and the emulator, about, in multiplications or some of them: what the largest instruction does,
/// once for each element of its largest value or, a contraction, for each index of all; and what all units of the launch do,
/// which there may be many of for few elements.
fn work(kernel: &Kernel, sizes: &[usize]) -> u64 {
    let (body, extents) = (&kernel.body, kernel.extents(sizes));
    let of = |axes: &[AxisId]| axes.iter().map(|a| extents[a.0 as usize] as u64).fold(1, u64::saturating_mul);
    let (mut most, mut depth) = (0, 1);
    for inst in &body.body {
        let values = inst.args.iter().chain(&inst.results).map(|&v| &body.ty(v).axes[..]);
        if inst.op == Op::Contract {
            let mut all: Vec<AxisId> = values.flatten().copied().collect();
            all.sort_unstable();
            all.dedup();
            most = most.max(of(&all));
            depth = depth.max(of(&body.summed(&inst.args, body.ty(inst.result()))));
        } else {
            most = most.max(values.map(of).max().unwrap_or(0));
        }
    }
    let shape = LaunchShape::of(kernel);
    let units = match shape.grid(kernel.number(sizes)) {
        Ok((x, y, z)) => u64::from(shape.units) * u64::from(x) * u64::from(y) * u64::from(z),
        Err(_) => u64::MAX,
    };
    most.max(units.saturating_mul(8.max(2 * depth)))
}

/// Makes each cache longer than what is appended to it, and each pool as long as the pages in its table.
fn make_room(kernel: &Kernel, symbols: &[&str], sizes: &mut [usize]) {
    let number = |axis: AxisId| match &kernel.body.axis(axis).size {
        Size::Sym(s) => symbols.iter().position(|x| x == s),
        Size::Fixed(_) => None,
    };
    let body = &kernel.body;
    for (inst, pool, slots) in Slots::all(body) {
        let page = slots.page as usize;
        let rows = match (&inst.op, &body.ty(slots.positions).axes[..]) {
            (Op::Append { from, .. }, _) => kernel.extents(sizes)[from.0 as usize] + 1,
            (_, axes) => axes.iter().map(|a| kernel.extents(sizes)[a.0 as usize]).max().unwrap_or(1),
        };
        if let Some(n) = number(slots.pages) {
            sizes[n] = sizes[n].max(rows.div_ceil(page));
        }
        let extents = kernel.extents(sizes);
        let pages: usize = body.ty(slots.table).axes.iter().map(|a| extents[a.0 as usize]).product();
        if let Some(n) = number(pool) {
            sizes[n] = sizes[n].max((pages + 1) * page);
        }
    }
    for inst in &kernel.body.body {
        let Op::Append { from, to } = inst.op else { continue };
        let rows = kernel.extents(sizes)[from.0 as usize];
        if let Size::Sym(s) = &kernel.body.axis(to).size
            && let Some(n) = symbols.iter().position(|x| x == s)
        {
            sizes[n] = sizes[n].max(rows + 1);
        }
    }
}

/// What the kernel means: its result for one argument per parameter, what it appends to included.
///
/// # Errors
/// An index that is out of range.
pub fn meaning(kernel: &Kernel, args: &[Tensor], sizes: &[usize]) -> Result<Tensor, String> {
    let module = kernel.module();
    let (given, mut caches) = given(kernel, args);
    let results = interpreter(kernel, &module, sizes).run(&given, &mut no_weights, &mut caches);
    Ok(results.map_err(|e| e.to_string())?.remove(0))
}

/// The arguments as a kernel's module takes them: what is appended to is a cache.
fn given(kernel: &Kernel, args: &[Tensor]) -> (Vec<Tensor>, Caches) {
    let (mut given, mut caches) = (Vec::new(), Caches::new());
    for (&param, arg) in kernel.body.params.iter().zip(args) {
        if Some(param) == kernel.cache() {
            caches.insert(kernel.body.value(param).name.clone(), arg.clone());
        } else {
            given.push(arg.clone());
        }
    }
    (given, caches)
}

fn interpreter<'m>(kernel: &Kernel, module: &'m Module, sizes: &[usize]) -> Interpreter<'m> {
    let mut interpreter = Interpreter::new(module, Precision::Exact);
    for (symbol, &size) in kernel.size_symbols().into_iter().zip(sizes) {
        interpreter = interpreter.with_size(symbol, size);
    }
    interpreter
}

fn no_weights(_: &str, _: &Function, _: &Weight) -> Result<Tensor, String> {
    Err("a kernel has no weights".to_owned())
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
    Ok(launch_together(device, &[(kernel, args, sizes)])?.remove(0))
}

/// What a device makes of several kernels, each with its arguments and sizes, at the same time where it can.
fn launch_together<D: Device>(
    device: &mut D,
    work: &[(&Kernel, &[Tensor], &[usize])],
) -> Result<Vec<Tensor>, DeviceError> {
    let mut held = Vec::with_capacity(work.len());
    for (kernel, args, _) in work {
        held.push(uploaded(device, kernel, args)?);
    }
    let inputs: Vec<Vec<_>> = held.iter().map(|inputs| inputs.iter().map(Option::as_ref).collect()).collect();
    let mut outputs: Vec<D::Buffer> = Vec::with_capacity(work.len());
    for (kernel, args, sizes) in work {
        outputs.push(output(device, kernel, args, sizes)?);
    }
    let launches = work.iter().zip(&inputs).zip(&mut outputs);
    let mut launches = launches.map(|(((kernel, _, sizes), inputs), output)| Launch {
        kernel,
        inputs,
        output,
        sizes,
        key: None,
        still: None,
    });
    device.launch_together(&mut launches)?;
    let mut results = Vec::with_capacity(work.len());
    for ((kernel, _, sizes), output) in work.iter().zip(&outputs) {
        let shape = shape(kernel, sizes);
        let data = match device.read(output, shape.iter().product())? {
            Data::F32(v) => v.into_iter().map(f64::from).collect(),
            Data::I32(v) => v.into_iter().map(f64::from).collect(),
        };
        results.push(Tensor { dtype: kernel.output().dtype, shape, data });
    }
    Ok(results)
}

/// The extents of a kernel's result.
fn shape(kernel: &Kernel, sizes: &[usize]) -> Vec<usize> {
    let extents = kernel.extents(sizes);
    kernel.output().axes.iter().map(|a| extents[a.0 as usize]).collect()
}

/// The inputs of a launch; none for what the kernel appends to.
fn uploaded<D: Device>(
    device: &mut D,
    kernel: &Kernel,
    args: &[Tensor],
) -> Result<Vec<Option<D::Buffer>>, DeviceError> {
    let params = kernel.body.params.iter().zip(args);
    params
        .map(|(&param, arg)| match Some(param) == kernel.cache() {
            true => Ok(None),
            false => device.upload(arg.dtype, data(arg)).map(Some),
        })
        .collect()
}

/// Where a launch writes: what it appends to, or what holds sevens.
fn output<D: Device>(
    device: &mut D,
    kernel: &Kernel,
    args: &[Tensor],
    sizes: &[usize],
) -> Result<D::Buffer, DeviceError> {
    let dtype = kernel.output().dtype;
    if let Some(cache) = kernel.cache() {
        let place = kernel.body.params.iter().position(|p| *p == cache);
        if let Some(arg) = place.and_then(|n| args.get(n)) {
            return device.upload(dtype, data(arg));
        }
    }
    let len = shape(kernel, sizes).iter().product();
    device.upload(dtype, data(&Tensor { dtype, shape: vec![len], data: vec![7.0; len] }))
}

fn data(t: &Tensor) -> Data {
    if t.dtype.is_float() {
        Data::F32(t.data.iter().map(|&x| x as f32).collect())
    } else {
        Data::I32(t.data.iter().map(|&x| x as i32).collect())
    }
}
