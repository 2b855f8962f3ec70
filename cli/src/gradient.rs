//! `latentc eval --grad` and `--adamw-step`: the gradient of the loss of given texts, and what one step of the optimiser makes of
//! the weights.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use latentc_codegen::device::Device;
use latentc_ir::DType;
use latentc_passes::Graph;
use latentc_runtime::checkpoint::{self, Checkpoint, write_tensors};
use latentc_runtime::eval::Batch;
use latentc_runtime::gradient::Tensor;
use latentc_runtime::optimizer::{AdamW, Moments, Optimizer};
use serde::Serialize;

use crate::model::Model;
use crate::target::{Job, Target};
use crate::{print, print_json, progress};

/// A gradient to be computed, whose arguments were checked.
pub(crate) struct Gradients<'a> {
    pub(crate) folder: &'a Path,
    pub(crate) out: &'a Path,
    pub(crate) target: Target,
    pub(crate) dtype: DType,
    pub(crate) json: bool,
    pub(crate) model: Model,
    pub(crate) batch: Batch,
    /// Whether gradients are written, and whether stepped weights are.
    pub(crate) wants: (bool, bool),
}

#[derive(Serialize)]
struct Report {
    loss: f32,
    grad_norm: f32,
    tensors: usize,
    target: &'static str,
    device: String,
    seconds: f64,
}

impl Job for Gradients<'_> {
    fn on<D: Device>(self, device: D) -> anyhow::Result<()> {
        let (writes_gradient, writes_step) = self.wants;
        let definition = self.model.trace(Graph::Gradient, self.dtype)?;
        let mut engine = self.model.load(self.folder, device, self.dtype, &[Graph::Gradient])?;
        let checkpoint = Checkpoint::open(self.folder)?;
        let optimizer = Optimizer::new(&mut engine)?;
        let start = Instant::now();
        let spinner = progress::spinner("differentiating");
        let gradient = self.batch.gradient(&mut engine, &definition)?;
        let with = AdamW::default();
        let clipping = optimizer.clipping(&mut engine, gradient.tensors.values(), with.most)?;

        let mut out: Vec<(String, Tensor)> = vec![
            ("loss".to_owned(), Tensor { shape: vec![], data: vec![gradient.loss] }),
            ("grad_norm".to_owned(), Tensor { shape: vec![], data: vec![clipping.norm] }),
        ];
        let tensors = gradient.tensors.len();
        for (name, g) in gradient.tensors {
            if writes_step {
                let p = checkpoint.require(&name)?.to_f32()?;
                let moments = Moments::new(p.len());
                let given = (p, g.data.clone(), moments);
                let (p, _) = optimizer.step(&mut engine, &with, 1, clipping.coef, given)?;
                out.push((format!("adamw1.{name}"), Tensor { shape: g.shape.clone(), data: p }));
            }
            if writes_gradient {
                out.push((format!("grad.{name}"), g));
            }
        }
        drop(spinner);
        let seconds = start.elapsed().as_secs_f64();

        let bytes: Vec<Vec<u8>> =
            out.iter().map(|(_, t)| t.data.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
        let views = out
            .iter()
            .zip(&bytes)
            .map(|((name, t), bytes)| (name.as_str(), checkpoint::DType::F32, &t.shape[..], &bytes[..]));
        write_tensors(self.out, views, &BTreeMap::new())?;

        let (loss, grad_norm) = (gradient.loss, clipping.norm);
        let (target, device) = (self.target.name(), engine.device().name());
        if self.json {
            return print_json(&Report { loss, grad_norm, tensors, target, device, seconds });
        }
        print(&format!(
            "{}: loss {loss:.6}, gradient of {tensors} tensors with norm {grad_norm:.6}, {seconds:.2} s on {device}\n",
            self.out.display()
        ))
    }
}
