//! The macro is sugar: the same function in plain Rust gives the same dump, and means what loops mean.

use latentc_frontend::expr::{
    Along, AxisDecl, Equation, Expr, Extent, Name, Target, WeightDecl, apply, num, target, val,
};
use latentc_frontend::{DType, SpecFn, Tracer, spec, trace};
use latentc_ir::{Caches, Interpreter, Module, Precision, SplitMix, Tensor, Tensors};

spec! {
    fn attention(width: usize)(h[t,d]) -> u[t,k] {
        axes { each b; t; s like t; d = width; k = width / 2 }
        weights { W[k,d] = "q_proj.weight"[k, d]; }
        q[t,k] = W[k,d] * h[t,d] @1;
        P[t,s] = softmax[s <= t](q[t,k] * q[s,k] / sqrt(k));
        u[t,k] = P[t,s] * q[s,k];
    }
}

fn built(width: usize) -> SpecFn<impl FnOnce(&mut Tracer)> {
    let axis = |name: &str, extent, each| AxisDecl { name: Name::here(name), extent, each };
    let equation = |target: Target, value: Expr, tag: Option<&str>| Equation {
        target,
        value,
        tag: tag.map(str::to_owned),
        cached: false,
    };
    let body = move |t: &mut Tracer| {
        t.axis(axis("b", Extent::Runtime, true));
        t.axis(axis("t", Extent::Runtime, false));
        t.axis(axis("s", Extent::Like(Name::here("t")), false));
        t.axis(axis("d", width.into(), false));
        t.axis(axis("k", (width / 2).into(), false));
        t.weight(WeightDecl {
            target: target("W", ["k", "d"]),
            tensor: Name::here("q_proj.weight"),
            dims: vec![vec![vec![Name::here("k")]], vec![vec![Name::here("d")]]],
        });
        t.equation(equation(target("q", ["t", "k"]), val("W", ["k", "d"]) * val("h", ["t", "d"]), Some("1")));
        let scores = val("q", ["t", "k"]) * val("q", ["s", "k"]) / num((width / 2) as f64).sqrt();
        let mask = Along::UpTo(Name::here("s"), Name::here("t"));
        t.equation(equation(target("P", ["t", "s"]), apply("softmax", [mask], [], [scores]), None));
        t.equation(equation(target("u", ["t", "k"]), val("P", ["t", "s"]) * val("q", ["s", "k"]), None));
    };
    SpecFn::new(Name::here("attention"), vec![target("h", ["t", "d"])], vec![target("u", ["t", "k"])], body)
}

trait Sqrt {
    fn sqrt(self) -> Expr;
}
impl Sqrt for Expr {
    fn sqrt(self) -> Expr {
        apply("sqrt", [], [], [self])
    }
}

/// The dump without the places, which differ.
fn placeless(mut module: Module) -> String {
    for f in &mut module.functions {
        f.source.clear();
        for inst in &mut f.body {
            for o in &mut inst.origins {
                (o.file, o.line, o.col) = ("spec.rs".to_owned(), 1, 1);
            }
        }
    }
    module.to_string()
}

#[test]
fn macro_and_builder_agree() {
    let written = trace("test", DType::F32, attention(8)).unwrap().module;
    let built = trace("test", DType::F32, built(8)).unwrap().module;
    assert_eq!(placeless(written), placeless(built));
}

#[test]
fn means_what_loops_mean() {
    let (b, t, d, k) = (2, 5, 8, 4);
    let mut rng = SplitMix(7);
    let h = Tensor::random(DType::F32, [b, t, d], &mut rng);
    let w = Tensor::random(DType::F32, [k, d], &mut rng);
    let module = trace("test", DType::F32, attention(d)).unwrap().module;
    let mut weights = Tensors::from([("q_proj.weight".to_owned(), w.clone())]);
    let got = Interpreter::new(&module, Precision::Exact)
        .run(std::slice::from_ref(&h), &mut weights, &mut Caches::new())
        .unwrap()
        .remove(0);

    let mut want = Tensor::zeros(DType::F32, [b, t, k]);
    for b in 0..b {
        let q = |t: usize, k: usize| -> f64 {
            (0..d).map(|d| w.at(&[k, d]).unwrap() * h.at(&[b, t, d]).unwrap()).sum()
        };
        for now in 0..t {
            let score =
                |s: usize| -> f64 { (0..k).map(|k| q(now, k) * q(s, k)).sum::<f64>() / (k as f64).sqrt() };
            let all: f64 = (0..=now).map(|s| score(s).exp()).sum();
            for j in 0..k {
                want.data[(b * t + now) * k + j] = (0..=now).map(|s| score(s).exp() / all * q(s, j)).sum();
            }
        }
    }
    got.close_to(&want, 1e-12, 1e-12).unwrap();
}
