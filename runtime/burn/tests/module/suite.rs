//! What must hold on every backend, against latentc's own engine on this CPU: the same tests with another `B`.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::backend::Autodiff;
use burn::module::{AutodiffModule, Module, ModuleVisitor, Param};
use burn::optim::{GradientsParams, Optimizer, SgdConfig};
use burn::record::{BinBytesRecorder, FullPrecisionSettings, NamedMpkFileRecorder, Recorder};
use burn::tensor::backend::{AutodiffBackend, BackendTypes};
use burn::tensor::{Int, Tensor, TensorData};
use latentc_burn::{CompiledModule, Definition, Texts, WeightsRecord};
use latentc_codegen::device::{Data, Device as _};
use latentc_codegen::host::Host;
use latentc_ir::tensor::SplitMix;
use latentc_ir::{DType, Function, Weight};
use latentc_passes::{Graph, pipeline};
use latentc_runtime::compiled::compile;
use latentc_runtime::engine::Engine;
use latentc_runtime::eval::{Batch, Reading};
use latentc_runtime::gradient::{Gatherer, Rows};
use latentc_runtime::places::Places;
use latentc_tests::{Case, max_diff, workspace};

use super::{B, open};

type Device = <B as BackendTypes>::Device;
type Train = Autodiff<B>;

const LOGITS: f32 = 2e-4;
const LOSS: f32 = 1e-5;
/// Weights that were stepped differ by what their gradients do.
const STEPPED: f32 = 1e-4;
/// Of a tensor's largest gradient.
const GRADIENT: f32 = 1e-4;

/// The device, or `None`, said out loud.
fn device(test: &str) -> Option<Device> {
    open().inspect_err(|e| eprintln!("SKIPPED: {test}: {e}")).ok()
}

/// The project's own cases: a DeepSeek-V2 with experts, ragged sizes and parts of tensors, and a dense model.
fn cases() -> Vec<Case> {
    let own = workspace().join("tests/cases");
    latentc_tests::cases().into_iter().filter(|case| case.path.starts_with(&own)).collect()
}

fn module(case: &Case, device: &Device) -> CompiledModule<B> {
    CompiledModule::load(&case.config, &case.checkpoint, device)
        .unwrap_or_else(|e| panic!("{}: {e}", case.name))
}

/// The case's texts, from the left.
fn rows(case: &Case) -> Rows {
    let (ids, shape) = case.integers("input_ids").expect("every case has input_ids");
    let mask = case.integers("attention_mask").map(|m| m.0);
    Batch::new(&ids, mask.as_deref(), shape[0], shape[1]).expect("the case's batch is right").next_tokens()
}

struct Inputs {
    tokens: Tensor<B, 2, Int>,
    targets: Tensor<B, 2, Int>,
    weights: Tensor<B, 2>,
}

fn inputs(module: &CompiledModule<B>, rows: &Rows, device: &Device) -> Inputs {
    let weights = TensorData::new(rows.weights.clone(), rows.shape);
    Inputs {
        tokens: module.tokens(&rows.ids, rows.shape, device).expect("ids are right"),
        targets: module.tokens(&rows.targets, rows.shape, device).expect("targets are right"),
        weights: Tensor::from_data(weights, device),
    }
}

fn floats<const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    tensor.into_data().to_vec().expect("they are f32")
}

/// Parameters by name, or what is known of each.
struct Names<'g, B: AutodiffBackend> {
    path: Vec<String>,
    gradients: Option<&'g B::Gradients>,
    found: BTreeMap<String, (Vec<usize>, Option<Vec<f32>>)>,
}

impl ModuleVisitor<Train> for Names<'_, Train> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, name: &str, _: &str) {
        assert_eq!(self.path.pop().as_deref(), Some(name));
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Train, D>>) {
        let tensor = param.val();
        let gradient = self.gradients.and_then(|g| tensor.grad(g)).map(floats);
        self.found.insert(self.path.join("."), (tensor.dims().to_vec(), gradient));
    }
}

fn gradients(
    module: &CompiledModule<Train>,
    of: &<Train as AutodiffBackend>::Gradients,
) -> BTreeMap<String, (Vec<usize>, Option<Vec<f32>>)> {
    let mut names = Names::<Train> { path: Vec::new(), gradients: Some(of), found: BTreeMap::new() };
    module.visit(&mut names);
    names.found
}

#[test]
fn forward_is_what_the_engine_computes() {
    let Some(device) = device("forward_is_what_the_engine_computes") else { return };
    for case in cases() {
        let (name, rows) = (&case.name, rows(&case));
        let mut engine = Engine::new(Host::new());
        engine
            .add(&case.compile(Graph::Prefill, DType::F32, &pipeline()), &case.checkpoint)
            .expect("it loads");
        let ids: Vec<i64> = rows.ids.iter().map(|&id| id.into()).collect();
        let batch = Batch::new(&ids, None, rows.shape[0], rows.shape[1]).expect("they are rows");
        let want = batch.logits(&mut engine, Reading::Whole).expect("it runs");

        let module = module(&case, &device);
        let tokens = inputs(&module, &rows, &device).tokens;
        // Twice, since what is put together of weights is kept.
        for _ in 0..2 {
            let logits = module.forward(tokens.clone()).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(logits.dims(), [rows.shape[0], rows.shape[1], want.vocab], "{name}");
            let off = max_diff(&floats(logits), &want.data);
            assert!(off <= LOGITS, "{name}: logits are off by {off:e}");
        }
        let last = Tensor::<B, 2, Int>::full([rows.shape[0], 1], rows.shape[1] as i64 - 1, &device);
        let last = floats(module.forward_at(tokens, last).expect("it runs"));
        let wanted: Vec<f32> =
            (0..rows.shape[0]).flat_map(|r| want.row(r, rows.shape[1] - 1)).copied().collect();
        let off = max_diff(&last, &wanted);
        assert!(off <= LOGITS, "{name}: the last logits are off by {off:e}");
    }
}

#[test]
fn gradients_are_what_the_engine_computes() {
    let Some(device) = device("gradients_are_what_the_engine_computes") else { return };
    for case in cases() {
        let (name, rows) = (&case.name, rows(&case));
        let compiled = case.compile(Graph::Gradient, DType::F32, &pipeline());
        let mut engine = Engine::new(Host::new());
        engine.add(&compiled, &case.checkpoint).expect("it loads");
        let gatherer = Gatherer::new(compiled.definition()).expect("it is a gradient");
        let mut want = vec![0.0; gatherer.places().len()];
        let want_loss = gatherer.add(&mut engine, &rows, 1.0, 1.0, &mut want).expect("it runs")[0].data[0];

        let module = module(&case, &device);
        let Inputs { tokens, targets, weights } = inputs(&module, &rows, &device);
        let plain = module.weighted_loss(tokens.clone(), targets.clone(), weights.clone()).expect("it runs");
        let module = module.train::<Train>();
        let loss = module.weighted_loss(
            Tensor::from_inner(tokens),
            Tensor::from_inner(targets),
            Tensor::from_inner(weights),
        );
        let loss = loss.unwrap_or_else(|e| panic!("{name}: {e}"));
        for loss in [plain, loss.clone().inner()] {
            let off = max_diff(&floats(loss), &[want_loss]);
            assert!(off <= LOSS, "{name}: the loss is off by {off:e}");
        }
        // What is made of the loss is differentiated by burn: d(3 l + l²)/dl = 3 + 2 l.
        let outer = 3.0 + 2.0 * want_loss;
        let made = loss.clone() * 3.0 + loss.clone() * loss;
        want.iter_mut().for_each(|g| *g *= outer);
        compare(name, gradients(&module, &made.backward()), gatherer.places(), &want);
    }
}

/// Compares the gradient of each parameter with that in an array of all.
fn compare(
    name: &str,
    found: BTreeMap<String, (Vec<usize>, Option<Vec<f32>>)>,
    places: &Places,
    want: &[f32],
) {
    assert_eq!(found.len(), places.tensors().len(), "{name}");
    let mut worst = 0.0f32;
    for placed in places.tensors() {
        let (shape, gradient) = &found[&placed.name];
        let gradient = gradient.as_ref().unwrap_or_else(|| panic!("{name}: no grad.{}", placed.name));
        assert_eq!(*shape, placed.shape, "{name}: {}", placed.name);
        let want = &want[placed.range.clone()];
        let largest = max_diff(want, &vec![0.0; want.len()]);
        let off = max_diff(gradient, want);
        assert!(off <= GRADIENT * largest, "{name}: grad.{} is off by {off:e} of {largest:e}", placed.name);
        worst = worst.max(if largest > 0.0 { off / largest } else { 0.0 });
    }
    println!("{name:16} {} gradients {worst:.1e}", found.len());
}

/// Vectors of tokens that learn those of the tokens behind them: few kernels, and an objective that takes all that one may.
const SMALL: [&str; 3] = [
    r#"module small.logits entry @logits

func @logits {
  axes b, t, q, v=8, d=4
  param tok: i32[b, t]
  param at: i32[b, q]
  weight E: f32[v=8, d=4] = "embed.weight"[v, d]
  weight T: f32[v=8, d=4] = "targets.weight"[v, d]

  x: f32[b, t, d=4] = gather E, tok along v
  last: f32[b, q, d=4] = gather x, at along t
  y: f32[b, q, v=8] = contract T, last over d
  return y
}
"#,
    r#"module small.loss entry @loss

func @loss {
  axes b, t, v=8, d=4
  param tok: i32[b, t]
  param target: i32[b, t]
  param weight: f32[b, t]
  weight E: f32[v=8, d=4] = "embed.weight"[v, d]
  weight T: f32[v=8, d=4] = "targets.weight"[v, d]

  x: f32[b, t, d=4] = gather E, tok along v
  want: f32[b, t, d=4] = gather T, target along v
  off: f32[b, t, d=4] = sub x, want
  square: f32[b, t, d=4] = mul off, off
  l: f32 = contract square, weight over b, t, d
  return l
}
"#,
    r#"module small.objective entry @objective

func @objective {
  axes b, t, v=8, d=4
  param tok: i32[b, t]
  param target: i32[b, t]
  param weight: f32[b, t]
  param here: f32[b, t]
  param part: f32
  param bound: f32[b]
  weight E: f32[v=8, d=4] = "embed.weight"[v, d]
  weight T: f32[v=8, d=4] = "targets.weight"[v, d]

  x: f32[b, t, d=4] = gather E, tok along v
  want: f32[b, t, d=4] = gather T, target along v
  off: f32[b, t, d=4] = sub x, want
  square: f32[b, t, d=4] = mul off, off
  l: f32 = contract square, weight over b, t, d
  size: f32[b, t] = contract x, want over d
  held: f32[b] = contract size, here over t
  more: f32 = contract held, bound over b
  whole: f32 = mul more, part
  count: f32[b, t] = mul here, bound
  all: f32 = add l, whole
  return all, l, whole, count
}
"#,
];

/// A part of a batch with padding and a sequence that is exempt, as latentc's own loop has it.
#[test]
fn the_objective_is_what_training_minimises() {
    let Some(device) = device("the_objective_is_what_training_minimises") else { return };
    let [logits, loss, objective] =
        SMALL.map(|text| latentc_ir::check("small.ir", text).unwrap_or_else(|e| panic!("{}", e.render())));
    let definition = Definition { logits, loss, objective };
    let mut rng = SplitMix(3);
    let mut numbers = |len: usize| (0..len).map(|_| rng.below(64) as f32 / 32.0 - 1.0).collect::<Vec<_>>();
    let stored: BTreeMap<_, _> = ["embed.weight", "targets.weight"].map(|name| (name, numbers(32))).into();
    let rows = Rows {
        ids: vec![1, 5, 2, 7, 3, 0],
        targets: vec![5, 2, 6, 3, 4, 0],
        weights: vec![1.0, 0.0, 0.5, 1.0, 1.0, 0.0],
        here: vec![1.0, 1.0, 1.0, 1.0, 1.0, 0.0],
        bound: vec![1.0, 0.0],
        shape: [2, 3],
    };
    const PART: f32 = 1.25;

    let compiled = compile(&definition.objective, Graph::Gradient, &pipeline()).expect("it compiles");
    let mut engine = Engine::new(Host::new());
    let made = &mut |host: &mut Host, _: &str, _: &Function, w: &Weight| {
        let data = stored[w.stored.tensor.as_str()].clone();
        Ok(Some(host.upload(DType::F32, Data::F32(data))?))
    };
    engine.add_made(&compiled, made).expect("there is room");
    let gatherer = Gatherer::new(&definition.objective).expect("it is a gradient");
    let mut want = vec![0.0; gatherer.places().len()];
    let told = gatherer.add(&mut engine, &rows, 1.0, PART, &mut want).expect("it runs");

    let module = CompiledModule::<B>::new(&definition, &device, |name, _| Ok(stored[name].clone()));
    let module = module.expect("it compiles");
    let Inputs { tokens, targets, weights } = inputs(&module, &rows, &device);
    let row = |data: &[f32]| Tensor::from_data(TensorData::new(data.to_vec(), [data.len()]), &device);
    let texts = Texts {
        weights: Tensor::from_inner(weights),
        here: Tensor::from_inner(row(&rows.here).reshape(rows.shape)),
        part: PART,
        bound: Tensor::from_inner(row(&rows.bound)),
        ..Texts::new(Tensor::from_inner(tokens), Tensor::from_inner(targets))
    };
    let module = module.train::<Train>();
    let objective = module.objective(texts.clone()).unwrap_or_else(|e| panic!("{e}"));
    let number = |n| objective.result::<1>(n).map(floats).unwrap_or_else(|| panic!("result {n} is a number"));
    for (n, told) in told.iter().enumerate().take(3) {
        let off = max_diff(&number(n), &told.data);
        assert!(off <= LOSS * told.data[0].abs().max(1.0), "result {n} is off by {off:e}");
    }
    assert_eq!(objective.result::<2>(3).map(floats), Some(vec![1.0, 1.0, 1.0, 0.0, 0.0, 0.0]));
    assert!(objective.result::<1>(3).is_none(), "it has two axes");
    assert!(objective.result::<2>(4).is_none(), "gradients are no results");
    let value = floats(objective.value.clone().inner());
    assert!(value == number(0) && (value[0] - number(1)[0] - number(2)[0]).abs() <= LOSS, "{value:?}");
    compare("objective", gradients(&module, &objective.value.backward()), gatherer.places(), &want);

    // Of parameters that do not learn there is a value, and no gradient.
    let frozen = module.no_grad().objective(texts).expect("it runs").value;
    assert_eq!(floats(frozen.clone().inner()), value);
    assert!(!frozen.into_primitive().tensor().is_tracked());
}

#[test]
fn a_step_of_an_optimiser_is_seen() {
    let Some(device) = device("a_step_of_an_optimiser_is_seen") else { return };
    let case = &cases()[0];
    let rows = rows(case);
    let compiled = case.compile(Graph::Gradient, DType::F32, &pipeline());
    let mut engine = Engine::new(Host::new());
    engine.add(&compiled, &case.checkpoint).expect("it loads");
    engine.add(&case.compile(Graph::Train, DType::F32, &pipeline()), &case.checkpoint).expect("it loads");
    let gatherer = Gatherer::new(compiled.definition()).expect("it is a gradient");
    let places = gatherer.places();
    let mut want = places.read(&case.checkpoint, "").expect("checked");

    let mut module = module(case, &device).train::<Train>();
    let mut optimizer = SgdConfig::new().init::<Train, CompiledModule<Train>>();
    let rate = 0.05;
    let mut losses = Vec::new();
    for _ in 0..3 {
        let Inputs { tokens, targets, weights } = inputs(&module.valid(), &rows, &device);
        let loss = module.weighted_loss(
            Tensor::from_inner(tokens.clone()),
            Tensor::from_inner(targets.clone()),
            Tensor::from_inner(weights.clone()),
        );
        let found = GradientsParams::from_grads(loss.expect("it runs").backward(), &module);
        module = optimizer.step(rate, module, found);

        let mut gradient = vec![0.0; places.len()];
        gatherer.add(&mut engine, &rows, 1.0, 1.0, &mut gradient).expect("it runs");
        want.iter_mut().zip(&gradient).for_each(|(p, g)| *p -= rate as f32 * g);
        engine.set_weights(&Arc::new(want.clone()), places).expect("it loads");
        let loss = module.valid().weighted_loss(tokens, targets, weights).expect("it runs");
        let (loss, want) = (floats(loss)[0], rows.loss(&mut engine).expect("it runs"));
        assert!((loss - want).abs() <= STEPPED, "after a step the loss is {loss}, not {want}");
        losses.push(loss);
    }
    assert!(losses.is_sorted_by(|a, b| a > b), "each step along the gradient lowers the loss: {losses:?}");
}

#[test]
fn a_record_has_all_there_is() {
    let Some(device) = device("a_record_has_all_there_is") else { return };
    let case = &cases()[0];
    let saved = module(case, &device);
    let tokens = inputs(&saved, &rows(case), &device).tokens;
    let want = floats(saved.forward(tokens.clone()).expect("it runs"));
    let fresh = || CompiledModule::<B>::init(&case.config, 7, 0.02, &device).expect("it is made");
    let other = floats(fresh().forward(tokens.clone()).expect("it runs"));
    assert!(max_diff(&want, &other) > LOGITS, "another seed is another model");

    let folder = tempfile::tempdir().expect("there is room");
    let file = folder.path().join("model");
    let recorder = NamedMpkFileRecorder::<FullPrecisionSettings>::new();
    saved.clone().save_file(&file, &recorder).expect("it is saved");
    let loaded = fresh().load_file(&file, &recorder, &device).expect("it loads");
    assert_eq!(floats(loaded.forward(tokens.clone()).expect("it runs")), want);

    // Through autodiff and back, and in bytes.
    let recorder = BinBytesRecorder::<FullPrecisionSettings>::new();
    let bytes = recorder.record(saved.train::<Train>().into_record(), ()).expect("it is saved");
    let record: WeightsRecord<Train> = recorder.load(bytes, &device).expect("it loads");
    let loaded = fresh().train::<Train>().try_load_record(record).expect("it fits");
    assert_eq!(floats(loaded.valid().forward(tokens).expect("it runs")), want);
}

#[test]
fn what_does_not_fit_is_named() {
    let Some(device) = device("what_does_not_fit_is_named") else { return };
    let cases = cases();
    let case = cases.iter().find(|c| c.name == "tiny").expect("it is the project's own");
    let other = cases.iter().find(|c| c.name == "tiny-llama").expect("it is the project's own");
    let module = module(case, &device);
    let says = |e: String, parts: &[&str]| {
        parts.iter().for_each(|p| assert!(e.contains(p), "{e}\nsays nothing of {p}"))
    };

    let tokens = module.tokens(&[1, 2, 3, 4, 5, 6], [2, 3], &device).expect("they are right");
    let targets = module.tokens(&[1, 2, 3, 4], [2, 2], &device).expect("they are right");
    says(module.loss(tokens.clone(), targets).expect_err("misshapen").to_string(), &["`target`", "2", "3"]);
    let at = Tensor::<B, 2, Int>::zeros([3, 1], &device);
    says(module.forward_at(tokens.clone(), at).expect_err("misshapen").to_string(), &["`at`", "3", "2"]);
    let none = module.tokens(&[], [2, 0], &device).expect("none is outside of the vocabulary");
    says(module.forward(none).expect_err("empty").to_string(), &["no tokens", "[2, 0]"]);
    says(
        module.tokens(&[-1], [1, 1], &device).expect_err("no id").to_string(),
        &["token id -1", "vocabulary"],
    );
    says(
        module.tokens(&[1], [1, 2], &device).expect_err("too few").to_string(),
        &["1 token ids", "1 rows of 2"],
    );

    let record = self::module(other, &device).into_record();
    let why = module.clone().try_load_record(record).expect_err("another model's").to_string();
    says(
        why,
        &["missing: `model.layers.0", "misshapen: `model.norm.weight`", "superfluous: `model.layers.0"],
    );
    let why =
        CompiledModule::<B>::load(&case.config, &other.checkpoint, &device).expect_err("another model's");
    says(why.to_string(), &["tiny-llama", "missing: `"]);

    // What was refused leaves the module as it was.
    module.forward(tokens).unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn frozen_parameters_have_no_gradient() {
    let Some(device) = device("frozen_parameters_have_no_gradient") else { return };
    let case = &cases()[0];
    let rows = rows(case);
    let frozen = module(case, &device).train::<Train>().no_grad();
    let Inputs { tokens, targets, .. } = inputs(&frozen.valid(), &rows, &device);
    let loss = frozen.loss(Tensor::from_inner(tokens), Tensor::from_inner(targets)).expect("it runs");
    assert!(floats(loss.inner())[0].is_finite());
    // They stay frozen through inference and back, whatever is cloned; others stay as they are.
    let (valid, learns) = (frozen.valid(), module(case, &device).train::<Train>().valid());
    for (module, tracked) in [(valid.clone(), false), (learns.clone(), true)] {
        let Inputs { tokens, targets, .. } = inputs(&module, &rows, &device);
        let module = module.train::<Train>();
        let loss = module.loss(Tensor::from_inner(tokens), Tensor::from_inner(targets)).expect("it runs");
        assert_eq!(loss.into_primitive().tensor().is_tracked(), tracked);
    }
    assert_eq!(frozen.parameters().count(), case.checkpoint.names().count());
}
