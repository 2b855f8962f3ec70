//! The gradient of the loss of given texts, by stored tensor.

use latentc_codegen::device::Device;
use latentc_ir::{Layout, Module, scoped};
use latentc_passes::{Graph, differentiate};
use rayon::prelude::*;

use crate::engine::{Engine, RunError, Value};
use crate::load::LoadError;
use crate::places::Places;

/// Texts as the loss takes them: of each position the token, the token that is to be predicted, and how much that counts.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows {
    /// Tokens `[rows, columns]`. Padding stands behind a text, where attention does not see it.
    pub ids: Vec<i32>,
    /// What follows each.
    pub targets: Vec<i32>,
    /// 0 where nothing is to be learned: prompts, padding.
    pub weights: Vec<f32>,
    /// 1 on tokens, 0 on padding.
    pub here: Vec<f32>,
    /// Of each row, 1 where its tokens may be dropped, 0 where none may be.
    pub bound: Vec<f32>,
    /// Rows and columns.
    pub shape: [usize; 2],
}

impl Rows {
    /// Texts that are equally long, of which every token but the first is to be learned.
    pub fn of(texts: &[Vec<i32>]) -> Rows {
        let columns = texts.first().map_or(0, |t| t.len().saturating_sub(1));
        let len = texts.len() * columns;
        Rows {
            ids: texts.iter().flat_map(|t| &t[..columns]).copied().collect(),
            targets: texts.iter().flat_map(|t| &t[t.len() - columns..]).copied().collect(),
            weights: vec![1.0; len],
            here: vec![1.0; len],
            bound: vec![1.0; texts.len()],
            shape: [texts.len(), columns],
        }
    }

    /// The sum of weights: how many targets the loss is the mean of.
    pub fn weight(&self) -> f64 {
        self.weights.iter().map(|&w| f64::from(w)).sum()
    }

    /// The number of rows that have tokens.
    pub fn sequences(&self) -> usize {
        self.here.chunks(self.shape[1].max(1)).filter(|row| row.iter().any(|&x| x > 0.0)).count()
    }

    /// What there is to say of the texts. A program takes the first so many.
    fn args(&self, takes: usize, part: f32) -> Result<Vec<Value>, RunError> {
        if self.weights.iter().all(|&w| w == 0.0) {
            return Err(RunError::Argument("no text has two tokens, so there is no loss".to_owned()));
        }
        let mut args = vec![
            Value::i32(self.ids.clone(), &self.shape),
            Value::i32(self.targets.clone(), &self.shape),
            Value::f32(self.weights.clone(), &self.shape),
            Value::f32(self.here.clone(), &self.shape),
            Value::f32(vec![part], &[]),
            Value::f32(self.bound.clone(), &self.shape[..1]),
        ];
        args.truncate(takes);
        Ok(args)
    }

    /// Runs a graph on these texts and shows its results: their numbers, elements and extents.
    fn run<D: Device>(
        &self,
        engine: &mut Engine<D>,
        graph: Graph,
        takes: usize,
        part: f32,
        mut see: impl FnMut(usize, &[f32], &[usize]),
    ) -> Result<(), RunError> {
        let args = self.args(takes, part)?;
        engine.run_seen(graph, &args, self.shape[1], |device, n, buffer, shape| {
            let len = shape.iter().product();
            Ok(device.show(buffer, len, &mut |floats| see(n, floats, shape))?)
        })
    }

    /// The mean cross entropy of the targets, in nats. The engine has the train graph.
    ///
    /// # Errors
    /// If nothing is to be learned, a token is outside of the vocabulary, or the device fails.
    pub fn loss<D: Device>(&self, engine: &mut Engine<D>) -> Result<f32, RunError> {
        let mut loss = None;
        self.run(engine, Graph::Train, LOSS, 1.0, |n, floats, _| {
            if n == 0 {
                loss = floats.first().copied();
            }
        })?;
        loss.ok_or_else(|| wrong("it returns nothing"))
    }
}

/// What the plain loss takes: tokens, targets, weights.
const LOSS: usize = 3;

/// What a program found of texts beside gradients.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// The elements.
    pub data: Vec<f32>,
    /// The extents; none of a single number.
    pub shape: Vec<usize>,
}

impl Found {
    /// The first element.
    pub fn number(&self) -> Option<f32> {
        self.data.first().copied()
    }
}

/// Brings the gradients of a program's weights to the places of the stored tensors that they are parts of.
#[derive(Debug)]
pub struct Gatherer {
    places: Places,
    /// The number of the definition's parameters, and that of its results.
    signature: (usize, usize),
    /// For each weight in the order of the program's results: its layout, and where the tensor of each of its pieces begins.
    weights: Vec<(Layout, Vec<usize>)>,
}

impl Gatherer {
    /// For the gradient graph of `definition`.
    ///
    /// # Errors
    /// [`LoadError::Layout`] if weights and stored tensors contradict each other.
    pub fn new(definition: &Module) -> Result<Gatherer, LoadError> {
        let places = Places::of(definition)?;
        let entry = definition.function(&definition.entry);
        let weight = |(scope, f, n): (String, &latentc_ir::Function, usize)| {
            let weight = &f.weights[n];
            let layout = weight.stored.layout(f, f.ty(weight.value)).map_err(LoadError::Layout)?;
            let start = |piece: &latentc_ir::Piece| {
                let name = scoped(&scope, &piece.tensor);
                let placed = places.tensor(&name).map(|t| t.range.start);
                placed.ok_or_else(|| LoadError::Layout(format!("`{name}` is not in the inventory")))
            };
            let starts = layout.pieces.iter().map(start).collect::<Result<_, _>>()?;
            Ok((layout, starts))
        };
        let weights =
            differentiate::weights(definition).into_iter().map(weight).collect::<Result<_, LoadError>>()?;
        let signature = entry.map_or((LOSS, 1), |f| (f.params.len(), f.results.len()));
        Ok(Gatherer { places, signature, weights })
    }

    /// Where gradients are brought to.
    pub fn places(&self) -> &Places {
        &self.places
    }

    /// Of each weight in the order of their gradients: its layout, and where in the array the tensor of each of its pieces begins.
    pub(crate) fn weights(&self) -> &[(Layout, Vec<usize>)] {
        &self.weights
    }

    /// Brings the gradient to memory of the device that `place` gives for each weight, by its number. Returns all results of the
    /// definition. For the rest see [`add`](Gatherer::add).
    ///
    /// # Errors
    /// As for [`add`](Gatherer::add).
    pub(crate) fn bring<D: Device>(
        &self,
        engine: &mut Engine<D>,
        rows: &Rows,
        part: f32,
        mut place: impl FnMut(usize) -> Option<D::Buffer>,
    ) -> Result<Vec<Found>, RunError> {
        let (takes, gives) = self.signature;
        let args = rows.args(takes, part)?;
        let mut place = |n: usize| n.checked_sub(gives).and_then(&mut place);
        let made = engine.run_into(Graph::Gradient, &args, rows.shape[1], &mut place)?;
        if made.len() != gives + self.weights.len() {
            return Err(wrong("it returns another number of results"));
        }
        let mut results = Vec::with_capacity(gives);
        for result in &made[..gives] {
            engine.show(result, |floats| {
                results.push(Found { data: floats.to_vec(), shape: result.shape.clone() });
            })?;
        }
        Ok(results)
    }

    /// Adds `share` times the gradient of the definition's first result at these texts to `sum`, an array of [`Gatherer::places`].
    /// Returns all results of the definition. `part` is passed to definitions that take it, behind [`Rows::here`]: the texts' share of
    /// a step's sequences over `share`, their share of its targets.
    ///
    /// # Errors
    /// If nothing is to be learned, a token is outside of the vocabulary, the program is not this definition's gradient, or the
    /// device fails.
    pub fn add<D: Device>(
        &self,
        engine: &mut Engine<D>,
        rows: &Rows,
        share: f32,
        part: f32,
        sum: &mut [f32],
    ) -> Result<Vec<Found>, RunError> {
        let (takes, gives) = self.signature;
        let mut results = Vec::with_capacity(gives);
        let mut seen = 0;
        rows.run(engine, Graph::Gradient, takes, part, |n, floats, shape| {
            seen += 1;
            if n < gives {
                results.push(Found { data: floats.to_vec(), shape: shape.to_vec() });
            } else if let Some((layout, starts)) = self.weights.get(n - gives) {
                for (piece, start) in layout.pieces.iter().zip(starts) {
                    // Weights may share elements of a tensor, as the two ends of a model do that are tied.
                    for span in layout.spans(piece) {
                        let (from, to, len) =
                            (span.weight as usize, start + span.stored as usize, span.len as usize);
                        add(&mut sum[to..to + len], &floats[from..from + len], share);
                    }
                }
            }
        })?;
        if seen != gives + self.weights.len() {
            return Err(wrong("it returns another number of results"));
        }
        Ok(results)
    }
}

/// `sum += share * x`, on all threads: there are as many elements as a model has parameters.
fn add(sum: &mut [f32], x: &[f32], share: f32) {
    const PART: usize = 1 << 15;
    let parts = sum.par_chunks_mut(PART).zip(x.par_chunks(PART));
    parts.for_each(|(sum, x)| sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += share * x));
}

fn wrong(what: &str) -> RunError {
    RunError::Argument(format!("the program is no gradient of this definition: {what}"))
}
