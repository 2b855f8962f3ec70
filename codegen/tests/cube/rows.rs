//! Kernels that reduce.

use latentc_codegen::cube::{Cubes, LaunchShape, cuda_source};
use latentc_codegen::program::{Kernel, KernelKind};
use latentc_ir::{Function, Module, expand};

use crate::bench::{agree, agree_on, inputs, kernel, map, tolerance};

/// The same with its composites expanded.
fn expanded(kernel: Kernel) -> Kernel {
    let function = Function { name: kernel.name.clone(), ..kernel.body };
    let module = Module { name: "test".to_owned(), functions: vec![function], entry: kernel.name.clone() };
    Kernel { name: kernel.name, kind: kernel.kind, body: expand(&module).functions.remove(0) }
}

fn softmax(columns: &str) -> Kernel {
    let body = format!(
        "axes a0=n0, a1={columns}\nparam p0: f32[a0, a1]\nparam p1: bool[a0, a1]\nleast: f32 = const -inf\n\
         x: f32[a0, a1] = select p1, p0, least\ny: f32[a0, a1] = softmax x over a1\nreturn y"
    );
    expanded(map("softmax", &body))
}

#[test]
fn masked_softmax() {
    // By a cube for each row, whatever its length is at run time.
    let k = softmax("n1");
    assert!(matches!(LaunchShape::of(&k).cubes, Cubes::Rows(_)));
    agree(&k, &[&[1, 1], &[3, 7], &[2, 257], &[2, 1000], &[2, 0], &[0, 5]]);
    // By a unit for each row.
    let k = softmax("5");
    assert!(matches!(LaunchShape::of(&k).cubes, Cubes::Elements(_)));
    agree(&k, &[&[300]]);
    // What is masked is exactly zero, also if it is the whole row.
    for k in [softmax("5"), softmax("n1")] {
        let sizes = [2, 5];
        let sizes = &sizes[..k.size_symbols().len()];
        let mask = [0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        let args = inputs(&k, sizes, &[(1, &mask)]);
        agree_on(&k, &args, sizes, tolerance(&k));
        if let Some(mut device) = crate::bench::device() {
            let y = latentc_codegen::check::launch(&mut device, &k, &args, sizes).unwrap();
            assert!(y.data.iter().zip(mask).all(|(&y, m)| m == 1.0 || y == 0.0), "{y:?}");
        }
    }
}

#[test]
fn a_maximum_and_the_sum_that_it_shifts_are_one_walk() {
    for (dtype, columns) in [("bf16", "24"), ("f32", "1024"), ("bf16", "4096"), ("f32", "5000")] {
        let body = format!(
            "axes a0=n0, a1={columns}\nparam p0: {dtype}[a0, a1]\nten: f32 = const 10.0\nx: f32[a0, a1] = mul p0, ten\n\
             m: f32[a0] = reduce_max x over a1\nz: f32[a0, a1] = sub x, m\ne: f32[a0, a1] = exp z\n\
             s: f32[a0] = reduce_sum e over a1\ng: f32[a0] = log s\ny: f32[a0] = add g, m\nreturn y"
        );
        let k = map("logsumexp", &body);
        agree(&k, &[&[1], &[3], &[0]]);
        // One over packs, if a row is more than a few, and one over the one element that is stored.
        let loops = cuda_source(&k).unwrap().matches("for (").count();
        assert!(loops <= 2, "{loops} loops over {columns} columns of {dtype}");
    }
    for columns in ["64", "2048"] {
        let k = softmax(columns);
        agree(&k, &[&[3]]);
        // Numbers that a unit has seen may all be masked, or all of the row.
        let n: usize = columns.parse().unwrap();
        let mask: Vec<_> = (0..2 * n).map(|i| f64::from(u8::from(i == n / 2 + 3))).collect();
        agree_on(&k, &inputs(&k, &[2], &[(1, &mask)]), &[2], tolerance(&k));
    }
}

#[test]
fn what_lies_across_rows_is_read_side_by_side() {
    for (dtype, by) in [("bf16", "reduce_sum"), ("f32", "reduce_max")] {
        let of = |rows: &str, columns: u64, by: &str| {
            map(
                "across",
                &format!(
                    "axes a0={rows}, a1=3, a2={columns}\nparam p0: {dtype}[a0, a1, a2]\nparam p1: {dtype}[a2]\n\
                     param p2: f32[a1, a2]\nparam p3: f32[a0]\nw: f32[a0, a1, a2] = mul p0, p1\n\
                     x: f32[a0, a1, a2] = mul w, p3\ns: f32[a1, a2] = {by} x over a0\ny: {dtype}[a1, a2] = add s, p2\nreturn y"
                ),
            )
        };
        // By cubes of many units for a few columns, then by a unit for each pack.
        agree(&of("n0", 48, by), &[&[7], &[300], &[0]]);
        agree(&of("6", 12, by), &[&[]]);
        // A product is a fold, too.
        let body = format!(
            "axes a0=n0, a1=n1, a2=32\nparam p0: {dtype}[a0, a1, a2]\nparam p1: {dtype}[a0, a1, a2]\n\
             y: f32[a2] = contract p0, p1 over a0, a1\nreturn y"
        );
        agree(&kernel(KernelKind::Contract, "products", &body), &[&[5, 70], &[0, 3]]);
    }
}

#[test]
fn what_is_folded_need_not_lie_side_by_side() {
    let body = "axes a0=n0, a1=4\nparam p0: f32[a1, a0]\nm: f32[a0] = reduce_max p0 over a1\n\
                x: f32[a1, a0] = sub p0, m\ny: f32[a1, a0] = silu x\nreturn y";
    agree(&map("apart", body), &[&[3], &[1], &[40]]);
}

#[test]
fn rms_norm() {
    let body = "axes a0=n0, a1=96, a2=n1\nparam p0: bf16[a0, a2, a1]\nparam p1: bf16[a1]\n\
                x: bf16[a2, a0, a1] = rms_norm p0 over a1 eps 1e-6\ny: bf16[a2, a0, a1] = mul x, p1\nreturn y";
    agree(&expanded(map("rms_norm", body)), &[&[3, 4], &[1, 1]]);
}

#[test]
fn reductions_alone() {
    for by in ["reduce_sum", "reduce_max"] {
        let body =
            format!("axes a0=n0, a1=n1\nparam p0: f32[a1, a0]\ny: f32[a0] = {by} p0 over a1\nreturn y");
        agree(&map(by, &body), &[&[3, 100], &[1, 1], &[4, 0]]);
        let body = format!("axes a0=7\nparam p0: f32[a0]\ny: f32 = {by} p0 over a0\nreturn y");
        agree(&map(&format!("{by}_all"), &body), &[&[]]);
        let body = format!("axes a0=0, a1=3\nparam p0: f32[a0, a1]\ny: f32[a1] = {by} p0 over a0\nreturn y");
        agree(&map(&format!("{by}_none"), &body), &[&[]]);
    }
}

#[test]
fn reductions_whose_rows_differ() {
    // The scheduler makes no such kernel; it is computed all the same.
    let body = "axes a0=n0, a1=n1, a2=4, a3=2\nparam p0: f32[a0, a1, a2]\nx: f32[a0, a1] = reduce_sum p0 over a2\n\
                m: f32[a0] = reduce_max x over a1\nf: f32[a0, a2] = reduce_sum p0 over a1\n\
                s: f32[a0, a3] = slice f axis a2 into a3 start 1\ny: f32[a0, a3] = sub s, m\nreturn y";
    agree(&map("differ", body), &[&[3, 5]]);
}

#[test]
fn a_norm_goes_into_a_cache() {
    let body = "axes a0=n0, a1=40, a2=n1 like a0\nparam p0: f32[a2, a1]\nparam p1: f32[a0, a1]\nparam p2: i32[a0]\n\
                x: f32[a0, a1] = rms_norm p1 over a1 eps 1e-6\ny: f32[a2, a1] = append p0, x, p2 from a0 to a2\nreturn y";
    let k = expanded(map("norm_append", body));
    let args = inputs(&k, &[3, 9], &[(2, &[8.0, 0.0, 3.0])]);
    agree_on(&k, &args, &[3, 9], tolerance(&k));
}
