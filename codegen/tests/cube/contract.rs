//! Matrix products.

use latentc_codegen::program::KernelKind;
use proptest::prelude::*;

use crate::bench::{agree, cuda, kernel};

#[test]
fn products_of_odd_shapes() {
    let k = kernel(
        KernelKind::Contract,
        "product",
        "axes a0=n0, a1=n1, a2=n2, a3=n3\nparam p0: f32[a3, a0, a2]\nparam p1: f32[a3, a1, a2]\n\
         y: f32[a3, a0, a1] = contract p0, p1 over a2\nreturn y",
    );
    agree(&k, &[&[1, 1, 1, 1], &[65, 70, 33, 2], &[64, 128, 16, 1], &[3, 2, 0, 2], &[0, 4, 4, 1]]);
    if let Some(resources) = cuda(&k) {
        assert_eq!(resources.stack_bytes, 0, "the sums are no registers: {resources:?}");
    }
}

#[test]
fn products_of_many_axes() {
    // Groups of two axes: next to each other, in other orders, apart; and axes of extent 1 between.
    let k = kernel(
        KernelKind::Contract,
        "apart",
        "axes a0=n0, a1=3, a2=5, a3=4, a4=2, a5=7, a6=1\nparam p0: f32[a4, a0, a3, a6, a1, a5]\n\
         param p1: f32[a5, a2, a4, a3]\ny: f32[a2, a1, a0, a6] = contract p0, p1 over a4, a3, a5\nreturn y",
    );
    agree(&k, &[&[1], &[6]]);
    // No axes of its own on one side, or on both.
    let k = kernel(
        KernelKind::Contract,
        "vector",
        "axes a0=n0, a1=50\nparam p0: f32[a1]\nparam p1: bf16[a1, a0]\ny: f16[a0] = contract p0, p1 over a1\nreturn y",
    );
    agree(&k, &[&[70]]);
    let k = kernel(
        KernelKind::Contract,
        "dot",
        "axes a0=n0, a1=2\nparam p0: f32[a0, a1]\nparam p1: f32[a1, a0]\ny: f32[a1] = contract p0, p1 over a0\nreturn y",
    );
    agree(&k, &[&[100]]);
    let k = kernel(
        KernelKind::Contract,
        "square",
        "axes a0=n0, a1=9\nparam p0: f32[a0, a1]\ny: f32[a0] = contract p0, p0 over a1\nreturn y",
    );
    agree(&k, &[&[3]]);
}

/// Shapes: for each axis its group (batch, m, n, k) and extent, and an order of memory for each tensor.
fn shapes() -> impl Strategy<Value = (Vec<(u8, usize)>, [Vec<usize>; 3])> {
    prop::collection::vec((0u8..4, prop::sample::select(vec![1usize, 2, 3, 5, 17])), 1..6).prop_flat_map(
        |axes| {
            let of = |groups: [u8; 3]| {
                let own: Vec<_> = (0..axes.len()).filter(|&n| groups.contains(&axes[n].0)).collect();
                Just(own).prop_shuffle()
            };
            let orders = [of([0, 1, 3]), of([0, 2, 3]), of([0, 1, 2])];
            (Just(axes), orders)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn products_of_any_axes((axes, [a, b, y]) in shapes(), tiles in any::<bool>()) {
        prop_assume!(axes.iter().any(|(group, _)| *group == 3));
        let table: Vec<_> = axes.iter().enumerate().map(|(n, (_, size))| format!("a{n}={size}")).collect();
        let list = |axes: &[usize]| axes.iter().map(|n| format!("a{n}")).collect::<Vec<_>>().join(", ");
        let ty = |axes: &[usize]| if axes.is_empty() { "f32".to_owned() } else { format!("f32[{}]", list(axes)) };
        let summed: Vec<_> = a.iter().copied().filter(|n| axes[*n].0 == 3).collect();
        let body = format!(
            "axes {}\nparam p0: {}\nparam p1: {}\ny: {} = contract p0, p1 over {}\nreturn y",
            table.join(", "), ty(&a), ty(&b), ty(&y), list(&summed)
        );
        // Such small ones are products with few rows, if not told otherwise.
        let kind = if tiles { KernelKind::Tiles } else { KernelKind::Contract };
        agree(&kernel(kind, "any", &body), &[&[]]);
    }
}
