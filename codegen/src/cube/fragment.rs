//! What a plane multiplies on tensor cores: tiles in registers, and their way from shared memory.
//!
//! A product is of 16 rows, 8 columns and 16 numbers of depth. Of the sums, a unit has two neighbouring columns of two rows, eight
//! apart: numbers 0 and 1 of the upper row, 2 and 3 of the lower (PTX ISA, "Matrix Fragments for mma.m16n8k16").

use latentc_ir::{AxisId, Function, Size, ValueId};

use super::emit::{Array, Buf, Elem, Emit, Pack, Shared, Val};

/// Elements of a pack of 16 bytes.
pub(super) const PACK: u32 = 8;

/// What tensor cores take numbers for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Factor {
    /// As they are stored, or rounded: bf16 or f16.
    Half(Elem),
    /// f32 without its last 13 bits, 8 numbers of depth in place of 16. For all but the instructions that multiply, each is two numbers of 16
    /// bits behind one another: these lie in shared memory and in registers as 16 numbers do (PTX ISA, "Matrix Fragments for mma.m16n8k8").
    Tf32,
}

impl Factor {
    /// As what it lies in shared memory and registers.
    pub(super) fn elem(self) -> Elem {
        match self {
            Factor::Half(elem) => elem,
            Factor::Tf32 => Elem::Bf16,
        }
    }

    /// As what it lies in memory if nothing need be done to it.
    pub(super) fn stored(self) -> Elem {
        match self {
            Factor::Half(elem) => elem,
            Factor::Tf32 => Elem::F32,
        }
    }

    /// Numbers of 16 bits that it is.
    pub(super) fn halves(self) -> u32 {
        (self.stored().bytes() / self.elem().bytes()) as u32
    }

    /// Its name in instructions.
    pub(super) fn named(self) -> &'static str {
        match self {
            Factor::Half(Elem::F16) => "f16",
            Factor::Half(_) => "bf16",
            Factor::Tf32 => "tf32",
        }
    }

    /// Adds the product of what registers hold of 16 rows and 8 columns.
    pub(super) fn multiply(self, e: &mut Emit, a: Array, b: Array, sum: Array) {
        match self {
            Factor::Half(elem) => e.multiply_matrices(a, b, sum, elem),
            // CubeCL 0.10 wants registers of one number each for it.
            Factor::Tf32 => e.of_groups("mma-tf32", &[sum, a, b], &[]),
        }
    }
}

/// Whether numbers of these axes that lie in one pack lie in one of a value, too.
pub(super) fn in_packs(body: &Function, value: ValueId, axes: &[AxisId]) -> bool {
    let wide = |a: &&AxisId| body.axis(**a).size != Size::Fixed(1);
    let (own, wanted) = (body.ty(value).axes.iter().rev(), axes.iter().rev());
    let same = own.filter(wide).zip(wanted.filter(wide)).take_while(|(a, b)| a == b);
    let length = same.map(|(a, _)| body.axis(*a).size.fixed().unwrap_or(1)).fold(1, u64::saturating_mul);
    length.is_multiple_of(PACK.into())
}

/// A plane of 32 units, as seen by one of them.
#[derive(Clone, Copy)]
pub(super) struct Plane {
    /// The plane's number in the cube.
    pub(super) number: Val,
    /// The unit's number in the plane.
    pub(super) lane: Val,
    /// The upper of the unit's two rows in a tile of sums.
    pub(super) row: Val,
    /// The first of its two columns there.
    pub(super) column: Val,
}

/// Where rows of numbers lie in shared memory, each `pitch` behind the one before it.
#[derive(Clone, Copy)]
pub(super) struct Lines {
    /// The first number of the first row.
    pub(super) start: Val,
    pub(super) pitch: u32,
}

impl Plane {
    pub(super) fn new(e: &mut Emit) -> Plane {
        let (unit, plane, four, two) = (e.unit(), e.u32(32), e.u32(4), e.u32(2));
        let (number, lane) = (e.div(unit, plane), e.rem(unit, plane));
        let (row, pair) = (e.div(lane, four), e.rem(lane, four));
        let column = e.mul(pair, two);
        Plane { number, lane, row, column }
    }

    /// The place that a unit names to `ldmatrix` for four matrices of 8 by 8: `down` of the bits 3 and 4 of its number go down eight
    /// rows, the other goes eight numbers to the right.
    fn named(&self, e: &mut Emit, lines: Lines, down: u32) -> Val {
        let [eight, sixteen] = [8, 16].map(|n| e.u32(n));
        let (low, high) = (e.rem(self.lane, eight), e.div(self.lane, sixteen));
        let middle = e.rem(self.lane, sixteen);
        let middle = e.div(middle, eight);
        let (rows, right) = if down == 3 { (middle, high) } else { (high, middle) };
        let rows = e.mul(rows, eight);
        let row = e.add(rows, low);
        let pitch = e.u32(lines.pitch);
        let row = e.mul(row, pitch);
        let right = e.mul(right, eight);
        let at = e.add(lines.start, row);
        e.add(at, right)
    }

    /// For [`load_rows`].
    pub(super) fn rows(&self, e: &mut Emit, lines: Lines) -> Val {
        self.named(e, lines, 3)
    }

    /// For [`load_rows_across`].
    pub(super) fn rows_across(&self, e: &mut Emit, lines: Lines) -> Val {
        self.named(e, lines, 4)
    }

    /// For [`load_columns`], of columns that lie along the depth.
    pub(super) fn columns_along(&self, e: &mut Emit, lines: Lines) -> Val {
        self.named(e, lines, 4)
    }

    /// For [`load_columns`], of columns that lie side by side.
    pub(super) fn columns_across(&self, e: &mut Emit, lines: Lines) -> Val {
        self.named(e, lines, 3)
    }
}

/// Registers for the left operand of a product.
pub(super) fn left(e: &mut Emit, elem: Elem) -> Array {
    e.array(elem, 2, 4)
}

/// Registers for a tile of sums.
pub(super) fn sums(e: &mut Emit) -> Array {
    e.array(Elem::F32, 1, 4)
}

/// Makes a tile of sums zero.
pub(super) fn clear(e: &mut Emit, sums: Array) {
    let zero = e.f32(0.0);
    for n in 0..4 {
        let n = e.u32(n);
        e.store(sums, n, zero);
    }
}

/// What a unit has of a row in two neighbouring tiles, as four neighbours of one of them: 16 bytes. Units with an odd number, which say that
/// they are `second`, have those of the second tile, and from the unit beside them. All units of the plane must come here.
pub(super) fn four_of(e: &mut Emit, second: Val, first_tile: [Val; 2], second_tile: [Val; 2]) -> [Val; 4] {
    let [(low0, high0), (low1, high1)] = [0, 1].map(|i: usize| {
        let given = e.select(second, first_tile[i], second_tile[i]);
        let (own, got) = (e.select(second, second_tile[i], first_tile[i]), e.shuffle_xor(given, 1));
        (e.select(second, got, own), e.select(second, own, got))
    });
    [low0, low1, high0, high1]
}

/// Loads so many matrices of 8 by 8 that are `more` numbers behind what the units name.
fn load(e: &mut Emit, to: Array, memory: Shared, (named, more): (Val, u32), matrices: usize, across: bool) {
    let more = e.u32(more);
    let at = e.add(named, more);
    e.load_matrix(to, memory, at, matrices, across);
}

/// Loads the 16 rows by 16 numbers of depth that are `more` numbers behind what the units name.
pub(super) fn load_rows(e: &mut Emit, to: Array, memory: Shared, named: Val, more: u32) {
    load(e, to, memory, (named, more), 4, false);
}

/// The same of rows that lie side by side, the 16 numbers of a depth behind one another.
pub(super) fn load_rows_across(e: &mut Emit, to: Array, memory: Shared, named: Val, more: u32) {
    load(e, to, memory, (named, more), 4, true);
}

/// Loads 16 columns by 16 numbers of depth, as the right operands of two products.
pub(super) fn load_columns(
    e: &mut Emit,
    elem: Elem,
    memory: Shared,
    named: Val,
    more: u32,
    across: bool,
) -> [Array; 2] {
    let both = e.array(elem, 2, 4);
    load(e, both, memory, (named, more), 4, across);
    [0, 2].map(|first| {
        let one = e.array(elem, 2, 2);
        for n in 0..2 {
            let (from, to) = (e.u32(first + n), e.u32(n));
            let pair = e.load(both, from);
            e.store(one, to, pair);
        }
        one
    })
}

/// Loads 8 columns by 16 numbers of depth, as the right operand of a product.
pub(super) fn load_eight(
    e: &mut Emit,
    elem: Elem,
    memory: Shared,
    named: Val,
    more: u32,
    across: bool,
) -> Array {
    let to = e.array(elem, 2, 2);
    load(e, to, memory, (named, more), 2, across);
    to
}

/// Sums of 16 rows and 16 columns as the left operand of a product, rounded.
pub(super) fn as_left(e: &mut Emit, elem: Elem, sums: [Array; 2]) -> Array {
    let to = left(e, elem);
    round_to_left(e, elem, to, sums);
    to
}

/// The same into registers that are there.
pub(super) fn round_to_left(e: &mut Emit, elem: Elem, to: Array, sums: [Array; 2]) {
    for (n, from) in sums.into_iter().enumerate() {
        for half in 0..2 {
            let pair = [0, 1].map(|i| {
                let i = e.u32(2 * half + i);
                e.load(from, i)
            });
            let at = e.u32(2 * n as u32 + half);
            let pair = e.vector(elem, &pair);
            e.store(to, at, pair);
        }
    }
}

/// [`PACK`] numbers as they are stored, from one on, in as many accesses of 16 bytes as they take; 0 where they are not `inside`.
pub(super) fn read_stored(
    e: &mut Emit,
    (buf, elem): (Buf, Elem),
    inside: Val,
    at: impl FnOnce(&mut Emit) -> Val,
) -> Vec<Pack> {
    let accesses = (elem.bytes() / 2) as u32;
    let width = PACK / accesses;
    let nothing = e.zero_pack(elem, width);
    let vars: Vec<_> = (0..accesses).map(|_| e.pack_var(&nothing)).collect();
    e.if_(inside, |e| {
        let (at, of_access) = (at(e), e.u32(width));
        let at = e.div(at, of_access);
        for (n, vars) in vars.iter().enumerate() {
            let n = e.u32(n as u32);
            let at = e.add(at, n);
            let loaded = e.load_pack(buf, at, width, true);
            e.set_pack(vars, &loaded);
        }
    });
    vars.iter().map(|vars| e.get_pack(vars, &nothing)).collect()
}

/// Puts what [`read_stored`] read into a place of shared memory, where there is an array for each number that one is split into.
pub(super) fn keep_split(e: &mut Emit, elem: Elem, read: &[Pack], to: &[Shared], place: Val) {
    let pack = e.u32(PACK);
    let at = e.div(place, pack);
    let width = PACK / read.len() as u32;
    let numbers = read.iter().flat_map(|pack| (0..width).map(move |n| (pack, n)));
    let numbers: Vec<_> = numbers.map(|(pack, n)| e.element_of(pack, n)).collect();
    for (&to, pack) in to.iter().zip(split(e, elem, &numbers, to.len())) {
        e.store_pack(to, at, &pack);
    }
}

/// Numbers as so many packs of narrower ones that add up to them: in each is what those before have left, rounded.
fn split(e: &mut Emit, elem: Elem, numbers: &[Val], pieces: usize) -> Vec<Pack> {
    let mut rest: Vec<_> = numbers.iter().map(|&x| e.cast(x, Elem::F32)).collect();
    let mut packs = Vec::new();
    for n in 0..pieces {
        let piece: Vec<_> = rest.iter().map(|&x| e.cast(x, elem)).collect();
        packs.push(e.pack(elem, &piece));
        if n + 1 < pieces {
            for (rest, piece) in rest.iter_mut().zip(piece) {
                let piece = e.cast(piece, Elem::F32);
                *rest = e.sub(*rest, piece);
            }
        }
    }
    packs
}
