//! The optimiser's programs against its equations in f64, for several steps.

use std::sync::Arc;

use latentc_codegen::host::Host;
use latentc_ir::tensor::SplitMix;
use latentc_runtime::engine::Engine;
use latentc_runtime::optimizer::{AdamW, Optimizer, PART, State};
use latentc_runtime::places::COLUMNS;

fn random(len: usize, scale: f64, rng: &mut SplitMix) -> Vec<f32> {
    (0..len).map(|_| ((rng.below(1 << 20) as f64 / f64::from(1 << 19) - 1.0) * scale) as f32).collect()
}

fn close(made: f32, want: f64) {
    assert!((f64::from(made) - want).abs() <= 1e-6 * want.abs().max(0.3), "{made}, not {want}");
}

#[test]
fn four_steps_of_adamw_under_clipping() {
    let mut engine = Engine::new(Host::new());
    let optimizer = Optimizer::new(&mut engine).expect("memory");
    let with = AdamW { rate: 3e-3, beta1: 0.8, beta2: 0.9, decay: 0.2, most: 0.5 };
    let mut rng = SplitMix(7);
    let len = 3 * COLUMNS;
    let mut state = State::new(random(len, 1.0, &mut rng));
    // The same in f64: weight, mean, mean of squares.
    let mut plain: Vec<[f64; 3]> = state.p.iter().map(|&x| [f64::from(x), 0.0, 0.0]).collect();
    for step in 1..=4 {
        // The first gradients are small, so that nothing is clipped.
        let gradient = Arc::new(random(len, if step == 1 { 1e-3 } else { 1.0 }, &mut rng));
        let clipping = optimizer.clipping(&mut engine, &gradient, with.most).expect("it runs");
        let norm = gradient.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>().sqrt();
        let coef = (with.most / (norm + 1e-6)).min(1.0);
        assert_eq!(coef == 1.0, step == 1);
        close(clipping.norm, norm);
        close(clipping.coef, coef);
        optimizer.step(&mut engine, &with, &mut state, &gradient, clipping.coef).expect("it runs");
        assert_eq!(state.steps, step);
        for (k, [p, m, v]) in plain.iter_mut().enumerate() {
            let g = f64::from(gradient[k]) * coef;
            *m = with.beta1 * *m + (1.0 - with.beta1) * g;
            *v = with.beta2 * *v + (1.0 - with.beta2) * g * g;
            let m_hat = *m / (1.0 - with.beta1.powi(step as i32));
            let v_hat = *v / (1.0 - with.beta2.powi(step as i32));
            *p = *p * (1.0 - with.rate * with.decay) - with.rate * m_hat / (v_hat.sqrt() + 1e-8);
            close(state.p[k], *p);
            close(state.m[k], *m);
            close(state.v[k], *v);
        }
    }
}

#[test]
fn no_gradient_has_the_norm_0() {
    let mut engine = Engine::new(Host::new());
    let optimizer = Optimizer::new(&mut engine).expect("memory");
    for len in [0, COLUMNS] {
        let zeros = Arc::new(vec![0.0; len]);
        let clipping = optimizer.clipping(&mut engine, &zeros, 1.0).expect("it runs");
        assert_eq!((clipping.norm, clipping.coef), (0.0, 1.0));
        let mut state = State::new(vec![2.0; len]);
        optimizer.step(&mut engine, &AdamW::default(), &mut state, &zeros, 1.0).expect("it runs");
        // A weight without a gradient decays all the same.
        assert_eq!(*state.p, vec![2.0 * 0.9999f32; len]);
    }
}

#[test]
fn parts_are_moved_as_the_whole_would_be() {
    let mut engine = Engine::new(Host::new());
    let optimizer = Optimizer::new(&mut engine).expect("memory");
    let (len, with) = (PART + 2 * COLUMNS, AdamW::default());
    let gradient = Arc::new(vec![0.5; len]);
    let clipping = optimizer.clipping(&mut engine, &gradient, with.most).expect("it runs");
    close(clipping.norm, 0.5 * (len as f64).sqrt());
    let mut state = State::new(vec![1.0; len]);
    optimizer.step(&mut engine, &with, &mut state, &gradient, clipping.coef).expect("it runs");
    // All parameters were alike, and so they are.
    close(state.p[0], 1.0 - with.rate * with.decay - with.rate);
    for array in [&state.p, &state.m, &state.v] {
        assert!(array.len() == len && array.iter().all(|x| *x == array[0]));
    }
    let wrong = optimizer.step(&mut engine, &with, &mut state, &Arc::new(gradient[1..].to_vec()), 1.0);
    assert!(wrong.is_err_and(|e| e.to_string().contains("are not of the same parameters")));
}
