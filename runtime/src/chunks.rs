//! Prompts in chunks: how many tokens of each sequence one run reads.
//!
//! What a run has in memory for itself grows with its tokens. A prompt can be read by several runs, each behind what those before it have
//! left in the caches; then a chunk of it says how much memory there must be, not all of it. The logits are those of one run, but
//! for rounding.

use std::collections::BTreeMap;
use std::ops::Range;

use latentc_codegen::memory::{Account, Layout};
use latentc_codegen::program::{Program, Role, Step};
use latentc_ir::{Size, Symbols};
use serde::Serialize;

use crate::compiled::Compiled;
use crate::engine::RunError;
use crate::session::Tokens;

/// All that is no weight may take as much as this part of the weights does, or [`ROOM`], if that is more.
const PART: u64 = 10;
/// What it may take in any case.
const ROOM: u64 = 256 << 20;
/// What no plan knows of comes out of that: programs, and what kernels have for themselves.
const OTHERS: u64 = 64 << 20;
/// Fewer tokens of a sequence are not worth a run of their own: each run brings all weights into the form that products of many rows read, and
/// makes anew what it needs of the past, such as keys and values of latents.
const LEAST: usize = 512;

/// Bytes of what is there from run to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Holding {
    /// Of all weights, as they are stored.
    pub weights: u64,
    /// Of all caches.
    pub caches: u64,
}

/// What reading prompts has in memory, from the plans of its programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Tokens of each sequence that one run reads at most.
    pub chunk: u64,
    /// Bytes of what is held.
    #[serde(flatten)]
    pub held: Holding,
    /// Bytes of the temporaries of the last chunk.
    pub temporaries: u64,
    /// What they would be if all tokens were read at once.
    pub whole: u64,
    /// What is held and the temporaries.
    pub peak: u64,
}

impl Memory {
    /// Of so many sequences of so many tokens, read by the programs of a graph in chunks of at most `chunk` tokens; if no number is given, as
    /// a session reads them.
    ///
    /// # Errors
    /// If a program has no plan, or none is for these sizes.
    pub fn of(
        programs: &[Compiled],
        (batch, tokens): (u64, u64),
        chunk: Option<u64>,
        layout: &Layout,
    ) -> Result<Memory, RunError> {
        let temporaries = |len: u64| {
            let fitting = programs
                .iter()
                .map(|compiled| (compiled, Symbols::of(compiled.module()).bind(batch, len, tokens)));
            let mut fitting = fitting.filter(|(compiled, sizes)| compiled.admits(sizes));
            let (compiled, sizes) = fitting
                .next()
                .ok_or_else(|| RunError::Argument(format!("no program is for {len} tokens at once")))?;
            temporaries(&compiled.program, &sizes, layout)
        };
        let none = || RunError::Argument("there is no program to read prompts with".to_owned());
        let largest = programs.last().ok_or_else(none)?;
        let sizes = Symbols::of(largest.module()).bind(batch, tokens, tokens);
        let held = Holding {
            weights: largest.module().weight_bytes().map_err(RunError::Argument)?,
            caches: caches(&largest.program, &largest.program.entry, &sizes, layout),
        };
        let chunk = match chunk {
            Some(chunk) => chunk.min(tokens),
            None => most(tokens as usize, |len| Ok(temporaries(len as u64)? <= budget(held)))? as u64,
        };
        let chunk = chunks(tokens as usize, chunk as usize).map(|c| c.len() as u64).max().unwrap_or(0);
        let (temporaries, whole) = (temporaries(chunk)?, temporaries(tokens)?);
        Ok(Memory { chunk, held, temporaries, whole, peak: held.weights + held.caches + temporaries })
    }
}

/// The most bytes of temporaries at one moment of a run.
pub(crate) fn temporaries(
    program: &Program,
    sizes: &BTreeMap<String, u64>,
    layout: &Layout,
) -> Result<u64, RunError> {
    let account = Account::of(program, sizes, layout)?;
    Ok(account.results + account.kept + account.passing)
}

/// Bytes of the caches of a routine and all that it calls.
fn caches(program: &Program, routine: &str, sizes: &BTreeMap<String, u64>, layout: &Layout) -> u64 {
    let Some(routine) = program.routine(routine) else { return 0 };
    let number = |size: &Size| match size {
        Size::Fixed(n) => *n,
        Size::Sym(s) => sizes.get(s).copied().unwrap_or(1),
    };
    let own = routine.buffers.iter().filter(|b| b.role == Role::Cache);
    let own = own.map(|b| b.dims.iter().map(number).product::<u64>() * (layout.kept)(b.dtype));
    let called = routine.steps.iter().filter_map(|step| match step {
        Step::Call { routine, .. } => Some(caches(program, routine, sizes, layout)),
        Step::Launch { .. } => None,
    });
    own.chain(called).sum()
}

/// Bytes that a run may have for temporaries.
pub(crate) fn budget(held: Holding) -> u64 {
    (held.weights / PART).max(ROOM).saturating_sub(held.caches + OTHERS)
}

/// How many of `len` tokens a run reads at most: as many as `fits` says there is memory for, but no fewer than are worth a run.
///
/// # Errors
/// Those of `fits`.
pub(crate) fn most(
    len: usize,
    mut fits: impl FnMut(usize) -> Result<bool, RunError>,
) -> Result<usize, RunError> {
    if len <= LEAST || fits(len)? {
        return Ok(len);
    }
    let (mut fit, mut over) = (LEAST, len);
    while over - fit > 1 {
        let middle = fit.midpoint(over);
        if fits(middle)? { fit = middle } else { over = middle }
    }
    Ok(fit)
}

/// `len` tokens in as few chunks of at most `most` as there can be, none more than one longer than another: a short one at the end would be as
/// slow as one that is too short.
pub(crate) fn chunks(len: usize, most: usize) -> impl ExactSizeIterator<Item = Range<usize>> + Clone {
    let count = len.div_ceil(most.max(1)).max(1);
    (0..count).map(move |n| n * len / count..(n + 1) * len / count)
}

/// Whether tokens can be read one behind the other: positions of each row ascend, so that none needs what stands behind it.
pub(crate) fn in_order(tokens: &Tokens) -> bool {
    tokens.positions.chunks(tokens.len.max(1)).all(|row| row.is_sorted_by(|a, b| a < b))
}

/// A chunk of all rows, and what is asked of it.
pub(crate) struct Chunk {
    pub(crate) tokens: Tokens,
    /// Indices of tokens, equally many for each row: where fewer are asked for, the first stands for those that nobody reads.
    pub(crate) at: Vec<i32>,
    /// How many.
    pub(crate) rows: usize,
    /// For each sequence, which of the rows of all logits these are.
    pub(crate) asked: Vec<Vec<usize>>,
}

impl Chunk {
    /// The tokens of a range. `at` are the indices that are asked for of all tokens, `rows` of each sequence.
    pub(crate) fn of(tokens: &Tokens, range: Range<usize>, at: &[i32], rows: usize) -> Chunk {
        let part = |of: &[i32]| of.chunks(tokens.len).flat_map(|row| row[range.clone()].to_vec()).collect();
        let batch = tokens.ids.len() / tokens.len;
        let here = |row: usize| -> Vec<usize> {
            (0..rows).filter(|n| range.contains(&(at[row * rows + n] as usize))).collect()
        };
        let asked: Vec<_> = (0..batch).map(here).collect();
        let width = asked.iter().map(Vec::len).max().unwrap_or(0);
        let indices = asked.iter().enumerate().flat_map(|(row, asked)| {
            let own = asked.iter().map(move |n| at[row * rows + n] - range.start as i32);
            own.chain(std::iter::repeat(0)).take(width)
        });
        Chunk {
            at: indices.collect(),
            rows: width,
            tokens: Tokens { ids: part(&tokens.ids), positions: part(&tokens.positions), len: range.len() },
            asked,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_few_and_alike() {
        let of = |len, most| chunks(len, most).collect::<Vec<_>>();
        assert_eq!(of(20, 7), [0..6, 6..13, 13..20]);
        assert_eq!(of(20, 20).len(), 1);
        assert_eq!(of(3, 1), [0..1, 1..2, 2..3]);
        assert!(of(0, 4)[0].is_empty());
    }

    #[test]
    fn as_many_tokens_as_fit_but_not_too_few() {
        let fitting = |len, most_that_fit| most(len, |n| Ok(n <= most_that_fit)).unwrap();
        assert_eq!(fitting(4096, 5000), 4096);
        assert_eq!(fitting(4096, 1500), 1500);
        assert_eq!(fitting(4096, 3), LEAST);
        assert_eq!(fitting(LEAST, 3), LEAST);
    }

    #[test]
    fn what_is_asked_for_falls_into_chunks() {
        let tokens = Tokens { ids: (0..8).collect(), positions: vec![0, 1, 2, 3, 5, 6, 7, 8], len: 4 };
        assert!(in_order(&tokens));
        // Two rows of each sequence: the last token and the first; the third one, twice.
        let at = [3, 0, 2, 2];
        let first = Chunk::of(&tokens, 0..2, &at, 2);
        assert_eq!(
            (&first.tokens.ids[..], &first.tokens.positions[..]),
            (&[0, 1, 4, 5][..], &[0, 1, 5, 6][..])
        );
        assert_eq!((first.rows, &first.at[..], &first.asked[..]), (1, &[0, 0][..], &[vec![1], vec![]][..]));
        let second = Chunk::of(&tokens, 2..4, &at, 2);
        assert_eq!((second.rows, &second.at[..]), (2, &[1, 0, 0, 0][..]));
        assert_eq!(second.asked, [vec![0], vec![0, 1]]);
        let back = Tokens { positions: vec![0, 1, 2, 2, 5, 6, 7, 8], ..tokens };
        assert!(!in_order(&back));
    }
}
