//! Whole programs in the interpreter: sizes, calls, weights, caches, and what is refused.

use latentc_ir::{Caches, Interpreter, Module, Precision, SplitMix, Tensor, Tensors, check, expand};

/// One head of attention with a cache, in two layers. `h` are the new tokens, `t0` the number of those before.
const DECODE: &str = r#"module attend.decode entry @model

func @layer {
  axes t, s=S like t, d=6, k=4
  param h: f32[t, d=6]
  param pos: i32[t]
  weight g: f32[d=6] = "norm.weight"[d]
  weight W_Q: f32[k=4, d=6] = "q.weight"[k, d]
  weight W_K: f32[k=4, d=6] = "k.weight"[k, d]
  cache K: f32[s, k=4]
  cache V: f32[s, d=6]

  n: f32[t, d=6] = rms_norm h over d eps 1e-6
  x: f32[t, d=6] = mul n, g
  q: f32[t, k=4] = contract W_Q, x over d
  k: f32[t, k=4] = contract W_K, x over d
  Ks: f32[s, k=4] = append K, k, pos from t to s
  Vs: f32[s, d=6] = append V, x, pos from t to s
  a: f32[t, s] = contract q, Ks over k
  at: i32[s] = position of s
  past: bool[t, s] = le at, pos
  never: f32 = const -inf
  m: f32[t, s] = select past, a, never
  p: f32[t, s] = softmax m over s
  o: f32[t, d=6] = contract p, Vs over s
  y: f32[t, d=6] = add h, o
  return y
}

func @model {
  axes t, d=6
  param h: f32[t, d=6]
  param pos: i32[t]

  h1: f32[t, d=6] = call @layer(h, pos) under "layers.0"
  h2: f32[t, d=6] = call @layer(h1, pos) under "layers.1"
  return h2
}
"#;

fn module(text: &str) -> Module {
    check("test.ir", text).unwrap_or_else(|e| panic!("{}", e.render()))
}

fn weights(m: &Module) -> Tensors {
    let mut rng = SplitMix(7);
    let inventory = m.inventory().unwrap();
    let random = |t: &latentc_ir::StoredTensor| {
        let shape: Vec<_> = t.shape.iter().map(|&n| n as usize).collect();
        (t.name.clone(), Tensor::random(t.dtype, shape, &mut rng))
    };
    inventory.tensors.iter().map(random).collect()
}

fn positions(range: std::ops::Range<i64>) -> Tensor {
    let at: Vec<_> = range.collect();
    Tensor::from_i64([at.len()], &at).unwrap()
}

fn rows(x: &Tensor, range: std::ops::Range<usize>) -> Tensor {
    let n = x.shape[1];
    Tensor::new(x.dtype, [range.len(), n], x.data[range.start * n..range.end * n].to_vec()).unwrap()
}

#[test]
fn tokens_one_by_one_are_tokens_at_once() {
    let m = module(DECODE);
    let mut w = weights(&m);
    let h = Tensor::random(latentc_ir::DType::F32, [5, 6], &mut SplitMix(3));
    let interp = Interpreter::new(&m, Precision::Exact).with_size("S", 8);
    let run =
        |h: Tensor, pos, w: &mut Tensors, c: &mut Caches| interp.run(&[h, pos], w, c).unwrap().remove(0);

    let mut at_once = Caches::new();
    let all = run(h.clone(), positions(0..5), &mut w, &mut at_once);
    assert_eq!(
        at_once.keys().collect::<Vec<_>>(),
        ["layers.0.K", "layers.0.V", "layers.1.K", "layers.1.V"],
        "each layer has its own caches"
    );
    let mut stepwise = Caches::new();
    for t in 0..5 {
        let y = run(rows(&h, t..t + 1), positions(t as i64..t as i64 + 1), &mut w, &mut stepwise);
        y.close_to(&rows(&all, t..t + 1), 1e-13, 1e-13).unwrap();
    }
    for (name, cache) in &at_once {
        cache.close_to(&stepwise[name], 1e-13, 1e-13).unwrap();
    }
    // A run of no tokens changes nothing.
    let before = stepwise.clone();
    let y = run(rows(&h, 0..0), positions(0..0), &mut w, &mut stepwise);
    assert_eq!((y.shape, stepwise), (vec![0, 6], before));
}

#[test]
fn composites_are_their_definitions() {
    let m = module(DECODE);
    let expanded = expand(&m);
    latentc_ir::verify(&expanded).unwrap_or_else(|e| panic!("{e:?}\n{expanded}"));
    assert!(!expanded.to_string().contains("softmax"), "{expanded}");
    let mut w = weights(&m);
    let args = [Tensor::random(latentc_ir::DType::F32, [5, 6], &mut SplitMix(3)), positions(2..7)];
    let mut run = |m: &Module| {
        Interpreter::new(m, Precision::Exact)
            .with_size("S", 8)
            .run(&args, &mut w, &mut Caches::new())
            .unwrap()
    };
    run(&m)[0].close_to(&run(&expanded)[0], 1e-13, 1e-13).unwrap();

    let rows = |axis: &str| {
        format!(
            "module c entry @main\n\nfunc @main {{\n  axes i=3, {axis}\n  param x: f32[i, d]\n\n  \
             P: f32[i, d] = softmax x over d\n  N: f32[i, d] = rms_norm x over d eps 1e-6\n  return P, N\n}}\n"
        )
    };
    let inf = f64::INFINITY;
    let x = Tensor::new(latentc_ir::DType::F32, [3, 2], vec![-inf, -inf, 0.5, -inf, 1.0, 3.0]).unwrap();
    for m in [
        module(&rows("d=2").replace("d]", "d=2]").replace("[i", "[i=3")),
        module(&rows("d").replace("[i", "[i=3")),
    ] {
        let mut none = Tensors::new();
        let mut run = |m: &Module| {
            let args = std::slice::from_ref(&x);
            Interpreter::new(m, Precision::Exact).run(args, &mut none, &mut Caches::new()).unwrap()
        };
        let (ours, theirs) = (run(&m), run(&expand(&m)));
        for (a, b) in ours.iter().zip(&theirs) {
            a.close_to(b, 1e-14, 1e-14).unwrap();
        }
        assert_eq!(ours[0].data[..4], [0.0, 0.0, 1.0, 0.0]);
    }
}

#[test]
fn what_disagrees_is_named() {
    let m = module(DECODE);
    let mut w = weights(&m);
    let interp = Interpreter::new(&m, Precision::Exact);
    let h = |t| Tensor::zeros(latentc_ir::DType::F32, [t, 6]);
    let mut refused = |interp: &Interpreter<'_>, args: &[Tensor], message: &str| {
        let error = interp.run(args, &mut w, &mut Caches::new()).unwrap_err();
        assert_eq!(error.to_string(), message);
    };
    refused(&interp, &[h(2)], "@model: 1 arguments for 2 parameters");
    refused(&interp, &[h(2), positions(0..3)], "@model: pos: axis `t` has size t = 2, the tensor 3");
    let wide = Tensor::zeros(latentc_ir::DType::F32, [2, 7]);
    refused(&interp, &[wide, positions(0..2)], "@model: h: axis `d` has size 6, the tensor 7");
    let flat = Tensor::zeros(latentc_ir::DType::F32, [12]);
    refused(&interp, &[flat, positions(0..2)], "@model: h: a tensor of shape [12] for f32[t, d=6]");
    refused(
        &interp,
        &[h(2), positions(0..2)],
        "@layer: K: nothing binds the size `S` of axis `s`; see with_size",
    );
    refused(
        &interp.clone().with_size("S", 4),
        &[h(2), positions(3..5)],
        "@layer: Ks: the position 4 along `t` is outside the cache's capacity 4 along `s`",
    );
    w.remove("layers.1.q.weight");
    let error = interp.with_size("S", 4).run(&[h(2), positions(0..2)], &mut w, &mut Caches::new());
    assert_eq!(error.unwrap_err().to_string(), "@layer: W_Q: the checkpoint has no \"layers.1.q.weight\"");
}
