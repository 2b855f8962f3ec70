//! Kernels without reductions, op by op.

use latentc_codegen::check::launch;
use latentc_codegen::cube::cuda_source;
use latentc_codegen::program::Kernel;
use latentc_ir::{Binary, Unary};

use crate::bench::{agree, agree_on, device, inputs, map};

#[test]
fn every_function_of_one_number() {
    for op in Unary::ALL {
        let name = latentc_ir::Op::Unary(op).mnemonic();
        let dtype = if op == Unary::Not { "bool" } else { "f32" };
        let positive = matches!(op, Unary::Log | Unary::Sqrt | Unary::Rsqrt);
        let (x, arg) = if positive { ("x: f32[a0] = abs p0", "x") } else { ("", "p0") };
        let body = format!("axes a0=n0\nparam p0: {dtype}[a0]\n{x}\ny: {dtype}[a0] = {name} {arg}\nreturn y");
        agree(&map(&format!("one_{name}"), &body), &[&[131]]);
    }
    let ints = "axes a0=n0\nparam p0: i32[a0]\nx: i32[a0] = neg p0\ny: i32[a0] = abs x\nz: i32[a0] = sub y, x\nreturn z";
    agree(&map("one_int", ints), &[&[9]]);
}

#[test]
fn every_function_of_two_numbers() {
    for op in Binary::ALL {
        let name = latentc_ir::Op::Binary(op).mnemonic();
        for dtype in ["f32", "i32", "bool"] {
            let truth = dtype == "bool";
            if (truth && !(op.is_logical() || op == Binary::Eq)) || (!truth && op.is_logical()) {
                continue;
            }
            let result = if op.is_comparison() { "bool" } else { dtype };
            // No division by zero: of integers, it means nothing.
            let (shift, b) = match (op, dtype) {
                (Binary::Div, "i32") => ("o: i32 = const 3\nb: i32[a1] = add p1, o", "b"),
                _ => ("", "p1"),
            };
            let body = format!(
                "axes a0=n0, a1=n1\nparam p0: {dtype}[a0, a1]\nparam p1: {dtype}[a1]\n{shift}\n\
                 y: {result}[a1, a0] = {name} p0, {b}\nreturn y"
            );
            agree(&map(&format!("two_{name}_{dtype}"), &body), &[&[7, 13]]);
        }
    }
}

#[test]
fn constants_positions_choices_and_casts() {
    let k = map(
        "choices",
        "axes a0=n0, a1=5\nparam p0: f32[a0, a1]\n\
         table: f32[a1] = const [0.5, -1.25, 3.0, 1e-3, 7.0]\n\
         place: i32[a0] = position of a0\n\
         where: i32[a1] = position of a1\n\
         later: bool[a0, a1] = le where, place\n\
         least: f32 = const -inf\n\
         x: f32[a0, a1] = mul p0, table\n\
         masked: f32[a0, a1] = select later, x, least\n\
         exp: f32[a0, a1] = exp masked\n\
         count: f32[a0] = cast place\n\
         y: f32[a0, a1] = add exp, count\n\
         return y",
    );
    agree(&k, &[&[1], &[11], &[300]]);
    let k = map(
        "casts",
        "axes a0=n0\nparam p0: f32[a0]\nparam p1: i32[a0]\nparam p2: bool[a0]\nten: f32 = const 10.0\n\
         big: f32[a0] = mul p0, ten\ntrunc: i32[a0] = cast big\nsome: bool[a0] = cast p1\n\
         both: bool[a0] = and some, p2\none: i32[a0] = cast both\ny: i32[a0] = add trunc, one\nreturn y",
    );
    agree(&k, &[&[100]]);
    let k = map(
        "from_half",
        "axes a0=n0\nparam p0: bf16[a0]\nparam p1: f16[a0]\ny: f32[a0] = mul p0, p1\nreturn y",
    );
    agree(&k, &[&[33]]);
    // Storing rounds: on CUDA to the dtype, in WGSL not at all.
    let k =
        map("rounds", "axes a0=n0\nparam p0: f32[a0]\nx: f16[a0] = cast p0\ny: bf16[a0] = cast x\nreturn y");
    agree(&k, &[&[33]]);
}

#[test]
fn axes_move() {
    let k = map(
        "moves",
        "axes a0=n0, a1=6, a2=2, a3=3, a4=12, a5=4, a6=10, a7=6\n\
         param p0: f32[a0, a4]\nparam p1: f32[a7, a0]\n\
         s: f32[a0, a5, a3] = split p0 axis a4 into a5, a3\n\
         m: f32[a0, a4] = merge s axes a5, a3 into a4\n\
         part: f32[a5, a0] = slice m axis a4 into a5 start 7\n\
         r: f32[a0, a1] = rename p1 from a7 to a1\n\
         c: f32[a0, a6] = concat r, part axes a1, a5 into a6\n\
         b: f32[a2, a0, a6] = broadcast c over a2\n\
         y: f32[a6, a2, a0] = neg b\n\
         return y",
    );
    agree(&k, &[&[1], &[5], &[0]]);
    // Parts without elements, and one part only.
    let k = map(
        "nothing",
        "axes a0=1, a1=0, a2=1\nparam p0: f32[a0]\nparam p1: f32[a1]\n\
         y: f32[a2] = concat p1, p0 axes a1, a0 into a2\nreturn y",
    );
    agree(&k, &[&[]]);
}

#[test]
fn gathers() {
    let k = map(
        "gathers",
        "axes a0=n0, a1=8, a2=n1, a3=3\nparam p0: f32[a1, a3, a0]\nparam p1: i32[a0, a2]\n\
         y: f32[a0, a2, a3] = gather p0, p1 along a1\nreturn y",
    );
    agree(&k, &[&[5, 7], &[1, 1], &[3, 0]]);
    // What the interpreter refuses reads zero here.
    let k = map(
        "outside",
        "axes a0=4, a1=8\nparam p0: f32[a1]\nparam p1: i32[a0]\ny: f32[a0] = gather p0, p1 along a1\nreturn y",
    );
    let args = inputs(&k, &[], &[(0, &[1.0; 8]), (1, &[7.0, 8.0, -1.0, 0.0])]);
    if let Some(mut device) = device() {
        assert_eq!(launch(&mut device, &k, &args, &[]).unwrap().data, [1.0, 0.0, 0.0, 1.0]);
    }
}

#[test]
fn the_largest_few() {
    let k = map(
        "few",
        "axes a0=n0, a1=13\nparam p0: f32[a0, a1]\ny: bool[a0, a1] = top_k p0 over a1 k 4\nreturn y",
    );
    agree(&k, &[&[9]]);
    let k = map("ties", "axes a0=8\nparam p0: f32[a0]\ny: bool[a0] = top_k p0 over a0 k 3\nreturn y");
    for x in [
        [1.0, 2.0, 2.0, 2.0, 2.0, 0.0, 1.0, 2.0],
        [f64::NEG_INFINITY, 2.0, f64::NEG_INFINITY, f64::NAN, 0.0, f64::NAN, f64::NEG_INFINITY, f64::NAN],
        [f64::NAN, 1.0, -1.0, 0.0, f64::NAN, 3.0, f64::INFINITY, 2.0],
    ] {
        agree_on(&k, &inputs(&k, &[], &[(0, &x)]), &[], 0.0);
        let at = map(
            "at",
            "axes a0=8, a1=5\nparam p0: f32[a0]\ny: i32[a1] = top_indices p0 over a0 into a1\nreturn y",
        );
        // Here NaN counts as -inf: among these two, the order is that of the row.
        if x.iter().all(|x| !x.is_nan()) {
            agree_on(&at, &inputs(&at, &[], &[(0, &x)]), &[], 0.0);
        }
    }
    let at = "axes a0=n0, a1=13, a2=13\nparam p0: f32[a0, a1]\ny: i32[a0, a2] = top_indices p0 over a1 into a2\nreturn y";
    agree(&map("all", at), &[&[9]]);
}

#[test]
fn rotations() {
    for pairs in ["interleaved", "halves"] {
        let k = map(
            &format!("rope_{pairs}"),
            &format!(
                "axes a0=n0, a1=3, a2=8, a3=4, a4=n1\n\
                 param p0: f32[a4, a0, a1, a2]\nparam p1: i32[a4, a0]\nparam p2: f32[a3]\n\
                 two: f32 = const 2.0\nx: f32[a4, a0, a1, a2] = mul p0, two\n\
                 y: f32[a4, a1, a0, a2] = rope x, p1, p2 over a2 pairs {pairs}\nreturn y"
            ),
        );
        agree(&k, &[&[5, 2], &[1, 1]]);
    }
}

#[test]
fn rows_go_into_a_cache() {
    let k = map(
        "append",
        "axes a0=n0, a1=3, a2=n1 like a0, a3=n2\nparam p0: f32[a3, a2, a1]\nparam p1: f32[a3, a0, a1]\n\
         param p2: i32[a3, a0]\nx: f32[a3, a0, a1] = neg p1\ny: f32[a3, a2, a1] = append p0, x, p2 from a0 to a2\nreturn y",
    );
    let args = inputs(&k, &[2, 6, 2], &[(2, &[0.0, 4.0, 5.0, 2.0])]);
    agree_on(&k, &args, &[2, 6, 2], 0.0);
    // What lies outside of the cache is not written, where the interpreter refuses.
    if let Some(mut device) = device() {
        let args = inputs(&k, &[2, 6, 1], &[(2, &[6.0, -1.0])]);
        assert_eq!(launch(&mut device, &k, &args, &[2, 6, 1]).unwrap().data, args[0].data);
    }
}

/// The accesses of 16 bytes in the CUDA text of a kernel, read and written.
fn wide(kernel: &Kernel) -> usize {
    let text = cuda_source(kernel).unwrap();
    text.matches("_8*>(").count() + text.matches("_4*>(").count()
}

#[test]
fn elements_side_by_side_are_one_access() {
    let of = |dtypes: [&str; 3], columns: u64| {
        let [p, q, y] = dtypes;
        map(
            "beside",
            &format!(
                "axes a0=n0, a1=3, a2={columns}\nparam p0: {p}[a0, a1, a2]\nparam p1: {q}[a1, a2]\nparam p2: f32[a0]\n\
                 param p3: i32[a0]\nparam p4: {q}[a2, a1]\nx: f32[a0, a1, a2] = mul p0, p1\n\
                 at: i32[a2] = position of a2\nhere: bool[a0, a2] = eq at, p3\n\
                 z: f32[a0, a1, a2] = select here, p4, x\nw: f32[a0, a1, a2] = add z, p2\n\
                 y: {y}[a0, a1, a2] = silu w\nreturn y"
            ),
        )
    };
    for (dtypes, columns, packs) in [
        (["bf16", "bf16", "bf16"], 64, 3),
        // Numbers of f32 are two accesses where those of 16 bits are one.
        (["f32", "bf16", "bf16"], 16, 4),
        (["f16", "bf16", "f32"], 24, 4),
        (["f32", "f32", "f32"], 12, 3),
        (["bf16", "f32", "bf16"], 4, 3),
        (["bf16", "f32", "bf16"], 6, 0),
    ] {
        let k = of(dtypes, columns);
        assert_eq!(wide(&k), packs, "{dtypes:?} {columns}\n{}", cuda_source(&k).unwrap());
        agree(&k, &[&[1], &[5], &[0], &[70]]);
    }
}

#[test]
fn whole_packs_move_as_one() {
    // Rows that an index chooses, joined with others, and a part of that: where parts are whole packs, all of it is read and written so.
    let of = |first: u64, start: u64, packs: usize| {
        let k = map(
            "moved",
            &format!(
                "axes a0=n0, a1=40, a2={first}, a3={}, a4=8, a5=16\nparam p0: bf16[a4, a2]\nparam p1: bf16[a0, a3]\n\
                 param p2: i32[a0]\nparam p3: bf16[a0, a5]\nx: bf16[a0, a2] = gather p0, p2 along a4\n\
                 j: bf16[a0, a1] = concat x, p1 axes a2, a3 into a1\n\
                 s: bf16[a0, a5] = slice j axis a1 into a5 start {start}\ny: bf16[a0, a5] = mul s, p3\nreturn y",
                40 - first
            ),
        );
        assert_eq!(wide(&k), packs, "{first} {start}\n{}", cuda_source(&k).unwrap());
        agree(&k, &[&[1], &[3], &[0], &[70]]);
    };
    of(16, 8, 4);
    of(24, 24, 4);
    of(12, 8, 0);
    of(16, 4, 0);
}
