//! Products of f32 as tf32: what is asked for, what it may be off, and that it is as far off as that.

use latentc_codegen::check::{Expected, launch};
use latentc_codegen::cube::{Target, Tuning, choose, chosen, cuda_sources, ways};
use latentc_codegen::program::{By, Kernel, KernelKind};

use crate::bench::{cuda_text, emulated, gpu, inputs, kernel};
use crate::matrix::gradient;

/// Of 160 rows and more columns, a sum of 136 products; both operands along it.
fn product() -> Kernel {
    kernel(
        KernelKind::Contract,
        "whole",
        "axes a0=n0, a1=270, a2=136\nparam p0: f32[a1, a2]\nparam p1: f32[a0, a2]\nparam p2: f32[a0]\n\
         x: f32[a0, a1] = contract p0, p1 over a2\ny: f32[a0, a1] = add x, p2\nreturn y",
    )
}

/// Two products of rows that choose among three matrices.
fn grouped() -> Kernel {
    kernel(
        KernelKind::Grouped,
        "experts",
        "axes a0=n0, a1=2, a2=70, a3=3, a4=72\nparam p0: f32[a0, a4]\nparam p1: i32[a0, a1]\n\
         param p2: f32[a3, a2, a4]\nparam p3: f32[a3, a2, a4]\n\
         w1: f32[a0, a1, a2, a4] = gather p2, p1 along a3\nx1: f32[a0, a1, a2] = contract w1, p0 over a4\n\
         w2: f32[a0, a1, a2, a4] = gather p3, p1 along a3\nx2: f32[a0, a1, a2] = contract w2, p0 over a4\n\
         y: f32[a0, a1, a2] = mul x1, x2\nreturn y",
    )
}

/// A normed operand, which is stored first, and a sum in parts.
fn normed() -> Kernel {
    kernel(
        KernelKind::Contract,
        "normed",
        "axes a0=n0, a1=40, a2=144\nparam p0: f32[a1, a2]\nparam p1: f32[a0, a2]\nsquares: f32[a0, a2] = mul p1, p1\n\
         sum: f32[a0] = reduce_sum squares over a2\nscale: f32[a0] = rsqrt sum\nh: f32[a0, a2] = mul p1, scale\n\
         y: f32[a0, a1] = contract p0, h over a2\nreturn y",
    )
}

fn asked_for() -> Tuning {
    Tuning::default().with_tf32(true)
}

/// The ways as tf32 of one side.
fn short(kernel: &Kernel, side: u8) -> Vec<Kernel> {
    let all = ways(kernel, Target::Cuda).into_iter();
    all.filter(|w| matches!(w.kind, KernelKind::Matrix { wide, tf32: true, .. } if wide == side)).collect()
}

/// How far off a kernel is of what it may be, in each of some ways; and of what it might be if it rounded as f32 does. None spills.
fn off(ways: &[Kernel], sizes: &[usize], given: &[(usize, &[f64])]) {
    for source in ways.iter().flat_map(|way| cuda_sources(way).unwrap()) {
        if let Some(resources) = cuda_text(&source.name, &source.text) {
            assert_eq!(resources.spill_bytes, 0, "{} spills: {resources:?}", source.name);
        }
    }
    let far = |way: &Kernel, got: &[f64]| {
        let args = inputs(way, sizes, given);
        let plain = Kernel { kind: KernelKind::of(&way.body), ..way.clone() };
        [way, &plain].map(|kernel| {
            let may = Expected::of(kernel, &args, sizes).unwrap();
            let each = got.iter().zip(&may.value.data).zip(&may.tolerance);
            each.map(|((got, want), may)| (got - want).abs() / may).fold(0.0, f64::max)
        })
    };
    let holds = |way: &Kernel, got: &[f64]| {
        let [of_own, of_f32] = far(way, got);
        assert!(of_own < 1.0 && of_f32 > 1.0, "{}: {of_own} of its own bound, {of_f32} of f32's", way.name);
    };
    if let Some(mut gpu) = gpu() {
        for way in ways {
            holds(way, &launch(&mut gpu, way, &inputs(way, sizes, given), sizes).unwrap().data);
        }
    }
    emulated(|emulator| {
        // Compiled together, they take as long as two.
        emulator.prepare(ways).unwrap();
        for way in ways {
            holds(way, &launch(emulator, way, &inputs(way, sizes, given), sizes).unwrap().data);
        }
    });
}

#[test]
fn all_tiles() {
    let mut ways = short(&product(), 0);
    ways.retain(|w| matches!(w.kind, KernelKind::Matrix { parts: 1, .. }));
    assert_eq!(ways.len(), 10, "four by planes, one by groups, five by boxes");
    off(&ways, &[160], &[]);
}

#[test]
fn rows_of_groups() {
    let mut ways = short(&grouped(), 0);
    // By planes, by groups, and by boxes of the matrices.
    ways.retain(|w| {
        matches!(
            w.kind,
            KernelKind::Matrix { rows: 32, .. }
                | KernelKind::Matrix { columns: 256, by: By::Groups | By::Boxes, .. }
        )
    });
    assert_eq!(ways.len(), 3, "{ways:?}");
    let index: Vec<_> = (0..80).map(|n| f64::from(n * 5 % 3)).collect();
    off(&ways, &[40], &[(1, &index)]);
}

#[test]
fn an_operand_that_is_stored_first_and_a_sum_in_parts() {
    let mut ways = short(&normed(), 0);
    ways.retain(|w| matches!(w.kind, KernelKind::Matrix { rows: 32, .. }));
    assert_eq!(ways.len(), 2, "{ways:?}");
    off(&ways, &[35], &[]);
}

#[test]
fn only_who_asks_has_it() {
    let short = |kernel: &Kernel, tuning: &Tuning| {
        let kind =
            choose(kernel, Target::Cuda, &vec![500; kernel.size_symbols().len()], tuning).unwrap().way.kind;
        matches!(kind, KernelKind::Matrix { tf32: true, .. })
    };
    assert!(matches!(chosen(&product(), &[500]).kind, KernelKind::Matrix { tf32: false, .. }));
    for (kernel, has) in [
        (product(), true),
        (grouped(), true),
        // Its depth does not lie behind one another; one operand has 16 bits.
        (gradient(["f32", "f32"]), false),
        (crate::matrix::wider(72), false),
    ] {
        assert_eq!(short(&kernel, &asked_for()), has, "{}", kernel.name);
        assert!(!short(&kernel, &Tuning::default()), "{}", kernel.name);
    }
}
