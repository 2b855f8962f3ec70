//! Streams.

use latentc_codegen::check::{check, launch};
use latentc_codegen::cube::{LaunchShape, chosen, cuda_sources};
use latentc_codegen::program::Kernel;
use proptest::prelude::*;

use crate::bench::{
    agree, cuda, cuda_text, device, inputs, means_the_same, means_the_same_on_wgpu, tolerance,
};
use crate::stream_matrix::right;
use crate::streams::{arb_case, arb_fold, backward, causal, latent, paged, pages, put, stream};

#[test]
fn latents_that_are_keys_and_values() {
    let k = latent("latent", "f32", [5, 24, 7]);
    agree(&k, &[&[1, 1, 1], &[2, 3, 70], &[1, 9, 100], &[2, 0, 3], &[1, 2, 0], &[0, 1, 5]]);
    // Positions are shared out, in parts that are not equal.
    agree(&k, &[&[1, 1, 3001], &[2, 7, 300]]);
    // Columns beyond one cube.
    agree(&latent("wide", "f32", [3, 530, 16]), &[&[1, 2, 40], &[1, 1, 290]]);
    agree(&latent("narrow", "bf16", [3, 40, 8]), &[&[1, 2, 40]]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2, ..ProptestConfig::default() })]
    #[test]
    fn pages_in_any_order(
        [b, t, s] in [1usize..4, 1usize..6, 1usize..100],
        page in prop::sample::select(vec![2u64, 16, 64]),
        width in 1u64..20,
    ) {
        within_bounds(&paged("paged", "f32", [3, width, 5], page), &pages([b, t, s], page));
        let sizes = pages([b, t, t], page);
        within_bounds(&put("put", "f32", [width, 7], page), &[b, t, sizes[3], sizes[4]]);
    }
}

#[test]
fn causal_heads() {
    agree(&causal("causal", "f32", [3, 40, 33]), &[&[1, 70, 70], &[2, 1, 5]]);
    // One row and one column of everything; no depth at all.
    agree(&causal("one", "f32", [1, 1, 1]), &[&[1, 1, 1], &[1, 40, 9]]);
    agree(&causal("flat", "f32", [2, 0, 3]), &[&[2, 3, 40]]);
}

#[test]
fn what_no_row_sees_is_not_read() {
    // Positions from 32 on hold no numbers, which the mask hides from all rows.
    let k = causal("hidden", "f32", [2, 6, 5]);
    let sizes = [1, 3, 70];
    let nothing =
        |width: usize| (0..70 * 2 * width).map(move |n| if n < 32 * 2 * width { 0.5 } else { f64::NAN });
    let (keys, values): (Vec<_>, Vec<_>) = (nothing(6).collect(), nothing(5).collect());
    let args = inputs(&k, &sizes, &[(1, &keys), (2, &values)]);
    if let Some(mut device) = crate::bench::device() {
        let y = launch(&mut device, &k, &args, &sizes).unwrap();
        assert!(y.data.iter().all(|y| (y - 0.5).abs() < 1e-5), "{:?}", y.data);
    }
}

#[test]
fn products_that_no_tile_computes() {
    // A key for each row, and a product that has no position.
    let k = stream(
        "odd",
        "axes t=n0, s=n1, k=5, v=6\nparam q: f32[t, k]\nparam e: f32[s, t, k]\nparam f: f32[t, k]\nparam w: f32[v, s]\n\
         z: f32[t, s] = contract q, e over k\nu: f32[t] = contract q, f over k\nx: f32[s, t] = add z, u\n\
         p: f32[t, s] = softmax x over s\ny: f32[v, t] = contract w, p over s\nreturn y",
    );
    agree(&k, &[&[3, 50], &[70, 3]]);
}

#[test]
fn sums_of_a_gradient() {
    let k = backward("backward", "f32", [3, 40, 33]);
    agree(&k, &[&[1, 70, 70], &[2, 1, 5], &[0, 2, 2], &[1, 3, 0]]);
    // Positions are shared out, so many that what they add up to is less exact than a few are.
    within_bounds(&k, &[1, 5, 600]);
    agree(&backward("flat", "f32", [2, 0, 3]), &[&[2, 3, 40]]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, ..ProptestConfig::default() })]
    #[test]
    fn folds_of_axes_in_any_order(case in arb_fold(), sizes in (0usize..4, 0usize..15, prop_oneof![0usize..80, 256usize..400])) {
        let (k, sizes) = (case.kernel(), [sizes.0, sizes.1, sizes.2]);
        as_exact_as_it_is(&k, &sizes);
        cuda(&k);
    }
}

/// Compares a kernel on all devices with what its arithmetic allows.
fn within_bounds(k: &Kernel, sizes: &[usize]) {
    right(k, sizes);
    if let Some(mut wgpu) = device() {
        let outcome = check(&mut wgpu, k, sizes, 5).unwrap_or_else(|e| panic!("{e}\n{}", k.body));
        assert!(outcome.passes() && outcome.tolerance.is_finite(), "{outcome:?}\n{}", k.body);
    }
}

/// Compares a kernel on all devices, in the way that each takes.
fn as_exact_as_it_is(k: &Kernel, sizes: &[usize]) {
    let args = inputs(k, sizes, &[]);
    if chosen(k, sizes).kind == k.kind {
        means_the_same(k, &args, sizes, tolerance(k));
    } else {
        // Tensor cores round operands and weights to the dtype of the values: what they may be off by follows from that.
        means_the_same_on_wgpu(k, &args, sizes, tolerance(k));
        right(k, sizes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, ..ProptestConfig::default() })]
    #[test]
    fn streams_of_axes_in_any_order(case in arb_case(), sizes in (0usize..4, 0usize..15, prop_oneof![0usize..80, 256usize..400])) {
        let (k, sizes) = (case.kernel(), [sizes.0, sizes.1, sizes.2]);
        as_exact_as_it_is(&k, &sizes);
        // Nobody writes such kernels, so a spill is no matter.
        cuda(&k);
    }
}

#[test]
fn shapes_of_the_published_models() {
    let latents = latent("decode", "bf16", [128, 512, 64]);
    assert_eq!(
        LaunchShape::of(&latents).to_string(),
        "256 units a cube, one cube per tile of 16 x 512 in [n1, 128] x [512] for each of [n0], 24912 B shared"
    );
    for k in [latents, latent("lite", "bf16", [16, 512, 64]), causal("prefill", "bf16", [128, 192, 128])] {
        assert!(LaunchShape::of(&k).shared_bytes <= 32 << 10, "{}", k.name);
        let sources = cuda_sources(&k).unwrap();
        let names: Vec<_> = sources.iter().map(|s| &s.name[k.name.len()..]).collect();
        assert_eq!(names, ["", "_part", "_merge"]);
        for resources in sources.iter().filter_map(|s| cuda_text(&s.name, &s.text)) {
            assert_eq!((resources.spill_bytes, resources.stack_bytes), (0, 0), "{}: {resources:?}", k.name);
        }
    }
}
