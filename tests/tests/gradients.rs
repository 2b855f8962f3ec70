//! Gradients and the first step of the optimiser, end to end, against other implementations' figures.
//!
//! The project's own cases hold, for each tensor, the slope of the loss along one direction (`grad_along`, by central differences in
//! float64), which must be that of the gradient to 1e-4 of its norm. The others hold every gradient and stepped weight.
//!
//! Tolerances are those that the cases' maker measured for f32 arithmetic in any order of summation, several times over: 1e-5 on the
//! loss; 1e-4 of a tensor's largest gradient on the others, and exactly 0 where no token reaches; 2e-5 of the norm on the norm;
//! 1e-5 on stepped weights where the clipped gradient is 1e-5 or more, or exactly 0. Elsewhere rounding may turn the sign of
//! the step, which is a thousandth: twice that, and a little, is allowed.

use std::sync::Arc;

use latentc_codegen::cube::WgpuDevice;
use latentc_codegen::device::Device;
use latentc_codegen::host::Host;
use latentc_ir::DType;
use latentc_passes::{Graph, pipeline};
use latentc_runtime::engine::Engine;
use latentc_runtime::eval::Batch;
use latentc_runtime::gradient::Gatherer;
use latentc_runtime::optimizer::{AdamW, Optimizer, State};
use latentc_runtime::places::{Placed, Places};
use latentc_tests::{Case, cases, max_diff};

const LOSS: f32 = 1e-5;
const ALONG: f64 = 1e-4;
const GRADIENT: f32 = 1e-4;
const NORM: f32 = 2e-5;
const STEP: f32 = 1e-5;
const CLEAR: f32 = 1e-5;
const TURNED: f32 = 2.1e-3;

fn agrees<D: Device>(case: &Case, device: D) {
    let name = &case.name;
    let compiled = case.compile(Graph::Gradient, DType::F32, &pipeline());
    let mut engine = Engine::new(device);
    engine.add(&compiled, &case.checkpoint).unwrap_or_else(|e| panic!("{name}: {e}"));
    let (ids, shape) = case.integers("input_ids").expect("every case has input_ids");
    let mask = case.integers("attention_mask").map(|m| m.0);
    let batch = Batch::new(&ids, mask.as_deref(), shape[0], shape[1]).expect("the case's batch is right");
    let gatherer = Gatherer::new(compiled.definition()).unwrap_or_else(|e| panic!("{name}: {e}"));
    let places = gatherer.places();
    let mut gradient = vec![0.0; places.len()];
    let found = gatherer
        .add(&mut engine, &batch.next_tokens(), 1.0, 1.0, &mut gradient)
        .unwrap_or_else(|e| panic!("{name}: {e}"));

    let loss = max_diff(&found[0].data, &case.floats("loss").0);
    assert!(loss <= LOSS, "{name}: the loss is off by {loss:e}");

    let along = along(case, places, &gradient);
    println!("{name:16} {:>4} kernels, loss {loss:.1e}, {along}", compiled.program.kernels.len());
    if case.expect.tensor("grad_norm").is_some() {
        steps(case, &mut engine, places, gradient);
    }
}

/// Compares slopes along a direction, where the case has them.
fn along(case: &Case, places: &Places, gradient: &[f32]) -> String {
    let (mut worst, mut count) = (0.0f64, 0);
    for Placed { name: tensor, range, .. } in places.tensors() {
        let g = &gradient[range.clone()];
        let field = format!("grad_along.{tensor}");
        if case.expect.tensor(&field).is_none() {
            continue;
        }
        let want = f64::from(case.floats(&field).0[0]);
        let of = |f: &dyn Fn(usize, f64) -> f64| -> f64 {
            g.iter().enumerate().map(|(n, &x)| f(n, f64::from(x))).sum()
        };
        let (slope, norm) = (of(&|n, x| x * (n as f64).cos()), of(&|_, x| x * x).sqrt());
        let off = (slope - want).abs();
        assert!(
            off <= ALONG * norm + 1e-8,
            "{}: along {tensor} the slope is {slope:e}, not {want:e}",
            case.name
        );
        worst = worst.max(off / norm.max(1e-8));
        count += 1;
    }
    format!("slopes along {count} tensors {worst:.1e}")
}

/// Compares every gradient, their norm, and what a step makes of the weights.
fn steps<D: Device>(case: &Case, engine: &mut Engine<D>, places: &Places, gradient: Vec<f32>) {
    let name = &case.name;
    let optimizer = Optimizer::new(engine).unwrap_or_else(|e| panic!("{name}: {e}"));
    let mut worst = 0.0f32;
    for Placed { name: tensor, shape, range } in places.tensors() {
        let (want, wanted) = case.floats(&format!("grad.{tensor}"));
        assert_eq!(wanted, *shape, "{name}: {tensor}");
        let largest = max_diff(&want, &vec![0.0; want.len()]);
        let off = max_diff(&gradient[range.clone()], &want);
        assert!(off <= GRADIENT * largest, "{name}: grad.{tensor} is off by {off:e} of {largest:e}");
        worst = worst.max(if largest > 0.0 { off / largest } else { 0.0 });
    }
    let stored = case.expect.names().filter(|n| n.starts_with("grad.")).count();
    assert_eq!(places.tensors().len(), stored, "{name}: tensors with a gradient");

    let with = AdamW::default();
    let gradient = Arc::new(gradient);
    let clipping = optimizer.clipping(engine, &gradient, with.most).expect("it runs");
    let norm = case.floats("grad_norm").0[0];
    let off = (clipping.norm - norm).abs() / norm;
    assert!(off <= NORM, "{name}: the norm is {}, not {norm}", clipping.norm);

    let mut stepped = 0.0f32;
    let mut state = State::new(places.read(&case.checkpoint, "").expect("checked"));
    optimizer.step(engine, &with, &mut state, &gradient, clipping.coef).expect("it runs");
    for Placed { name: tensor, range, .. } in places.tensors() {
        let (want, _) = case.floats(&format!("adamw1.{tensor}"));
        let (exact, _) = case.floats(&format!("grad.{tensor}"));
        for ((p, want), g) in state.p[range.clone()].iter().zip(&want).zip(&exact) {
            let (off, g) = ((p - want).abs(), (g * clipping.coef).abs());
            let clear = g >= CLEAR || g == 0.0;
            assert!(off <= if clear { STEP } else { TURNED }, "{name}: adamw1.{tensor}: {p}, not {want}");
            stepped = stepped.max(if clear { off } else { 0.0 });
        }
    }
    println!("{name:16} gradients {worst:.1e}, norm {off:.1e}, step {stepped:.1e}");
}

/// The cases that say something of gradients.
fn trained() -> impl Iterator<Item = Case> {
    cases().into_iter().filter(|case| case.expect.names().any(|name| name.starts_with("grad")))
}

/// A graphics driver for the CPU is enough; `scripts/setup-lavapipe.sh` installs one.
#[test]
fn on_wgpu() {
    for case in trained() {
        match WgpuDevice::open() {
            Ok(device) => agrees(&case, device),
            Err(e) => return eprintln!("SKIPPED: on_wgpu: {e}"),
        }
    }
}

#[test]
fn on_the_host() {
    for case in trained() {
        agrees(&case, Host::new());
    }
}
