//! Kernels that reduce.

use latentc_codegen::cube::{Cubes, LaunchShape};
use latentc_codegen::program::Kernel;
use latentc_ir::{Function, Module, expand};

use crate::bench::{agree, agree_on, inputs, map, tolerance};

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
