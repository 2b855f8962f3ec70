//! What training minimises, with all balance losses on and tokens dropped: the compiled gradient against the definition in f64, on every device.
//!
//! Each result must be the interpreter's to 1e-5. The slope along a direction through all router weights, and through all weights,
//! must be the central difference to 1e-4 of the gradient's norm, as for the reference cases. Choices of experts are constants
//! of both, since a step of 1e-6 turns none.

use std::collections::BTreeMap;

use latentc_codegen::cube::WgpuDevice;
use latentc_codegen::device::{Data, Device};
use latentc_codegen::host::Host;
use latentc_ir::{Caches, DType, Interpreter, Precision, Tensor, Tensors, scoped};
use latentc_models::config::ModelConfig;
use latentc_models::{Goal, trace};
use latentc_passes::{Graph, differentiate, pipeline};
use latentc_runtime::compiled::compile;
use latentc_runtime::engine::{Engine, Value};
use latentc_runtime::eval::Batch;
use latentc_tests::{Case, cases};

const RESULT: f64 = 1e-5;
const SLOPE: f64 = 1e-4;
const STEP: f64 = 1e-6;
/// As of a batch that is run in parts.
const PART: f32 = 1.25;

/// A case whose configuration asks for all balance losses, loudly.
fn balanced(case: &Case) -> Option<ModelConfig> {
    let mut config = case.config.clone();
    let ModelConfig::DeepseekV2(cfg) = &mut config else { return None };
    let moe = cfg.moe.as_mut()?;
    (moe.aux_loss_alpha, moe.device_loss_alpha, moe.communication_loss_alpha) = (0.5, 0.3, 0.2);
    if moe.n_devices == 1 && moe.n_routed_experts.is_multiple_of(2) {
        (moe.n_devices, moe.topk_device) = (2, 2);
    }
    moe.device_capacity_factor = Some(0.6);
    Some(config)
}

fn agrees<D: Device>(case: &Case, device: D) {
    let Some(config) = balanced(case) else { return };
    let name = &case.name;
    let definition =
        trace(&config, Goal::Objective, DType::F32).unwrap_or_else(|e| panic!("{}", e.render())).module;
    let compiled =
        compile(&definition, Graph::Gradient, &pipeline()).unwrap_or_else(|e| panic!("{name}: {e}"));
    let mut engine = Engine::new(device);
    engine.add(&compiled, &case.checkpoint).unwrap_or_else(|e| panic!("{name}: {e}"));

    let (ids, shape) = case.integers("input_ids").expect("every case has input_ids");
    let mask = case.integers("attention_mask").map(|m| m.0);
    let batch = Batch::new(&ids, mask.as_deref(), shape[0], shape[1]).expect("the case's batch is right");
    let rows = batch.next_tokens();
    let (tok, target, weight, here) = (rows.ids, rows.targets, rows.weights, rows.here);
    // The last sequence is exempt.
    let mut bound = rows.bound;
    bound.iter_mut().last().into_iter().for_each(|x| *x = 0.0);
    let longest = batch.longest();
    let shape = [batch.rows(), longest];
    let args = [
        Value::i32(tok.clone(), &shape),
        Value::i32(target.clone(), &shape),
        Value::f32(weight.clone(), &shape),
        Value::f32(here.clone(), &shape),
        Value::f32(vec![PART], &[]),
        Value::f32(bound.clone(), &[batch.rows()]),
    ];
    let floats = |value: Value| match value.data {
        Data::F32(data) => data,
        Data::I32(_) => panic!("{name}: results are floats"),
    };
    let results = engine.run(Graph::Gradient, &args, longest).unwrap_or_else(|e| panic!("{name}: {e}"));
    let results: Vec<Vec<f32>> = results.into_iter().map(floats).collect();

    let wide = |dtype, data: Vec<f64>| Tensor::new(dtype, shape, data).expect("a batch");
    let exact = [
        wide(DType::I32, tok.iter().map(|&x| f64::from(x)).collect()),
        wide(DType::I32, target.iter().map(|&x| f64::from(x)).collect()),
        wide(DType::F32, weight.iter().map(|&x| f64::from(x)).collect()),
        wide(DType::F32, here.iter().map(|&x| f64::from(x)).collect()),
        Tensor::scalar(DType::F32, f64::from(PART)),
        Tensor::new(DType::F32, [batch.rows()], bound.iter().map(|&x| f64::from(x)).collect())
            .expect("a row"),
    ];
    let stored: Tensors = case
        .checkpoint
        .names()
        .map(|name| {
            let t = case.checkpoint.require(name).expect("it is there");
            (name.to_owned(), Tensor::from_f32(t.shape, &t.to_f32().expect("floats")).expect("a tensor"))
        })
        .collect();
    let run = |stored: &mut Tensors| {
        Interpreter::new(&definition, Precision::Exact)
            .run(&exact, stored, &mut Caches::new())
            .expect("it runs")
    };
    let want = run(&mut stored.clone());
    for (n, (got, want)) in results.iter().zip(&want).enumerate() {
        for (got, want) in got.iter().zip(&want.data) {
            let off = (f64::from(*got) - want).abs();
            assert!(off <= RESULT * (1.0 + want.abs()), "{name}: result {n} has {got}, not {want}");
        }
    }
    let moe = match &config {
        ModelConfig::DeepseekV2(cfg) => cfg.moe.as_ref().expect("it has experts"),
        ModelConfig::Llama(_) => unreachable!("it has none"),
    };
    let chosen = f64::from(here.iter().sum::<f32>()) * moe.num_experts_per_tok as f64;
    for layer in want[5].data.chunks(moe.n_routed_experts) {
        assert_eq!(layer.iter().sum::<f64>(), chosen, "{name}: each token chooses as many experts as it may");
    }

    let kept = want[6].data.iter().sum::<f64>();
    assert!(kept < want[5].data.iter().sum(), "{name}: some are dropped, {kept} are kept");

    // The gradient of each stored tensor, and the direction that the step goes.
    let mut gradients: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let parts = differentiate::weights(&definition);
    assert_eq!(results.len(), want.len() + parts.len(), "{name}: results");
    for ((scope, f, n), part) in parts.into_iter().zip(&results[want.len()..]) {
        let weight = &f.weights[n];
        let layout = weight.stored.layout(f, f.ty(weight.value)).expect("a layout");
        for piece in &layout.pieces {
            let all = gradients
                .entry(scoped(&scope, &piece.tensor))
                .or_insert_with(|| vec![0.0; layout.stored_elements() as usize]);
            for span in layout.spans(piece) {
                let (from, to, len) = (span.weight as usize, span.stored as usize, span.len as usize);
                all[to..to + len]
                    .iter_mut()
                    .zip(&part[from..from + len])
                    .for_each(|(x, g)| *x += f64::from(*g));
            }
        }
    }
    for (what, picked) in [("the routers", "mlp.gate.weight"), ("all weights", "")] {
        let along = |step: f64| {
            let mut moved = stored.clone();
            for (_, t) in moved.iter_mut().filter(|(name, _)| name.ends_with(picked)) {
                t.data.iter_mut().enumerate().for_each(|(n, x)| *x += step * (n as f64).cos());
            }
            run(&mut moved)[0].data[0]
        };
        let slope = (along(STEP) - along(-STEP)) / (2.0 * STEP);
        let chosen = gradients.iter().filter(|(name, _)| name.ends_with(picked)).map(|(_, g)| g);
        let (mut got, mut square) = (0.0, 0.0);
        for g in chosen {
            got += g.iter().enumerate().map(|(n, g)| g * (n as f64).cos()).sum::<f64>();
            square += g.iter().map(|g| g * g).sum::<f64>();
        }
        let (off, norm) = ((got - slope).abs(), square.sqrt());
        println!("{name:16} along {what}: {got:+.6e}, {slope:+.6e}, norm {norm:.1e}");
        assert!(off <= SLOPE * norm + 1e-8, "{name}: along {what} the slope is {got:e}, not {slope:e}");
        assert!(norm > 0.0, "{name}: {what} have a gradient");
    }
}

/// The small model of the project: the interpreter takes long for the others.
fn chosen() -> impl Iterator<Item = Case> {
    cases().into_iter().filter(|case| case.name == "tiny")
}

#[test]
fn on_wgpu() {
    for case in chosen() {
        match WgpuDevice::open() {
            Ok(device) => agrees(&case, device),
            Err(e) => return eprintln!("SKIPPED: on_wgpu: {e}"),
        }
    }
}

#[test]
fn on_the_host() {
    for case in chosen() {
        agrees(&case, Host::new());
    }
}
