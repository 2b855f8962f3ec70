//! The loss as one operation of burn's autodiff.
//!
//! The graph returns the loss together with its gradient, so that the backward pass only hands out what the forward pass has: times
//! the gradient of what was made of the loss. An operation of burn has as many parents as its type says, a model as many parameters as
//! it happens to have, so the operation is a chain: each link is the loss, and adds a few parameters to it.

use burn::backend::Autodiff;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Shape, TensorMetadata};

/// The parents of a link: the link before it, and parameters. burn's walk through the links is recursive, so they are few.
const PARENTS: usize = 64;

/// A link.
#[derive(Debug)]
struct Link;

impl<B: Backend> Backward<B, PARENTS> for Link {
    /// The gradient of the loss by each parent that is a parameter.
    type State = Vec<Option<B::FloatTensorPrimitive>>;

    fn backward(
        self,
        ops: Ops<Self::State, PARENTS>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let outer = gradients.consume::<B>(&ops.node);
        for (parent, gradient) in ops.parents.into_iter().zip(ops.state) {
            let Some(parent) = parent else { continue };
            let gradient = match gradient {
                None => outer.clone(),
                Some(gradient) => {
                    let ones = Shape::from(vec![1; gradient.rank()]);
                    B::float_mul(gradient, B::float_reshape(outer.clone(), ones))
                }
            };
            gradients.register::<B>(parent.id, gradient);
        }
    }
}

/// A parameter, and the gradient of the loss by it.
type Pair<B, C> =
    (<Autodiff<B, C> as burn::tensor::backend::BackendTypes>::FloatTensorPrimitive, FloatTensor<B>);
type FloatTensor<B> = <B as burn::tensor::backend::BackendTypes>::FloatTensorPrimitive;

/// The loss, `[1]`, as a function of parameters.
pub(crate) fn loss<B: Backend, C: CheckpointStrategy>(
    loss: FloatTensor<B>,
    parameters: Vec<Pair<B, C>>,
) -> <Autodiff<B, C> as burn::tensor::backend::BackendTypes>::FloatTensorPrimitive {
    let none = Autodiff::<B, C>::from_inner(loss.clone());
    let mut last = none.clone();
    let mut rest = parameters.into_iter();
    loop {
        let mut nodes = vec![last.node.clone()];
        let mut state = vec![None];
        for (parameter, gradient) in rest.by_ref().take(PARENTS - 1) {
            nodes.push(parameter.node.clone());
            state.push(Some(gradient));
        }
        if nodes.len() == 1 {
            return last;
        }
        nodes.resize(PARENTS, none.node.clone());
        let Ok(nodes) = <[_; PARENTS]>::try_from(nodes) else { return last };
        last = match Backward::<B, PARENTS>::prepare::<C>(Link, nodes).compute_bound().stateful() {
            OpsKind::Tracked(link) => link.finish(state, loss.clone()),
            OpsKind::UnTracked(link) => link.finish(loss.clone()),
        };
    }
}

#[cfg(all(test, feature = "wgpu"))]
mod tests {
    use burn::backend::Wgpu;
    use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
    use burn::tensor::{Tensor, TensorPrimitive};

    use super::*;
    use crate::weight::float;

    type A = Autodiff<Wgpu>;

    /// Chains of none, one and several links, one after the other on the same parameters.
    #[test]
    fn each_parameter_gets_its_gradient() {
        let Ok(device) = crate::wgpu_device() else {
            return eprintln!("SKIPPED: each_parameter_gets_its_gradient: no wgpu");
        };
        let primitive = |t: Tensor<A, 1>| match t.into_primitive() {
            TensorPrimitive::Float(t) => t,
            TensorPrimitive::QFloat(_) => unreachable!("it is made of floats"),
        };
        for count in [1, 2, PARENTS - 1, PARENTS, 3 * PARENTS] {
            let parameters: Vec<Tensor<A, 1>> =
                (0..count).map(|_| Tensor::zeros([2], &device).require_grad()).collect();
            for factor in [1.0, 3.0] {
                let pair = |(n, p): (usize, &Tensor<A, 1>)| {
                    let gradient = Tensor::<Wgpu, 1>::from_floats([n as f32, -1.0], &device);
                    (primitive(p.clone()), gradient.into_primitive().tensor())
                };
                let value = Tensor::<Wgpu, 1>::from_floats([2.0], &device).into_primitive().tensor();
                let made =
                    loss::<Wgpu, NoCheckpointing>(value, parameters.iter().enumerate().map(pair).collect());
                let gradients = (float::<A, 1>(made) * factor).backward();
                for (n, p) in parameters.iter().enumerate() {
                    let gradient = p.grad(&gradients).unwrap_or_else(|| panic!("{n} of {count} has none"));
                    let want = [n as f32 * factor, -factor];
                    assert_eq!(gradient.into_data().to_vec::<f32>().expect("they are floats"), want);
                }
            }
        }
    }
}
