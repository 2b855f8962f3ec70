//! Products that are rotated, and that go to a cache, in each of their ways.

use latentc_codegen::cube::{Target, ways};
use latentc_codegen::program::{By, Kernel, KernelKind};

use crate::bench::{agree_on, cuda, inputs, kernel, on_cuda};

/// Rows and columns of odd numbers; `weights` are the axes of the matrix, of which a2 is summed.
fn rotated(pairs: &str, weights: &str, dtype: &str) -> Kernel {
    let body = format!(
        "axes a0=n0, a1=3, a3=10, a2=n1, a4=5\nparam p0: {dtype}[{weights}]\nparam p1: {dtype}[a0, a2]\n\
         param p2: i32[a0]\nparam p3: f32[a4]\nparam p4: f32[a0, a1, a3]\n\
         x: f32[a0, a1, a3] = contract p0, p1 over a2\nz: f32[a0, a1, a3] = add x, p4\n\
         y: f32[a0, a1, a3] = rope z, p2, p3 over a3 pairs {pairs}\nreturn y"
    );
    kernel(KernelKind::Contract, &format!("rotated_{pairs}"), &body)
}

/// A row of a cache for each new token: a product with a norm before it, rotated or not.
fn appended(behind: &str) -> Kernel {
    let body = format!(
        "axes a0=n0, a1=n1, a2=n2 like a0, a3=6, a4=40, a5=3\nparam p0: bf16[a2, a1, a3]\nparam p1: bf16[a3, a4]\n\
         param p2: bf16[a1, a0, a4]\nparam p3: i32[a1, a0]\nparam p4: f32[a5]\n\
         squares: f32[a1, a0, a4] = mul p2, p2\nsum: f32[a1, a0] = reduce_sum squares over a4\n\
         scale: f32[a1, a0] = rsqrt sum\nh: f32[a1, a0, a4] = mul p2, scale\n\
         k: f32[a1, a0, a3] = contract p1, h over a4\n{behind}\n\
         y: bf16[a2, a1, a3] = append p0, x, p3 from a0 to a2\nreturn y"
    );
    kernel(KernelKind::Contract, "appended", &body)
}

/// The kernel and each of its ways but those of tensor cores.
fn all(kernel: &Kernel) -> Vec<Kernel> {
    let few = ways(kernel, Target::Wgsl).into_iter();
    let few = few.filter(|w| matches!(w.kind, KernelKind::Few { rows: 1 | 8, .. }));
    let tiles = Kernel { kind: KernelKind::Tiles, ..kernel.clone() };
    [tiles].into_iter().chain(few).collect()
}

#[test]
fn partners_are_side_by_side() {
    for pairs in ["interleaved", "halves"] {
        // Along the summed axes.
        let along = rotated(pairs, "a1, a3, a2", "bf16");
        let some = all(&along);
        assert_eq!(some.len(), 3, "{pairs}");
        for way in &some {
            for sizes in [&[1, 64][..], &[9, 33]] {
                let positions: Vec<_> = (0..sizes[0]).map(|n| (n * n) as f64).collect();
                agree_on(way, &inputs(way, sizes, &[(2, &positions)]), sizes, 1e-4);
            }
        }
        // Across the columns, halves are too far apart.
        let across = all(&rotated(pairs, "a2, a1, a3", "f32"));
        assert_eq!(across.len(), if pairs == "halves" { 1 } else { 3 });
        for way in &across {
            agree_on(way, &inputs(way, &[2, 21], &[(2, &[3.0, 70.0])]), &[2, 21], 1e-4);
        }
    }
    // In tiles, whichever operand has the axis; it need not be the last of the result.
    let k = kernel(
        KernelKind::Contract,
        "turned",
        "axes a0=n0, a1=66, a2=17, a3=33\nparam p0: f32[a2, a1]\nparam p1: f32[a2, a0]\nparam p2: i32[a0]\n\
         param p3: f32[a3]\nx: f32[a1, a0] = contract p0, p1 over a2\n\
         y: f32[a1, a0] = rope x, p2, p3 over a1 pairs halves\nreturn y",
    );
    let positions: Vec<_> = (0..70).map(f64::from).collect();
    agree_on(&k, &inputs(&k, &[70], &[(2, &positions)]), &[70], 1e-4);
}

#[test]
fn no_product_is_computed_for_its_partner_again() {
    // A loop over the depth for each element would stand where its partner is wanted.
    let loops = |k: &Kernel| latentc_codegen::cube::cuda_source(k).unwrap().matches("for (").count();
    let plain = kernel(
        KernelKind::Contract,
        "plain",
        "axes a0=n0, a1=3, a3=10, a2=n1\nparam p0: f32[a1, a3, a2]\nparam p1: f32[a0, a2]\n\
         x: f32[a0, a1, a3] = contract p0, p1 over a2\nreturn x",
    );
    for pairs in ["interleaved", "halves"] {
        let rotated = rotated(pairs, "a1, a3, a2", "f32");
        for (plain, rotated) in all(&plain).iter().zip(&all(&rotated)) {
            assert_eq!(loops(plain), loops(rotated), "{}", rotated.name);
        }
    }
}

#[test]
fn what_is_appended_is_made_in_its_place() {
    let rope = "x: bf16[a1, a0, a3] = rope k, p3, p4 over a3 pairs interleaved";
    for behind in [rope, "x: bf16[a1, a0, a3] = neg k"] {
        let k = appended(behind);
        let some = all(&k);
        assert_eq!(some.len(), 3);
        for way in &some {
            // Two sequences of three tokens at different places; one is out of the cache and written nowhere.
            let sizes = [3, 2, 7];
            let positions = [0.0, 1.0, 2.0, 4.0, 5.0, 6.0];
            agree_on(way, &inputs(way, &sizes, &[(3, &positions)]), &sizes, 2e-2);
            cuda(way);
        }
    }
}

#[test]
fn tensor_cores_rotate_and_append() {
    // Each with a tile of its own, one of them with two parts of the sums.
    for (high, parts, behind) in [
        (32, 2, "x: bf16[a0, a1, a3] = rope k, p2, p3 over a3 pairs interleaved"),
        (64, 1, "x: bf16[a0, a1, a3] = rope k, p2, p3 over a3 pairs halves"),
        (128, 1, "x: bf16[a0, a1, a3] = rope k, p2, p3 over a3 pairs interleaved"),
        (64, 1, "x: bf16[a0, a1, a3] = neg k"),
    ] {
        let k = kernel(
            KernelKind::Contract,
            "cached",
            &format!(
                "axes a0=n0, a1=3, a2=n1 like a0, a3=24, a4=80, a5=12\nparam p0: bf16[a2, a1, a3]\nparam p1: bf16[a1, a3, a4]\n\
                 param p2: i32[a0]\nparam p3: f32[a5]\nparam p4: bf16[a0, a4]\n\
                 k: f32[a0, a1, a3] = contract p1, p4 over a4\n{behind}\n\
                 y: bf16[a2, a1, a3] = append p0, x, p2 from a0 to a2\nreturn y"
            ),
        );
        let wanted = |w: &Kernel| match w.kind {
            KernelKind::Matrix { wide: 0, rows, columns, by: By::Planes, parts: of, tf32: false } => {
                (rows, of) == (high, parts) && columns <= 128
            }
            _ => false,
        };
        let matrix: Vec<_> = ways(&k, Target::Cuda).into_iter().filter(wanted).collect();
        assert!(!matrix.is_empty(), "{high} rows, {parts} parts");
        let rows = usize::from(high) + 5;
        let positions: Vec<_> = (0..rows).map(|n| (n + 3) as f64).collect();
        for way in &matrix {
            let sizes = [rows, rows + 5];
            on_cuda(way, &inputs(way, &sizes, &[(2, &positions)]), &sizes, 2e-2);
        }
    }
}
