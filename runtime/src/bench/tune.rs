//! Which of its ways to compute a kernel is the best on a device.
//!
//! Each kernel of a program is tried where it stands in a run, in every way that the device has for its sizes. Whatever a way takes, it
//! counts only if its result is that of the way which the device's rules choose. Rounding lets the two differ: f32 sums in another order
//! by little, operands and results of 16 bits by some parts in a thousand. An element that is missing, or comes twice, differs by more.

use std::collections::BTreeMap;
use std::sync::Arc;

use latentc_codegen::cube::{Tuning, Way, class, identity};
use latentc_codegen::device::{Data, Device, DeviceError};
use latentc_codegen::program::Kernel;
use latentc_ir::DType;

use super::clock::Clock;
use super::{Arguments, BenchError, Places, Ready, Seconds, Settings, dwell};
use crate::compiled::Compiled;
use crate::engine::{Launch, at_once};

/// What differs from the result of the rules' way by more than this part of it, in the mean of squares, is wrong: where numbers have 16
/// bits, a rounding or two of each operand and of the result; else another order of sums, and operands as two numbers of 16 bits.
const APART: [f64; 2] = [1.0 / 128.0, 1.0 / 4096.0];
/// A single element may differ by so many times that.
const ONE: f64 = 16.0;
/// A way has to be faster by this part: less is noise.
const WORTH: f64 = 0.03;
/// What results hold before a launch: a number that no kernel of a model makes often.
const BEFORE: f32 = 7.0;

/// A kernel, at some sizes, in all of its ways.
#[derive(Clone, Debug)]
pub struct Tried {
    /// Its name, in the first program that has it.
    pub name: String,
    /// What it is known by in any program.
    pub identity: u64,
    /// The class of its sizes, by name: each the largest.
    pub up_to: BTreeMap<String, usize>,
    /// That of the rules first.
    pub trials: Vec<Trial>,
    /// The number of the best.
    pub best: usize,
}

/// A way, and how long it takes.
#[derive(Clone, Debug)]
pub struct Trial {
    /// The way.
    pub way: Way,
    /// How long a launch takes, or why this way is not to be taken.
    pub came: Result<Seconds, String>,
}

impl Tried {
    /// What the rules' way takes by what the best one takes.
    pub fn ratio(&self) -> f64 {
        let median = |n: usize| self.trials[n].came.as_ref().map_or(f64::NAN, |s| s.median);
        median(0) / median(self.best)
    }
}

/// Tries all kernels of a program (or [those](Settings::only) that are asked for) that are not among those that were `tried` and of which the
/// device has more than one way, and adds them there; gives the device back. `tell` is told what is being measured, and `done` is shown
/// what was tried so far whenever there is more of it.
///
/// # Errors
/// See [`BenchError`].
pub fn tune<D: Device>(
    device: D,
    compiled: &Compiled,
    given: &Arguments,
    with: &Settings,
    tried: &mut Vec<Tried>,
    mut tell: impl FnMut(String),
    mut done: impl FnMut(&[Tried]),
) -> Result<D, BenchError> {
    let with = Settings { kernels: true, ..with.clone() };
    let Ready { mut engine, maker, mut pool, mut clock, .. } =
        Ready::new(device, compiled, given, &with, &mut tell)?;
    let pool = pool.as_mut().expect("kernels are measured");
    engine.run_by(compiled.graph, &given.values, given.past, &mut |device, launches| {
        for launch in &mut *launches {
            let Some((target, _)) = device.machine() else { continue };
            let (kernel, sizes) = (launch.kernel, launch.sizes);
            let symbols = kernel.size_symbols().into_iter().map(str::to_owned);
            let up_to: BTreeMap<_, _> = symbols.zip(class(sizes)).collect();
            let identity = identity(kernel, target);
            let ways = device.ways(kernel, sizes);
            let wanted = with.only.is_empty() || with.only.contains(&kernel.name);
            if !wanted || ways.len() < 2 || tried.iter().any(|t| t.identity == identity && t.up_to == up_to) {
                continue;
            }
            let mut bench =
                Bench { places: Places { maker: &maker, pool, cold: given.cold }, clock: &mut clock };
            let said = |n: usize, way: &Way| format!("{}: {} ({n} of {})", kernel.name, way, ways.len());
            let mut trials: Vec<Trial> = Vec::new();
            let choose = |way: Way| {
                let mut one = Tuning::default();
                one.insert(identity, up_to.clone(), way.to_string());
                Arc::new(one)
            };
            let mut own = None;
            for (n, &way) in ways.iter().enumerate() {
                tell(said(n + 1, &way));
                device.take_ways(choose(way));
                let quickest = trials.iter().filter_map(|t| t.came.as_ref().ok()).map(|s| s.median);
                let quickest = quickest.fold(f64::INFINITY, f64::min);
                match bench.one(device, launch, &mut own, quickest, with.repeat) {
                    Ok(came) => trials.push(Trial { way, came }),
                    // Others may be refused, for want of memory, say.
                    Err(e) if n > 0 => trials.push(Trial { way, came: Err(e.to_string()) }),
                    Err(e) => return Err(e),
                }
            }
            let median = |t: &Trial| t.came.as_ref().map_or(f64::INFINITY, |s| s.median);
            let order = |a: &usize, b: &usize| median(&trials[*a]).total_cmp(&median(&trials[*b]));
            let mut best = (0..trials.len()).min_by(order).unwrap_or(0);
            // Both once more, one after the other: a device may have been slower for a while.
            for n in [0, best].into_iter().filter(|_| best > 0) {
                device.take_ways(choose(ways[n]));
                let samples = dwell(device, &mut bench.places, bench.clock, launch, with.repeat)?;
                trials[n].came = Ok(Seconds::of(samples));
            }
            let median = |n: usize| trials[n].came.as_ref().map_or(f64::INFINITY, |s| s.median);
            if median(best) > (1.0 - WORTH) * median(0) {
                best = 0;
            }
            device.take_ways(Arc::default());
            tried.push(Tried { name: kernel.name.clone(), identity, up_to, trials, best });
            done(tried);
        }
        at_once(device, launches)
    })?;
    engine.wait()?;
    Ok(engine.into_device())
}

/// What launches are timed with.
struct Bench<'b, D: Device> {
    places: Places<'b, D>,
    clock: &'b mut Clock<D>,
}

impl<D: Device> Bench<'_, D> {
    /// How long a launch takes in the way that the device now has, or why that does not count. The first result is the one that others are
    /// compared with. What takes twice as long as the quickest is not measured again.
    fn one(
        &mut self,
        device: &mut D,
        launch: &mut Launch<'_, D::Buffer>,
        own: &mut Option<Data>,
        quickest: f64,
        repeat: usize,
    ) -> Result<Result<Seconds, String>, DeviceError> {
        let got = result(device, launch)?;
        match own {
            None => *own = Some(got),
            Some(own) => {
                if let Some(why) = apart(launch.kernel, own, &got) {
                    return Ok(Err(why));
                }
            }
        }
        let first = dwell(device, &mut self.places, self.clock, launch, 1)?;
        let samples = match first[..] {
            [seconds] if seconds > 2.0 * quickest => first,
            _ => dwell(device, &mut self.places, self.clock, launch, repeat)?,
        };
        Ok(Ok(Seconds::of(samples)))
    }
}

/// What a launch makes of its inputs, in memory that holds nothing of it before.
fn result<D: Device>(device: &mut D, launch: &Launch<'_, D::Buffer>) -> Result<Data, DeviceError> {
    let (kernel, sizes) = (launch.kernel, launch.sizes);
    let (dtype, extents) = (kernel.output().dtype, kernel.extents(sizes));
    let len = kernel.output().axes.iter().map(|a| extents[a.0 as usize]).product();
    let before =
        if dtype.is_float() { Data::F32(vec![BEFORE; len]) } else { Data::I32(vec![BEFORE as i32; len]) };
    let mut output = device.upload(dtype, before)?;
    device.launch(kernel, launch.inputs, &mut output, sizes)?;
    device.read(&output, len)
}

/// Why a result is not that of the rules' way; `None` if it is.
fn apart(kernel: &Kernel, own: &Data, got: &Data) -> Option<String> {
    let (own, got) = match (own, got) {
        (Data::F32(own), Data::F32(got)) => (own, got),
        (Data::I32(own), Data::I32(got)) => {
            let wrong = own.iter().zip(got).filter(|(a, b)| a != b).count();
            return (wrong > 0).then(|| format!("{wrong} of {} integers are others", own.len()));
        }
        (Data::F32(_) | Data::I32(_), _) => return Some("numbers of another kind".to_owned()),
    };
    let body = &kernel.body;
    let narrow = |dtype: DType| matches!(dtype, DType::Bf16 | DType::F16);
    let narrow = body.params.iter().chain(&body.results).any(|&v| narrow(body.ty(v).dtype));
    let most = APART[usize::from(!narrow)];
    // What neither writes says nothing, nor what both find to be no number.
    let both = own.iter().zip(got).map(|(&a, &b)| (f64::from(a), f64::from(b)));
    let written = || {
        both.clone()
            .filter(|(a, b)| *a != f64::from(BEFORE) || a != b)
            .filter(|(a, b)| !(a.is_nan() && b.is_nan()))
    };
    let (mut count, mut squares, mut errors) = (0usize, 0.0, 0.0);
    for (a, b) in written() {
        count += 1;
        squares += if a.is_finite() { a * a } else { 0.0 };
        errors += if a == b { 0.0 } else { (a - b) * (a - b) };
    }
    let mean = |sum: f64| (sum / count.max(1) as f64).sqrt();
    let (size, error) = (mean(squares), mean(errors));
    if error.is_nan() || error > most * size {
        return Some(format!("it is off by {:.1e} of the result, in the mean of squares", error / size));
    }
    let one = written().filter(|(a, b)| (a - b).abs() > ONE * most * a.abs().max(size)).count();
    (one > 0).then(|| format!("{one} of {count} elements are off"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(dtype: &str) -> Kernel {
        let text = format!(
            "module m entry @f\n\nfunc @f {{\n  axes a0=n0, a1=8, a2=4\n  param p0: {dtype}[a2, a1]\n  param p1: {dtype}[a0, a1]\n\n  \
             y: {dtype}[a0, a2] = contract p0, p1 over a1\n  return y\n}}\n"
        );
        let body = latentc_ir::parse("m.ir", &text).expect("it parses").functions.remove(0);
        Kernel { name: "f".to_owned(), kind: latentc_codegen::program::KernelKind::Contract, body }
    }

    #[test]
    fn what_rounding_makes_is_the_same_and_what_is_missing_is_not() {
        let own: Vec<f32> = (0..4096).map(|n| (n as f32 * 0.7).sin()).collect();
        let of = |change: &dyn Fn(usize, f32) -> f32| {
            Data::F32(own.iter().enumerate().map(|(n, &x)| change(n, x)).collect())
        };
        let first = of(&|_, x| x);
        let narrow = |other: Data| apart(&kernel("bf16"), &first, &other);
        let wide = |other: Data| apart(&kernel("f32"), &first, &other);
        assert_eq!((narrow(of(&|_, x| x)), wide(of(&|_, x| x * 1.000_01))), (None, None));
        assert_eq!(narrow(of(&|_, x| half::bf16::from_f32(x).to_f32())), None);
        assert!(wide(of(&|_, x| half::bf16::from_f32(x).to_f32())).is_some());
        // One element that was not written, one that is no number, a part of each sum that is missing.
        for wrong in [
            of(&|n, x| if n == 100 { BEFORE } else { x }),
            of(&|n, x| if n == 4095 { f32::NAN } else { x }),
            of(&|n, x| if n == 4095 { f32::INFINITY } else { x }),
            of(&|_, x| x * (1.0 - 1.0 / 64.0)),
        ] {
            assert!(narrow(wrong).is_some());
        }
        let integers = |last: i32| Data::I32(vec![1, 2, last]);
        assert_eq!(apart(&kernel("f32"), &integers(3), &integers(3)), None);
        assert_eq!(
            apart(&kernel("f32"), &integers(3), &integers(4)),
            Some("1 of 3 integers are others".to_owned())
        );
    }
}
