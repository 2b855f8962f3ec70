//! Trains a small DeepSeek-V2 on texts, byte by byte, with burn's own learner and AdamW:
//!
//!     cargo run --release -p latentc-burn --example train -- --steps 200 README.md ARCHITECTURE.md
//!
//! The forward pass, what is minimised and its gradient are latentc's, compiled from the model's equations; the data loader, the loop, the optimiser,
//! the metrics and the records are burn's. `OUT/valid` and `OUT/train` hold burn's logs, `OUT/model.mpk` its record of the parameters.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use burn::backend::wgpu::WgpuDevice;
use burn::backend::{Autodiff, Wgpu};
use burn::data::dataloader::DataLoaderBuilder;
use burn::data::dataloader::batcher::Batcher;
use burn::data::dataset::InMemDataset;
use burn::grad_clipping::GradientClippingConfig;
use burn::module::Module;
use burn::optim::AdamWConfig;
use burn::record::{FullPrecisionSettings, NamedMpkFileRecorder};
use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};
use burn::train::metric::{Adaptor, LossInput, LossMetric};
use burn::train::renderer::{
    EvaluationName, EvaluationProgress, MetricState, MetricsRenderer, MetricsRendererEvaluation,
    MetricsRendererTraining, ProgressType, TrainingProgress,
};
use burn::train::{InferenceStep, ItemLazy, Learner, SupervisedTraining, TrainOutput, TrainStep};
use latentc_burn::{CompiledModule, ModuleError, Texts, wgpu_device};
use latentc_models::config::ModelConfig;

type B = Wgpu;
type Train = Autodiff<B>;

/// About 170,000 parameters: latent attention, and one layer of routed experts beside a shared one, which a balance loss keeps equally busy.
const CONFIG: &str = r#"{
  "model_type": "deepseek_v2", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
  "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": null, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
  "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
  "moe_intermediate_size": 32, "first_k_dense_replace": 1, "moe_layer_freq": 1, "topk_method": "greedy", "n_group": 1,
  "topk_group": 1, "norm_topk_prob": false, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "hidden_act": "silu",
  "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": false,
  "attention_bias": false, "aux_loss_alpha": 0.01, "seq_aux": true
}"#;

/// Bytes of a text, and one more: each is to be predicted from those before it.
const WINDOW: usize = 64;
const BATCH: usize = 8;

/// The model, in a module of one's own: it could have other parts beside.
#[derive(Module, Debug)]
struct Net<B: Backend> {
    compiled: CompiledModule<B>,
}

/// Windows as `[BATCH, WINDOW]` of bytes, and of the bytes that follow.
#[derive(Clone, Debug)]
struct Batch<B: Backend> {
    tokens: Tensor<B, 2, Int>,
    targets: Tensor<B, 2, Int>,
}

#[derive(Clone)]
struct Windows;

impl<B: Backend> Batcher<B, Vec<u8>, Batch<B>> for Windows {
    fn batch(&self, items: Vec<Vec<u8>>, device: &B::Device) -> Batch<B> {
        let ids = |from: usize| {
            let ids: Vec<i32> =
                items.iter().flat_map(|w| &w[from..from + WINDOW]).map(|&b| b.into()).collect();
            Tensor::from_data(TensorData::new(ids, [items.len(), WINDOW]), device)
        };
        Batch { tokens: ids(0), targets: ids(1) }
    }
}

/// What the learner tells of a step.
struct Loss(Tensor<B, 1>);

impl ItemLazy for Loss {
    type ItemSync = Loss;

    fn sync(self) -> Loss {
        self
    }
}

impl Adaptor<LossInput<B>> for Loss {
    fn adapt(&self) -> LossInput<B> {
        LossInput::new(self.0.clone())
    }
}

impl TrainStep for Net<Train> {
    type Input = Batch<Train>;
    type Output = Loss;

    fn step(&self, batch: Batch<Train>) -> TrainOutput<Loss> {
        let texts = Texts::new(batch.tokens, batch.targets);
        let objective = self.compiled.objective(texts).unwrap_or_else(|e| panic!("{e}"));
        let told = Loss(objective.result(1).expect("the cross entropy is a number"));
        TrainOutput::new(self, objective.value.backward(), told)
    }
}

impl InferenceStep for Net<B> {
    type Input = Batch<B>;
    type Output = Loss;

    fn step(&self, batch: Batch<B>) -> Loss {
        Loss(self.compiled.loss(batch.tokens, batch.targets).unwrap_or_else(|e| panic!("{e}")))
    }
}

/// Says the loss every so many steps.
struct Lines {
    steps: usize,
    loss: f64,
}

impl MetricsRendererTraining for Lines {
    fn update_train(&mut self, state: MetricState) {
        if let MetricState::Numeric(_, value) = state {
            self.loss = value.current();
        }
    }

    fn update_valid(&mut self, state: MetricState) {
        self.update_train(state);
    }

    fn render_train(&mut self, item: TrainingProgress, _: Vec<ProgressType>) {
        let step = item.iteration.unwrap_or(0);
        if step.is_multiple_of(10) || step == 1 {
            println!("step {step:>4} of {}  loss {:.3}", self.steps, self.loss);
        }
    }

    fn render_valid(&mut self, _: TrainingProgress, _: Vec<ProgressType>) {}
}

impl MetricsRendererEvaluation for Lines {
    fn update_test(&mut self, _: EvaluationName, _: MetricState) {}

    fn render_test(&mut self, _: EvaluationProgress, _: Vec<ProgressType>) {}
}

impl MetricsRenderer for Lines {
    fn manual_close(&mut self) {}

    fn register_metric(&mut self, _: burn::train::metric::MetricDefinition) {}
}

/// The mean loss of all windows, in nats a byte.
fn mean(net: &Net<B>, windows: &[Vec<u8>], device: &WgpuDevice) -> Result<f32, ModuleError> {
    let mut sum = 0.0;
    for window in windows {
        let batch: Batch<B> = Windows.batch(vec![window.clone()], device);
        sum += net.compiled.loss(batch.tokens, batch.targets)?.into_scalar();
    }
    Ok(sum / windows.len() as f32)
}

/// Makes so many steps on a text, the end of which is kept for validation. Returns the mean loss there before and after.
pub(crate) fn train(text: &[u8], steps: usize, out: &Path) -> Result<(f32, f32), ModuleError> {
    let device = wgpu_device()?;
    let config = ModelConfig::from_str("the example's configuration", CONFIG)?;
    let windows: Vec<Vec<u8>> = text.windows(WINDOW + 1).step_by(WINDOW).map(<[u8]>::to_vec).collect();
    let kept = windows.len() / 10;
    if kept == 0 {
        let least = 10 * WINDOW + 1;
        return Err(ModuleError::Mismatch(format!("a text of {} bytes, where it takes {least}", text.len())));
    }
    let (learned, kept) = windows.split_at(windows.len() - kept);
    // An epoch is all steps, so that validation does not come in between.
    let epoch: Vec<_> = learned.iter().cycle().take(steps * BATCH).cloned().collect();

    let net = Net { compiled: CompiledModule::<B>::init(&config, 1, 0.02, &device)? };
    let before = mean(&net, kept, &device)?;
    let optimizer = AdamWConfig::new()
        .with_beta_2(0.95)
        .with_weight_decay(0.1)
        .with_grad_clipping(Some(GradientClippingConfig::Norm(1.0)));
    let learner = Learner::new(net.train::<Train>(), optimizer.init(), 3e-3);
    let loader = DataLoaderBuilder::<Train, _, _>::new(Windows)
        .batch_size(BATCH)
        .shuffle(1)
        .set_device(device.clone());
    let valid = DataLoaderBuilder::<B, _, _>::new(Windows).batch_size(BATCH).set_device(device.clone());
    let training = SupervisedTraining::new(
        out,
        loader.build(InMemDataset::new(epoch)),
        valid.build(InMemDataset::new(kept.to_vec())),
    );
    let training = training
        .metrics((LossMetric::<B>::new(),))
        .renderer(Lines { steps, loss: f64::NAN })
        .with_application_logger(None)
        .num_epochs(1);
    let net = training.launch(learner).model;
    let after = mean(&net, kept, &device)?;

    let recorder = NamedMpkFileRecorder::<FullPrecisionSettings>::new();
    let failed = |e: &dyn std::fmt::Display| ModuleError::Mismatch(format!("{}: {e}", out.display()));
    net.compiled.save_file(out.join("model-new"), &recorder).map_err(|e| failed(&e))?;
    std::fs::rename(out.join("model-new.mpk"), out.join("model.mpk")).map_err(|e| failed(&e))?;
    Ok((before, after))
}

fn main() -> ExitCode {
    let (mut steps, mut out, mut text) = (100, PathBuf::from("target/burn-example"), Vec::new());
    let mut args = std::env::args().skip(1);
    let fail = |why: String| {
        eprintln!("error: {why}\nusage: train [--steps N] [--out FOLDER] TEXT...");
        ExitCode::FAILURE
    };
    while let Some(arg) = args.next() {
        match (arg.as_str(), arg.starts_with("--").then(|| args.next()).flatten()) {
            ("--steps", Some(n)) => match n.parse() {
                Ok(n) if n > 0 => steps = n,
                _ => return fail(format!("--steps {n}: not a number of steps")),
            },
            ("--out", Some(folder)) => out = folder.into(),
            (option, _) if option.starts_with("--") => {
                return fail(format!("{option}: unknown, or without its value"));
            }
            (file, _) => match std::fs::read(file) {
                Ok(bytes) => text.extend(bytes),
                Err(e) => return fail(format!("{file}: {e}")),
            },
        }
    }
    match train(&text, steps, &out) {
        Ok((before, after)) => {
            println!(
                "validation: {before:.3} nats a byte before, {after:.3} after {steps} steps; {}",
                out.display()
            );
            ExitCode::SUCCESS
        }
        Err(e) => fail(e.to_string()),
    }
}
