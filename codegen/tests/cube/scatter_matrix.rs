//! Sums of outer products by index on tensor cores: the text for CUDA, emulated and through NVIDIA's compilers.

use latentc_codegen::check::{check, launch, meaning};
use latentc_codegen::cube::{Machine, Target, cuda_sources, typical, ways};
use latentc_codegen::emulate::Emulator;
use latentc_codegen::program::{By, Kernel, KernelKind};
use proptest::prelude::*;

use crate::bench::{cuda_text, emulated, inputs, kernel, on_cuda, shows_unawaited};
use crate::stream_matrix::right;

/// The ways of a kernel on tensor cores.
fn tiled(kernel: &Kernel) -> Vec<Kernel> {
    let ways = ways(kernel, Target::Cuda).into_iter();
    ways.filter(|w| matches!(w.kind, KernelKind::ScatterMatrix { .. })).collect()
}

/// Gradients of so many matrices of `rows` by `columns`, of which each of `n0` tokens chose two. The second factor has no axis of
/// the choice.
fn matrices(name: &str, [first, second]: [&str; 2], [groups, rows, columns]: [u64; 3]) -> Kernel {
    let text = format!(
        "axes a0={groups}, a1={rows}, a2={columns}, a3=n0, a4=2\nparam p0: {first}[a3, a4, a1]\n\
         param p1: {second}[a3, a2]\nparam p2: i32[a3, a4]\n\
         x: f32[a3, a4, a1, a2] = mul p0, p1\ny: f32[a0, a1, a2] = scatter_add x, p2 along a0\nreturn y"
    );
    kernel(KernelKind::Scatter, name, &text)
}

#[test]
fn factors_of_any_float() {
    let pairs = ["bf16 bf16", "f16 f16", "bf16 f32", "f32 f32", "f16 f32", "f16 bf16"];
    let ways = pairs.into_iter().enumerate().map(|(n, dtypes)| {
        let (first, second) = dtypes.split_once(' ').unwrap();
        // Tails of tiles, and groups that end within a stage or fill several.
        let k = matrices(&dtypes.replace(' ', "_"), [first, second], [3, 72, 40]);
        let [small, large, groups] = <[Kernel; 3]>::try_from(tiled(&k)).expect("three kinds of tiles");
        [&groups, &small, &large, &groups][n % 4].clone()
    });
    let ways: Vec<_> = ways.collect();
    // All at once, since what takes time is to compile.
    emulated(|emulator| emulator.prepare(&ways).unwrap());
    ways.iter().for_each(|way| right(way, &[110]));
}

#[test]
fn any_choice_of_rows() {
    let k = matrices("choice", ["bf16", "f32"], [5, 24, 136]);
    let ways = tiled(&k);
    // None, one, all of one index, more indices than rows; what is none adds nothing.
    let skewed: Vec<f64> = (0..190).map(|n| if n % 9 == 0 { f64::from(n % 5) } else { 3.0 }).collect();
    for index in [&[][..], &[4.0, 4.0], &[2.0; 190], &skewed] {
        let sizes = [index.len() / 2];
        for way in &ways[1..] {
            on_cuda(way, &inputs(way, &sizes, &[(2, index)]), &sizes, 2e-4);
        }
    }
    let index = [1.0, -1.0, 3.0, 5.0, 0.0, 4.0];
    let way = &ways[1];
    let mut args = inputs(way, &[3], &[(2, &index)]);
    emulated(|emulator| {
        let got = launch(emulator, way, &args, &[3]).unwrap();
        // As if these rows were zero.
        args[2].data = index.iter().map(|&i| if (0.0..5.0).contains(&i) { i } else { 0.0 }).collect();
        for row in [1, 3] {
            args[0].data[24 * row..24 * row + 24].fill(0.0);
        }
        got.close_to(&meaning(way, &args, &[3]).unwrap(), 3e-5, 3e-5).unwrap();
    });
}

#[test]
fn axes_in_any_order() {
    // Several axes on a side, with one of the rows between, sides that alternate in the result, and rows in an order of the
    // index's own.
    let k = kernel(
        KernelKind::Scatter,
        "order",
        "axes a0=4, a1=3, a2=8, a3=n0, a4=n1, a5=16\nparam p0: bf16[a4, a2]\nparam p1: bf16[a3, a1, a4, a5]\n\
         param p2: i32[a4, a3]\nx: f32[a4, a3, a1, a2, a5] = mul p0, p1\n\
         y: f32[a1, a0, a2, a5] = scatter_add x, p2 along a0\nreturn y",
    );
    right(&tiled(&k)[0], &[7, 11]);
    // Pairs of columns that are none in the result.
    let k = kernel(
        KernelKind::Scatter,
        "pairs",
        "axes a0=4, a1=8, a2=8, a3=n0, a4=3\nparam p0: f32[a3, a1]\nparam p1: bf16[a3, a4, a2]\n\
         param p2: i32[a3]\nx: f32[a3, a4, a1, a2] = mul p0, p1\n\
         y: f32[a4, a2, a1, a0] = scatter_add x, p2 along a0\nreturn y",
    );
    right(&tiled(&k)[0], &[21]);
}

#[test]
fn only_sums_of_matrices_have_the_way() {
    // Columns that fill no packs, ones that both factors have, rows that the result has, and one factor.
    let refused = [
        "axes a0=4, a1=6, a2=8, a3=n0\nparam p0: bf16[a3, a1]\nparam p1: bf16[a3, a2]\nparam p2: i32[a3]\n\
         x: f32[a3, a1, a2] = mul p0, p1\ny: f32[a0, a1, a2] = scatter_add x, p2 along a0\nreturn y",
        "axes a0=4, a1=8, a2=8, a3=n0\nparam p0: bf16[a3, a1]\nparam p1: bf16[a3, a2, a1]\nparam p2: i32[a3]\n\
         x: f32[a3, a1, a2] = mul p0, p1\ny: f32[a0, a1, a2] = scatter_add x, p2 along a0\nreturn y",
        "axes a0=4, a1=8, a2=8, a3=n0\nparam p0: bf16[a3, a1]\nparam p1: bf16[a3, a2]\nparam p2: i32[a3]\n\
         x: f32[a3, a1, a2] = mul p0, p1\ny: f32[a3, a0, a1, a2] = scatter_add x, p2 along a0\nreturn y",
        "axes a0=4, a1=8, a3=n0\nparam p0: bf16[a3, a1]\nparam p2: i32[a3]\n\
         y: f32[a0, a1] = scatter_add p0, p2 along a0\nreturn y",
    ];
    for body in refused {
        assert!(tiled(&kernel(KernelKind::Scatter, "other", body)).is_empty(), "{body}");
    }
}

#[test]
fn large_matrices_have_large_tiles() {
    // Those of the published model are what devices launch, whatever the number of tokens.
    for dtypes in [["bf16", "bf16"], ["bf16", "f32"], ["f32", "f32"]] {
        let all = typical(&matrices("experts", dtypes, [64, 1408, 2048]), &Machine::HOPPER);
        let [_, way] = &all[..] else { panic!("one way: {all:?}") };
        assert_eq!(way.kind, KernelKind::ScatterMatrix { side: 128, by: By::Groups });
        let sources = cuda_sources(way).unwrap();
        let [sorts, multiplies] = &sources[..] else { panic!("two launches: {sources:?}") };
        assert_eq!(sorts.name, "experts_groups128_sort");
        if let Some(resources) = cuda_text(&multiplies.name, &multiplies.text) {
            // Two cubes on a processor.
            assert!(resources.registers <= 128, "{dtypes:?}: {resources:?}");
            assert_eq!((resources.spill_bytes, resources.stack_bytes), (0, 0), "{dtypes:?}: {resources:?}");
        }
    }
    let [_, small] = &typical(&matrices("few", ["bf16", "bf16"], [4, 64, 128]), &Machine::HOPPER)[..] else {
        panic!("one way")
    };
    assert_eq!(small.kind, KernelKind::ScatterMatrix { side: 64, by: By::Planes });
}

#[test]
fn two_runs_agree_to_the_last_bit() {
    let way = &tiled(&matrices("again", ["bf16", "f32"], [3, 40, 24]))[0];
    emulated(|emulator| {
        // Threads and blocks go in another order each time.
        let digest = |emulator: &mut Emulator| check(emulator, way, &[90], 5).unwrap().digest;
        let first = digest(emulator);
        assert_eq!(first, digest(&mut Emulator::open(11).unwrap()));
    });
}

#[test]
fn what_is_not_awaited_shows() {
    let [_, planes, groups] = &tiled(&matrices("awaited", ["bf16", "bf16"], [2, 40, 24]))[..] else {
        panic!("three kinds of tiles")
    };
    let wait = "asm volatile(\"cp.async.wait_group %0;\" :: \"n\"(1) : \"memory\");";
    shows_unawaited(planes, wait, &[190]);
    let shown = "asm volatile(\"fence.proxy.async.shared::cta;\" ::: \"memory\");";
    shows_unawaited(groups, &format!("{wait}\n{shown}"), &[190]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3, ..ProptestConfig::default() })]
    #[test]
    fn matrices_of_any_size(
        (groups, rows, columns) in (1u64..9, 1u64..24, 1u64..24),
        tokens in 0usize..90,
        dtypes in (0usize..3, 0usize..3),
        tile in 0usize..3,
    ) {
        let of = |n: usize| ["bf16", "f16", "f32"][n];
        let k = matrices("random", [of(dtypes.0), of(dtypes.1)], [groups, 8 * rows, 8 * columns]);
        right(&tiled(&k)[tile], &[tokens]);
    }
}
