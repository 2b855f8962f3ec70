//! A matrix product on the CPU, by what it is bound by: a few rows stream the matrix as it is stored ([`few`]), many go to the
//! `gemm` crate, or to the CPU's own products of bf16 where both operands are of that type ([`halves`](super::halves)).

use gemm::Parallelism;
use latentc_ir::{DType, Function, ValueId};
use rayon::prelude::*;
use smallvec::SmallVec;

use super::Shared;
use super::few::{self, Dense, Matrix, Rows};
use super::simd::{Element, Held, Unit, on_best_unit};
use super::spare::with_floats;
use crate::device::Floats;

/// With so many rows or less a product waits for the matrix, not for arithmetic, or would wait for it to be packed.
const FEW: usize = 48;
/// The same for products of bf16.
#[cfg(target_arch = "x86_64")]
const FEW_HALVES: usize = 24;
/// With more rows and columns than so many, products of bf16 fill registers with both.
const SOME: usize = 12;
/// Elements of a matrix that one task works on: they fit into a core's cache, and are worth handing to a thread.
const BLOCK: usize = 1 << 16;
/// The same of one that is widened: the crate packs the rows anew for each task, which so many columns are worth.
const WIDENED: usize = 1 << 19;

/// Where the elements of a matrix lie, from one of them on.
pub(super) trait Place: Copy + Send + Sync {
    /// So many elements farther on.
    ///
    /// # Safety
    /// There must be an element, or the end of them.
    unsafe fn at(self, elements: usize) -> Self;

    /// Whether few rows can be multiplied with a matrix that has these steps, in sums over `0..k`.
    fn has_form(matrix: &Matrix<Self>, k: usize) -> bool;

    /// The elements, if they are floats in a form in which those of type bf16 are held.
    fn held(self) -> Option<Held>;

    /// `y = x · matrix` for few rows, or `y += …`, where there is a [form](Place::has_form).
    ///
    /// # Safety
    /// See [`multiply`].
    unsafe fn few(
        x: Rows<*const f32>,
        matrix: Matrix<Self>,
        y: Rows<*mut f32>,
        size: (usize, usize),
        add: bool,
    );

    /// A matrix in f32, and its steps: what lay side by side still does.
    ///
    /// # Safety
    /// All `n` columns of `k` must be readable.
    unsafe fn widened(matrix: Matrix<Self>, size: (usize, usize)) -> (Vec<f32>, usize, usize);
}

impl<E: Element> Place for Dense<E> {
    unsafe fn at(self, elements: usize) -> Self {
        // SAFETY: by the caller.
        Dense(unsafe { self.0.add(elements) })
    }

    fn has_form(matrix: &Matrix<Self>, _: usize) -> bool {
        few::has_form(matrix)
    }

    fn held(self) -> Option<Held> {
        E::held(self.0)
    }

    unsafe fn few(
        x: Rows<*const f32>,
        matrix: Matrix<Self>,
        y: Rows<*mut f32>,
        size: (usize, usize),
        add: bool,
    ) {
        // SAFETY: by the caller.
        unsafe { few::product(Unit::best(), x, matrix, y, size, add) };
    }

    unsafe fn widened(matrix: Matrix<Self>, (n, k): (usize, usize)) -> (Vec<f32>, usize, usize) {
        let mut wide = Vec::with_capacity(n * k);
        let dense = matrix.along <= matrix.column;
        let (lines, line, step) = if dense { (n, k, matrix.along) } else { (k, n, matrix.column) };
        let next = if dense { matrix.column } else { matrix.along };
        for i in 0..lines {
            let from = matrix.data.0.wrapping_add(i * next);
            if step == 1 {
                // SAFETY: by the caller.
                let from = unsafe { std::slice::from_raw_parts(from, line) };
                wide.extend(from.iter().map(|x| x.wide()));
            } else {
                // SAFETY: by the caller.
                wide.extend((0..line).map(|j| unsafe { (*from.add(j * step)).wide() }));
            }
        }
        if dense { (wide, k, 1) } else { (wide, 1, n) }
    }
}

/// How a product is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Columns in blocks, each of which is read once.
    Few,
    /// The same of bf16, as which rows are taken too.
    #[cfg(target_arch = "x86_64")]
    FewHalves,
    /// Both operands as bf16, by as many threads as are wanted.
    #[cfg(target_arch = "x86_64")]
    Halves,
    /// Columns in blocks, each of which is widened to f32 first.
    Widened,
    /// All at once, by as many threads as are wanted.
    Whole,
}

impl Way {
    /// For so many rows and elements that lie so, `n` columns of them, where sums are over `0..k`. Both may be of [type](are_halves) bf16.
    pub(super) fn of<P: Place>(
        matrix: &Matrix<P>,
        x: &Rows<*const f32>,
        (n, k): (usize, usize),
        halves: bool,
    ) -> Way {
        #[cfg(target_arch = "x86_64")]
        match matrix.data.held().filter(|_| halves && super::halves::usable()) {
            Some(Held::Narrow(_)) if x.count <= FEW_HALVES && few::has_form(matrix) => return Way::FewHalves,
            Some(_) if multiplies_halves(halves, x.count, n) => return Way::Halves,
            Some(_) | None => {}
        }
        if x.count <= FEW && P::has_form(matrix, k) {
            Way::Few
        } else if let Some(Held::Wide(_)) = matrix.data.held() {
            Way::Whole
        } else {
            Way::Widened
        }
    }

    /// How many columns a task takes.
    pub(super) fn columns(self, n: usize, k: usize) -> usize {
        match self {
            Way::Whole => n.max(1),
            #[cfg(target_arch = "x86_64")]
            Way::Halves => n.max(1),
            #[cfg(target_arch = "x86_64")]
            Way::FewHalves => Way::Few.columns(n, k),
            Way::Few => columns_of(BLOCK, n, k),
            Way::Widened => columns_of(WIDENED, n, k),
        }
    }
}

/// How many floats so many rows of `k` are, at most, where they are few and brought into another order, or into registers' length.
pub(super) fn copied(rows: usize, k: usize) -> usize {
    rows.min(FEW) * k.next_multiple_of(2 * few::LANES)
}

/// So many columns of `k` as have about so many elements, but not so many that a thread has none. They fill two registers side by side.
fn columns_of(elements: usize, n: usize, k: usize) -> usize {
    let each = n.div_ceil(rayon::current_num_threads()).max(1);
    (elements / k.max(1)).clamp(1, each).next_multiple_of(2 * few::LANES).min(n.max(1))
}

/// Whether the operands of a product are bf16 by their types, so that they may be rounded to that where they are held in f32.
pub(super) fn are_halves(body: &Function, operands: &[ValueId]) -> bool {
    operands.iter().all(|&v| body.ty(v).dtype == DType::Bf16)
}

/// Whether a product of so many rows and columns, whose operands may be of [type](are_halves) bf16, is best made by the CPU's own of
/// bf16.
pub(super) fn multiplies_halves(halves: bool, rows: usize, columns: usize) -> bool {
    #[cfg(target_arch = "x86_64")]
    let usable = super::halves::usable();
    #[cfg(not(target_arch = "x86_64"))]
    let usable = false;
    halves && rows.min(columns) > SOME && usable
}

/// `y = x · matrix` for the columns `0..n`, or `y += …`.
///
/// # Safety
/// All that the steps, `n`, `k` and the counts lead to must be readable, and for `y` writable by no one else.
pub(super) unsafe fn multiply<P: Place>(
    way: Way,
    x: Rows<*const f32>,
    matrix: Matrix<P>,
    y: Rows<*mut f32>,
    (n, k): (usize, usize),
    add: bool,
    parallelism: Parallelism,
) {
    // SAFETY: by the caller; what is widened has the same elements.
    unsafe {
        match (way, matrix.data.held()) {
            (Way::Few, _) => P::few(x, matrix, y, (n, k), add),
            #[cfg(target_arch = "x86_64")]
            (Way::FewHalves, Some(Held::Narrow(data))) => {
                let matrix = Matrix { data, column: matrix.column, along: matrix.along };
                super::halves::few::product(x, matrix, y, (n, k), add);
            }
            #[cfg(target_arch = "x86_64")]
            (Way::Halves, Some(data)) => {
                let x = Rows { data: Held::Wide(x.data), count: x.count, row: x.row, step: x.step };
                let matrix = Matrix { data, column: matrix.column, along: matrix.along };
                super::halves::product(x, matrix, y, (n, k), add, parallelism);
            }
            (Way::Whole, Some(Held::Wide(data))) => {
                let matrix = Matrix { data: Dense(data), column: matrix.column, along: matrix.along };
                product(x, matrix, y, (n, k), add, parallelism);
            }
            // A matrix that is held otherwise than its way takes it is widened first.
            _ => {
                let (wide, column, along) = P::widened(matrix, (n, k));
                let matrix = Matrix { data: Dense(wide.as_ptr()), column, along };
                product(x, matrix, y, (n, k), add, parallelism);
            }
        }
    }
}

/// All of a product in f32, by the `gemm` crate.
///
/// # Safety
/// See [`multiply`].
pub(super) unsafe fn product(
    x: Rows<*const f32>,
    matrix: Matrix<Dense<f32>>,
    y: Rows<*mut f32>,
    (n, k): (usize, usize),
    add: bool,
    parallelism: Parallelism,
) {
    // The crate packs its left operand, which is the matrix if rows of the result are contiguous, and the right one hardly ever. To pack
    // columns that are lines of memory is to turn them. With few rows it is less work to have the rows packed, and to turn the result.
    let lines = matrix.along == 1 && matrix.column > 1 && y.step == 1;
    if !lines || x.count * (n + k) >= n * k || x.count * n > TURNED {
        // SAFETY: by the caller.
        return unsafe { gemm(x, matrix, y, (n, k), add, parallelism) };
    }
    with_floats(|turned| {
        if turned.len() < x.count * n {
            turned.resize(x.count * n, 0.0);
        }
        let to = Rows { data: turned.as_mut_ptr(), count: x.count, row: 1, step: x.count };
        // SAFETY: by the caller, and there is so much scratch.
        unsafe { gemm(x, matrix, to, (n, k), false, parallelism) };
        let data = Shared(y.data);
        let block = |first: usize| {
            let rows = first..x.count.min(first + SIDE);
            let line = |row: usize| {
                // SAFETY: by the caller; each row is in one block.
                unsafe { std::slice::from_raw_parts_mut(data.get().add(row * y.row), n) }
            };
            turn(turned, x.count, first, &mut rows.map(line).collect::<SmallVec<[_; SIDE]>>(), add);
        };
        let blocks = x.count.div_ceil(SIDE);
        match parallelism {
            Parallelism::None => (0..blocks).for_each(|n| block(n * SIDE)),
            Parallelism::Rayon(_) => (0..blocks).into_par_iter().for_each(|n| block(n * SIDE)),
        }
    });
}

/// Elements of a result that is turned at most, so that each thread keeps little for it: 16 MiB.
const TURNED: usize = 1 << 22;
/// Rows and columns that are turned at once.
const SIDE: usize = 16;

on_best_unit! {
    /// Writes rows of a matrix, or adds them, from one in which columns of `height` are contiguous: the first row is `first`.
    fn turn(from: &[f32], height: usize, first: usize, rows: &mut [&mut [f32]], add: bool) {
        let n = rows.first().map_or(0, |row| row.len());
        let mut tile = [[0.0; SIDE]; SIDE];
        for start in (0..n).step_by(SIDE) {
            let width = SIDE.min(n - start);
            for j in 0..width {
                let at = (start + j) * height + first;
                for (line, x) in tile.iter_mut().zip(&from[at..at + rows.len()]) {
                    line[j] = *x;
                }
            }
            for (row, line) in rows.iter_mut().zip(&tile) {
                let to = &mut row[start..start + width];
                for (y, x) in to.iter_mut().zip(line) {
                    *y = if add { *y + x } else { *x };
                }
            }
        }
    }
}

/// A product as the crate makes it.
///
/// # Safety
/// See [`multiply`].
unsafe fn gemm(
    x: Rows<*const f32>,
    matrix: Matrix<Dense<f32>>,
    y: Rows<*mut f32>,
    (n, k): (usize, usize),
    add: bool,
    parallelism: Parallelism,
) {
    // SAFETY: by the caller.
    unsafe {
        gemm::gemm(
            x.count,
            n,
            k,
            y.data,
            y.step as isize,
            y.row as isize,
            add,
            x.data,
            x.step as isize,
            x.row as isize,
            matrix.data.0,
            matrix.column as isize,
            matrix.along as isize,
            1.0f32,
            1.0f32,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Puts floats somewhere in f32: what is small is not worth another loop.
pub(super) fn widen(floats: Floats<'_>, to: &mut [f32]) {
    match floats {
        Floats::F32(x) => to.copy_from_slice(x),
        Floats::Bf16(x) => to.iter_mut().zip(x).for_each(|(to, x)| *to = x.wide()),
        Floats::F16(x) => to.iter_mut().zip(x).for_each(|(to, x)| *to = x.wide()),
    }
}
