//! Products of many rows in bf16, by the CPU's own: one instruction multiplies 32 pairs of numbers and adds each two to a sum in f32, where
//! one of f32 multiplies 16.
//!
//! A tile of the result is a few lines of one operand, *down*, by two registers' worth of lines of the other, *across*. A register holds
//! two summands of each of 16 lines across, and two of one line down, spread, meet it. Lines across are packed so, block by block,
//! and lines down are copied tile by tile, since lines a power of two apart would drive each other out of the cache. While a
//! tile is multiplied, the lines of the next one are asked for.
//!
//! A few rows are another matter ([`few`]).
//!
//! What is held in f32 and has more bits is rounded as it is packed: that is what its type says. A kernel may round such a value
//! where it writes it or leave that to its readers; the bounds that kernels are checked by count one rounding either way
//! (`codegen/src/check/bound.rs`), and that what is subnormal is zero to this instruction, operands and sums alike.

pub(super) mod few;

use std::arch::x86_64::*;
use std::cell::Cell;

use gemm::Parallelism;
use half::bf16;
use rayon::prelude::*;

use super::Shared;
use super::few::{Matrix, Rows};
use super::simd::Held;

/// Lines down a tile.
const DOWN: usize = 12;
/// Lines across in a register.
const LANES: usize = 16;
/// Lines across in a panel, which is as wide as a tile.
const PANEL: usize = 2 * LANES;
/// Bytes that come from memory together.
const FETCHED: usize = 64;
/// Summands of a block: the lines down a tile lie in a core's first cache.
const DEPTH: usize = 512;
/// Lines of a block across: with so many summands they lie in its second.
const BLOCK: usize = 512;

impl Held {
    /// So many elements farther on.
    fn at(self, elements: usize) -> Held {
        match self {
            Held::Wide(p) => Held::Wide(p.wrapping_add(elements)),
            Held::Narrow(p) => Held::Narrow(p.wrapping_add(elements)),
        }
    }
}

/// Whether this CPU has the instructions.
pub(super) fn usable() -> bool {
    is_x86_feature_detected!("avx512bf16")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
}

/// Lines of numbers that are summed over.
#[derive(Clone, Copy)]
struct Lines {
    data: Held,
    count: usize,
    /// From one line to the next.
    line: usize,
    /// From one summand to the next.
    along: usize,
}

impl Lines {
    /// Lines from one on, summands from one on.
    fn from(self, line: usize, at: usize) -> Lines {
        let data = self.data.at(line * self.line + at * self.along);
        Lines { data, count: self.count - line, ..self }
    }

    /// What it costs about to bring all of them into the order that they have down a tile, and across.
    fn costs(&self) -> [usize; 2] {
        let down = if self.along == 1 { 1 } else { 8 };
        let across = match (self.line, self.along) {
            (1, _) => 1,
            (_, 1) => 2,
            _ => 8,
        };
        [down * self.count, across * self.count]
    }
}

/// Where a result goes.
#[derive(Clone, Copy)]
struct To {
    data: Shared<f32>,
    /// From one line across to the next.
    across: usize,
    /// From one line down to the next.
    down: usize,
    /// Whether it is added to what is there.
    add: bool,
}

impl To {
    /// From other lines on.
    fn from(self, across: usize, down: usize) -> To {
        let data = self.data.get().wrapping_add(across * self.across + down * self.down);
        To { data: Shared(data), ..self }
    }
}

/// `y = x · matrix` for the columns `0..n`, or `y += …`, where both are of type bf16.
///
/// # Safety
/// All that the steps, `n`, `k` and the counts lead to must be readable, and for `y` writable by no one else. The CPU must
/// [have](usable) the instructions.
pub(super) unsafe fn product(
    x: Rows<Held>,
    matrix: Matrix<Held>,
    y: Rows<*mut f32>,
    (n, k): (usize, usize),
    add: bool,
    parallelism: Parallelism,
) {
    let x = Lines { data: x.data, count: x.count, line: x.row, along: x.step };
    let w = Lines { data: matrix.data, count: n, line: matrix.column, along: matrix.along };
    let ([x_down, x_across], [w_down, w_across]) = (x.costs(), w.costs());
    let data = Shared(y.data);
    // If both ways are as good, lines across are those along which the result is contiguous.
    let (across, down, to) = if (x_across + w_down, y.step == 1) < (w_across + x_down, y.row == 1) {
        (x, w, To { data, across: y.row, down: y.step, add })
    } else {
        (w, x, To { data, across: y.step, down: y.row, add })
    };
    // A thread that waits for others may begin another product meanwhile, and then finds nothing here.
    let mut packed = PACKED.take();
    for first in (0..across.count).step_by(BLOCK) {
        // An empty sum is zero.
        for at in (0..k.max(1)).step_by(DEPTH) {
            let block = Block {
                across: Lines { count: BLOCK.min(across.count - first), ..across.from(first, at) },
                down: down.from(0, at),
                depth: DEPTH.min(k - at),
                to: To { add: add || at > 0, ..to.from(first, 0) },
            };
            // SAFETY: by the caller; blocks lie within.
            unsafe { block.run(&mut packed, parallelism) };
        }
    }
    PACKED.set(packed);
}

/// Has this thread have room for so many words.
pub(super) fn reserve(words: usize) {
    let mut packed = PACKED.take();
    if packed.len() < words {
        packed.resize(words, 0);
    }
    PACKED.set(packed);
}

thread_local! {
    /// Where lines across are packed, or rows are rounded.
    static PACKED: Cell<Vec<u32>> = const { Cell::new(Vec::new()) };
}

/// Some lines across with all lines down, over some summands.
struct Block {
    across: Lines,
    down: Lines,
    depth: usize,
    to: To,
}

/// Lines down a tile, with pairs of summands side by side.
#[repr(align(64))]
struct Copied([u32; DOWN * DEPTH / 2]);

impl Block {
    /// # Safety
    /// See [`product`].
    unsafe fn run(&self, packed: &mut Vec<u32>, parallelism: Parallelism) {
        // Lines are packed by squares of 16 pairs.
        let panel = self.depth.div_ceil(2).next_multiple_of(LANES) * PANEL;
        let panels = self.across.count.div_ceil(PANEL);
        if packed.len() < panels * panel {
            packed.resize(panels * panel, 0);
        }
        let packed = Shared(packed.as_mut_ptr());
        let place = |n: usize| packed.get().wrapping_add(n * panel);
        // SAFETY: by the caller; each panel has a place of its own.
        let pack = |n: usize| unsafe { pack_across(self.across.from(n * PANEL, 0), self.depth, place(n)) };
        let tile = |copied: &mut Copied, n: usize| {
            let down = self.down.from(n * DOWN, 0);
            // SAFETY: by the caller; each task has lines down of its own, and panels are only read.
            unsafe {
                pack_down(down, self.depth, copied);
                let next = self.down.from(((n + 1) * DOWN).min(self.down.count), 0);
                for n_across in 0..panels {
                    let lanes = (self.across.count - n_across * PANEL).min(PANEL);
                    let to = self.to.from(n_across * PANEL, n * DOWN);
                    let panel = place(n_across);
                    let size = (down.count, lanes, self.depth);
                    if lanes > LANES {
                        multiply::<2>(copied, panel, size, to, next);
                    } else {
                        multiply::<1>(copied, panel, size, to, next);
                    }
                }
            }
        };
        let tiles = self.down.count.div_ceil(DOWN);
        let nothing = || Copied([0; _]);
        match parallelism {
            Parallelism::None => {
                (0..panels).for_each(pack);
                let mut copied = nothing();
                (0..tiles).for_each(|n| tile(&mut copied, n));
            }
            Parallelism::Rayon(_) => {
                (0..panels).into_par_iter().for_each(pack);
                (0..tiles).into_par_iter().for_each_init(nothing, tile);
            }
        }
    }
}

/// A tile: `S` registers across, over `k` summands. Of its lines some may be there only, down and across. The lines of the next tile are asked
/// for meanwhile, wherever they are.
///
/// # Safety
/// All that `to` leads to must be writable, and the panel as deep as `k`. The CPU must [have](usable) the instructions, here and below.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn multiply<const S: usize>(
    down: &Copied,
    panel: *const u32,
    (lines, lanes, k): (usize, usize, usize),
    to: To,
    next: Lines,
) {
    let (ahead, line) = match next.data {
        Held::Wide(p) => (p.cast::<u8>(), next.line * size_of::<f32>()),
        Held::Narrow(p) => (p.cast::<u8>(), next.line * size_of::<bf16>()),
    };
    let mut sums = [[_mm512_setzero_ps(); S]; DOWN];
    let lines = lines.min(DOWN);
    // SAFETY: by the caller; pairs are below half of `DEPTH`. What is asked for is not read.
    unsafe {
        for at in 0..k.div_ceil(2) {
            // Of each line as much as there are pairs for.
            let byte = at / LANES * line + at % LANES * FETCHED;
            _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(byte).cast());
            let across: [_; S] =
                std::array::from_fn(|s| halves(_mm512_loadu_si512(panel.add(at * PANEL + s * LANES).cast())));
            for (r, sums) in sums.iter_mut().enumerate() {
                let pair = down.0.as_ptr().add(r * DEPTH / 2 + at).read();
                let pair = halves(_mm512_set1_epi32(pair.cast_signed()));
                for (sum, across) in sums.iter_mut().zip(across) {
                    *sum = _mm512_dpbf16_ps(*sum, pair, across);
                }
            }
        }
        if to.across == 1 {
            put_lines(&sums[..lines], lanes, to);
        } else if to.down == 1 && lines == DOWN {
            put_turned(&sums, lanes, to);
        } else {
            put_numbers(&sums[..lines], lanes, to);
        }
    }
}

/// As numbers of the instruction.
#[inline]
#[target_feature(enable = "avx512f")]
fn halves(x: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits.
    unsafe { std::mem::transmute(x) }
}

/// The lanes below a number.
fn below(lanes: usize) -> u16 {
    if lanes < LANES { (1 << lanes) - 1 } else { u16::MAX }
}

/// Writes sums, or adds them, where lines across are side by side.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn put_lines<const S: usize>(sums: &[[__m512; S]], lanes: usize, to: To) {
    for (r, sums) in sums.iter().enumerate() {
        for (s, &sum) in sums.iter().enumerate() {
            let (at, mask) = (to.from(s * LANES, r).data.get(), below(lanes.saturating_sub(s * LANES)));
            // SAFETY: by the caller: the lanes of the mask are there.
            unsafe {
                let sum = if to.add { _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), sum) } else { sum };
                _mm512_mask_storeu_ps(at, mask, sum);
            }
        }
    }
}

/// The same where lines down are side by side, and all are there: four of them at a time.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn put_turned<const S: usize>(sums: &[[__m512; S]; DOWN], lanes: usize, to: To) {
    for (n, rows) in sums.as_chunks::<4>().0.iter().enumerate() {
        for s in 0..S {
            let rows = rows.map(|row| _mm512_castps_si512(row[s]));
            // In each quarter of a register there is a column of the four now.
            let quarters = turn_quarters(rows).map(|x| {
                // SAFETY: a register is four of a quarter of its size.
                unsafe { std::mem::transmute::<__m512i, [__m128; 4]>(x) }
            });
            for i in 0..LANES.min(lanes - s * LANES) {
                let (at, sum) = (to.from(s * LANES + i, 4 * n).data.get(), quarters[i % 4][i / 4]);
                // SAFETY: by the caller.
                unsafe { _mm_storeu_ps(at, if to.add { _mm_add_ps(_mm_loadu_ps(at), sum) } else { sum }) };
            }
        }
    }
}

/// The same one by one.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn put_numbers<const S: usize>(sums: &[[__m512; S]], lanes: usize, to: To) {
    for (r, sums) in sums.iter().enumerate() {
        // SAFETY: a register is 16 numbers.
        let numbers = sums.iter().flat_map(|&x| unsafe { std::mem::transmute::<__m512, [f32; LANES]>(x) });
        for (i, sum) in numbers.enumerate().take(lanes) {
            let at = to.from(i, r).data.get();
            // SAFETY: by the caller.
            unsafe { *at = if to.add { *at + sum } else { sum } };
        }
    }
}

/// Packs a panel of lines, or as many as there are: all lines' first pairs of summands, then their second.
///
/// # Safety
/// There must be room for whole squares of 16 pairs.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn pack_across(lines: Lines, k: usize, to: *mut u32) {
    for first in (0..lines.count.min(PANEL)).step_by(LANES) {
        let lines = lines.from(first, 0);
        let count = lines.count.min(LANES);
        // SAFETY: by the caller; lines are below their number, summands below `k`.
        unsafe {
            if lines.line == 1 {
                for at in (0..k).step_by(2) {
                    let even = load(lines.data.at(at * lines.along), count);
                    // Of the last pair there may be one summand only.
                    let odd = load(lines.data.at((at + 1) * lines.along), if at + 1 < k { count } else { 0 });
                    let odd = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(odd));
                    let pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(even), odd);
                    _mm512_storeu_si512(to.add(at / 2 * PANEL + first).cast(), pairs);
                }
                continue;
            }
            for at in (0..k).step_by(2 * LANES) {
                let rows = std::array::from_fn(|i| {
                    if i < count { load_pairs(lines.from(i, at), k - at) } else { _mm512_setzero_si512() }
                });
                for (n, pairs) in turn_square(rows).into_iter().enumerate() {
                    _mm512_storeu_si512(to.add((at / 2 + n) * PANEL + first).cast(), pairs);
                }
            }
        }
    }
}

/// Copies the lines of a tile down, or as many as there are.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn pack_down(lines: Lines, k: usize, to: &mut Copied) {
    for (r, to) in to.0.chunks_exact_mut(DEPTH / 2).enumerate().take(lines.count) {
        for (n, to) in to.chunks_exact_mut(LANES).enumerate().take(k.div_ceil(2 * LANES)) {
            let at = n * 2 * LANES;
            // SAFETY: by the caller; `to` is as long as a register.
            unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), load_pairs(lines.from(r, at), k - at)) };
        }
    }
}

/// Up to 16 numbers that lie side by side; what is not there is zero.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn load(data: Held, count: usize) -> __m256i {
    // SAFETY: by the caller: the lanes of the mask are there. Numbers of the instruction are 16 bits each.
    unsafe {
        match data {
            Held::Wide(p) => {
                let wide = _mm512_maskz_loadu_ps(below(count), p);
                std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(wide))
            }
            Held::Narrow(p) => _mm256_maskz_loadu_epi16(below(count), p.cast()),
        }
    }
}

/// Up to 32 summands of a line; what is not there is zero.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn load_pairs(line: Lines, k: usize) -> __m512i {
    // SAFETY: by the caller: there are `k` summands. 32 numbers are 512 bits.
    unsafe {
        match line.data {
            Held::Narrow(p) if line.along == 1 && k >= 2 * LANES => _mm512_loadu_si512(p.cast()),
            _ if line.along == 1 => {
                let high = load(line.data.at(LANES), k.saturating_sub(LANES));
                _mm512_inserti64x4::<1>(_mm512_castsi256_si512(load(line.data, k)), high)
            }
            _ => {
                let mut numbers = [bf16::ZERO; 2 * LANES];
                for (i, number) in numbers.iter_mut().enumerate().take(k) {
                    *number = match line.data.at(i * line.along) {
                        Held::Wide(p) => bf16::from_f32(*p),
                        Held::Narrow(p) => *p,
                    };
                }
                std::mem::transmute::<[bf16; 2 * LANES], __m512i>(numbers)
            }
        }
    }
}

/// Turns the squares of 4 by 4 that are the quarters of four registers.
#[inline]
#[target_feature(enable = "avx512f")]
fn turn_quarters([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
    let (low_ab, low_cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
    let (high_ab, high_cd) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
    [
        _mm512_unpacklo_epi64(low_ab, low_cd),
        _mm512_unpackhi_epi64(low_ab, low_cd),
        _mm512_unpacklo_epi64(high_ab, high_cd),
        _mm512_unpackhi_epi64(high_ab, high_cd),
    ]
}

/// Turns a square of 16 by 16: within each quarter of a register, then the quarters.
#[inline]
#[target_feature(enable = "avx512f")]
fn turn_square(rows: [__m512i; LANES]) -> [__m512i; LANES] {
    let mut turned = [_mm512_setzero_si512(); LANES];
    let fours = [0, 4, 8, 12].map(|r| turn_quarters([rows[r], rows[r + 1], rows[r + 2], rows[r + 3]]));
    for i in 0..4 {
        let [a, b, c, d] = fours.map(|four| four[i]);
        // The first and third quarters of each, and the second and fourth.
        let (even_ab, even_cd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0x88>(c, d));
        let (odd_ab, odd_cd) = (_mm512_shuffle_i32x4::<0xdd>(a, b), _mm512_shuffle_i32x4::<0xdd>(c, d));
        turned[i] = _mm512_shuffle_i32x4::<0x88>(even_ab, even_cd);
        turned[i + 4] = _mm512_shuffle_i32x4::<0x88>(odd_ab, odd_cd);
        turned[i + 8] = _mm512_shuffle_i32x4::<0xdd>(even_ab, even_cd);
        turned[i + 12] = _mm512_shuffle_i32x4::<0xdd>(odd_ab, odd_cd);
    }
    turned
}

#[cfg(test)]
mod tests {
    use latentc_ir::SplitMix;
    use proptest::prelude::*;

    use super::*;

    /// Where element (line, summand) of so many by `k` lies.
    #[derive(Clone, Copy, Debug)]
    enum Order {
        Lines,
        Turned,
        Gaps,
    }

    impl Order {
        fn any() -> impl Strategy<Value = Order> {
            prop::sample::select(vec![Order::Lines, Order::Turned, Order::Gaps])
        }

        fn steps(self, lines: usize, k: usize) -> (usize, usize) {
            match self {
                Order::Lines => (k, 1),
                Order::Turned => (1, lines),
                Order::Gaps => (3 * k, 3),
            }
        }
    }

    /// Numbers as all their forms, and where the result goes.
    struct Given<'a> {
        wide: [&'a [f32]; 2],
        narrow: [&'a [bf16]; 2],
        y: Rows<*mut f32>,
    }

    /// Numbers with more bits are rounded; then products are exact, and each summand is one rounding of a sum no larger than all of them.
    fn check(
        (m, n, k): (usize, usize, usize),
        [x_steps, w_steps, y_steps]: [(usize, usize); 3],
        (add, seed): (bool, u64),
        multiply: impl FnOnce(Given<'_>),
    ) -> Result<(), TestCaseError> {
        if !usable() {
            use std::io::Write;
            // Not through `eprintln!`, which the test harness swallows.
            return Ok(std::io::stderr().write_all(b"SKIPPED: this CPU has no products of bf16\n")?);
        }
        let mut rng = SplitMix(seed);
        let mut numbers = |len: usize| -> Vec<f32> {
            (0..len).map(|_| (rng.next_u64() % 20_001) as f32 / 10_000.0 - 1.0).collect()
        };
        let (x, w, old) = (numbers(3 * m * k), numbers(3 * (n + 2) * (k + 2)), numbers(3 * m * n));
        let [x_narrow, w_narrow]: [Vec<bf16>; 2] =
            [&x, &w].map(|x| x.iter().map(|&x| bf16::from_f32(x)).collect());
        let mut y = old.clone();
        multiply(Given {
            wide: [&x, &w],
            narrow: [&x_narrow, &w_narrow],
            y: Rows { data: y.as_mut_ptr(), count: m, row: y_steps.0, step: y_steps.1 },
        });
        let mut written = vec![false; y.len()];
        for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
            let to = i * y_steps.0 + j * y_steps.1;
            let first = if add { f64::from(old[to]) } else { 0.0 };
            let (mut sum, mut size) = (first, first.abs());
            for at in 0..k {
                let x = x_narrow[i * x_steps.0 + at * x_steps.1].to_f64();
                let w = w_narrow[j * w_steps.0 + at * w_steps.1].to_f64();
                sum += x * w;
                size += (x * w).abs();
            }
            // One for each summand, for each of the sums in a register, and for each block that is added.
            let roundings = (k + 8 + k / DEPTH) as f64;
            let bound = 1.01 * roundings * f64::from(f32::EPSILON) / 2.0 * size;
            let off = (f64::from(y[to]) - sum).abs();
            let got = y[to];
            prop_assert!(off <= bound, "row {i}, column {j}: {got}, not {sum}, off by {off:e} > {bound:e}");
            written[to] = true;
        }
        for (at, _) in written.iter().enumerate().filter(|(_, written)| !**written) {
            prop_assert_eq!(y[at], old[at], "element {} is not the product's", at);
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn products_of_any_size_and_steps(
            (m, n, k) in prop_oneof![
                (1usize..70, 1usize..70, 0usize..150),
                (1usize..30, 1usize..60, DEPTH - 3..2 * DEPTH + 60),
                (1usize..30, BLOCK - 3..BLOCK + 60, 0usize..40),
            ],
            orders in [Order::any(), Order::any(), Order::any()],
            wide: [bool; 2],
            (add, threads) in any::<(bool, bool)>(),
            seed: u64,
        ) {
            let steps = [orders[0].steps(m, k), orders[1].steps(n, k), orders[2].steps(m, n)];
            check((m, n, k), steps, (add, seed), |given| {
                let held = [0, 1].map(|n| match wide[n] {
                    true => Held::Wide(given.wide[n].as_ptr()),
                    false => Held::Narrow(given.narrow[n].as_ptr()),
                });
                let x = Rows { data: held[0], count: m, row: steps[0].0, step: steps[0].1 };
                let w = Matrix { data: held[1], column: steps[1].0, along: steps[1].1 };
                let parallelism = if threads { Parallelism::Rayon(0) } else { Parallelism::None };
                // SAFETY: the slices are as long as any order needs.
                unsafe { product(x, w, given.y, (n, k), add, parallelism) };
            })?;
        }

        #[test]
        fn a_few_rows_of_any_size_and_steps(
            // As many summands as columns may be, and the other way round: whichever lie side by side.
            (m, n, k, beside) in prop_oneof![
                (1usize..20, 1usize..20, 0usize..300, Just(false)),
                (1usize..20, 1usize..300, 0usize..20, Just(true)),
            ],
            orders in [Order::any(), Order::any()],
            gap in 0usize..3,
            add: bool,
            seed: u64,
        ) {
            let w_steps = if beside { (1, n + gap) } else { (k + gap, 1) };
            let steps = [orders[0].steps(m, k), w_steps, orders[1].steps(m, n)];
            check((m, n, k), steps, (add, seed), |given| {
                let x = Rows { data: given.wide[0].as_ptr(), count: m, row: steps[0].0, step: steps[0].1 };
                let w = Matrix { data: given.narrow[1].as_ptr(), column: steps[1].0, along: steps[1].1 };
                // SAFETY: as above.
                unsafe { few::product(x, w, given.y, (n, k), add) };
            })?;
        }
    }
}
