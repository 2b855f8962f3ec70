//! The gradient of the loss of given texts, by stored tensor.

use std::collections::BTreeMap;

use latentc_codegen::device::{Data, Device};
use latentc_ir::{Module, scoped};
use latentc_passes::{Graph, differentiate};

use crate::engine::{Engine, RunError, Value};
use crate::eval::Batch;

/// A tensor as it lies in a checkpoint, or something that belongs to one: its gradient, its moments.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// The extents, slowest first.
    pub shape: Vec<usize>,
    /// The elements.
    pub data: Vec<f32>,
}

/// A loss and its gradient.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradient {
    /// The mean cross entropy of all next tokens, in nats.
    pub loss: f32,
    /// The gradient by each stored tensor, under the tensor's name.
    pub tensors: BTreeMap<String, Tensor>,
}

impl Batch {
    /// The loss of all texts and its gradient. The engine has the gradient graph of `definition`.
    ///
    /// # Errors
    /// If no text has two tokens, a token is outside of the vocabulary, or the device fails.
    pub fn gradient<D: Device>(
        &self,
        engine: &mut Engine<D>,
        definition: &Module,
    ) -> Result<Gradient, RunError> {
        let longest = self.longest();
        let shape = [self.rows(), longest];
        let (ids, targets, weights) = self.targets();
        if weights.iter().all(|&w| w == 0.0) {
            return Err(RunError::Argument("no text has two tokens, so there is no loss".to_owned()));
        }
        let args = [Value::i32(ids, &shape), Value::i32(targets, &shape), Value::f32(weights, &shape)];
        let results = engine.run(Graph::Gradient, &args, longest)?;
        let wrong = |what: String| {
            RunError::Argument(format!("the program is no gradient of this definition: {what}"))
        };
        let mut floats = results.into_iter().map(|value| match value.data {
            Data::F32(data) => Ok(data),
            Data::I32(_) => Err(wrong("it returns integers".to_owned())),
        });
        let loss = floats.next().ok_or_else(|| wrong("it returns nothing".to_owned()))??;
        let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
        for (scope, f, n) in differentiate::weights(definition) {
            let weight = &f.weights[n];
            let part = floats.next().ok_or_else(|| wrong("it returns too little".to_owned()))??;
            let layout = weight.stored.layout(f, f.ty(weight.value)).map_err(wrong)?;
            for piece in &layout.pieces {
                let tensor = tensors.entry(scoped(&scope, &piece.tensor)).or_insert_with(|| Tensor {
                    shape: layout.shape.iter().map(|&n| n as usize).collect(),
                    data: vec![0.0; layout.stored_elements() as usize],
                });
                // Weights may share elements of a tensor, as the two ends of a model do that are tied.
                for span in layout.spans(piece) {
                    let (from, to, len) = (span.weight as usize, span.stored as usize, span.len as usize);
                    let sums = tensor.data[to..to + len].iter_mut();
                    sums.zip(&part[from..from + len]).for_each(|(sum, x)| *sum += x);
                }
            }
        }
        Ok(Gradient { loss: loss[0], tensors })
    }
}
