//! Products with few rows, in each of their ways.

use latentc_codegen::cube::{LaunchShape, Target, ways};
use latentc_codegen::program::{Kernel, KernelKind};
use latentc_ir::DType;

use crate::bench::{agree_on, inputs, kernel};

/// Each way to compute a kernel means what the kernel means, spilling nothing. There are so many.
fn agree(kernel: &Kernel, count: usize, sizes: &[&[usize]]) {
    let ways = ways(kernel, Target::Wgsl);
    assert_eq!(ways.len(), count, "{ways:?}");
    for way in ways.iter().filter(|w| matches!(w.kind, KernelKind::Few { rows: 1 | 8, .. })) {
        for sizes in sizes {
            let tolerance = if kernel.output().dtype == DType::F32 { 3e-5 } else { 1e-2 };
            agree_on(way, &inputs(way, sizes, &[]), sizes, tolerance);
        }
    }
}

/// A norm before gate and up projection, SwiGLU and a residual behind them; weights in bf16, read in packs of 8.
const SWIGLU: &str = "param p0: bf16[a1, a2]
param p1: bf16[a2]
param p2: bf16[a0, a2]
param p3: bf16[a1, a2]
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
fn along_the_summed_axes_with_what_stands_around() {
    for depth in ["a2=n2", "a2=256"] {
        let k = kernel(KernelKind::Contract, "swiglu", &format!("axes a0=n0, a1=n1, {depth}\n{SWIGLU}"));
        let sizes: &[&[usize]] = if depth == "a2=n2" { &[&[3, 33, 17], &[9, 2, 0]] } else { &[&[9, 19]] };
        agree(&k, 4, sizes);
    }
}

#[test]
fn many_columns_and_chunks() {
    let k = kernel(
        KernelKind::Contract,
        "logits",
        "axes a0=n0, a1=1601, a2=520\nparam p0: bf16[a1, a2]\nparam p1: f32[a0, a2]\n\
         y: bf16[a0, a1] = contract p0, p1 over a2\nreturn y",
    );
    agree(&k, 8, &[&[2]]);
}

#[test]
fn across_the_columns_head_by_head() {
    let k = kernel(
        KernelKind::Contract,
        "absorbed",
        "axes a0=n0, a1=3, a2=24, a3=10\nparam p0: f32[a0, a1, a3]\nparam p1: bf16[a1, a3, a2]\n\
         y: f32[a0, a1, a2] = contract p0, p1 over a3\nreturn y",
    );
    agree(&k, 8, &[&[1], &[11]]);
    // Summed axes that lie apart, an odd number of columns, and two axes of rows.
    let k = kernel(
        KernelKind::Contract,
        "apart",
        "axes a0=n0, a1=2, a2=5, a3=9, a4=n1\nparam p0: f32[a0, a3, a1, a4]\nparam p1: f16[a4, a2, a3]\n\
         y: f32[a1, a2, a0] = contract p0, p1 over a3, a4\nreturn y",
    );
    agree(&k, 8, &[&[2, 3]]);
}

#[test]
fn by_an_index() {
    let k = kernel(
        KernelKind::Grouped,
        "up",
        "axes a0=n0, a1=3, a2=37, a3=7, a4=16\nparam p0: f32[a0, a3]\nparam p1: i32[a0, a1]\n\
         param p2: bf16[a3, a2, a4]\nparam p3: bf16[a0, a4]\nparam p4: bf16[a3, a2, a4]\n\
         w: f32[a0, a1] = gather p0, p1 along a3\n\
         w1: bf16[a0, a1, a2, a4] = gather p2, p1 along a3\n\
         x1: f32[a0, a1, a2] = contract w1, p3 over a4\n\
         w2: bf16[a0, a1, a2, a4] = gather p4, p1 along a3\n\
         x2: f32[a0, a1, a2] = contract w2, p3 over a4\n\
         s: f32[a0, a1, a2] = silu x1\nm: f32[a0, a1, a2] = mul s, x2\ny: f32[a0, a1, a2] = mul w, m\nreturn y",
    );
    indexed(&k, 1, &[0.0, 6.0, 2.0, 2.0, 5.0, 1.0]);
    let k = kernel(
        KernelKind::Grouped,
        "down",
        "axes a0=n0, a1=19, a2=3, a3=24, a4=7\nparam p0: f32[a0, a2, a3]\nparam p1: bf16[a4, a1, a3]\n\
         param p2: i32[a0, a2]\nw: bf16[a0, a2, a1, a3] = gather p1, p2 along a4\n\
         y: f32[a0, a1] = contract p0, w over a2, a3\nreturn y",
    );
    indexed(&k, 2, &[0.0, 6.0, 2.0, 2.0, 5.0, 1.0]);
}

fn indexed(kernel: &Kernel, index: usize, choice: &[f64]) {
    let ways = ways(kernel, Target::Wgsl);
    assert_eq!(ways.len(), 4);
    for way in &ways[..2] {
        agree_on(way, &inputs(way, &[2], &[(index, choice)]), &[2], 3e-5);
    }
}

/// The launch of a product of one row with so many columns, and as many matrices as the row meets.
fn of_a_row(columns: usize, depth: usize, matrices: usize) -> LaunchShape {
    let (mut params, mut products) = (String::new(), String::new());
    for n in 0..matrices {
        params += &format!("param p{}: bf16[a1, a2]\n", n + 1);
        products += &format!("y{n}: f32[a0, a1] = contract p{}, p0 over a2\n", n + 1);
    }
    let meet = if matrices == 2 { "y: f32[a0, a1] = mul y0, y1\nreturn y" } else { "return y0" };
    let body =
        format!("axes a0=n0, a1={columns}, a2={depth}\nparam p0: bf16[a0, a2]\n{params}{products}{meet}");
    let all = ways(&kernel(KernelKind::Contract, "row", &body), Target::Cuda);
    let row = all.iter().find(|w| matches!(w.kind, KernelKind::Few { rows: 1, .. }));
    LaunchShape::of(row.expect("a row is few rows"))
}

/// What is on its way past the registers leaves room for four cubes on a multiprocessor of an H100, of 228 KiB, of which each cube costs one.
#[test]
fn four_cubes_of_a_row_run_at_once() {
    for (columns, matrices) in [(2816, 2), (22528, 2), (10944, 1), (102_400, 1)] {
        let shared = of_a_row(columns, 2048, matrices).shared_bytes;
        assert!(shared > 32 << 10, "{shared} of {columns} columns");
        assert!(shared <= (228 << 10) / 4 - (1 << 10), "{shared} of {columns} columns");
    }
}

/// Where a unit has all that it reads on its way at once, cubes are few, since others stand beside them.
#[test]
fn more_cubes_are_made_of_deep_columns_than_of_flat_ones() {
    let cubes = |columns, depth| of_a_row(columns, depth, 1).grid(|_| 1).expect("it can be numbered").0;
    assert_eq!([cubes(2048, 2048), cubes(1024, 2048), cubes(512, 2048)], [256, 128, 64]);
    assert_eq!([cubes(512, 5120), cubes(64, 2048)], [256, 64]);
}
