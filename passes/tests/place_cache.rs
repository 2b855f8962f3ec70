//! What is kept of a token: of the bundled models as their papers say, and of models that people make of theirs.

use std::collections::BTreeMap;

use latentc_frontend::{SpecFn, Tracer, spec, trace};
use latentc_ir::interp::{Caches, Interpreter, Precision};
use latentc_ir::tensor::{SplitMix, Tensor};
use latentc_ir::{AxisId, DType, Function, Inst, Module, Op, Size, ValueId, Weight, verify};
use latentc_models::config::ModelConfig;
use latentc_models::{Goal, trace as trace_model};
use latentc_passes::{Context, Graph, Kind, pipeline, place_cache, run};

/// The module after this pass, and after `derive`.
fn placed(module: &Module, cx: &mut Context) -> [Module; 2] {
    verify(module).unwrap_or_else(|e| panic!("{e:?}"));
    let apply = |name: &str, m: &Module, cx: &mut Context| {
        let pass = pipeline().into_iter().find(|p| p.name == name).expect("it is in the pipeline");
        pass.apply(m, cx).unwrap_or_else(|e| panic!("{e}"))
    };
    let placed = apply("place_cache", module, cx);
    verify(&placed).unwrap_or_else(|e| panic!("{e:?}\n{placed}"));
    let derived = apply("derive", &placed, cx);
    [placed, derived]
}

/// Elements that a token leaves in the caches of a function and of all that it calls.
fn elements(module: &Module, function: &str, memo: &mut BTreeMap<String, u64>) -> u64 {
    if let Some(&n) = memo.get(function) {
        return n;
    }
    let f = module.function(function).expect("a verified module has all that it calls");
    let fixed =
        |f: &Function, v| f.ty(v).axes.iter().filter_map(|&a| f.axis(a).size.fixed()).product::<u64>();
    let mut sum = f.caches.iter().map(|&c| fixed(f, c)).sum();
    for inst in &f.body {
        if let Op::Call { callee, .. } = &inst.op {
            sum += elements(module, callee, memo);
        }
    }
    memo.insert(function.to_owned(), sum);
    sum
}

fn kv_elements(name: &str, graph: Graph) -> u64 {
    let traced = trace_model(&ModelConfig::bundled(name).unwrap(), Goal::Logits, DType::Bf16).unwrap();
    let [_, derived] = placed(&traced.module, &mut Context::new(graph));
    elements(&derived, &derived.entry, &mut BTreeMap::new())
}

/// arXiv 2405.04434, table 1 and section 3.1.2: 576 a layer of 60, against 95 layers of 8 groups of keys and values.
#[test]
fn bundled_models_keep_what_their_papers_say() {
    let mut expected = BTreeMap::from([
        ("deepseek-v2", 34_560),
        ("deepseek-v2-lite", 27 * (512 + 64)),
        ("deepseek-67b", 194_560),
        ("bench-moe-0.3b", 8 * (256 + 32)),
    ]);
    for name in ModelConfig::bundled_names() {
        let want = expected.remove(name).unwrap_or_else(|| panic!("a new model, {name}: what does it keep?"));
        for graph in [Graph::Prefill, Graph::Decode] {
            assert_eq!(kv_elements(name, graph), want, "{name}");
        }
        assert_eq!(kv_elements(name, Graph::Train), 0, "{name}");
    }
    assert_eq!(expected, BTreeMap::new());
}

#[test]
fn authors_are_told_where_they_are_wrong() {
    for name in ModelConfig::bundled_names() {
        let traced = trace_model(&ModelConfig::bundled(name).unwrap(), Goal::Logits, DType::Bf16).unwrap();
        let [module, _] = placed(&traced.module, &mut Context::new(Graph::Decode));
        let asserted = traced.cached.iter().map(|c| (c.function.as_str(), c.values.as_slice()));
        assert_eq!(place_cache::compare(&module, asserted), [], "{name}");
    }
    let traced = trace("toy", DType::F32, expanded(WIDE)).unwrap();
    let [module, _] = placed(&traced.module, &mut Context::new(Graph::Decode));
    let asserted = traced.cached.iter().map(|c| (c.function.as_str(), c.values.as_slice()));
    let remarks = place_cache::compare(&module, asserted);
    let [remark] = &remarks[..] else { panic!("{remarks:?}") };
    assert_eq!(
        remark.message,
        "the author's `cache` stands before k, but the least that later tokens can be served from is c"
    );
    assert_eq!((remark.kind, remark.value.as_str()), (Kind::Warning, "c"));
    assert!(!remark.origins.is_empty());
}

#[test]
fn the_choice_is_explained() {
    let config = ModelConfig::bundled("deepseek-v2").unwrap();
    let traced = trace_model(&config, Goal::Logits, DType::Bf16).unwrap();
    let mut cx = Context::new(Graph::Decode);
    placed(&traced.module, &mut cx);
    let text: Vec<_> = cx.remarks.iter().map(ToString::to_string).collect();
    let want = "applied: place_cache: @mla c_KV, k_R models/src/deepseek_v2/attention.rs:53:15 (41) \
        models/src/deepseek_v2/attention.rs:55:15 (43)\n  \
        of each token c_KV, k_R is kept: 1152 bytes, not the 65664 of k_C, k_R, v_C\n  \
        * keep c_KV, k_R: 1.152e3 bytes a token; flops 0; bytes 1152 b t\n    \
        keep k_C, k_R, v_C: 6.566e4 bytes a token; flops 0; bytes 65664 b t\n    \
        keep h: 3.022e4 bytes a token; flops 5898240 b t; bytes 10240 b t\n";
    assert_eq!(text, [want]);
}

/// Sizes of the variants below.
#[derive(Clone, Copy)]
struct Sizes {
    /// The residual stream.
    d: u64,
    /// Heads, and elements of one.
    i: u64,
    n: u64,
    /// The latents.
    c: u64,
    /// Elements that are rotated.
    r: u64,
    /// Experts.
    e: u64,
}

/// As large as models are, where time counts, and as small as the interpreter likes.
const WIDE: Sizes = Sizes { d: 4096, i: 32, n: 128, c: 256, r: 64, e: 4 };
const SMALL: Sizes = Sizes { d: 13, i: 3, n: 4, c: 2, r: 2, e: 2 };

spec! {
    /// The plainest: keys are made of a latent, which is the value. The author is mistaken about the cache.
    fn expanded(z: Sizes)(h[t,d]) -> o[t,i,c] {
        axes { each b; t; s like t; d = z.d; i = z.i; n = z.n; c = z.c }
        weights { W_D[c,d] = "d"[c, d]; W_K[i,n,c] = "k"[i * n, c]; W_Q[i,n,d] = "q"[i * n, d]; }
        q[t,i,n] = W_Q[i,n,d] * h[t,d];
        c[t,c] = W_D[c,d] * h[t,d];
        cache k[t,i,n] = W_K[i,n,c] * c[t,c];
        P[t,i,s] = softmax[s <= t](q[t,i,n] * k[s,i,n]);
        o[t,i,c] = P[t,i,s] * c[s,c];
    }

    /// A latent on the value side only.
    fn value_latent(z: Sizes)(h[t,d]) -> o[t,i,n] {
        axes { each b; t; s like t; d = z.d; i = z.i; n = z.n; c = z.c; r = z.r }
        weights {
            W_Q[i,r,d] = "q"[i * r, d]; W_K[r,d] = "k"[r, d]; W_D[c,d] = "d"[c, d]; W_V[i,n,c] = "v"[i * n, c];
        }
        let freqs: Vec<f64> = (0..z.r / 2).map(|j| 0.5f64.powi(j as i32)).collect();
        q[t,i,r] = rope[r at t; &freqs](W_Q[i,r,d] * h[t,d]);
        k[t,r] = rope[r at t; &freqs](W_K[r,d] * h[t,d]);
        c[t,c] = rms_norm[c; 1e-6](W_D[c,d] * h[t,d]);
        v[t,i,n] = W_V[i,n,c] * c[t,c];
        P[t,i,s] = softmax[s <= t](q[t,i,r] * k[s,r]);
        o[t,i,n] = P[t,i,s] * v[s,i,n];
    }

    /// Two latents, no rotation.
    fn two_latents(z: Sizes)(h[t,d]) -> o[t,i,n] {
        axes { each b; t; s like t; d = z.d; i = z.i; n = z.n; c = z.c; a = z.c }
        weights {
            W_Q[i,n,d] = "q"[i * n, d]; W_A[a,d] = "a"[a, d]; W_C[c,d] = "c"[c, d];
            W_K[i,n,a] = "k"[i * n, a]; W_V[i,n,c] = "v"[i * n, c];
        }
        q[t,i,n] = W_Q[i,n,d] * h[t,d];
        a[t,a] = W_A[a,d] * h[t,d];
        c[t,c] = W_C[c,d] * h[t,d];
        k[t,i,n] = W_K[i,n,a] * a[t,a];
        v[t,i,n] = W_V[i,n,c] * c[t,c];
        P[t,i,s] = softmax[s <= t](q[t,i,n] * k[s,i,n]);
        o[t,i,n] = P[t,i,s] * v[s,i,n];
    }

    /// Keys are a gated mixture of what experts make of the latent; gates are zero but for one.
    fn expert_keys(z: Sizes)(h[t,d]) -> o[t,i,n] {
        axes { each b; t; s like t; d = z.d; i = z.i; n = z.n; c = z.c; e = z.e }
        weights {
            W_Q[i,n,d] = "q"[i * n, d]; W_D[c,d] = "d"[c, d]; W_G[e,d] = "g"[e, d];
            W_K[e,i,n,c] = "k"[e * i * n, c]; W_V[i,n,c] = "v"[i * n, c];
        }
        q[t,i,n] = W_Q[i,n,d] * h[t,d];
        c[t,c] = W_D[c,d] * h[t,d];
        g[t,e] = top[e; 1](softmax[e](W_G[e,d] * h[t,d]));
        k[t,i,n] = g[t,e] * W_K[e,i,n,c] * c[t,c];
        v[t,i,n] = W_V[i,n,c] * c[t,c];
        P[t,i,s] = softmax[s <= t](q[t,i,n] * k[s,i,n]);
        o[t,i,n] = P[t,i,s] * v[s,i,n];
    }

    /// A gate of a head multiplies its keys, and a key is read at two places.
    fn read_twice(z: Sizes)(h[t,d]) -> o[t,i,n] {
        axes { each b; t; s like t; d = z.d; i = z.i; n = z.n; c = z.c }
        weights {
            W_Q[i,n,d] = "q"[i * n, d]; W_D[c,d] = "d"[c, d]; W_G[i,d] = "g"[i, d]; W_K[i,n,c] = "k"[i * n, c];
        }
        q[t,i,n] = W_Q[i,n,d] * h[t,d];
        c[t,c] = W_D[c,d] * h[t,d];
        g[t,i] = sigmoid(W_G[i,d] * h[t,d]);
        k[t,i,n] = g[t,i] * W_K[i,n,c] * c[t,c];
        P[t,i,s] = softmax[s <= t](q[t,i,n] * k[s,i,n]);
        o[t,i,n] = P[t,i,s] * k[s,i,n];
    }

    /// The keys' latent is narrower than all of theirs, but the values' own cut is the wide one that both are made of.
    fn shared(z: Sizes)(h[t,d]) -> o[t,i,n] {
        axes { each b; t; s like t; d = z.d; i = z.i; n = z.n; c = z.c; m = 2 * z.c; j = 4 * z.c }
        weights {
            W_Q[i,n,d] = "q"[i * n, d]; W_M[m,d] = "m"[m, d]; W_C[c,m] = "c"[c, m];
            W_K[i,n,c] = "k"[i * n, c]; W_V[j,m] = "v"[j, m]; W_O[i,n,j] = "o"[i * n, j];
        }
        q[t,i,n] = W_Q[i,n,d] * h[t,d];
        m[t,m] = W_M[m,d] * h[t,d];
        c[t,c] = W_C[c,m] * m[t,m];
        k[t,i,n] = W_K[i,n,c] * c[t,c];
        v[t,j] = W_V[j,m] * m[t,m];
        P[t,i,s] = softmax[s <= t](q[t,i,n] * k[s,i,n]);
        w[t,i,j] = P[t,i,s] * v[s,j];
        o[t,i,n] = W_O[i,n,j] * w[t,i,j];
    }

    /// One head of keys and values for all queries (arXiv 1911.02150).
    fn multi_query(z: Sizes)(h[t,d]) -> o[t,i,r] {
        axes { each b; t; s like t; d = z.d; i = z.i; r = z.r }
        weights { W_Q[i,r,d] = "q"[i * r, d]; W_K[r,d] = "k"[r, d]; W_V[r,d] = "v"[r, d]; }
        let freqs: Vec<f64> = (0..z.r / 2).map(|j| 0.5f64.powi(j as i32)).collect();
        q[t,i,r] = rope[r at t; &freqs](W_Q[i,r,d] * h[t,d]);
        cache K[t,r] = rope[r at t; &freqs](W_K[r,d] * h[t,d]);
        cache V[t,r] = W_V[r,d] * h[t,d];
        P[t,i,s] = softmax[s <= t](q[t,i,r] * K[s,r]);
        o[t,i,r] = P[t,i,s] * V[s,r];
    }

    /// As many heads of keys and values as of queries.
    fn multi_head(z: Sizes)(h[t,d]) -> o[t,i,n] {
        axes { each b; t; s like t; d = z.d; i = z.i; n = z.n }
        weights { W_Q[i,n,d] = "q"[i * n, d]; W_K[i,n,d] = "k"[i * n, d]; W_V[i,n,d] = "v"[i * n, d]; }
        let freqs: Vec<f64> = (0..z.n / 2).map(|j| 0.5f64.powi(j as i32)).collect();
        q[t,i,n] = rope[n at t; &freqs](W_Q[i,n,d] * h[t,d]);
        cache K[t,i,n] = rope[n at t; &freqs](W_K[i,n,d] * h[t,d]);
        cache V[t,i,n] = W_V[i,n,d] * h[t,d];
        P[t,i,s] = softmax[s <= t](q[t,i,n] * K[s,i,n]);
        o[t,i,n] = P[t,i,s] * V[s,i,n];
    }

    /// What is passed in may be the cut.
    fn passed(z: Sizes)(h[t,d], c[t,c]) -> o[t,i,n] {
        axes { each b; t; s like t; d = z.d; i = z.i; n = z.n; c = z.c }
        weights { W_Q[i,n,d] = "q"[i * n, d]; W_K[i,n,c] = "k"[i * n, c]; W_V[i,n,c] = "v"[i * n, c]; }
        q[t,i,n] = W_Q[i,n,d] * h[t,d];
        k[t,i,n] = W_K[i,n,c] * c[t,c];
        v[t,i,n] = W_V[i,n,c] * c[t,c];
        P[t,i,s] = softmax[s <= t](q[t,i,n] * k[s,i,n]);
        o[t,i,n] = P[t,i,s] * v[s,i,n];
    }
}

/// What is kept of a token in a spec of one function.
fn kept<F: FnOnce(&mut Tracer)>(spec: SpecFn<F>) -> String {
    let traced = trace("toy", DType::Bf16, spec).unwrap_or_else(|e| panic!("{}", e.render()));
    let [module, derived] = placed(&traced.module, &mut Context::new(Graph::Decode));
    let f = module.entry().unwrap();
    let pasts = f.body.iter().filter(|i| matches!(i.op, Op::Past { .. }));
    let names: Vec<_> = pasts.map(|i| f.value(i.args[0]).name.as_str()).collect();
    format!("{}: {}", names.join(" "), elements(&derived, &derived.entry, &mut BTreeMap::new()))
}

/// What `stream_softmax` says of the weights of a spec of one function, in a graph after all passes.
fn streamed<F: FnOnce(&mut Tracer)>(spec: SpecFn<F>, graph: Graph) -> String {
    let traced = trace("toy", DType::Bf16, spec).unwrap_or_else(|e| panic!("{}", e.render()));
    let mut cx = Context::new(graph);
    let stages = run(&traced.module, &mut cx, &pipeline()).unwrap();
    let whole = |i: &&Inst| matches!(i.op, Op::Softmax { .. });
    let left = stages[stages.len() - 1].1.entry().unwrap().body.iter().filter(whole).count();
    let remark = cx.remarks.iter().find(|r| r.pass == "stream_softmax" && r.value == "P").expect("has one");
    assert_eq!(left, usize::from(remark.kind == Kind::Applied));
    remark.message.split_once(": ").map_or(&*remark.message, |(what, _)| what).to_owned()
}

#[test]
fn variants_stream() {
    let all = |spec: &dyn Fn(Graph) -> String, decode: &str, prefill: &str| {
        assert_eq!(spec(Graph::Decode), decode);
        assert_eq!(spec(Graph::Prefill), prefill);
        assert_eq!(spec(Graph::Train), prefill);
    };
    all(&|g| streamed(expanded(WIDE), g), "streams `s` into `o`", "streams `s` into `o`");
    all(&|g| streamed(value_latent(WIDE), g), "streams `s` into `P.c.s`", "streams `s` into `o`");
    all(&|g| streamed(two_latents(WIDE), g), "streams `s` into `P.c.s`", "streams `s` into `o`");
    all(&|g| streamed(expert_keys(WIDE), g), "streams `s` into `P.c.s`", "streams `s` into `o`");
    all(&|g| streamed(read_twice(WIDE), g), "streams `s` into `o`", "streams `s` into `o`");
    all(&|g| streamed(shared(WIDE), g), "streams `s` into `P.m.s`", "streams `s` into `o`");
    all(&|g| streamed(multi_query(WIDE), g), "streams `s` into `o`", "streams `s` into `o`");
    all(&|g| streamed(multi_head(WIDE), g), "streams `s` into `o`", "streams `s` into `o`");
    all(&|g| streamed(passed(WIDE), g), "streams `s` into `P.c.s`", "streams `s` into `o`");
}

#[test]
fn variants_profit() {
    assert_eq!(kept(expanded(WIDE)), "c: 256");
    assert_eq!(kept(value_latent(WIDE)), "k c: 320");
    assert_eq!(kept(two_latents(WIDE)), "a c: 512");
    assert_eq!(kept(expert_keys(WIDE)), "c g: 260");
    assert_eq!(kept(read_twice(WIDE)), "c g: 288");
    assert_eq!(kept(shared(WIDE)), "m: 512");
    assert_eq!(kept(multi_query(WIDE)), "K V: 128");
    assert_eq!(kept(multi_head(WIDE)), "K V: 8192");
    assert_eq!(kept(passed(WIDE)), "c: 256");
}

/// A tensor that is the same for equal names.
fn random(f: &Function, value: ValueId) -> Tensor {
    let seed = f.value(value).name.bytes().fold(1u64, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
    let mut rng = SplitMix(seed);
    let size = |a: &AxisId| match &f.axis(*a).size {
        Size::Fixed(n) => *n as usize,
        Size::Sym(s) if s == "b" => 2,
        Size::Sym(_) => 5,
    };
    let shape: Vec<_> = f.ty(value).axes.iter().map(size).collect();
    let data = (0..shape.iter().product()).map(|_: usize| rng.below(33) as f64 / 16.0 - 1.0).collect();
    Tensor { dtype: DType::F32, shape, data }
}

/// Before and after the pass, a spec computes the same of the same arguments and weights.
fn same<F: FnOnce(&mut Tracer)>(spec: SpecFn<F>) {
    let traced = trace("toy", DType::F32, spec).unwrap_or_else(|e| panic!("{}", e.render()));
    let [after, _] = placed(&traced.module, &mut Context::new(Graph::Decode));
    assert_ne!(after, traced.module);
    let run = |m: &Module| {
        let f = m.entry().unwrap();
        let args: Vec<_> = f.params.iter().map(|&p| random(f, p)).collect();
        let mut weights = |_: &str, f: &Function, w: &Weight| Ok(random(f, w.value));
        Interpreter::new(m, Precision::Exact).run(&args, &mut weights, &mut Caches::new()).unwrap()
    };
    for (x, y) in run(&traced.module).iter().zip(run(&after)) {
        y.close_to(x, 1e-9, 1e-9).unwrap_or_else(|e| panic!("{e:?}\n{after}"));
    }
}

#[test]
fn variants_mean_the_same() {
    same(expanded(SMALL));
    same(value_latent(SMALL));
    same(two_latents(SMALL));
    same(expert_keys(SMALL));
    same(read_twice(SMALL));
    same(shared(SMALL));
    same(passed(SMALL));
}
