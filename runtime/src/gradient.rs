//! The gradient of the loss of given texts, by stored tensor.

use latentc_codegen::device::{Data, Device};
use latentc_ir::{Layout, Module, scoped};
use latentc_passes::{Graph, differentiate};

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
    /// Rows and columns.
    pub shape: [usize; 2],
}

impl Rows {
    /// The sum of weights: how many targets the loss is the mean of.
    pub fn weight(&self) -> f64 {
        self.weights.iter().map(|&w| f64::from(w)).sum()
    }

    fn run<D: Device>(&self, engine: &mut Engine<D>, graph: Graph) -> Result<Vec<Vec<f32>>, RunError> {
        if self.weights.iter().all(|&w| w == 0.0) {
            return Err(RunError::Argument("no text has two tokens, so there is no loss".to_owned()));
        }
        let args = [
            Value::i32(self.ids.clone(), &self.shape),
            Value::i32(self.targets.clone(), &self.shape),
            Value::f32(self.weights.clone(), &self.shape),
        ];
        let floats = |value: Value| match value.data {
            Data::F32(data) => Ok(data),
            Data::I32(_) => Err(RunError::Argument("the program of a loss returns integers".to_owned())),
        };
        engine.run(graph, &args, self.shape[1])?.into_iter().map(floats).collect()
    }

    /// The mean cross entropy of the targets, in nats. The engine has the train graph.
    ///
    /// # Errors
    /// If nothing is to be learned, a token is outside of the vocabulary, or the device fails.
    pub fn loss<D: Device>(&self, engine: &mut Engine<D>) -> Result<f32, RunError> {
        let results = self.run(engine, Graph::Train)?;
        results.first().and_then(|loss| loss.first().copied()).ok_or_else(|| wrong("it returns nothing"))
    }
}

/// Brings the gradients of a program's weights to the places of the stored tensors that they are parts of.
#[derive(Debug)]
pub struct Gatherer {
    places: Places,
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
        Ok(Gatherer { places, weights })
    }

    /// Where gradients are brought to.
    pub fn places(&self) -> &Places {
        &self.places
    }

    /// Adds `share` times the gradient of the loss of these texts to `sum`, an array of [`Gatherer::places`]. Returns the loss: the
    /// mean cross entropy of the targets, in nats.
    ///
    /// # Errors
    /// If nothing is to be learned, a token is outside of the vocabulary, the program is not this definition's gradient, or the
    /// device fails.
    pub fn add<D: Device>(
        &self,
        engine: &mut Engine<D>,
        rows: &Rows,
        share: f32,
        sum: &mut [f32],
    ) -> Result<f32, RunError> {
        let mut results = rows.run(engine, Graph::Gradient)?.into_iter();
        let loss = results.next().and_then(|loss| loss.first().copied());
        let loss = loss.ok_or_else(|| wrong("it returns nothing"))?;
        for (layout, starts) in &self.weights {
            let part = results.next().ok_or_else(|| wrong("it returns too little"))?;
            for (piece, start) in layout.pieces.iter().zip(starts) {
                // Weights may share elements of a tensor, as the two ends of a model do that are tied.
                for span in layout.spans(piece) {
                    let (from, to, len) =
                        (span.weight as usize, start + span.stored as usize, span.len as usize);
                    let sums = sum[to..to + len].iter_mut();
                    sums.zip(&part[from..from + len]).for_each(|(sum, x)| *sum += share * x);
                }
            }
        }
        Ok(loss)
    }
}

fn wrong(what: &str) -> RunError {
    RunError::Argument(format!("the program is no gradient of this definition: {what}"))
}
