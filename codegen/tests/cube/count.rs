//! What the emulator counts of a launch.

use latentc_codegen::check::launch;
use latentc_codegen::cube::chosen;
use latentc_codegen::emulate::{Count, Moved};
use latentc_codegen::program::{Kernel, KernelKind};
use latentc_codegen::traffic::Traffic;

use crate::bench::{emulated, inputs, kernel, map};
use crate::streams::{latent, paged, paged_codes, pages};

/// What the launches of a kernel do, if there is a compiler.
fn counted(kernel: &Kernel, sizes: &[usize], given: &[(usize, &[f64])]) -> Option<Vec<Count>> {
    let mut counts = None;
    emulated(|emulator| {
        let mut counting = emulator.clone().counting();
        launch(&mut counting, kernel, &inputs(kernel, sizes, given), sizes).unwrap();
        counts = Some(counting.take_counts());
    });
    counts
}

fn each_once(bytes: u64) -> Moved {
    Moved { asked: bytes, by_block: bytes, distinct: bytes }
}

#[test]
fn every_byte_by_whoever_touches_it() {
    let twice = map("twice", "axes a0=n0\nparam p0: bf16[a0]\ny: f32[a0] = add p0, p0\nreturn y");
    let Some(counts) = counted(&twice, &[1000], &[]) else { return };
    let [Count { kernel, buffers, multiplied: 0 }] = &counts[..] else { panic!("{counts:?}") };
    assert_eq!(kernel, "twice");
    assert_eq!(buffers[..], [[each_once(2000), Moved::default()], [Moved::default(), each_once(4000)]]);

    // Each unit of a cube needs the same number, and so does each cube.
    let scaled =
        map("scaled", "axes a0=n0\nparam p0: f32[a0]\nparam p1: f32\ny: f32[a0] = mul p0, p1\nreturn y");
    let Some(counts) = counted(&scaled, &[1000], &[]) else { return };
    let [_, [scale, _], _] = &counts[0].buffers[..] else { panic!("{counts:?}") };
    assert_eq!(scale.distinct, 4);
    assert!(scale.by_block > 4 && scale.by_block < scale.asked, "{scale:?}");
}

#[test]
fn tiles_multiply_what_they_hold() {
    let body = "axes a0=n0, a1=128, a2=64\nparam p0: bf16[a0, a2]\nparam p1: bf16[a1, a2]\n\
                y: f32[a0, a1] = contract p0, p1 over a2\nreturn y";
    let k = kernel(KernelKind::Contract, "product", body);
    for (rows, tiles) in [(64, 64), (40, 64)] {
        let Some(counts) = counted(&k, &[rows], &[]) else { return };
        let (KernelKind::Matrix { .. }, [count]) = (chosen(&k, &[rows]).kind, &counts[..]) else {
            panic!("{counts:?}")
        };
        assert_eq!(count.multiplied, 2 * tiles * 128 * 64, "{rows} rows");
        assert_eq!(count.moved().distinct as f64, Traffic::of_launch(&k, &[rows as u64]).unwrap().bytes());
    }
}

#[test]
fn latents_are_read_once_though_they_are_keys_and_values() {
    // Two sequences whose last position is read; many positions, which are shared out; as many heads as a cube has rows.
    let (sizes, [heads, width, shared]) = ([2, 1, 700], [16, 64, 16]);
    let k = latent("latent", "bf16", [heads, width, shared]);
    let Some(counts) = counted(&k, &sizes, &[(4, &[699.0, 699.0])]) else { return };
    let [part, merge] = &counts[..] else { panic!("positions are shared out: {counts:?}") };
    assert_eq!((&part.kernel[..], &merge.kernel[..]), ("latent_matrix1_part", "latent_matrix1_merge"));
    let positions = (sizes[0] * sizes[2]) as u64;
    // Queries, rotated queries, latents, shared keys.
    let read: Vec<_> = part.buffers.iter().map(|[read, _]| *read).collect();
    assert_eq!(read[2], each_once(2 * positions * width));
    assert_eq!(read[3], each_once(2 * positions * shared));
    assert!(part.multiplied > 0 && merge.multiplied == 0);
}

#[test]
fn pages_are_read_once_and_tables_once_for_each_pack() {
    // Two sequences whose last position is read, in pages of a pool that lie anywhere; more of them than are read.
    let (page, positions, [heads, width]) = (16, 128, [16, 64]);
    let sizes = pages([2, 1, positions], page);
    let table: Vec<f64> = (0..2 * sizes[4]).map(|n| (n * 5 % (2 * sizes[4])) as f64).collect();
    let last = vec![positions as f64 - 1.0; 2];
    let (all, of_number) = (2 * positions as u64, 2);
    let read = |kernel: &Kernel, [pos, of_table]: [usize; 2]| {
        let counts = counted(kernel, &sizes, &[(pos, &last), (of_table, &table)])?;
        assert!(matches!(chosen(kernel, &sizes).kind, KernelKind::StreamMatrix { .. }));
        Some(counts[0].buffers.iter().map(|[read, _]| *read).collect::<Vec<_>>())
    };
    // Queries, rotated queries, latents, shared keys, positions, table.
    let shared = 16;
    let Some(of) = read(&paged("pages", "bf16", [heads, width, shared], page), [4, 5]) else { return };
    assert_eq!(of[2], each_once(all * of_number * width));
    assert_eq!(of[3], each_once(all * of_number * shared));
    // Each thread that brings a pack of a line asks where the line is.
    let packs = |numbers: u64| numbers / 8;
    assert_eq!(of[5].asked, 4 * all * (packs(width) + packs(shared)));

    // Queries, codes, scales, positions, table.
    let (codes, group) = (paged_codes("codes", [heads, width, 32], page), 32);
    let Some(of) = read(&codes, [3, 4]) else { return };
    let once = |bytes: u64, of: Moved| assert_eq!((of.by_block, of.distinct), (bytes, bytes), "{of:?}");
    once(all * width, of[1]);
    once(all * of_number * width / group, of[2]);
    // Not for each of the eight numbers of it.
    assert_eq!(of[4].asked, 4 * all * packs(width));
    let pages_read = all / page;
    assert!(of[4].distinct == 4 * pages_read && of[4].by_block <= 2 * of[4].distinct, "{:?}", of[4]);
}
