//! Each rule of the language by a small spec and the whole dump that it makes.

use latentc_frontend::{DType, SpecFn, Tracer, spec, trace};
use latentc_ir::{parse, verify};

/// The dump of a spec, which verifies and reads back as the same module.
fn dump<F: FnOnce(&mut Tracer)>(spec: SpecFn<F>) -> String {
    let traced = trace("test", DType::Bf16, spec).unwrap_or_else(|e| panic!("{}", e.render()));
    verify::verify(&traced.module).unwrap_or_else(|e| panic!("{e:?}\n{}", traced.module));
    let text = traced.module.to_string();
    assert_eq!(parse::parse("test", &text).unwrap(), traced.module);
    text
}

macro_rules! rules {
    ($($name:ident: $call:expr;)*) => { $(
        #[test]
        fn $name() {
            insta::assert_snapshot!(dump($call));
        }
    )* };
}

rules! {
    shared_index_is_summed: product();
    each_term_has_its_own_sum: terms();
    functions_work_along: along();
    numbers_fold: numbers();
    renames_by_position: renames();
    past_and_mask: attention();
    groups_split_and_merge: groups();
    values_as_indices: gathers();
    an_axis_is_folded: folds();
    rounded_once: rounding();
    top_k: tops();
    turned_by_position: rotation();
    calls_share_functions: layers();
    rust_around_equations: control(Some(3));
    defined_again: again();
}

spec! {
    /// One contraction, however many factors; the batch is carried unwritten.
    fn product()(x[t,d], y[t,d]) -> z[t,c] {
        axes { each b; t; c = 4; d = 8 }
        weights { W[c,d] = "w.weight"[c, d]; }
        z[t,c] = 2 * W[c,d] * x[t,d] * y[t,d] / sqrt(d)  @7;
    }

    fn terms()(x[t,d], y[t,d]) -> z[t] {
        axes { each b; t; d = 8 }
        z[t] = x[t,d] * y[t,d] - x[t,d] * x[t,d] + 1;
    }

    /// The sum over `d` happens inside, where both uses are; `c` is kept for the norm.
    fn along()(x[t,d]) -> z[t,c] {
        axes { each b; t; c = 4; d = 8 }
        weights { W[c,d] = "w.weight"[c, d]; g[c] = "g.weight"[c]; }
        z[t,c] = g[c] * rms_norm[c; 1e-6](silu(W[c,d] * x[t,d]));
    }

    fn numbers()(x[t,d]) -> (y[t,d], z[t,d]) {
        axes { each b; t; d = 16 }
        y[t,d] = 1 * x[t,d] * {0.5 * 4.0} / sqrt(d + 0);
        z[t,d] = -(1 / x[t,d]) + d;
    }

    /// `k` is as long as `i`, so a value over `i` may be read over `k`; the renamed value is made once.
    fn renames()(x[t,i]) -> (y[t,i,k], z[t,i,k]) {
        axes { each b; t; i = 4; k = 4 }
        y[t,i,k] = x[t,i] * x[t,k];
        z[t,i,k] = x[t,i] - x[t,k];
    }

    fn attention()(q[t,k], v[t,k]) -> o[t,k] {
        axes { each b; t; s like t; k = 4 }
        P[t,s] = softmax[s <= t](q[t,k] * v[s,k]);
        o[t,k] = P[t,s] * v[s,k];
    }

    fn groups()(x[t,e]) -> y[t,e] {
        axes { each b; t; e = 6; g = 2; j = 3 }
        best[t,g]       = max[j](x[t,(g,j)]);
        y[t,(g,j) as e] = x[t,(g,j)] - best[t,g];
    }

    fn gathers()(tok[t]: i32, at[q]: i32, pick[t]: i32) -> (x[t,d], last[q,d], one[t]) {
        axes { each b; t; q; v = 9; d = 4 }
        weights { W[v,d] = "embed.weight"[v, d]; }
        x[t,d]    = W[tok[t], d];
        last[q,d] = x[at[q], d];
        one[t]    = x[t, pick[t]];
    }

    fn folds()(x[t,d], w[t]) -> (y[t], z[t], ratio[t], all) {
        axes { each b; t; d = 4 }
        ratio[t] = sum[d](w[t] / x[t,d]);
        y[t] = sum[d](x[t,d]) + max[d](x[t,d]) + logsumexp[d](x[t,d]);
        z[t] = sum[d](exp(x[t,d]) * w[t]);
        all  = sum[t](w[t]);
    }

    /// On the way nothing is rounded below f32; the result is the model's unless the author says otherwise.
    fn rounding()(x[t,d]) -> (y[t,d]: f32, z[t,d], same[t]: bool) {
        axes { each b; t; d = 4 }
        y[t,d]: f32 = exp(x[t,d]) + 1;
        z[t,d]      = y[t,d];
        same[t]     = max[d](x[t,d]) == max[d](z[t,d]) && !(max[d](x[t,d]) > 0);
    }

    fn tops()(x[t,e]) -> (y[t,e], z[t,e]) {
        axes { each b; t; e = 8 }
        y[t,e] = top[e; 2](x[t,e]);
        z[t,e] = select(in_top[e; 3](x[t,e]), x[t,e], 1);
    }

    fn rotation()(q[t,i,r], k[t,r]) -> (x[t,i,r], y[t,r]) {
        axes { each b; t; i = 2; r = 4 }
        x[t,i,r] = rope[r at t; [1.0, 0.5].as_slice()](q[t,i,r]);
        y[t,r]   = rope_halves[r at t; vec![1.0, 0.5]](k[t,r]);
    }

    fn layer(width: usize)(x[t,d]) -> y[t,d] {
        axes { each b; t; d = 4; f = width }
        weights { W[f,d] = "up.weight"[f, d]; V[d,f] = "down.weight"[d, f]; }
        y[t,d] = x[t,d] + W[f,d] * V[d,f];
    }

    fn layers()(x[t,d]) -> x[t,d] {
        axes { each b; t; d = 4 }
        for l in 0..3 {
            x[t,d] = call layer(if l == 1 { 16 } else { 8 })(x[t,d]) in format!("layers.{l}");
        }
    }

    fn control(rank: Option<usize>)(x[t,d]) -> y[t,d] {
        axes { each b; t; d = 4 }
        let double = 2.0;
        if let Some(rank) = rank {
            axes { p = rank }
            weights { A[p,d] = "a.weight"[p, d]; }
            c[t,p] = A[p,d] * x[t,d];
            y[t,d] = A[p,d] * c[t,p] * {double};
        } else {
            y[t,d] = x[t,d];
        }
    }

    fn again()(x[t]) -> y[t] {
        axes { each b; t }
        y[t] = x[t] + 1;
        y[t] = y[t] * y[t];
    }
}

/// The author's assertions come back beside the module.
#[test]
fn cache_is_an_assertion() {
    spec! {
        fn f()(h[t,d]) -> y[t,d] {
            axes { each b; t; d = 4 }
            cache k[t,d] = exp(h[t,d]);
            y[t,d] = k[t,d] + 1;
        }
    }
    let traced = trace("test", DType::F32, f()).unwrap();
    assert_eq!(traced.cached.len(), 1);
    assert_eq!(
        (traced.cached[0].function.as_str(), &traced.cached[0].values[..]),
        ("f", &["k".to_owned()][..])
    );
}

rules! {
    stated_here: stated();
    a_number_for_each: tables();
}

spec! {
    fn stated()(x[t,d]) -> z[t,d] {
        state layer(8);
        z[t,d] = 2 * y[t,d];
    }

    fn tables()(x[t,d]) -> y[t,d] {
        axes { each b; t; d = 2 }
        y[t,d] = x[t,d] * table[d; vec![0.5, 2.0]]();
    }
}
