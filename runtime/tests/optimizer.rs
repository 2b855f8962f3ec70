//! The optimiser's programs against its equations in f64, for several steps on tensors of several shapes.

use latentc_codegen::host::Host;
use latentc_ir::tensor::SplitMix;
use latentc_runtime::engine::Engine;
use latentc_runtime::gradient::Tensor;
use latentc_runtime::optimizer::{AdamW, Moments, Optimizer};

fn random(shape: &[usize], scale: f64, rng: &mut SplitMix) -> Tensor {
    let number = |_| ((rng.below(1 << 20) as f64 / f64::from(1 << 19) - 1.0) * scale) as f32;
    Tensor { shape: shape.to_vec(), data: (0..shape.iter().product()).map(number).collect() }
}

fn close(made: f32, want: f64) {
    assert!((f64::from(made) - want).abs() <= 1e-6 * want.abs().max(0.3), "{made}, not {want}");
}

#[test]
fn four_steps_of_adamw_under_clipping() {
    let mut engine = Engine::new(Host);
    let optimizer = Optimizer::new(&mut engine).expect("memory");
    let with = AdamW { rate: 3e-3, beta1: 0.8, beta2: 0.9, decay: 0.2, most: 0.5 };
    let mut rng = SplitMix(7);
    let shapes: [&[usize]; 5] = [&[3, 5], &[7], &[1, 1], &[], &[2, 3, 4]];
    let mut weights: Vec<Tensor> = shapes.iter().map(|s| random(s, 1.0, &mut rng)).collect();
    let mut moments: Vec<Moments> = weights.iter().map(|w| Moments::new(w.data.len())).collect();
    // The same in f64: weight, mean, mean of squares.
    let wide = |t: &Tensor| t.data.iter().map(|&x| [f64::from(x), 0.0, 0.0]).collect::<Vec<_>>();
    let mut plain: Vec<Vec<[f64; 3]>> = weights.iter().map(wide).collect();
    for step in 1..=4 {
        // The first gradients are small, so that nothing is clipped.
        let scale = if step == 1 { 0.01 } else { 1.0 };
        let gradients: Vec<Tensor> = shapes.iter().map(|s| random(s, scale, &mut rng)).collect();
        let clipping = optimizer.clipping(&mut engine, &gradients, with.most).expect("it runs");
        let squares = gradients.iter().flat_map(|g| &g.data).map(|&g| f64::from(g) * f64::from(g));
        let norm = squares.sum::<f64>().sqrt();
        let coef = (with.most / (norm + 1e-6)).min(1.0);
        assert_eq!(coef == 1.0, step == 1);
        close(clipping.norm, norm);
        close(clipping.coef, coef);
        for n in 0..shapes.len() {
            let given = (weights[n].data.clone(), gradients[n].data.clone(), moments[n].clone());
            let (p, next) = optimizer.step(&mut engine, &with, step, clipping.coef, given).expect("it runs");
            for (k, [p, m, v]) in plain[n].iter_mut().enumerate() {
                let g = f64::from(gradients[n].data[k]) * coef;
                *m = with.beta1 * *m + (1.0 - with.beta1) * g;
                *v = with.beta2 * *v + (1.0 - with.beta2) * g * g;
                let m_hat = *m / (1.0 - with.beta1.powi(step as i32));
                let v_hat = *v / (1.0 - with.beta2.powi(step as i32));
                *p = *p * (1.0 - with.rate * with.decay) - with.rate * m_hat / (v_hat.sqrt() + 1e-8);
            }
            for (k, [want, m, v]) in plain[n].iter().enumerate() {
                close(p[k], *want);
                close(next.m[k], *m);
                close(next.v[k], *v);
            }
            (weights[n].data, moments[n]) = (p, next);
        }
    }
}

#[test]
fn no_gradient_has_the_norm_0() {
    let mut engine = Engine::new(Host);
    let optimizer = Optimizer::new(&mut engine).expect("memory");
    let empty = Tensor { shape: vec![0, 3], data: vec![] };
    let zeros = Tensor { shape: vec![2], data: vec![0.0; 2] };
    let clipping = optimizer.clipping(&mut engine, [&empty, &zeros], 1.0).expect("it runs");
    assert_eq!((clipping.norm, clipping.coef), (0.0, 1.0));
    let given = (vec![2.0, -2.0], zeros.data, Moments::new(2));
    let (p, _) = optimizer.step(&mut engine, &AdamW::default(), 1, 1.0, given).expect("it runs");
    // A weight without a gradient decays all the same.
    assert_eq!(p, [2.0 * 0.9999f32, -2.0 * 0.9999]);
}
