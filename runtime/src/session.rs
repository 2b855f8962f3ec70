//! A batch of sequences being read and continued.

use latentc_codegen::device::{Data, Device};
use latentc_passes::Graph;
use latentc_passes::page::TABLE;

use crate::engine::{Engine, RunError, Value};
use crate::pages::Pages;

/// Sequences in the caches of an engine. Row `r` of the batch is one sequence; a token's position says where in its sequence it
/// stands, so rows may be of different lengths. Where caches lie in pages, a row takes pages of the pool as it grows.
pub struct Session<'e, D: Device> {
    engine: &'e mut Engine<D>,
    batch: usize,
    capacity: usize,
    /// Positions in the caches, of the longest row.
    past: usize,
    vocab: usize,
    pages: Option<Pages>,
}

/// Tokens to read: one row per sequence, all rows equally long.
#[derive(Clone, Debug)]
pub struct Tokens {
    /// Ids, row by row.
    pub ids: Vec<i32>,
    /// The position of each in its sequence.
    pub positions: Vec<i32>,
    /// Tokens of each row.
    pub len: usize,
}

/// The logits of some rows: `[batch, rows, vocab]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Logits {
    /// The elements, the vocabulary fastest.
    pub data: Vec<f32>,
    /// Rows of each sequence.
    pub rows: usize,
    /// Elements of a row.
    pub vocab: usize,
}

impl Logits {
    /// One row of one sequence.
    pub fn row(&self, sequence: usize, row: usize) -> &[f32] {
        let start = (sequence * self.rows + row) * self.vocab;
        &self.data[start..start + self.vocab]
    }
}

impl<'e, D: Device> Session<'e, D> {
    /// Empty sequences of up to `capacity` positions each.
    ///
    /// # Errors
    /// If the device has no room for their caches.
    pub fn new(engine: &'e mut Engine<D>, batch: usize, capacity: usize) -> Result<Self, RunError> {
        engine.reset(batch, capacity)?;
        let vocab = [Graph::Prefill, Graph::Decode].into_iter().find_map(|g| {
            let program = engine.program(g)?;
            let entry = program.routine(&program.entry)?;
            let logits = entry.buffer(*entry.results.first()?);
            logits.dims.last()?.fixed()
        });
        let vocab =
            vocab.ok_or_else(|| RunError::Argument("no graph that makes logits was loaded".to_owned()))?;
        let pool = engine.pool().map(|pool| pool.page as usize);
        let pages = pool.map(|page| Pages::new(page, engine.pool_pages(), batch));
        Ok(Session { engine, batch, capacity, past: 0, vocab: vocab as usize, pages })
    }

    /// Pages that are taken, and all there are; `None` if caches do not lie in pages.
    pub fn pages(&self) -> Option<(usize, usize)> {
        self.pages.as_ref().map(|pages| (pages.taken(), pages.all()))
    }

    /// Ends a row: its pages are free for others, and it begins anew.
    pub fn end(&mut self, row: usize) {
        if let Some(pages) = &mut self.pages {
            pages.end(row);
        }
    }

    /// Has one row begin as another does, as far as that has filled whole pages, which both then have and neither may write to. Gives the
    /// number of positions that are shared; what is behind them the row has to read for itself.
    ///
    /// # Errors
    /// If caches do not lie in pages, or there are no such rows.
    pub fn fork(&mut self, from: usize, to: usize) -> Result<usize, RunError> {
        let fail = |why: &str| Err(RunError::Argument(why.to_owned()));
        if from >= self.batch || to >= self.batch || from == to {
            return fail(&format!("row {from} cannot be forked to row {to}: there are {} rows", self.batch));
        }
        match &mut self.pages {
            Some(pages) => Ok(pages.fork(from, to)),
            None => {
                fail("rows share what they begin with where caches lie in pages: compile with --cache-page")
            }
        }
    }

    /// Reads tokens and gives the logits after those at the indices `at` of each row (`[batch, rows]`).
    ///
    /// # Errors
    /// If a token is outside of the vocabulary, a position is beyond the capacity, or the device fails.
    pub fn read(
        &mut self,
        graph: Graph,
        tokens: &Tokens,
        at: &[i32],
        rows: usize,
    ) -> Result<Logits, RunError> {
        let fail = |why: String| Err(RunError::Argument(why));
        if tokens.ids.len() != self.batch * tokens.len || tokens.positions.len() != tokens.ids.len() {
            return fail(format!("{} tokens for {} rows of {}", tokens.ids.len(), self.batch, tokens.len));
        }
        if at.len() != self.batch * rows || at.iter().any(|&i| i < 0 || i as usize >= tokens.len) {
            return fail(format!("the rows wanted, {at:?}, are not among the {} given", tokens.len));
        }
        if let Some(id) = tokens.ids.iter().find(|&&id| id < 0 || id as usize >= self.vocab) {
            return fail(format!("token id {id} is outside of the vocabulary of {}", self.vocab));
        }
        if let Some(p) = tokens.positions.iter().find(|&&p| p < 0 || p as usize >= self.capacity) {
            return fail(format!(
                "position {p} is beyond the {} that the session has room for",
                self.capacity
            ));
        }
        if let Some(pages) = &mut self.pages {
            for (row, positions) in tokens.positions.chunks(tokens.len.max(1)).enumerate() {
                pages.write(row, positions).map_err(RunError::Argument)?;
            }
        }
        let longest = tokens.positions.iter().map(|&p| p as usize + 1).max().unwrap_or(0);
        self.past = self.past.max(longest);
        let program = self.engine.program(graph);
        let entry = program.and_then(|p| p.routine(&p.entry));
        let names: Vec<String> = entry
            .map(|e| e.params.iter().map(|&p| e.buffer(p).name.clone()).collect())
            .ok_or_else(|| RunError::Argument(format!("the {} graph was not loaded", graph.name())))?;
        let mut args = Vec::new();
        for name in names {
            args.push(match name.as_str() {
                "tok" => Value::i32(tokens.ids.clone(), &[self.batch, tokens.len]),
                "pos" => Value::i32(tokens.positions.clone(), &[self.batch, tokens.len]),
                "at" => Value::i32(at.to_vec(), &[self.batch, rows]),
                TABLE if self.pages.is_some() => {
                    let (table, width) = self.pages.as_ref().map(|p| p.table(self.past)).unwrap_or_default();
                    Value::i32(table, &[self.batch, width])
                }
                other => return fail(format!("the program wants `{other}`, which a session does not have")),
            });
        }
        let results = self.engine.run(graph, &args, self.past)?;
        match results.into_iter().next() {
            Some(Value { data: Data::F32(data), .. }) => Ok(Logits { data, rows, vocab: self.vocab }),
            _ => fail("the program makes no logits".to_owned()),
        }
    }
}
