//! What a model says of given texts: all logits, and the loss.

use latentc_codegen::device::Device;
use latentc_passes::Graph;

use crate::engine::{Engine, RunError};
use crate::gradient::Rows;
use crate::session::{Logits, Session, Tokens};

/// A batch of texts, padded to one length.
#[derive(Clone, Debug)]
pub struct Batch {
    ids: Vec<i32>,
    rows: usize,
    columns: usize,
    /// Where each row's tokens begin and end.
    spans: Vec<(usize, usize)>,
}

/// How the texts are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// All at once.
    Whole,
    /// So many positions at once, the others one by one.
    TokenByToken {
        /// The number of positions.
        prefill: usize,
    },
}

impl Batch {
    /// A batch from ids `[rows, columns]` and, where texts differ in length, a mask of the same shape that is 1 on tokens and 0 on
    /// padding, which may be on either side.
    ///
    /// # Errors
    /// If the sizes disagree, an id does not fit 32 bits, or a mask is not one run of ones per row; names the row.
    pub fn new(ids: &[i64], mask: Option<&[i64]>, rows: usize, columns: usize) -> Result<Batch, String> {
        if ids.len() != rows * columns || mask.is_some_and(|m| m.len() != ids.len()) {
            return Err(format!("{} ids do not make {rows} rows of {columns}", ids.len()));
        }
        let mut spans = Vec::new();
        for r in 0..rows {
            let Some(mask) = mask.map(|m| &m[r * columns..(r + 1) * columns]) else {
                spans.push((0, columns));
                continue;
            };
            let start = mask.iter().position(|&m| m != 0).unwrap_or(0);
            let end = mask.iter().rposition(|&m| m != 0).map_or(start, |n| n + 1);
            if mask[start..end].iter().any(|&m| m != 1) || mask.iter().any(|&m| m != 0 && m != 1) {
                return Err(format!(
                    "attention_mask row {r} is not one run of ones; padding goes before or after a text, not into it"
                ));
            }
            spans.push((start, end));
        }
        let ids: Vec<i32> = ids.iter().map(|&id| i32::try_from(id).unwrap_or(-1)).collect();
        // Padding may hold any id; what is read there is thrown away.
        let mut clean = vec![0; ids.len()];
        for (r, &(start, end)) in spans.iter().enumerate() {
            let row = r * columns;
            clean[row + start..row + end].copy_from_slice(&ids[row + start..row + end]);
            if let Some(c) = (start..end).find(|c| clean[row + c] < 0) {
                return Err(format!("input_ids[{r}, {c}] is no token id"));
            }
        }
        Ok(Batch { ids: clean, rows, columns, spans })
    }

    /// The number of texts.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// For each position of every text, up to the longest: the token, the one that follows, and 1 where there is one, else 0.
    pub fn next_tokens(&self) -> Rows {
        let longest = self.longest();
        let targets = self.tokens(1, longest + 1).ids;
        let ends = self.spans.iter().map(|(start, end)| end - start);
        let before = |off: usize| {
            let row = move |len: usize| (0..longest).map(move |p| f32::from(u8::from(p + off < len)));
            ends.clone().flat_map(row).collect()
        };
        Rows {
            ids: self.tokens(0, longest).ids,
            targets,
            weights: before(1),
            // A token without a successor is a token all the same.
            here: before(0),
            bound: vec![1.0; self.rows],
            shape: [self.rows, longest],
        }
    }

    /// The longest text.
    pub fn longest(&self) -> usize {
        self.spans.iter().map(|(start, end)| end - start).max().unwrap_or(0)
    }

    /// The positions `from..to` of every text. Texts that have ended go on with padding: nothing that is kept sees it, since attention
    /// looks back only.
    fn tokens(&self, from: usize, to: usize) -> Tokens {
        let mut tokens = Tokens { ids: Vec::new(), positions: Vec::new(), len: to - from };
        for (r, &(start, end)) in self.spans.iter().enumerate() {
            for p in from..to {
                let column = start + p;
                tokens.ids.push(if column < end { self.ids[r * self.columns + column] } else { 0 });
                tokens.positions.push(p as i32);
            }
        }
        tokens
    }

    /// Logits `[rows, columns, vocab]`, zero at padding.
    ///
    /// # Errors
    /// If a token is outside of the vocabulary, or the device fails.
    pub fn logits<D: Device>(&self, engine: &mut Engine<D>, reading: Reading) -> Result<Logits, RunError> {
        let longest = self.longest();
        let mut session = Session::new(engine, self.rows, longest)?;
        let mut pieces = Vec::new();
        match reading {
            Reading::Whole => pieces.push((Graph::Prefill, 0, longest)),
            Reading::TokenByToken { prefill } => {
                pieces.push((Graph::Prefill, 0, prefill.min(longest)));
                pieces.extend((prefill.min(longest)..longest).map(|p| (Graph::Decode, p, p + 1)));
            }
        }
        let mut all: Option<Logits> = None;
        for (graph, from, to) in pieces.into_iter().filter(|(_, from, to)| from < to) {
            let n = to - from;
            let at: Vec<i32> = (0..self.rows).flat_map(|_| 0..n as i32).collect();
            let part = session.read(graph, &self.tokens(from, to), &at, n)?;
            let vocab = part.vocab;
            let all = all.get_or_insert_with(|| Logits {
                data: vec![0.0; self.rows * self.columns * vocab],
                rows: self.columns,
                vocab,
            });
            for (r, &(start, end)) in self.spans.iter().enumerate() {
                for p in (from..to).filter(|p| start + p < end) {
                    let to = (r * self.columns + start + p) * vocab;
                    all.data[to..to + vocab].copy_from_slice(part.row(r, p - from));
                }
            }
        }
        Ok(all.unwrap_or(Logits { data: Vec::new(), rows: self.columns, vocab: 0 }))
    }

    /// The mean cross entropy of each text's next tokens, in nats; `None` if no text has two tokens.
    pub fn loss(&self, logits: &Logits) -> Option<f64> {
        let (mut sum, mut count) = (0.0, 0usize);
        for (r, &(start, end)) in self.spans.iter().enumerate() {
            for c in start..end.saturating_sub(1) {
                let row = logits.row(r, c);
                let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let total: f64 = row.iter().map(|&x| f64::from(x - max).exp()).sum();
                let target = self.ids[r * self.columns + c + 1] as usize;
                sum += total.ln() - f64::from(row[target] - max);
                count += 1;
            }
        }
        (count > 0).then(|| sum / count as f64)
    }
}
