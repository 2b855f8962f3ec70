//! Each mistake of an author by the message that it must give.

use latentc_frontend::{DType, Diagnostic, SpecError, SpecFn, Spot, Tracer, spec, trace};

/// The rendered errors, without the fixed part of the path.
fn message<F: FnOnce(&mut Tracer)>(spec: SpecFn<F>) -> String {
    match trace("test", DType::Bf16, spec) {
        Ok(traced) => panic!("traced:\n{}", traced.module),
        Err(error) => error.render(),
    }
}

macro_rules! mistakes {
    ($($name:ident;)*) => { $(
        #[test]
        fn $name() {
            insta::assert_snapshot!(stringify!($name), message(specs::$name()));
        }
    )* };
}

mistakes! {
    sizes_differ; too_few_indices; unknown_value; unknown_axis; only_on_the_left; forgotten_index; two_readings;
    unknown_function; misused_function; operand_lacks_axis; k_too_large; odd_frequencies; mask_of_strangers;
    axis_redeclared; runtime_size; empty_axis; groups_do_not_multiply; unknown_dtype; wrong_kind; missing_result;
    result_differs; weight_not_stored; weight_stored_twice; weight_with_foreign_axis; call_with_too_few;
    call_with_wrong_size; call_result_differs; call_of_expression; redefined; batch_written; summed_quotient; float_index;
    twice_on_the_left; bool_times_float; axis_kept_by_nobody; one_cause_one_error; square_transpose; endless;
}

mod specs {
    use super::*;

    spec! {
        pub(super) fn sizes_differ()(h[t,p]) -> k[t,i] {
            axes { each b; t; p = 1536; c = 512; i = 16 }
            weights { W[i,c] = "w"[i, c]; }
            k[t,i] = W[i,c] * h[t,c];
        }
        pub(super) fn too_few_indices()(h[t,d]) -> k[t] {
            axes { each b; t; d = 4 }
            k[t] = h[t];
        }
        pub(super) fn unknown_value()(h[t]) -> k[t] {
            axes { each b; t }
            k[t] = h[t] * H[t];
        }
        pub(super) fn unknown_axis()(h[t]) -> k[t] {
            axes { each b; t }
            k[t] = h[x];
        }
        pub(super) fn only_on_the_left()(h[t]) -> k[t,d] {
            axes { each b; t; d = 4 }
            k[t,d] = h[t];
        }
        pub(super) fn forgotten_index()(h[t,d]) -> k[t] {
            axes { each b; t; d = 4 }
            k[t] = 2 * h[t,d];
        }
        pub(super) fn two_readings()(h[t,d]) -> k[t,f] {
            axes { each b; t; d = 4; f = 8 }
            weights { A[f,d] = "a"[f, d]; B[f,d] = "b"[f, d]; }
            k[t,f] = silu(A[f,d] * h[t,d]) * (B[f,d] * h[t,d]);
        }
        pub(super) fn unknown_function()(h[t]) -> k[t] {
            axes { each b; t }
            k[t] = gelu(h[t]);
        }
        pub(super) fn misused_function()(h[t,d]) -> k[t,d] {
            axes { each b; t; d = 4 }
            k[t,d] = rms_norm[d](h[t,d]);
        }
        pub(super) fn operand_lacks_axis()(h[t,d]) -> k[t,d] {
            axes { each b; t; d = 4; e = 3 }
            k[t,d] = h[t,d] - max[e](h[t,d]);
        }
        pub(super) fn k_too_large()(h[t,d]) -> k[t,d] {
            axes { each b; t; d = 4 }
            k[t,d] = top[d; 6](h[t,d]);
        }
        pub(super) fn odd_frequencies()(h[t,d]) -> k[t,d] {
            axes { each b; t; d = 4 }
            k[t,d] = rope[d at t; vec![1.0, 0.1, 0.01]](h[t,d]);
        }
        pub(super) fn mask_of_strangers()(h[t], g[u]) -> k[t,u] {
            axes { each b; t; u }
            k[t,u] = softmax[u <= t](h[t] * g[u]);
        }
        pub(super) fn axis_redeclared()(h[t,d]) -> k[t,d] {
            axes { each b; t; d = 4 }
            axes { d = 5 }
            k[t,d] = h[t,d];
        }
        pub(super) fn runtime_size()(h[t]) -> k[t] {
            axes { each b; t }
            k[t] = h[t] / t;
        }
        pub(super) fn empty_axis()(h[t]) -> k[t] {
            axes { each b; t; d = 0 }
            k[t] = h[t];
        }
        pub(super) fn groups_do_not_multiply()(h[t,e]) -> k[t,g] {
            axes { each b; t; e = 10; g = 4; j = 3 }
            k[t,g] = max[j](h[t,(g,j)]);
        }
        pub(super) fn unknown_dtype()(h[t]) -> k[t] {
            axes { each b; t }
            k[t]: float = h[t];
        }
        pub(super) fn wrong_kind()(h[t]) -> k[t] {
            axes { each b; t }
            k[t]: bool = h[t] + 1;
        }
        pub(super) fn missing_result()(h[t]) -> k[t] {
            axes { each b; t }
            j[t] = h[t];
        }
        pub(super) fn result_differs()(h[t,d]) -> k[t,d] {
            axes { each b; t; d = 4 }
            k[d,t] = h[t,d];
        }
        pub(super) fn weight_not_stored()(h[t,d]) -> k[t,d] {
            axes { each b; t; d = 4; e = 2 }
            weights { W[e,d] = "experts.weight"[d]; }
            k[t,d] = h[t,d] * W[e,d] * W[e,d];
        }
        pub(super) fn weight_stored_twice()(h[t,d]) -> k[t,d] {
            axes { each b; t; d = 4 }
            weights { W[d] = "experts.{d}.weight"[d]; }
            k[t,d] = h[t,d] * W[d];
        }
        pub(super) fn weight_with_foreign_axis()(h[t,d]) -> k[t,d] {
            axes { each b; t; d = 4; n = 2; v = 3 }
            weights { W[d] = "w"[d, (n | v)]; }
            k[t,d] = h[t,d] * W[d];
        }
        fn callee()(x[t,d], y[t]) -> z[t,d] {
            axes { each b; t; d = 8 }
            z[t,d] = x[t,d] * y[t];
        }
        pub(super) fn call_with_too_few()(h[t,d]) -> k[t,d] {
            axes { each b; t; d = 8 }
            k[t,d] = call callee()(h[t,d]);
        }
        pub(super) fn call_with_wrong_size()(h[t,d], g[t]) -> k[t,d] {
            axes { each b; t; d = 4 }
            k[t,d] = call callee()(h[t,d], g[t]);
        }
        pub(super) fn call_result_differs()(h[t,d], g[t]) -> k[t] {
            axes { each b; t; d = 8 }
            k[t] = call callee()(h[t,d], g[t]);
        }
        pub(super) fn call_of_expression()(h[t,d], g[t]) -> k[t,d] {
            axes { each b; t; d = 8 }
            k[t,d] = call callee()(h[t,d] + 1, g[t]);
        }
        pub(super) fn redefined()(h[t,d]) -> k[t] {
            axes { each b; t; d = 4 }
            k[t,d] = h[t,d];
            k[t] = sum[d](h[t,d]);
        }
        pub(super) fn batch_written()(h[t]) -> k[t] {
            axes { each b; t }
            k[b,t] = h[t];
        }
        pub(super) fn summed_quotient()(p[t,d], q[t,d]) -> k[t] {
            axes { each b; t; d = 4 }
            k[t] = p[t,d] / q[t,d];
        }
        pub(super) fn float_index()(p[t], q[t]) -> k[t] {
            axes { each b; t; v = 4 }
            weights { W[v] = "w"[v]; }
            k[t] = W[p[t]] * q[t];
        }
        pub(super) fn twice_on_the_left()(p[t]) -> k[t] {
            axes { each b; t }
            k[t,t] = p[t];
        }
        pub(super) fn bool_times_float()(p[t,e]) -> k[t,e] {
            axes { each b; t; e = 4 }
            k[t,e] = in_top[e; 2](p[t,e]) * p[t,e];
        }
        pub(super) fn axis_kept_by_nobody()(p[t,e]) -> k[t] {
            axes { each b; t; e = 4 }
            k[t] = softmax[e](p[t,e]);
        }
        /// `k` is wrong, what uses it is not blamed.
        pub(super) fn one_cause_one_error()(p[t,e]) -> m[t] {
            axes { each b; t; e = 4 }
            k[t] = p[t,e];
            l[t] = k[t] + 1;
            m[t] = l[t] * l[t];
        }
        pub(super) fn square_transpose()(p[i,j]) -> k[i,j] {
            axes { each b; i = 4; j = 4 }
            k[i,j] = p[j,i];
        }
    }

    type Body = Box<dyn FnOnce(&mut Tracer)>;

    /// A function that calls itself; only a builder can write it, `spec!` would not compile.
    pub(super) fn endless() -> SpecFn<Body> {
        use latentc_frontend::expr::{AxisDecl, Call, Extent, Name, target, val};
        let body = |t: &mut Tracer| {
            t.axis(AxisDecl { name: Name::here("t"), extent: Extent::Runtime, each: false });
            let (targets, args) = (vec![target("y", ["t"])], vec![val("x", ["t"])]);
            t.call(Call { targets, args, scope: String::new(), tag: None }, endless());
        };
        SpecFn::new(Name::here("endless"), vec![target("x", ["t"])], vec![target("y", ["t"])], Box::new(body))
    }
}

/// Without the source at hand, an error still says what and where.
#[test]
fn source_out_of_reach() {
    let (here, there) = (Spot::new("no/such/file.rs", 3, 7), Spot::new("no/such/file.rs", 1, 0));
    let error =
        Diagnostic::new(here, "`d` is only on the left").related(there, "declared here").note("sum it");
    let error = SpecError { diagnostics: vec![error] };
    assert_eq!(error.to_string(), "no/such/file.rs:3:7: `d` is only on the left");
    let want = "error: `d` is only on the left\n  ┌─ no/such/file.rs:3:7\n  = no/such/file.rs:1:0: declared here\n  = sum it\n";
    assert_eq!(error.render(), want);
}

/// A place that is not in its file, as a builder may give, is no reason to panic.
#[test]
fn place_out_of_reach() {
    for (line, col) in [(0, 0), (1, 0), (0, 1), (1, 9999), (99999, 1)] {
        let error = Diagnostic::new(Spot::new("frontend/tests/errors.rs", line, col), "wrong");
        assert!(SpecError { diagnostics: vec![error] }.render().starts_with("error: wrong\n"));
    }
}

/// What is stated of another function, and numbers in a row.
mod stated {
    use super::*;

    mistakes! { stated_of_nothing; table_of_other_length; }

    mod specs {
        use super::*;

        spec! {
            fn doubled()(g[t]) -> k[t] {
                axes { each b; t }
                k[t] = 2 * g[t];
            }
            pub(super) fn stated_of_nothing()(h[t]) -> k[t] {
                axes { each b; t }
                state doubled();
            }
            pub(super) fn table_of_other_length()(h[t,d]) -> k[t,d] {
                axes { each b; t; d = 4 }
                k[t,d] = h[t,d] * table[d; vec![1.0, 2.0]]();
            }
        }
    }
}
