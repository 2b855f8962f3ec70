//! Products with what stands around them.

use latentc_codegen::program::KernelKind;

use crate::bench::{agree, cuda, kernel};

/// An RMS norm before gate and up projection, SwiGLU and a residual behind them.
const SWIGLU: &str = "axes a0=n0, a1=n1, a2=n2
param p0: f32[a1, a2]
param p1: f32[a2]
param p2: f32[a0, a2]
param p3: f32[a2, a1]
param p4: f32[a0, a1]
size: f32 = const 40.0
eps: f32 = const 1e-6
squares: f32[a0, a2] = mul p2, p2
sum: f32[a0] = reduce_sum squares over a2
mean: f32[a0] = div sum, size
shifted: f32[a0] = add mean, eps
scale: f32[a0] = rsqrt shifted
normed: f32[a0, a2] = mul p2, scale
h: f32[a0, a2] = mul normed, p1
gate: f32[a0, a1] = contract p0, h over a2
up: f32[a0, a1] = contract p3, h over a2
open: f32[a0, a1] = silu gate
z: f32[a0, a1] = mul open, up
y: f32[a0, a1] = add z, p4
return y";

#[test]
fn norm_before_and_swiglu_behind() {
    let k = kernel(KernelKind::Contract, "swiglu", SWIGLU);
    agree(&k, &[&[1, 70, 40], &[65, 3, 40], &[3, 130, 17], &[2, 2, 0], &[0, 4, 4]]);
    if let Some(resources) = cuda(&k) {
        assert_eq!(resources.stack_bytes, 0, "the sums are no registers: {resources:?}");
    }
}

#[test]
fn folds_and_moves_on_both_sides() {
    // Both operands are scaled by the largest number of their rows; one is rotated, the other a part of a longer tensor.
    let k = kernel(
        KernelKind::Contract,
        "both",
        "axes a0=n0, a1=7, a2=6, a3=3, a4=2, a5=20
param p0: f32[a4, a0, a2]
param p1: i32[a0]
param p2: f32[a3]
param p3: f32[a5, a4, a1]
left: f32[a4, a0, a2] = rope p0, p1, p2 over a2 pairs halves
most: f32[a4, a0] = reduce_max p0 over a2
left.scaled: f32[a4, a0, a2] = sub left, most
right: f32[a2, a4, a1] = slice p3 axis a5 into a2 start 5
right.most: f32[a4, a1] = reduce_max right over a2
right.scaled: f32[a2, a4, a1] = sub right, right.most
x: f32[a0, a1, a4] = contract left.scaled, right.scaled over a2
shifted: f32[a0, a1, a4] = add x, most
y: f32[a0, a1, a4] = mul shifted, right.most
return y",
    );
    agree(&k, &[&[1], &[66]]);
    cuda(&k);
}

#[test]
fn gathered_gate_and_up() {
    let k = kernel(
        KernelKind::Grouped,
        "experts",
        "axes a0=n0, a1=2, a2=5, a3=9, a4=8
param p0: f32[a4, a2, a3]
param p1: i32[a0, a1]
param p2: f32[a0, a3]
param p3: f32[a4, a2, a3]
param p4: f32[a0, a1]
squares: f32[a0, a3] = mul p2, p2
sum: f32[a0] = reduce_sum squares over a3
h: f32[a0, a3] = div p2, sum
w: f32[a0, a1, a2, a3] = gather p0, p1 along a4
gate: f32[a0, a1, a2] = contract w, h over a3
v: f32[a0, a1, a2, a3] = gather p3, p1 along a4
up: f32[a0, a1, a2] = contract v, h over a3
open: f32[a0, a1, a2] = silu gate
z: f32[a0, a1, a2] = mul open, up
y: f32[a0, a1, a2] = mul z, p4
return y",
    );
    agree(&k, &[&[1], &[13]]);
    cuda(&k);
}
