//! The module.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::Autodiff;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::module::{
    AutodiffModule, Content, HasAutodiffModule, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper,
    ModuleVisitor, ParamId,
};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Element, FloatDType, Int, IntDType, Shape, Tensor, TensorData};
use burn_cubecl::tensor::CubeTensor;
use latentc_codegen::cube::CubeRuntime;
use latentc_ir::DType;
use latentc_models::config::ModelConfig;
use latentc_runtime::checkpoint::{Checkpoint, DType as StoredDType};
use latentc_runtime::init::{Init, fresh};
use latentc_runtime::load;

use crate::autodiff;
use crate::backend::{CubeclBackend, burn_dtype, float_dtype};
use crate::programs::{Argument, Definition, Gathered, ModuleError, Programs, Which, inventory};
use crate::record::{Recorded, WeightsRecord};
use crate::texts::{Objective, Texts};
use crate::weight::{Weight, float};

/// A model as a module of burn: its stored tensors are the parameters, by their names, and its graphs are compiled.
///
/// It is made for a [`CubeclBackend`]; [`train`](Module::train) brings it to the autodiff of one. Clones share tensors and graphs.
#[derive(Clone)]
pub struct CompiledModule<B: Backend> {
    weights: BTreeMap<Arc<str>, Weight<B>>,
    /// The names of those that do not learn, known below autodiff too.
    frozen: BTreeSet<Arc<str>>,
    shared: Arc<Shared>,
    /// What inference has put together of these very weights.
    gathered: Arc<Mutex<Gathered>>,
}

/// What does not depend on the backend's decorators.
struct Shared {
    /// Of the definition.
    name: String,
    vocab: Option<usize>,
    /// The dtype of weights.
    dtype: DType,
    /// [`Programs`] of the backend's runtime.
    programs: Box<dyn Any + Send + Sync>,
}

impl<B: CubeclBackend> CompiledModule<B> {
    /// From a folder in Hugging Face form.
    ///
    /// # Errors
    /// If the files are not right or do not fit each other, naming file, key or tensor, or the backend's floats are not for the kernels.
    pub fn open(folder: impl AsRef<Path>, device: &B::Device) -> Result<Self, ModuleError> {
        let config = ModelConfig::from_path(&folder)?;
        Self::load(&config, &Checkpoint::open(&folder)?, device)
    }

    /// A configuration with the weights of a checkpoint.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn load(
        config: &ModelConfig,
        checkpoint: &Checkpoint,
        device: &B::Device,
    ) -> Result<Self, ModuleError> {
        let definition = Definition::of(config, Self::dtype()?)?;
        load::check(&definition.loss, checkpoint)?;
        Self::new(&definition, device, |name, _| {
            Ok(checkpoint.require(name)?.to_f32().map_err(load::LoadError::from)?)
        })
    }

    /// A configuration with random weights of this standard deviation, the same for the same seed.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn init(config: &ModelConfig, seed: u64, std: f64, device: &B::Device) -> Result<Self, ModuleError> {
        let definition = Definition::of(config, Self::dtype()?)?;
        let with = Init { seed, std, dtype: StoredDType::F32 };
        Self::new(&definition, device, |name, shape| {
            let bytes = fresh(name, shape, with);
            Ok(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
        })
    }

    /// A definition with weights from anywhere: `make` is given the name and the extents of each stored tensor, and returns its elements.
    ///
    /// # Errors
    /// If the definition does not compile or contradicts itself, or those of `make`.
    pub fn new(
        definition: &Definition,
        device: &B::Device,
        mut make: impl FnMut(&str, &[usize]) -> Result<Vec<f32>, ModuleError>,
    ) -> Result<Self, ModuleError> {
        let dtype = Self::dtype()?;
        let programs = Programs::<B::Runtime>::new(definition)?;
        let mut weights = BTreeMap::new();
        for (name, shape) in inventory(definition)? {
            let data = make(&name, &shape)?;
            if data.len() != shape.iter().product::<usize>() {
                let len = data.len();
                return Err(ModuleError::Mismatch(format!(
                    "`{name}` has {len} elements, {shape:?} is wanted"
                )));
            }
            let data = TensorData::new(data, Shape::from(shape)).convert::<B::FloatElem>();
            let rank = data.shape.len();
            let weight = Weight::new(ParamId::new(), data, device).ok_or_else(|| {
                let most = Weight::<B>::RANKS;
                ModuleError::Mismatch(format!("`{name}` has {rank} axes, where a parameter has 1 to {most}"))
            })?;
            weights.insert(Arc::from(name), weight);
        }
        let vocab = definition.logits.entry().and_then(|f| {
            let last = *f.ty(*f.results.first()?).axes.last()?;
            f.axis(last).size.fixed()
        });
        let shared = Shared {
            name: definition.loss.name.clone(),
            vocab: vocab.map(|n| n as usize),
            dtype,
            programs: Box::new(programs),
        };
        Ok(CompiledModule {
            weights,
            frozen: BTreeSet::new(),
            shared: Arc::new(shared),
            gathered: Arc::default(),
        })
    }

    /// The dtype in which kernels hold what the backend's floats are.
    fn dtype() -> Result<DType, ModuleError> {
        let burn = <B::FloatElem as Element>::dtype();
        let target = <B::Runtime as CubeRuntime>::TARGET;
        let found = float_dtype(burn).filter(|&d| target.bytes(d) == Some(burn.size()));
        found.ok_or_else(|| ModuleError::Floats {
            backend: std::any::type_name::<B>().to_owned(),
            dtype: burn.name().to_owned(),
            target: target.to_string(),
        })
    }

    /// Token ids `[rows, columns]` for [`forward`](Self::forward) and the losses, checked.
    ///
    /// # Errors
    /// If they do not fill the shape, or one is outside of the vocabulary.
    pub fn tokens(
        &self,
        ids: &[i32],
        shape: [usize; 2],
        device: &B::Device,
    ) -> Result<Tensor<B, 2, Int>, ModuleError> {
        let wrong = |what: String| Err(ModuleError::Mismatch(what));
        if ids.len() != shape[0] * shape[1] {
            return wrong(format!("{} token ids do not make {} rows of {}", ids.len(), shape[0], shape[1]));
        }
        if let Some(vocab) = self.shared.vocab
            && let Some(id) =
                ids.iter().find(|&&id| usize::try_from(id).is_ok_and(|id| id >= vocab) || id < 0)
        {
            return wrong(format!("token id {id} is outside of the vocabulary of {vocab}"));
        }
        Ok(Tensor::from_data(TensorData::new(ids.to_vec(), Shape::from(shape.to_vec())), device))
    }

    /// The logits `[rows, columns, vocabulary]` behind each token of whole sequences `[rows, columns]`, in f32.
    ///
    /// # Errors
    /// If there are no tokens, or the device fails.
    pub fn forward(&self, tokens: Tensor<B, 2, Int>) -> Result<Tensor<B, 3>, ModuleError> {
        some(&tokens)?;
        let [rows, columns] = tokens.dims();
        let at = Tensor::<B, 1, Int>::arange(0..columns as i64, &tokens.device());
        self.forward_at(tokens, at.unsqueeze::<2>().expand([rows, columns]))
    }

    /// The same behind some tokens only: for each row, the columns `at`, `[rows, wanted]`.
    ///
    /// # Errors
    /// As for [`forward`](Self::forward), and if there are not as many rows.
    pub fn forward_at(
        &self,
        tokens: Tensor<B, 2, Int>,
        at: Tensor<B, 2, Int>,
    ) -> Result<Tensor<B, 3>, ModuleError> {
        some(&tokens)?;
        let args = vec![("tok", ints::<B>(tokens)), ("at", ints::<B>(at))];
        self.infer(Which::Logits, args)
    }

    /// The mean cross entropy of the targets, in nats, `[1]`: `targets` has for each token the one to be predicted, as a rule the next.
    ///
    /// # Errors
    /// If the two are not of one shape, there are no tokens, or the device fails.
    pub fn loss(
        &self,
        tokens: Tensor<B, 2, Int>,
        targets: Tensor<B, 2, Int>,
    ) -> Result<Tensor<B, 1>, ModuleError> {
        let weights = ones::<B>(&tokens);
        self.weighted_loss(tokens, targets, weights)
    }

    /// The same with a weight for each target, 0 where nothing is to be learned.
    ///
    /// # Errors
    /// As for [`loss`](Self::loss).
    pub fn weighted_loss(
        &self,
        tokens: Tensor<B, 2, Int>,
        targets: Tensor<B, 2, Int>,
        weights: Tensor<B, 2>,
    ) -> Result<Tensor<B, 1>, ModuleError> {
        some(&tokens)?;
        self.infer(Which::Loss, examples::<B>(tokens, targets, weights))
    }

    fn infer<const D: usize>(
        &self,
        which: Which,
        args: Vec<(&str, Argument<B::Runtime>)>,
    ) -> Result<Tensor<B, D>, ModuleError> {
        let stored = |name: &str, dtype| self.find::<B>(name, dtype, Weight::primitive);
        let mut gathered = self.gathered.lock().unwrap_or_else(PoisonError::into_inner);
        let results = self.programs::<B>()?.run::<B>(which, &stored, args, Some(&mut gathered))?;
        first::<B>(results).map(float)
    }
}

impl<B: CubeclBackend, C: CheckpointStrategy> CompiledModule<Autodiff<B, C>> {
    /// The mean cross entropy of the targets, in nats, `[1]`: `targets` has for each token the one to be predicted, as a rule the next. Its
    /// backward pass gives the gradient by every parameter that requires one.
    ///
    /// # Errors
    /// If the two are not of one shape, there are no tokens, or the device fails.
    pub fn loss(
        &self,
        tokens: Tensor<Autodiff<B, C>, 2, Int>,
        targets: Tensor<Autodiff<B, C>, 2, Int>,
    ) -> Result<Tensor<Autodiff<B, C>, 1>, ModuleError> {
        let weights = Tensor::from_inner(ones::<B>(&tokens.clone().inner()));
        self.weighted_loss(tokens, targets, weights)
    }

    /// The same with a weight for each target, 0 where nothing is to be learned. There is no gradient by these.
    ///
    /// # Errors
    /// As for [`loss`](Self::loss).
    pub fn weighted_loss(
        &self,
        tokens: Tensor<Autodiff<B, C>, 2, Int>,
        targets: Tensor<Autodiff<B, C>, 2, Int>,
        weights: Tensor<Autodiff<B, C>, 2>,
    ) -> Result<Tensor<Autodiff<B, C>, 1>, ModuleError> {
        let tokens = tokens.inner();
        some(&tokens)?;
        let args = examples::<B>(tokens, targets.inner(), weights.inner());
        let learns = self.weights.values().any(Weight::is_tracked);
        let which = if learns { Which::Gradient } else { Which::Loss };
        Ok(self.differentiated(which, args)?.0)
    }

    /// What training minimises: the loss, and what the configuration adds to it, such as balance losses of experts. Its backward pass gives
    /// the gradient by every parameter that requires one.
    ///
    /// # Errors
    /// If the tensors do not fit each other, there are no tokens, or the device fails.
    pub fn objective(&self, texts: Texts<Autodiff<B, C>>) -> Result<Objective<Autodiff<B, C>>, ModuleError> {
        let Texts { tokens, targets, weights, here, part, bound } = texts;
        let tokens = tokens.inner();
        some(&tokens)?;
        let part = Tensor::<B, 1>::full([1], part, &tokens.device());
        let mut args = examples::<B>(tokens, targets.inner(), weights.inner());
        args.extend([
            ("here", floats::<B>(here.inner().into_primitive().tensor())),
            ("part", floats::<B>(part.into_primitive().tensor())),
            ("bound", floats::<B>(bound.inner().into_primitive().tensor())),
        ]);
        let (value, results) = self.differentiated(Which::Objective, args)?;
        Ok(Objective { value, results })
    }

    /// The first result of a graph as an operation of autodiff, and all results of the definition.
    #[allow(clippy::type_complexity, reason = "a pair of what burn calls tensors")]
    fn differentiated(
        &self,
        which: Which,
        args: Vec<(&str, Argument<B::Runtime>)>,
    ) -> Result<(Tensor<Autodiff<B, C>, 1>, Vec<CubeTensor<B::Runtime>>), ModuleError> {
        let inner = |weight: &Weight<Autodiff<B, C>>| Autodiff::<B, C>::inner(weight.primitive());
        let stored = |name: &str, dtype| self.find::<B>(name, dtype, inner);
        // The next step has other weights, so what is gathered of these is not kept.
        let programs = self.programs::<B>()?;
        let results = programs.run::<B>(which, &stored, args, None)?;
        let (results, mut gradients) = programs.gradients::<B>(which, results);
        let value = first::<B>(results.clone())?;
        let pair = |(name, weight): (&Arc<str>, &Weight<Autodiff<B, C>>)| {
            let gradient = gradients.remove(&**name)?;
            let parameter = weight.primitive();
            let dtype = inner(weight).dtype;
            let gradient =
                if gradient.dtype == dtype { gradient } else { B::float_cast(gradient, dtype.into()) };
            Some((parameter, gradient))
        };
        let tracked = self.weights.iter().filter(|(_, weight)| weight.is_tracked());
        let parameters = tracked.filter_map(pair).collect();
        Ok((float(autodiff::loss::<B, C>(value, parameters)), results))
    }
}

impl<B: Backend> CompiledModule<B> {
    /// The same graphs with parameters that are made of these, one by one.
    fn each<C: Backend>(self, mut f: impl FnMut(&Arc<str>, Weight<B>) -> Weight<C>) -> CompiledModule<C> {
        let each = |(name, weight): (Arc<str>, Weight<B>)| {
            let weight = f(&name, weight);
            (name, weight)
        };
        CompiledModule {
            weights: self.weights.into_iter().map(each).collect(),
            frozen: self.frozen,
            shared: self.shared,
            gathered: Arc::default(),
        }
    }

    /// The names of the parameters, sorted, and their extents.
    pub fn parameters(&self) -> impl Iterator<Item = (&str, Vec<usize>)> {
        self.weights.iter().map(|(name, weight)| (&**name, weight.shape()))
    }

    /// Takes the parameters from a record, as [`load_record`](Module::load_record) does, which cannot refuse one.
    ///
    /// # Errors
    /// If the record has not just the module's tensors, in their shapes: all differences are listed.
    pub fn try_load_record(self, mut record: WeightsRecord<B>) -> Result<Self, ModuleError> {
        let mut problems = Vec::new();
        for (name, weight) in &self.weights {
            let want = weight.shape();
            match record.tensors.get(&**name) {
                None => problems.push(format!("  missing: `{name}` {want:?}")),
                Some(t) if t.shape != want => {
                    problems
                        .push(format!("  misshapen: `{name}` is {:?}, the module wants {want:?}", t.shape));
                }
                Some(_) => {}
            }
        }
        let own = |name: &&String| !self.weights.contains_key(name.as_str());
        problems.extend(record.tensors.keys().filter(own).map(|name| format!("  superfluous: `{name}`")));
        if !problems.is_empty() {
            let list = problems.join("\n");
            let name = &self.shared.name;
            return Err(ModuleError::Mismatch(format!(
                "the record is not of a {name} like this one:\n{list}"
            )));
        }
        Ok(self.each(|name, weight| match record.tensors.remove(&**name) {
            Some(Recorded { id, flat, .. }) => weight.load(id, flat),
            None => weight,
        }))
    }

    fn programs<I: CubeclBackend>(&self) -> Result<&Programs<I::Runtime>, ModuleError> {
        self.shared.programs.downcast_ref().ok_or_else(|| {
            ModuleError::Mismatch(format!(
                "the module was made for another runtime than that of {}",
                std::any::type_name::<I>()
            ))
        })
    }

    /// A parameter's tensor in a dtype, on the backend below autodiff.
    fn find<I: CubeclBackend>(
        &self,
        name: &str,
        dtype: DType,
        primitive: impl Fn(&Weight<B>) -> CubeTensor<I::Runtime>,
    ) -> Result<CubeTensor<I::Runtime>, ModuleError> {
        let wrong = |what: String| ModuleError::Mismatch(format!("the parameter `{name}` {what}"));
        let weight = self.weights.get(name).ok_or_else(|| wrong("is not there".to_owned()))?;
        let tensor = primitive(weight);
        let want =
            burn_dtype(dtype).ok_or_else(|| wrong(format!("is to be {dtype}, which burn does not have")))?;
        Ok(if tensor.dtype == want { tensor } else { I::float_cast(tensor, want.into()) })
    }
}

fn some<B: Backend>(tokens: &Tensor<B, 2, Int>) -> Result<(), ModuleError> {
    match tokens.dims() {
        [0, _] | [_, 0] => {
            Err(ModuleError::Mismatch(format!("there are no tokens in a shape of {:?}", tokens.dims())))
        }
        _ => Ok(()),
    }
}

fn first<B: CubeclBackend>(
    results: Vec<CubeTensor<B::Runtime>>,
) -> Result<CubeTensor<B::Runtime>, ModuleError> {
    let none = || ModuleError::Mismatch("the graph returns nothing".to_owned());
    results.into_iter().next().ok_or_else(none)
}

fn ints<B: CubeclBackend>(tensor: Tensor<B, 2, Int>) -> Argument<B::Runtime> {
    let tensor = tensor.into_primitive();
    let wide = tensor.dtype != burn::tensor::DType::I32;
    (if wide { B::int_cast(tensor, IntDType::I32) } else { tensor }, DType::I32)
}

fn examples<B: CubeclBackend>(
    tokens: Tensor<B, 2, Int>,
    targets: Tensor<B, 2, Int>,
    weights: Tensor<B, 2>,
) -> Vec<(&'static str, Argument<B::Runtime>)> {
    let weights = floats::<B>(weights.into_primitive().tensor());
    vec![("tok", ints::<B>(tokens)), ("target", ints::<B>(targets)), ("weight", weights)]
}

fn floats<B: CubeclBackend>(tensor: CubeTensor<B::Runtime>) -> Argument<B::Runtime> {
    let wide = tensor.dtype == burn::tensor::DType::F32;
    (if wide { tensor } else { B::float_cast(tensor, FloatDType::F32) }, DType::F32)
}

fn ones<B: Backend>(tokens: &Tensor<B, 2, Int>) -> Tensor<B, 2> {
    Tensor::ones(tokens.dims(), &tokens.device())
}

impl<B: Backend> Module<B> for CompiledModule<B> {
    type Record = WeightsRecord<B>;

    fn collect_devices(&self, devices: Vec<B::Device>) -> Vec<B::Device> {
        self.weights.values().fold(devices, |devices, weight| weight.collect_devices(devices))
    }

    fn fork(self, device: &B::Device) -> Self {
        self.each(|_, weight| weight.fork(device))
    }

    fn to_device(self, device: &B::Device) -> Self {
        self.each(|_, weight| weight.moved(device))
    }

    fn visit<V: ModuleVisitor<B>>(&self, visitor: &mut V) {
        for (name, weight) in &self.weights {
            name.split('.').for_each(|part| visitor.enter_module(part, CONTAINER));
            weight.visit(visitor);
            name.rsplit('.').for_each(|part| visitor.exit_module(part, CONTAINER));
        }
    }

    fn map<M: ModuleMapper<B>>(self, mapper: &mut M) -> Self {
        self.each(|name, weight| {
            name.split('.').for_each(|part| mapper.enter_module(part, CONTAINER));
            let weight = weight.map(mapper);
            name.rsplit('.').for_each(|part| mapper.exit_module(part, CONTAINER));
            weight
        })
    }

    /// # Panics
    /// If the record has not just the module's tensors, in their shapes: see [`CompiledModule::try_load_record`].
    fn load_record(self, record: WeightsRecord<B>) -> Self {
        self.try_load_record(record).unwrap_or_else(|e| panic!("{e}"))
    }

    fn into_record(self) -> WeightsRecord<B> {
        let recorded = |(name, weight): (Arc<str>, Weight<B>)| {
            let shape = weight.shape();
            let (id, flat) = weight.flat();
            (name.to_string(), Recorded { id, shape, flat })
        };
        WeightsRecord { tensors: self.weights.into_iter().map(recorded).collect() }
    }
}

/// What visitors are told of each part of a parameter's name.
const CONTAINER: &str = "Struct:CompiledModule";

impl<B: AutodiffBackend> AutodiffModule<B> for CompiledModule<B> {
    type InnerModule = CompiledModule<B::InnerBackend>;

    fn valid(&self) -> Self::InnerModule {
        let mut inner = self.clone().each(|_, weight| weight.valid());
        let frozen = self.weights.iter().filter(|(_, weight)| !weight.is_tracked());
        inner.frozen = frozen.map(|(name, _)| Arc::clone(name)).collect();
        inner
    }

    fn from_inner(module: Self::InnerModule) -> Self {
        let frozen = module.frozen.clone();
        module.each(|name, weight| Weight::from_inner(weight, !frozen.contains(name)))
    }
}

impl<B: AutodiffBackend> HasAutodiffModule<B> for CompiledModule<B::InnerBackend> {
    type TrainModule = CompiledModule<B>;
}

impl<B: Backend> fmt::Debug for CompiledModule<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, dtype) = (&self.shared.name, self.shared.dtype);
        f.debug_struct("CompiledModule").field("name", name).field("dtype", &dtype).finish_non_exhaustive()
    }
}

impl<B: Backend> ModuleDisplayDefault for CompiledModule<B> {
    fn content(&self, content: Content) -> Option<Content> {
        let content = content.set_top_level_type("CompiledModule");
        let content = content.add_debug_attribute("definition", &self.shared.name);
        content.add_debug_attribute("tensors", &self.weights.len()).optional()
    }

    fn num_params(&self) -> usize {
        Module::num_params(self)
    }
}

impl<B: Backend> ModuleDisplay for CompiledModule<B> {}

impl<B: Backend> fmt::Display for CompiledModule<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&ModuleDisplay::format(self, Default::default()))
    }
}
