//! The reference cases, end to end: the compiled program on a device against another implementation's figures, with the
//! first few passes of the pipeline and with all of them.
//!
//! Tolerances are those that the cases' maker measured for f32 arithmetic in any order of summation, several times over: 2e-4 on
//! logits of up to 7, 1e-5 on the loss; greedy tokens are equal.

use latentc_codegen::cube::WgpuDevice;
use latentc_codegen::device::Device;
use latentc_codegen::host::Host;
use latentc_ir::DType;
use latentc_passes::{Graph, Pass, pipeline, selected};
use latentc_runtime::engine::Engine;
use latentc_runtime::eval::{Batch, Reading};
use latentc_runtime::generate::{Sampler, generate};
use latentc_tests::{Case, cases, max_diff, workspace};

const LOGITS: f32 = 2e-4;
const LOSS: f64 = 1e-5;

/// The first so many passes, and of the others what kernels need; all lists of that kind, the whole pipeline last.
fn prefixes() -> Vec<Vec<Pass>> {
    let names: Vec<_> = pipeline().iter().map(|p| p.name).collect();
    let mut prefixes: Vec<_> =
        (0..=names.len()).map(|count| selected(|pass| names[..count].contains(&pass.name))).collect();
    prefixes.dedup_by_key(|passes| passes.iter().map(|p| p.name).collect::<Vec<_>>());
    prefixes
}

fn agrees<D: Device>(case: &Case, device: D, dtype: DType, passes: &[Pass]) {
    let mut engine = Engine::new(device);
    for graph in [Graph::Prefill, Graph::Decode] {
        engine
            .add(&case.compile(graph, dtype, passes), &case.checkpoint)
            .unwrap_or_else(|e| panic!("{}: {e}", case.name));
    }
    let (ids, shape) = case.integers("input_ids").expect("every case has input_ids");
    let mask = case.integers("attention_mask").map(|m| m.0);
    let batch = Batch::new(&ids, mask.as_deref(), shape[0], shape[1]).expect("the case's batch is right");

    let (want, _) = case.floats("prefill_logits");
    let logits = batch.logits(&mut engine, Reading::Whole).unwrap_or_else(|e| panic!("{}: {e}", case.name));
    let prefill = max_diff(&logits.data, &want);
    assert!(prefill <= LOGITS, "{}: prefill logits are off by {prefill:e}", case.name);

    let loss = batch.loss(&logits).expect("texts of two tokens and more");
    let (want, _) = case.floats("loss");
    let loss = (loss - f64::from(want[0])).abs();
    assert!(loss <= LOSS, "{}: the loss is off by {loss:e}", case.name);

    // Token by token from position 3 on, across the ends of the shorter rows.
    let (want, _) = case.floats("prefill_logits");
    let logits = batch
        .logits(&mut engine, Reading::TokenByToken { prefill: 3 })
        .unwrap_or_else(|e| panic!("{}: {e}", case.name));
    let decode = max_diff(&logits.data, &want);
    assert!(decode <= LOGITS, "{}: decoded logits are off by {decode:e}", case.name);

    let (greedy, greedy_shape) = case.integers("greedy_ids").expect("every case has greedy_ids");
    let (prompts, _) = case.integers("prompt_lens").expect("every case has prompt_lens");
    for (r, &len) in prompts.iter().enumerate() {
        let prompt: Vec<i32> = ids[r * shape[1]..][..len as usize].iter().map(|&i| i as i32).collect();
        let steps = greedy_shape[1];
        let made = generate(&mut engine, &prompt, steps, &mut Sampler::greedy(), |_| true)
            .expect("the prompt is right");
        let want: Vec<i32> = greedy[r * steps..][..steps].iter().map(|&i| i as i32).collect();
        assert_eq!(made, want, "{}: greedy tokens of row {r}", case.name);
    }
    println!(
        "{:16} {:>4} kernels, prefill {prefill:.1e}, decode {decode:.1e}, loss {loss:.1e}; {} passes",
        case.name,
        engine.program(Graph::Decode).map_or(0, |p| p.kernels.len()),
        passes.len()
    );
}

/// A graphics driver for the CPU is enough; `scripts/setup-lavapipe.sh` installs one. It is slow, so that all cases run
/// with all passes, and the project's own after each single pass too.
#[test]
fn on_wgpu() {
    let own = workspace().join("tests/cases");
    let prefixes = prefixes();
    for case in cases() {
        let from = if case.path.starts_with(&own) { 0 } else { prefixes.len() - 1 };
        for passes in &prefixes[from..] {
            match WgpuDevice::open() {
                Ok(device) => agrees(&case, device, DType::F32, passes),
                Err(e) => return eprintln!("SKIPPED: on_wgpu: {e}"),
            }
        }
    }
}

/// A bf16 program keeps what it will round in f32, so buffers of two dtypes come and go. WGSL stores both as f32: the figures are
/// the same.
#[test]
fn with_narrow_dtypes_on_wgpu() {
    for case in cases().iter().take(2) {
        match WgpuDevice::open() {
            Ok(device) => agrees(case, device, DType::Bf16, &pipeline()),
            Err(e) => return eprintln!("SKIPPED: with_narrow_dtypes_on_wgpu: {e}"),
        }
    }
}

#[test]
fn on_the_host() {
    for case in cases() {
        prefixes().iter().for_each(|passes| agrees(&case, Host::new(), DType::F32, passes));
    }
}
