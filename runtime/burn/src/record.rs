//! Parameters as burn saves them.

use std::collections::BTreeMap;
use std::fmt;

use burn::module::ParamId;
use burn::record::{PrecisionSettings, Record};
use burn::tensor::backend::Backend;
use burn::tensor::{Shape, Tensor, TensorData};
use serde::{Deserialize, Serialize};

/// The parameters of a [`CompiledModule`](crate::CompiledModule), by the names of the stored tensors. It is written as a map of names to
/// what burn writes of a parameter: its id, and its shape, dtype and elements.
pub struct WeightsRecord<B: Backend> {
    pub(crate) tensors: BTreeMap<String, Recorded<B>>,
}

/// One parameter. Its rank is that of the file, whatever the module has.
pub(crate) struct Recorded<B: Backend> {
    pub(crate) id: ParamId,
    pub(crate) shape: Vec<usize>,
    pub(crate) flat: Tensor<B, 1>,
}

impl<B: Backend> fmt::Debug for WeightsRecord<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.tensors.iter().map(|(name, t)| (name, &t.shape))).finish()
    }
}

/// A parameter in a file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Item {
    id: String,
    param: TensorData,
}

impl<B: Backend> Record<B> for WeightsRecord<B> {
    type Item<S: PrecisionSettings> = BTreeMap<String, Item>;

    fn into_item<S: PrecisionSettings>(self) -> BTreeMap<String, Item> {
        let item = |(name, tensor): (String, Recorded<B>)| {
            let mut param = tensor.flat.into_data().convert::<S::FloatElem>();
            param.shape = Shape::from(tensor.shape);
            (name, Item { id: tensor.id.serialize(), param })
        };
        self.tensors.into_iter().map(item).collect()
    }

    fn from_item<S: PrecisionSettings>(item: BTreeMap<String, Item>, device: &B::Device) -> WeightsRecord<B> {
        let recorded = |(name, item): (String, Item)| {
            let Item { id, mut param } = item;
            let shape = param.shape.to_vec();
            param.shape = Shape::from(vec![shape.iter().product::<usize>()]);
            let flat = B::memory_persistent_allocations(device, param, |param| {
                Tensor::from_data(param.convert::<B::FloatElem>(), device)
            });
            // An id that burn did not write is no reason to lose the elements.
            let id = ParamId::try_deserialize(&id).unwrap_or_default();
            (name, Recorded { id, shape, flat })
        };
        WeightsRecord { tensors: item.into_iter().map(recorded).collect() }
    }
}
