//! Balance losses and token dropping against loops written straight from sections 2.2.3 and 2.2.4 of arXiv 2405.04434, sequence by
//! sequence, in f64.

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

/// A batch of sequences of these lengths with random weights, and what the mixture of experts and its counts are of it.
struct Counted {
    module: Module,
    u: Tensor,
    weights: Tensors,
    /// `y`, `count`, `score`, `sent`, `kept`.
    parts: Vec<Tensor>,
}

fn counted(cfg: &DeepseekV2Config, lens: &[usize], bound: &[bool]) -> Counted {
    let module = module(cfg);
    let (b, t) = (lens.len(), lens.iter().copied().max().unwrap());
    let mut rng = SplitMix(7);
    let u = Tensor::random(DType::F32, [b, t, cfg.common.hidden_size], &mut rng);
    let here: Vec<f64> = lens.iter().flat_map(|&l| (0..t).map(move |p| f64::from(u8::from(p < l)))).collect();
    let here = Tensor::new(DType::F32, [b, t], here).unwrap();
    let bound: Vec<f64> = bound.iter().map(|&bound| f64::from(u8::from(bound))).collect();
    let bound = Tensor::new(DType::F32, [b], bound).unwrap();
    let mut weights = Tensors::new();
    let counted = module.function("counted_moe").unwrap();
    let calls = counted.body.iter().filter_map(|inst| match &inst.op {
        Op::Call { callee, scope } if scope.is_empty() => {
            Some((module.function(callee).unwrap(), String::new()))
        }
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
    let parts = call(&module, "counted_moe", &[u.clone(), here, bound], &mut weights);
    Counted { module, u, weights, parts }
}

fn check(what: &str, cfg: &DeepseekV2Config, lens: &[usize]) {
    let moe = cfg.moe.as_ref().unwrap();
    let (b, n) = (lens.len(), moe.n_routed_experts);
    let Counted { module, u, weights, parts } = counted(cfg, lens, &vec![true; b]);

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
    args.push(f32s(&[layers], vec![9.0; layers]));
    let got = call(&module, "balance", &args, &mut Tensors::new());
    for n in 0..3 {
        let (got, want) = (got[n].data[0] - before[n], want[n]);
        assert!((got - want).abs() < 1e-9 * (1.0 + want.abs()), "{what}: loss {n} is {got}, not {want}");
    }
    let (others, last) = got[3].data.split_at((layers - 1) * n);
    assert!(others.iter().all(|&x| x == 5.0), "{what}: {others:?}");
    assert_eq!(last.iter().map(|x| x - 5.0).collect::<Vec<_>>(), load, "{what}: load");
    let all = 9.0 + load.iter().sum::<f64>();
    assert_eq!((got[4].data[0], *got[4].data.last().unwrap()), (9.0, all), "{what}: nothing is dropped");
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

/// `W_2 (silu(W_1 u) * W_3 u)`, of the tensors below a scope.
fn swiglu(weights: &Tensors, scope: &str, u: &[f64]) -> Vec<f64> {
    let of = |name: &str, x: &[f64]| -> Vec<f64> {
        let w = &weights[&format!("{scope}.{name}.weight")];
        w.data.chunks(w.shape[1]).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
    };
    let (y_1, y_3) = (of("gate_proj", u), of("up_proj", u));
    let z: Vec<f64> = y_1.iter().zip(y_3).map(|(y, y_3)| y / (1.0 + (-y).exp()) * y_3).collect();
    of("down_proj", &z)
}

/// Checks the mixture of experts where devices have this capacity, and returns how many choices were dropped, and of how many.
fn check_dropping(what: &str, cfg: &DeepseekV2Config, lens: &[usize], bound: &[bool]) -> (usize, usize) {
    let moe = cfg.moe.as_ref().unwrap();
    let (n, k, devices) = (moe.n_routed_experts, moe.num_experts_per_tok, moe.n_devices);
    let Counted { u, weights, parts, .. } = counted(cfg, lens, bound);
    let routed = routed(moe, &u, &weights["gate.weight"], lens);

    // Of each device, the choices that it is sent, the best first.
    let tokens: usize = lens.iter().sum();
    let room = moe.device_capacity_factor.unwrap() * (tokens * k) as f64 / devices as f64;
    let mut kept = vec![];
    let mut all = 0;
    for device in 0..devices {
        let mut sent: Vec<(bool, f64, [usize; 3])> = vec![];
        for (b, &len) in lens.iter().enumerate() {
            for t in 0..len {
                let on = device * (n / devices)..(device + 1) * (n / devices);
                let chosen = on.filter(|&e| routed.chosen[b][t][e]);
                sent.extend(chosen.map(|e| (!bound[b], routed.scores[b][t][e], [b, t, e])));
            }
        }
        sent.sort_by(|x, y| (y.0, y.1).partial_cmp(&(x.0, x.1)).unwrap());
        all += sent.len();
        let fits =
            sent.iter().enumerate().filter(|(at, (exempt, ..))| *exempt || (*at as f64) < room.floor());
        kept.extend(fits.map(|(_, (.., at))| *at));
    }

    let [_, t, d] = u.shape[..] else { panic!("b, t and d") };
    for (b, &len) in lens.iter().enumerate() {
        for p in 0..len {
            let row = (b * t + p) * d;
            let u = &u.data[row..row + d];
            let mut want = swiglu(&weights, "shared_experts", u);
            let (scores, chosen) = (&routed.scores[b][p], &routed.chosen[b][p]);
            let sum: f64 = (0..n).filter(|&e| chosen[e]).map(|e| scores[e]).sum();
            let scale = moe.routed_scaling_factor / if moe.norm_topk_prob { sum } else { 1.0 };
            for e in (0..n).filter(|&e| kept.contains(&[b, p, e])) {
                let y = swiglu(&weights, &format!("experts.{e}"), u);
                want.iter_mut().zip(y).for_each(|(sum, y)| *sum += scale * scores[e] * y);
            }
            for (got, want) in parts[0].data[row..row + d].iter().zip(want) {
                let off = (got - want).abs();
                assert!(off < 1e-9 * (1.0 + want.abs()), "{what}: token {p} of {b} is {got}, not {want}");
            }
        }
    }
    assert_eq!(parts[4].data.iter().sum::<f64>(), kept.len() as f64, "{what}: kept");
    (all - kept.len(), all)
}

/// What is dropped is what has the lowest affinity on a device that is sent more than it can do.
#[test]
fn devices_drop_what_exceeds_their_capacity() {
    let with = |factor: f64, change: fn(&mut MoeConfig)| {
        config(|moe| {
            moe.device_capacity_factor = Some(factor);
            change(moe);
        })
    };
    let plain = |_: &mut MoeConfig| {};
    let all = [true; 3];
    let (dropped, _) = check_dropping("a device for each group", &with(1.0, plain), &[7, 1, 4], &all);
    assert!(dropped > 0);
    // 36 choices, and room for 4 on each of 4 devices.
    assert_eq!(check_dropping("less room", &with(0.45, plain), &[7, 1, 4], &all), (20, 36));
    assert_eq!(check_dropping("room for all", &with(4.0, plain), &[7, 1, 4], &all).0, 0);
    let some = [true, false, true];
    let (dropped, _) = check_dropping("an exempt sequence", &with(0.45, plain), &[7, 5, 4], &some);
    assert!(dropped > 0);
    let none = [false; 3];
    assert_eq!(check_dropping("all exempt", &with(0.1, plain), &[7, 5, 4], &none).0, 0);
    assert!(check_dropping("a sequence without tokens", &with(0.7, plain), &[3, 0, 6], &all).0 > 0);
    let across = |moe: &mut MoeConfig| (moe.n_devices, moe.topk_device) = (3, 3);
    assert!(check_dropping("devices across groups", &with(0.6, across), &[9, 3], &[true; 2]).0 > 0);
    let normed = |moe: &mut MoeConfig| {
        moe.norm_topk_prob = true;
        moe.topk_method = TopkMethod::Greedy;
    };
    assert!(check_dropping("gates that sum to one", &with(0.6, normed), &[5, 6], &[true; 2]).0 > 0);
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
