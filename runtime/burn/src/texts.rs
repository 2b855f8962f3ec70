//! What training reads, and what it tells.

use burn::backend::Autodiff;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Int, Tensor, TensorMetadata};

use crate::weight::float;

/// Texts that are to be learned, as [`objective`](crate::CompiledModule::objective) takes them. What is special about some is said in place of
/// what [`Texts::new`] says: `Texts { bound, ..Texts::new(tokens, targets) }`.
#[derive(Clone, Debug)]
pub struct Texts<B: Backend> {
    /// Tokens `[rows, columns]`, a sequence each row. Padding stands behind a text, where attention does not see it.
    pub tokens: Tensor<B, 2, Int>,
    /// For each token the one to be predicted, as a rule the next.
    pub targets: Tensor<B, 2, Int>,
    /// How much each target counts: 0 where nothing is to be learned, as of prompts and padding.
    pub weights: Tensor<B, 2>,
    /// 1 on tokens, 0 on padding.
    pub here: Tensor<B, 2>,
    /// Where a batch is run in parts that count by their targets: a part's share of all sequences over its share of all targets.
    pub part: f32,
    /// Of each row, 1 where its tokens may be dropped, 0 where none may be: `[rows]`.
    pub bound: Tensor<B, 1>,
}

impl<B: Backend> Texts<B> {
    /// Whole sequences, all of which is to be learned.
    pub fn new(tokens: Tensor<B, 2, Int>, targets: Tensor<B, 2, Int>) -> Texts<B> {
        let (shape, device) = (tokens.dims(), tokens.device());
        let ones = Tensor::ones(shape, &device);
        let bound = Tensor::ones([shape[0]], &device);
        Texts { tokens, targets, weights: ones.clone(), here: ones, part: 1.0, bound }
    }
}

/// What training minimises, at some texts, and what its definition tells beside that.
#[derive(Clone, Debug)]
pub struct Objective<B: AutodiffBackend> {
    /// What is minimised, `[1]`.
    pub value: Tensor<B, 1>,
    pub(crate) results: Vec<<B::InnerBackend as burn::tensor::backend::BackendTypes>::FloatTensorPrimitive>,
}

impl<B: Backend, C: CheckpointStrategy> Objective<Autodiff<B, C>> {
    /// A result of the definition: 0 is the value itself and 1 the cross entropy, without a gradient; models say what else there is,
    /// as `latentc_models::deepseek_v2::balance` does. `None` if there is none of that number, or it has not `D` axes. A single number
    /// has one.
    pub fn result<const D: usize>(&self, n: usize) -> Option<Tensor<B, D>> {
        self.results.get(n).filter(|r| r.rank() == D).cloned().map(float)
    }
}
