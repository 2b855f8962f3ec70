//! A batch of sequences being read and continued.

use latentc_codegen::device::{Data, Device};
use latentc_passes::Graph;
use latentc_passes::page::TABLE;

use crate::chunks::{self, Chunk};
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
    /// What the last run was given, in memory that the next one's lies in.
    args: Vec<Value>,
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
        Ok(Session { engine, batch, capacity, past: 0, vocab: vocab as usize, pages, args: Vec::new() })
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

    /// Reads tokens and gives the logits after those at the indices `at` of each row (`[batch, rows]`). Many are read in [chunks](crate::chunks),
    /// if positions ascend in each row.
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
        let chunks = chunks::chunks(tokens.len, self.most(graph, tokens, rows)?);
        if chunks.len() == 1 {
            return self.run(graph, tokens, at, rows);
        }
        // Memory for the last chunk, which has the longest past, is enough for all.
        let last = chunks.clone().last().expect("there is a chunk");
        let last = Chunk::of(tokens, last, at, rows);
        let past = self.past_with(tokens);
        let shapes = self.shapes(graph, last.tokens.len, last.rows, past)?;
        self.engine.reserve(graph, &shapes, past)?;
        let mut logits = Logits { data: vec![0.0; self.batch * rows * self.vocab], rows, vocab: self.vocab };
        for range in chunks {
            let chunk = Chunk::of(tokens, range, at, rows);
            let read = self.run(graph, &chunk.tokens, &chunk.at, chunk.rows)?;
            for (sequence, asked) in chunk.asked.iter().enumerate() {
                for (from, &to) in asked.iter().enumerate() {
                    let to = (sequence * rows + to) * self.vocab;
                    logits.data[to..to + self.vocab].copy_from_slice(read.row(sequence, from));
                }
            }
        }
        Ok(logits)
    }

    /// How many tokens of each sequence one run reads at most, of these.
    fn most(&self, graph: Graph, tokens: &Tokens, rows: usize) -> Result<usize, RunError> {
        if !chunks::in_order(tokens) {
            return Ok(tokens.len);
        }
        if let Some(most) = self.engine.chunk() {
            return Ok(most);
        }
        // Asked for long prompts alone: a token of decode does not wait for it.
        chunks::most(tokens.len, |len| {
            let past = self.past_with(tokens);
            let shapes = self.shapes(graph, len, rows.min(len), past)?;
            let budget = chunks::budget(self.engine.holding());
            Ok(self.engine.temporaries(graph, &shapes, past)? <= budget)
        })
    }

    /// Positions in the caches when these tokens have been read.
    fn past_with(&self, tokens: &Tokens) -> usize {
        tokens.positions.iter().map(|&p| p as usize + 1).max().unwrap_or(0).max(self.past)
    }

    /// The shapes of what a graph takes, for so many tokens of each sequence, rows of logits, and positions in the caches.
    fn shapes(
        &self,
        graph: Graph,
        len: usize,
        rows: usize,
        past: usize,
    ) -> Result<Vec<Vec<usize>>, RunError> {
        let width = |param: Param| match (param, &self.pages) {
            (Param::Tokens | Param::Positions, _) => len,
            (Param::Table, Some(pages)) => pages.width(past),
            (Param::At | Param::Table, _) => rows,
        };
        params(self.engine, graph)?.map(|param| Ok(vec![self.batch, width(param?)])).collect()
    }

    /// One run.
    fn run(&mut self, graph: Graph, tokens: &Tokens, at: &[i32], rows: usize) -> Result<Logits, RunError> {
        self.past = self.past_with(tokens);
        let mut taken = 0;
        for param in params(self.engine, graph)? {
            let table;
            let (ids, width) = match (param?, &self.pages) {
                (Param::Tokens, _) => (&tokens.ids[..], tokens.len),
                (Param::Positions, _) => (&tokens.positions[..], tokens.len),
                (Param::Table, Some(pages)) => {
                    table = pages.table(self.past);
                    (&table[..], pages.width(self.past))
                }
                (Param::At | Param::Table, _) => (at, rows),
            };
            if self.args.len() == taken {
                self.args.push(Value::i32(Vec::new(), &[0, 0]));
            }
            self.args[taken].refill(ids, [self.batch, width]);
            taken += 1;
        }
        let mut logits = None;
        self.engine.run_seen(graph, &self.args[..taken], self.past, |device, n, buffer, shape| {
            if n == 0 {
                logits = Some(device.read(buffer, shape.iter().product())?);
            }
            Ok(())
        })?;
        match logits {
            Some(Data::F32(data)) => Ok(Logits { data, rows, vocab: self.vocab }),
            Some(Data::I32(_)) | None => Err(RunError::Argument("the program makes no logits".to_owned())),
        }
    }
}

/// What a program that serves may take.
#[derive(Clone, Copy)]
enum Param {
    /// Ids.
    Tokens,
    /// Where each of them stands.
    Positions,
    /// The rows that logits are asked for of.
    At,
    /// The pages of each sequence.
    Table,
}

/// What a graph takes, in order.
fn params<D: Device>(
    engine: &Engine<D>,
    graph: Graph,
) -> Result<impl Iterator<Item = Result<Param, RunError>>, RunError> {
    let none = || RunError::Argument(format!("the {} graph was not loaded", graph.name()));
    let program = engine.program(graph).ok_or_else(none)?;
    let entry = program.routine(&program.entry).ok_or_else(none)?;
    let paged = engine.pool().is_some();
    Ok(entry.params.iter().map(move |&id| match entry.buffer(id).name.as_str() {
        "tok" => Ok(Param::Tokens),
        "pos" => Ok(Param::Positions),
        "at" => Ok(Param::At),
        TABLE if paged => Ok(Param::Table),
        other => {
            Err(RunError::Argument(format!("the program wants `{other}`, which a session does not have")))
        }
    }))
}
