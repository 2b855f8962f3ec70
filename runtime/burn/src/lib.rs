//! Compiled models as modules of [burn].
//!
//! A [`CompiledModule`] has the tensors of a model's checkpoint as burn's parameters, under their names there: burn's optimisers, records
//! and visitors see them as they see a linear layer's. Its forward pass, its loss, what training minimises and the gradients of both are
//! graphs that latentc compiled from the model's equations; to burn's autodiff each of the two is one operation.
//!
//! ```no_run
//! use burn::backend::{Autodiff, Wgpu};
//! use burn::module::{AutodiffModule, Module};
//! use burn::tensor::{Int, Tensor};
//! use latentc_burn::{CompiledModule, Texts};
//!
//! # fn main() -> Result<(), latentc_burn::ModuleError> {
//! let device = latentc_burn::wgpu_device()?;
//! let model = CompiledModule::<Wgpu>::open("tests/cases/tiny", &device)?;
//! let tokens = Tensor::<Wgpu, 2, Int>::from_data([[1, 2, 3]], &device);
//! let logits = model.forward(tokens.clone())?; // [1, 3, vocabulary]
//!
//! let model = model.train::<Autodiff<Wgpu>>();
//! let next = Tensor::from_data([[2, 3, 4]], &device);
//! // With the balance losses that config.json asks for; `loss` is the cross entropy alone.
//! let objective = model.objective(Texts::new(Tensor::from_inner(tokens), next))?;
//! let gradients = objective.value.backward();
//! # Ok(())
//! # }
//! ```
//!
//! # What is copied
//!
//! Nothing goes through the host. burn's tensors and latentc's buffers are memory of the same CubeCL client, so tokens, results, and
//! parameters that a graph wants as they are stored are handed over as they lie; so are their gradients. A weight that is a part of a
//! stored tensor, or a stack of several as the experts of a layer are, is put together on the device by burn's own operations: for
//! inference once per module, in training once per step, since each step changes it. The gradient of a stack is handed out in
//! parts where the device can address them. A tensor whose rows CubeCL pads is packed first.
//!
//! # What is not checked
//!
//! Token ids are on the device, and looking at them there would mean waiting for it: an id outside of the vocabulary reads a row of
//! zeros. [`CompiledModule::tokens`] checks ids on their way to the device.

mod autodiff;
mod backend;
mod module;
mod parts;
mod programs;
mod record;
mod texts;
mod weight;

pub use backend::{CubeclBackend, wgpu_device};
pub use module::CompiledModule;
pub use programs::{Definition, ModuleError};
pub use record::WeightsRecord;
pub use texts::{Objective, Texts};
