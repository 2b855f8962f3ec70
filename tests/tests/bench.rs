//! Measuring, on a device that checks: the CUDA text of every launch that `bench` makes, its own kernels among them, run by the
//! emulator with weights in bf16. Times mean nothing there.

use latentc_codegen::device::DeviceError;
use latentc_codegen::emulate::Emulator;
use latentc_codegen::program::KernelKind;
use latentc_ir::DType;
use latentc_passes::{Graph, pipeline};
use latentc_runtime::bench::{Arguments, Probe, Settings, Shape, measure};
use latentc_tests::cases;

#[test]
fn every_launch_of_decode_stays_in_its_memory() {
    measured(Graph::Decode, Shape { batch: 2, tokens: 1, context: 150 });
}

#[test]
fn every_launch_of_prefill_stays_in_its_memory() {
    measured(Graph::Prefill, Shape { batch: 1, tokens: 37, context: 40 });
}

fn measured(graph: Graph, shape: Shape) {
    let cases = cases();
    let tiny = cases.iter().find(|c| c.name == "tiny").expect("the project's own case");
    let emulator = match Emulator::open(1) {
        Ok(emulator) => emulator,
        Err(DeviceError::Absent(what, why)) => {
            return eprintln!("SKIPPED: every launch of {} stays in its memory: {what}: {why}", graph.name());
        }
        Err(e) => panic!("{e}"),
    };
    let compiled = tiny.compile(graph, DType::Bf16, &pipeline());
    let given = Arguments::of_model(&compiled.program, shape, 199, 3).unwrap();
    let with = Settings {
        repeat: 2,
        seed: 3,
        std: 0.02,
        dtype: DType::Bf16,
        // Larger than all weights but the embedding's, so that most come from elsewhere.
        probe: Probe { bytes: 1 << 15, side: 24, queues: true },
        kernels: true,
        only: Vec::new(),
        whole: true,
    };
    let measured = measure(emulator, &compiled, &given, &with, |_| {}).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(measured.kernels.len(), compiled.program.kernels.len());
    assert!(measured.kernels.iter().all(|k| k.time.is_some_and(|t| t.seconds.median > 0.0)));
    assert!(measured.step.seconds.is_some_and(|s| s.median > 0.0));
    assert!(measured.kernels.iter().any(|k| matches!(k.way, KernelKind::Few { .. })));
}
