//! `latentc eval --grad` and `--adamw-step`: the gradient of the loss of given texts, and what one step of the optimiser makes of
//! the weights.

use std::collections::BTreeMap;
use std::path::Path;
use std::slice::from_ref;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use latentc_codegen::device::Device;
use latentc_ir::DType;
use latentc_passes::Graph;
use latentc_runtime::checkpoint::{self, Checkpoint, write_tensors};
use latentc_runtime::eval::Batch;
use latentc_runtime::gradient::{Found, Gatherer};
use latentc_runtime::optimizer::{AdamW, Optimizer, State};
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
        let mut engine = self.model.load(self.folder, device, self.dtype, &[Graph::Gradient.into()])?;
        let optimizer = Optimizer::new(&mut engine)?;
        let gatherer = Gatherer::new(&definition)?;
        let places = gatherer.places();
        let start = Instant::now();
        let spinner = progress::spinner("differentiating");
        let mut gradient = vec![0.0; places.len()];
        let rows = self.batch.next_tokens();
        let found = gatherer.add(&mut engine, &rows, 1.0, 1.0, &mut gradient)?;
        let loss = found.first().and_then(Found::number).context("the program has no results")?;
        let with = AdamW::default();
        let gradient = Arc::new(gradient);
        let clipping = optimizer.clipping(&mut engine, &gradient, with.most)?;

        let mut out: Vec<(String, &[usize], &[f32])> = vec![
            ("loss".to_owned(), &[], from_ref(&loss)),
            ("grad_norm".to_owned(), &[], from_ref(&clipping.norm)),
        ];
        let mut state = State::new(Vec::new());
        if writes_step {
            state = State::new(places.read(&Checkpoint::open(self.folder)?, "")?);
            optimizer.step(&mut engine, &with, &mut state, &gradient, clipping.coef)?;
        }
        for t in places.tensors() {
            if writes_step {
                out.push((format!("adamw1.{}", t.name), &t.shape, &state.p[t.range.clone()]));
            }
            if writes_gradient {
                out.push((format!("grad.{}", t.name), &t.shape, &gradient[t.range.clone()]));
            }
        }
        drop(spinner);
        let seconds = start.elapsed().as_secs_f64();

        let bytes: Vec<Vec<u8>> =
            out.iter().map(|(_, _, data)| data.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
        let views = out
            .iter()
            .zip(&bytes)
            .map(|((name, shape, _), bytes)| (name.as_str(), checkpoint::DType::F32, *shape, &bytes[..]));
        write_tensors(self.out, views, &BTreeMap::new())?;

        let (grad_norm, tensors) = (clipping.norm, places.tensors().len());
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
