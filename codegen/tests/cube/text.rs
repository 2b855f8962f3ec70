//! The text of kernels, whole.

use latentc_codegen::cube::{LaunchShape, cuda_source, wgsl_source};
use latentc_codegen::program::KernelKind;

use crate::bench::{kernel, map};

#[test]
fn a_map() {
    let k = map(
        "swiglu",
        "axes a0=n0, a1=1536\nparam p0: bf16[a0, a1]\nparam p1: bf16[a0, a1]\n\
         x: f32[a0, a1] = silu p0\ny: bf16[a0, a1] = mul x, p1\nreturn y",
    );
    insta::assert_snapshot!(cuda_source(&k).unwrap());
    assert!(wgsl_source(&k).unwrap().contains("fn swiglu("));
}

#[test]
fn a_contraction() {
    let k = kernel(
        KernelKind::Contract,
        "scores",
        "axes a0=n0, a1=n1, a2=16, a3=192\nparam p0: bf16[a0, a2, a3]\nparam p1: bf16[a1, a2, a3]\n\
         y: f32[a2, a0, a1] = contract p0, p1 over a3\nreturn y",
    );
    insta::assert_snapshot!(cuda_source(&k).unwrap());
    let shape = LaunchShape::of(&k);
    assert_eq!(
        shape.to_string(),
        "256 units a cube, one cube per tile of 64 x 64 in [n0] x [n1] for each of [16], 8320 B shared"
    );
    assert_eq!(shape.grid(|_| 65), Ok((64, 1, 1)));
}
