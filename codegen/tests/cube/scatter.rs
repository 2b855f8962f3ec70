//! Kernels that add up where an index says.

use latentc_codegen::check::launch;
use latentc_codegen::device::DeviceError;
use latentc_codegen::program::{Kernel, KernelKind};

use crate::bench::{agree_on, device, inputs, kernel, tolerance};

fn scatter(name: &str, body: &str) -> Kernel {
    kernel(KernelKind::Scatter, name, body)
}

/// Indices below `n`, some of them equal.
fn indices(len: usize, n: usize) -> Vec<f64> {
    (0..len).map(|i| (i * i % n) as f64).collect()
}

#[test]
fn rows_are_added_up() {
    // The gradient of an embedding: a batch of tokens, columns, a table.
    let k = scatter(
        "table",
        "axes a0=7, a1=n0, a2=n1, a3=n2\nparam p0: f32[a2, a3, a1]\nparam p1: i32[a2, a3]\n\
         y: f32[a0, a1] = scatter_add p0, p1 along a0\nreturn y",
    );
    for sizes in [[5, 2, 9], [300, 1, 1], [1, 3, 40], [4, 0, 3]] {
        let index = indices(sizes[1] * sizes[2], 7);
        agree_on(&k, &inputs(&k, &sizes, &[(1, &index)]), &sizes, tolerance(&k));
    }
}

#[test]
fn more_than_a_cube_has_at_once() {
    // Of indices, of columns, and of rows; indices that lie in one cube follow one another in runs and alone.
    let k = scatter(
        "blocks",
        "axes a0=150, a1=n0, a2=n1\nparam p0: f32[a2, a1]\nparam p1: i32[a2]\n\
         y: f32[a0, a1] = scatter_add p0, p1 along a0\nreturn y",
    );
    for sizes in [[3, 1200], [1030, 9]] {
        let index: Vec<_> =
            (0..sizes[1]).map(|i| if i % 7 < 4 { 65.0 } else { (i * i % 150) as f64 }).collect();
        agree_on(&k, &inputs(&k, &sizes, &[(1, &index)]), &sizes, 1e-4);
    }
}

#[test]
fn some_axes_of_the_index_stay() {
    let k = scatter(
        "stays",
        "axes a0=n0, a1=n1, a2=n2, a3=3\nparam p0: bf16[a3, a0, a2]\nparam p1: i32[a2, a0]\n\
         y: f32[a2, a1, a3] = scatter_add p0, p1 along a1\nreturn y",
    );
    for sizes in [[6, 4, 2], [1, 1, 1], [17, 5, 33]] {
        let index = indices(sizes[0] * sizes[2], sizes[1]);
        agree_on(&k, &inputs(&k, &sizes, &[(1, &index)]), &sizes, tolerance(&k));
    }
}

#[test]
fn what_lies_outside_adds_nothing() {
    let k = scatter(
        "outside",
        "axes a0=3, a1=4\nparam p0: f32[a1]\nparam p1: i32[a1]\ny: f32[a0] = scatter_add p0, p1 along a0\nreturn y",
    );
    let Some(mut device) = device() else { return };
    let args = inputs(&k, &[], &[(0, &[1.0, 2.0, 3.0, 4.0]), (1, &[2.0, -1.0, 3.0, 2.0])]);
    assert_eq!(launch(&mut device, &k, &args, &[]).unwrap().data, [0.0, 0.0, 5.0]);
}

#[test]
fn sums_are_f32() {
    let k = scatter(
        "narrow",
        "axes a0=3, a1=4\nparam p0: bf16[a1]\nparam p1: i32[a1]\ny: bf16[a0] = scatter_add p0, p1 along a0\nreturn y",
    );
    let refused = latentc_codegen::cube::cuda_source(&k).unwrap_err();
    assert!(matches!(refused, DeviceError::Kernel { .. }), "{refused}");
    assert!(refused.to_string().contains("`y` is bf16, but sums are f32"), "{refused}");
}

/// The gradient of matrices of which each row chose some: outer products, which are never stored.
#[test]
fn products_are_added_up() {
    let k = scatter(
        "matrices",
        "axes a0=n0, a1=n1, a2=n2, a3=n3, a4=2\nparam p0: bf16[a1, a2]\nparam p1: f32[a1, a4, a3]\nparam p2: i32[a1, a4]\n\
         x: f32[a1, a4, a2, a3] = mul p0, p1\ny: f32[a0, a2, a3] = scatter_add x, p2 along a0\nreturn y",
    );
    for sizes in [[4, 6, 3, 5], [1, 1, 1, 1], [9, 33, 17, 20], [3, 0, 2, 2]] {
        let index = indices(2 * sizes[1], sizes[0]);
        agree_on(&k, &inputs(&k, &sizes, &[(2, &index)]), &sizes, tolerance(&k));
    }
}
