//! On wgpu.

#[path = "suite.rs"]
mod suite;

use burn::backend::Wgpu;
use latentc_burn::{CompiledModule, wgpu_device as open};
use latentc_tests::cases;

type B = Wgpu;

/// WGSL has no f16 in memory, so that burn's tensors are not what kernels read.
#[test]
fn floats_of_another_width_are_refused() {
    let Ok(device) = open() else {
        return eprintln!("SKIPPED: floats_of_another_width_are_refused: no wgpu");
    };
    let case = &cases()[0];
    let half = CompiledModule::<Wgpu<burn::tensor::f16>>::load(&case.config, &case.checkpoint, &device);
    let why = half.expect_err("of half the width").to_string();
    assert!(why.contains("f16") && why.contains("WGSL") && why.contains("use f32"), "{why}");
}
