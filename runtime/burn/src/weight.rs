//! A parameter of any rank that stored tensors have.

use burn::module::{AutodiffModule, Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Tensor, TensorData, TensorPrimitive};

/// The rank is a part of a tensor's type in burn, but not of a stored tensor's.
#[derive(Clone, Debug)]
pub(crate) enum Weight<B: Backend> {
    /// A vector.
    One(Param<Tensor<B, 1>>),
    /// A matrix.
    Two(Param<Tensor<B, 2>>),
    /// A stack of matrices.
    Three(Param<Tensor<B, 3>>),
    /// More.
    Four(Param<Tensor<B, 4>>),
}

/// The same for each rank: with a parameter, or from one parameter to another.
macro_rules! each {
    ($weight:expr, $param:ident => $body:expr) => {
        match $weight {
            Weight::One($param) => $body,
            Weight::Two($param) => $body,
            Weight::Three($param) => $body,
            Weight::Four($param) => $body,
        }
    };
    ($weight:expr, $param:ident -> $body:expr) => {
        match $weight {
            Weight::One($param) => Weight::One($body),
            Weight::Two($param) => Weight::Two($body),
            Weight::Three($param) => Weight::Three($body),
            Weight::Four($param) => Weight::Four($body),
        }
    };
}

impl<B: Backend> Weight<B> {
    /// The largest rank.
    pub(crate) const RANKS: usize = 4;

    /// With these elements; `None` if the rank is none of 1 to [`Weight::RANKS`].
    pub(crate) fn new(id: ParamId, data: TensorData, device: &B::Device) -> Option<Weight<B>> {
        fn param<B: Backend, const D: usize>(
            id: ParamId,
            data: TensorData,
            device: &B::Device,
        ) -> Param<Tensor<B, D>> {
            Param::initialized(id, Tensor::from_data(data, device).require_grad())
        }
        // Parameters stay, so CubeCL keeps them apart from what comes and goes.
        B::memory_persistent_allocations(device, data, |data| {
            Some(match data.shape.len() {
                1 => Weight::One(param(id, data, device)),
                2 => Weight::Two(param(id, data, device)),
                3 => Weight::Three(param(id, data, device)),
                4 => Weight::Four(param(id, data, device)),
                _ => return None,
            })
        })
    }

    /// The extents.
    pub(crate) fn shape(&self) -> Vec<usize> {
        each!(self, p => p.lazy_shape().to_vec())
    }

    /// The tensor.
    pub(crate) fn primitive(&self) -> B::FloatTensorPrimitive {
        each!(self, p => p.val().into_primitive().tensor())
    }

    /// Whether gradients are wanted.
    pub(crate) fn is_tracked(&self) -> bool {
        each!(self, p => p.val().is_require_grad())
    }

    /// The tensor as one axis, and what burn knows the parameter by: both as they are saved.
    pub(crate) fn flat(self) -> (ParamId, Tensor<B, 1>) {
        each!(self, p => {
            let p = Module::<B>::into_record(p);
            (p.id, p.val().reshape([-1]))
        })
    }

    /// The parameter with what another has, which has as many elements.
    pub(crate) fn load(self, id: ParamId, flat: Tensor<B, 1>) -> Weight<B> {
        each!(self, p -> {
            let shape = p.lazy_shape();
            p.transform_for_load(flat.reshape(shape), id)
        })
    }

    pub(crate) fn visit(&self, visitor: &mut impl ModuleVisitor<B>) {
        each!(self, p => p.visit(visitor));
    }

    pub(crate) fn map(self, mapper: &mut impl ModuleMapper<B>) -> Weight<B> {
        each!(self, p -> Module::map(p, mapper))
    }

    pub(crate) fn fork(self, device: &B::Device) -> Weight<B> {
        each!(self, p -> p.fork(device))
    }

    pub(crate) fn moved(self, device: &B::Device) -> Weight<B> {
        each!(self, p -> p.to_device(device))
    }

    pub(crate) fn collect_devices(&self, devices: Vec<B::Device>) -> Vec<B::Device> {
        each!(self, p => p.collect_devices(devices))
    }
}

impl<B: AutodiffBackend> Weight<B> {
    pub(crate) fn valid(&self) -> Weight<B::InnerBackend> {
        each!(self, p -> AutodiffModule::<B>::valid(p))
    }

    /// With a gradient or without: burn's parameters forget which when they are cloned below autodiff.
    pub(crate) fn from_inner(inner: Weight<B::InnerBackend>, tracked: bool) -> Weight<B> {
        each!(inner, p -> Param::initialized(p.id, Tensor::from_inner(p.val()).set_require_grad(tracked)))
    }
}

/// A tensor of a backend from its primitive.
pub(crate) fn float<B: Backend, const D: usize>(primitive: B::FloatTensorPrimitive) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}
