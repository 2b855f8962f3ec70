//! Models that people make of theirs: a gate is found wherever it stands, and only what it lets through is computed.

use latentc_frontend::{SpecFn, Tracer, spec, trace};
use latentc_ir::{DType, Function, Module, Op, cost};
use latentc_passes::validate::{Numbers, Verdict, compare};
use latentc_passes::{Context, Graph, Remark, pipeline};

/// Sizes of the variants.
#[derive(Clone, Copy)]
struct Sizes {
    /// The residual stream.
    d: u64,
    /// Heads and elements of one, or experts and what is inside of one.
    e: u64,
    f: u64,
    /// Experts of an expert, and what is inside of one.
    i: u64,
    n: u64,
    /// How many are open.
    k: u64,
}

const SIZES: Sizes = Sizes { d: 64, e: 16, f: 24, i: 8, n: 12, k: 2 };

spec! {
    /// Mixture of attention heads (arXiv 2210.05144): each token asks with the heads that its gate opens, keys and values are
    /// those of all.
    fn heads(z: Sizes)(h[t,d]) -> o[t,d] {
        axes { each b; t; s like t; d = z.d; e = z.e; n = z.n }
        weights {
            W_G[e,d] = "gate"[e, d]; W_Q[e,n,d] = "{e}.q"[n, d]; W_O[e,d,n] = "{e}.o"[d, n];
            W_K[n,d] = "k"[n, d]; W_V[n,d] = "v"[n, d];
        }
        g[t,e]   = top[e; z.k](softmax[e](W_G[e,d] * h[t,d]));
        q[t,e,n] = W_Q[e,n,d] * h[t,d];
        k[t,n]   = W_K[n,d] * h[t,d];
        v[t,n]   = W_V[n,d] * h[t,d];
        P[t,e,s] = softmax[s <= t](q[t,e,n] * k[s,n]);
        a[t,e,n] = P[t,e,s] * v[s,n];
        o[t,d]   = g[t,e] * W_O[e,d,n] * a[t,e,n];
    }

    /// Gates that sum to one, and a score that is not what is multiplied with.
    fn renormalised(z: Sizes)(h[t,d]) -> o[t,d] {
        axes { each b; t; d = z.d; e = z.e; f = z.f }
        weights { W_G[e,d] = "gate"[e, d]; W_1[e,f,d] = "{e}.up"[f, d]; W_2[e,d,f] = "{e}.down"[d, f]; }
        s[t,e] = sigmoid(W_G[e,d] * h[t,d]);
        g[t,e] = top[e; z.k](s[t,e]);
        g[t,e] = g[t,e] / (sum[e](g[t,e]) + 1e-20);
        u[t,e,f] = tanh(W_1[e,f,d] * h[t,d]);
        o[t,d] = g[t,e] * W_2[e,d,f] * u[t,e,f];
    }

    /// Experts that are mixtures of experts themselves.
    fn nested(z: Sizes)(h[t,d]) -> o[t,d] {
        axes { each b; t; d = z.d; e = z.e; i = z.i; f = z.f }
        weights {
            W_G[e,d] = "gate"[e, d]; W_H[e,i,d] = "{e}.gate"[i, d];
            W_1[e,i,f,d] = "{e}.{i}.up"[f, d]; W_2[e,i,d,f] = "{e}.{i}.down"[d, f];
        }
        g[t,e]     = top[e; z.k](softmax[e](W_G[e,d] * h[t,d]));
        r[t,e,i]   = top[i; 1](softmax[i](W_H[e,i,d] * h[t,d]));
        u[t,e,i,f] = silu(W_1[e,i,f,d] * h[t,d]);
        y[t,e,d]   = r[t,e,i] * W_2[e,i,d,f] * u[t,e,i,f];
        o[t,d]     = g[t,e] * y[t,e,d];
    }
}

/// The module before and after the pass, and what was said.
fn routed<F: FnOnce(&mut Tracer)>(spec: SpecFn<F>) -> (Module, Module, Vec<Remark>) {
    let traced = trace("toy", DType::F32, spec).unwrap_or_else(|e| panic!("{}", e.render()));
    let mut cx = Context::new(Graph::Decode);
    let mut before = traced.module;
    for pass in pipeline() {
        let after = pass.apply(&before, &mut cx).unwrap_or_else(|e| panic!("{e}"));
        if pass.name == "route" {
            for seed in 0..4 {
                assert_eq!(compare(&before, &after, seed, Numbers::Reals), Verdict::Same, "{after}");
            }
            cx.remarks.retain(|r| r.pass == "route");
            return (before, after, cx.remarks);
        }
        before = after;
    }
    unreachable!("it is in the pipeline")
}

/// Rows of weights that are gathered, by weight.
fn gathered(m: &Module) -> Vec<&str> {
    let f: &Function = m.entry().expect("an entry");
    let gathers = f.body.iter().filter(|i| matches!(i.op, Op::Gather { .. }));
    let weights = gathers.filter(|i| f.weights.iter().any(|w| w.value == i.args[0]));
    weights.map(|i| f.value(i.args[0]).name.as_str()).collect()
}

/// Operations for a token that looks back on itself only, of a module without what nothing needs.
fn operations(m: &Module) -> i128 {
    let simplify = pipeline().into_iter().find(|p| p.name == "simplify").expect("a pass");
    let swept = simplify.apply(m, &mut Context::new(Graph::Decode)).expect("it always applies");
    let total = cost(&swept, &swept.entry).expect("no calls that are missing").total;
    total.flops.eval(&["b", "t", "s"].map(|s| (s.to_owned(), 1)).into()).expect("no other sizes")
}

/// Operations for a token of two products with weights of so many elements: by the first each is multiplied and added up, the
/// second multiplies by the gate as well.
fn products(elements: i128) -> i128 {
    (2 + 4) * elements
}

#[test]
fn heads_that_a_gate_opens() {
    let (before, after, remarks) = routed(heads(SIZES));
    assert_eq!(remarks.len(), 1);
    assert_eq!(gathered(&after), ["W_O", "W_Q"]);
    // Two heads' queries and results of 16; the gate, the key and the value are as dear as before.
    let all = products(16 * 12 * 64);
    assert_eq!((operations(&before) / 1000, operations(&after) / 1000), (79, 14));
    assert!(operations(&before) - operations(&after) >= all - all / 8);
}

#[test]
fn gates_that_are_scaled_to_one() {
    let (before, after, remarks) = routed(renormalised(SIZES));
    assert_eq!(remarks.len(), 1);
    assert_eq!(gathered(&after), ["W_2", "W_1"]);
    let all = products(16 * 24 * 64);
    assert_eq!((operations(&before) / 1000, operations(&after) / 1000), (149, 20));
    assert!(operations(&before) - operations(&after) >= all - all / 8);
}

#[test]
fn gates_under_gates() {
    let (before, after, remarks) = routed(nested(SIZES));
    assert_eq!(remarks.len(), 2, "the sum of experts, and in it the sum of theirs");
    let twice = gathered(&after);
    assert!(twice.contains(&"W_2") && twice.contains(&"W_1") && twice.contains(&"W_H"), "{twice:?}\n{after}");
    // Of 16 times 8, two times one.
    let all = products(16 * 8 * 24 * 64);
    assert_eq!((operations(&before) / 1000, operations(&after) / 1000), (1204, 23));
    assert!(operations(&before) - operations(&after) >= all - all / 64);
}
