//! Streamed softmaxes against the interpreter.

use latentc_codegen::stream::StreamPlan;
use proptest::prelude::*;

use crate::check_at;
use crate::streams::{arb_case, causal, latent, stream};

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, ..ProptestConfig::default() })]
    #[test]
    fn streams_of_axes_in_any_order(
        case in arb_case(),
        sizes in (0usize..4, prop_oneof![0usize..4, 20usize..50], prop_oneof![0usize..6, 100usize..400]),
        seed: u64,
    ) {
        check_at(&case.kernel(), &[sizes.0, sizes.1, sizes.2], seed)?;
    }
}

#[test]
fn rows_and_positions_beyond_a_tile() {
    for sizes in [[1, 1, 9000], [1, 3, 5000], [2, 5, 1000], [1, 200, 300], [3, 1, 7], [0, 1, 5], [1, 1, 0]] {
        check_at(&latent("latent", "f32", [4, 8, 4]), &sizes, 3).unwrap();
        check_at(&causal("causal", "f32", [3, 6, 5]), &sizes, 4).unwrap();
    }
}

#[test]
fn bodies_that_are_no_streams() {
    let why = |body: &str| StreamPlan::of(&stream("no", body).body).unwrap_err();
    let head = "axes t=4, s=n0, k=3, v=2\nparam q: f32[t, k]\nparam kk: f32[s, k]\nparam vv: f32[s, v]\n";
    assert_eq!(
        why(&format!("{head}y: f32[t, s] = contract q, kk over k\nreturn y")),
        "0 instructions are `softmax`; a stream has one"
    );
    let soft = format!("{head}z: f32[t, s] = contract q, kk over k\np: f32[t, s] = softmax z over s\n");
    assert_eq!(why(&format!("{soft}return p")), "`p` goes elsewhere than into one contraction");
    assert_eq!(
        why(&format!("{soft}y: f32[t, v, s] = contract p, vv\nreturn y")),
        "`y` does not sum weights and values over `s` alone"
    );
    assert_eq!(
        why(&format!(
            "{soft}y: f32[t, v] = contract p, vv over s\nm: f32[t] = reduce_max y over v\nreturn m"
        )),
        "`m` is not elementwise in `y`"
    );
    let head = format!("{head}m: f32[s] = reduce_max kk over k\nz: f32[t, s] = contract q, kk over k\n");
    assert_eq!(
        why(&format!(
            "{head}x: f32[t, s] = sub z, m\np: f32[t, s] = softmax x over s\ny: f32[t, v] = contract p, vv over s\nreturn y"
        )),
        "`m`, by `reduce_max`, is too much to compute where `m` is read"
    );
}
