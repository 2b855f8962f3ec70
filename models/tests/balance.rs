//! Balance losses against sums written straight from section 2.2.3 of arXiv 2405.04434, sequence by sequence, in f64.

use std::path::Path;

use latentc_ir::{Caches, DType, Interpreter, Module, Op, Precision, SplitMix, Tensor, Tensors, verify};
use latentc_models::config::{DeepseekV2Config, ModelConfig, MoeConfig, TopkMethod};
use latentc_models::{Goal, trace};

/// The configuration of the project's own small model, with these experts.
fn config(change: impl FnOnce(&mut MoeConfig)) -> DeepseekV2Config {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases/tiny");
    let ModelConfig::DeepseekV2(mut cfg) = ModelConfig::from_path(path).unwrap() else {
        panic!("it is a DeepSeek-V2")
    };
    let moe = cfg.moe.as_mut().unwrap();
    moe.n_routed_experts = 12;
    moe.num_experts_per_tok = 3;
    moe.topk_method = TopkMethod::GroupLimitedGreedy { n_group: 4, topk_group: 2 };
    (moe.n_devices, moe.topk_device) = (4, 2);
    change(moe);
    cfg
}

fn module(cfg: &DeepseekV2Config) -> Module {
    let model = ModelConfig::DeepseekV2(cfg.clone());
    let module =
        trace(&model, Goal::Objective, DType::F32).unwrap_or_else(|e| panic!("{}", e.render())).module;
    verify(&module).unwrap_or_else(|e| panic!("{e:?}"));
    module
}

/// What one layer's experts do with a batch: the router's scores and choices, from its equations.
struct Routed {
    /// `[b][t][e]`, padding left out.
    scores: Vec<Vec<Vec<f64>>>,
    chosen: Vec<Vec<Vec<bool>>>,
}

/// The `k` largest, of equals the first.
fn largest(x: &[f64], k: usize) -> Vec<bool> {
    let before = |j: usize, i: usize| x[j] > x[i] || (x[j] == x[i] && j < i);
    (0..x.len()).map(|i| (0..x.len()).filter(|&j| before(j, i)).count() < k).collect()
}

fn routed(moe: &MoeConfig, u: &Tensor, router: &Tensor, lens: &[usize]) -> Routed {
    let [_, t, d] = u.shape[..] else { panic!("b, t and d") };
    let n = moe.n_routed_experts;
    let (mut scores, mut chosen) = (Vec::new(), Vec::new());
    for (b, &len) in lens.iter().enumerate() {
        let (mut rows, mut picks) = (Vec::new(), Vec::new());
        for p in 0..len {
            let u = &u.data[(b * t + p) * d..][..d];
            let dot = |e: usize| -> f64 { router.data[e * d..][..d].iter().zip(u).map(|(x, y)| x * y).sum() };
            let e: Vec<f64> = (0..n).map(|e| dot(e).exp()).collect();
            let all: f64 = e.iter().sum();
            let s: Vec<f64> = e.iter().map(|x| x / all).collect();
            let mut open = s.clone();
            if let TopkMethod::GroupLimitedGreedy { n_group, topk_group } = moe.topk_method {
                let width = n / n_group;
                let best: Vec<f64> = s.chunks(width).map(|g| g.iter().copied().fold(0.0, f64::max)).collect();
                let groups = largest(&best, topk_group);
                (0..n).filter(|e| !groups[e / width]).for_each(|e| open[e] = 0.0);
            }
            picks.push(largest(&open, moe.num_experts_per_tok));
            rows.push(s);
        }
        scores.push(rows);
        chosen.push(picks);
    }
    Routed { scores, chosen }
}

/// Equations 23, 26 and 29 without their factors, for one sequence.
fn losses(moe: &MoeConfig, scores: &[Vec<f64>], chosen: &[Vec<bool>]) -> [f64; 3] {
    let (n, k, d, m) = (moe.n_routed_experts, moe.num_experts_per_tok, moe.n_devices, moe.topk_device);
    let t = scores.len() as f64;
    let count = |i: usize| chosen.iter().filter(|c| c[i]).count() as f64;
    let f: Vec<f64> = (0..n).map(|i| n as f64 / (k as f64 * t) * count(i)).collect();
    let p: Vec<f64> = (0..n).map(|i| scores.iter().map(|s| s[i]).sum::<f64>() / t).collect();
    let expert = (0..n).map(|i| f[i] * p[i]).sum();
    let (mut device, mut communication) = (0.0, 0.0);
    for i in 0..d {
        let on: Vec<usize> = (i * (n / d)..(i + 1) * (n / d)).collect();
        let f_1 = on.iter().map(|&j| f[j]).sum::<f64>() / on.len() as f64;
        let p_1: f64 = on.iter().map(|&j| p[j]).sum();
        let sent = chosen.iter().filter(|c| on.iter().any(|&j| c[j])).count() as f64;
        device += f_1 * p_1;
        communication += d as f64 / (m as f64 * t) * sent * p_1;
    }
    [expert, device, communication]
}

fn call(module: &Module, entry: &str, args: &[Tensor], weights: &mut Tensors) -> Vec<Tensor> {
    let mut module = module.clone();
    entry.clone_into(&mut module.entry);
    Interpreter::new(&module, Precision::Exact).run(args, weights, &mut Caches::new()).unwrap()
}

fn check(what: &str, cfg: &DeepseekV2Config, lens: &[usize]) {
    let moe = cfg.moe.as_ref().unwrap();
    let module = module(cfg);
    let (b, t, n) = (lens.len(), lens.iter().copied().max().unwrap(), moe.n_routed_experts);
    let mut rng = SplitMix(7);
    let u = Tensor::random(DType::F32, [b, t, cfg.common.hidden_size], &mut rng);
    let here: Vec<f64> = lens.iter().flat_map(|&l| (0..t).map(move |p| f64::from(u8::from(p < l)))).collect();
    let here = Tensor::new(DType::F32, [b, t], here).unwrap();
    let mut weights = Tensors::new();
    let counted = module.function("counted_moe").unwrap();
    let calls = counted.body.iter().filter_map(|inst| match &inst.op {
        Op::Call { callee, scope } => Some((module.function(callee).unwrap(), format!("{scope}."))),
        _ => None,
    });
    for (f, scope) in calls.chain([(counted, String::new())]) {
        for w in &f.weights {
            let layout = w.stored.layout(f, f.ty(w.value)).unwrap();
            for piece in &layout.pieces {
                let shape: Vec<_> = layout.shape.iter().map(|&n| n as usize).collect();
                let name = format!("{scope}{}", piece.tensor);
                weights.entry(name).or_insert_with(|| Tensor::random(DType::F32, shape, &mut rng));
            }
        }
    }
    let parts = call(&module, "counted_moe", &[u.clone(), here], &mut weights);

    let routed = routed(moe, &u, &weights["gate.weight"], lens);
    let sequences: Vec<_> = routed.scores.into_iter().zip(routed.chosen).collect();
    let mut want = [0.0; 3];
    if moe.seq_aux {
        let some: Vec<_> = sequences.iter().filter(|(s, _)| !s.is_empty()).collect();
        for (scores, chosen) in &some {
            let one = losses(moe, scores, chosen);
            want.iter_mut().zip(one).for_each(|(sum, x)| *sum += x / some.len() as f64);
        }
    } else {
        let (scores, chosen): (Vec<_>, Vec<_>) = sequences.iter().cloned().unzip();
        want = losses(moe, &scores.concat(), &chosen.concat());
    }
    let load: Vec<f64> =
        (0..n).map(|e| sequences.iter().flat_map(|(_, c)| c).filter(|c| c[e]).count() as f64).collect();

    // As the second of two layers, behind one that left these.
    let before = [1.0, 2.0, 3.0];
    let layers = module.function("counted_trunk").unwrap().axis_named("l").unwrap();
    let layers = module.function("counted_trunk").unwrap().axis(layers).size.fixed().unwrap() as usize;
    let at: Vec<f64> = (0..layers).map(|l| f64::from(u8::from(l + 1 == layers))).collect();
    let f32s = |shape: &[usize], data: Vec<f64>| Tensor::new(DType::F32, shape, data).unwrap();
    let mut args = vec![f32s(&[b], lens.iter().map(|&l| l as f64).collect())];
    args.extend_from_slice(&parts[1..]);
    args.push(f32s(&[layers], at));
    args.extend(before.map(|x| Tensor::scalar(DType::F32, x)));
    args.push(f32s(&[layers, n], vec![5.0; layers * n]));
    let got = call(&module, "balance", &args, &mut Tensors::new());
    for n in 0..3 {
        let (got, want) = (got[n].data[0] - before[n], want[n]);
        assert!((got - want).abs() < 1e-9 * (1.0 + want.abs()), "{what}: loss {n} is {got}, not {want}");
    }
    let (others, last) = got[3].data.split_at((layers - 1) * n);
    assert!(others.iter().all(|&x| x == 5.0), "{what}: {others:?}");
    assert_eq!(last.iter().map(|x| x - 5.0).collect::<Vec<_>>(), load, "{what}: load");
    assert!(want.iter().all(|x| *x > 0.0), "{what}: {want:?}");
}

#[test]
fn losses_are_those_of_the_equations() {
    let grouped = |_: &mut MoeConfig| {};
    check("a device for each group", &config(grouped), &[7, 1, 4]);
    check("one sequence", &config(grouped), &[5]);
    check("a sequence without tokens", &config(grouped), &[3, 0, 6]);
    let greedy = |moe: &mut MoeConfig| {
        moe.topk_method = TopkMethod::Greedy;
        (moe.n_devices, moe.topk_device) = (6, 3);
    };
    check("devices without groups", &config(greedy), &[4, 6]);
    let one = |moe: &mut MoeConfig| {
        moe.topk_method = TopkMethod::Greedy;
        (moe.n_devices, moe.topk_device) = (1, 1);
    };
    check("one device", &config(one), &[4, 2]);
    let other = |moe: &mut MoeConfig| (moe.n_devices, moe.topk_device) = (3, 3);
    check("devices across groups", &config(other), &[9, 3]);
    let whole = |moe: &mut MoeConfig| moe.seq_aux = false;
    check("the batch as one sequence", &config(whole), &[7, 0, 2]);
}

/// Which factors there are is the configuration's choice.
#[test]
fn the_objective_has_the_losses_that_are_switched_on() {
    let uses = |change: fn(&mut MoeConfig)| {
        let module = module(&config(change));
        let f = module.function("objective").unwrap();
        (f.results[0] == f.results[1], f.body.iter().filter(|i| i.op.mnemonic() == "mul").count())
    };
    let off = |moe: &mut MoeConfig| moe.aux_loss_alpha = 0.0;
    assert!(uses(off).0, "without losses the objective is the cross entropy");
    let all = |moe: &mut MoeConfig| {
        (moe.aux_loss_alpha, moe.device_loss_alpha, moe.communication_loss_alpha) = (0.003, 0.05, 0.02);
    };
    assert!(!uses(all).0);
    let module = module(&config(all)).to_string();
    for factor in ["0.003", "0.05", "0.02"] {
        assert!(module.contains(&format!("const {factor} ")), "{factor}:\n{module}");
    }
}
