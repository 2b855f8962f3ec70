//! Kernels that keep parts of their rows.

use latentc_codegen::check::{launch, meaning};
use latentc_codegen::cube::{Cubes, LaunchShape};
use latentc_codegen::host::Host;
use latentc_codegen::map::{MapPlan, fits};
use latentc_codegen::program::{Kernel, KernelKind};
use latentc_ir::{Axis, AxisId, DType, Function, Op, Reduce, Size, Type, Unary, ValueId, Want, infer};
use proptest::prelude::*;

use crate::bench::{agree, agree_on, cuda, inputs, map, means_the_same, tolerance};

/// Softmax over all, the best groups, and the best in these; then what `end` makes of it.
fn router([e, g, j, k]: [usize; 4], slots: usize, end: &str) -> Kernel {
    let body = format!(
        "axes a0=n0, a1=n1, a2={slots}, a3={e}, a4={g}, a5={j}\nparam p0: f32[a0, a1, a3]\n\
         m: f32[a0, a1] = reduce_max p0 over a3\nshifted: f32[a0, a1, a3] = sub p0, m\n\
         exp: f32[a0, a1, a3] = exp shifted\nsum: f32[a0, a1] = reduce_sum exp over a3\n\
         a: f32[a0, a1, a3] = div exp, sum\nin_group: f32[a0, a1, a4, a5] = split a axis a3 into a4, a5\n\
         best: f32[a0, a1, a4] = reduce_max in_group over a5\nopen: bool[a0, a1, a4] = top_k best over a4 k {k}\n\
         zero: f32 = const 0.0\nkept: f32[a0, a1, a4, a5] = select open, in_group, zero\n\
         scores: f32[a0, a1, a3] = merge kept axes a4, a5 into a3\n\
         at: i32[a0, a1, a2] = top_indices scores over a3 into a2\n{end}"
    );
    map("router", &body)
}

const GATES: &str = "gate: f32[a0, a1, a2] = gather scores, at along a3\nscale: f32 = const 16.0\n\
                     y: f32[a0, a1, a2] = mul gate, scale\nreturn y";

#[test]
fn a_router_is_one_kernel() {
    for (sizes, slots) in [([160, 8, 20, 3], 6), ([64, 1, 64, 1], 6), ([15, 5, 3, 2], 4)] {
        for end in ["return at", GATES] {
            let k = router(sizes, slots, end);
            let plan = MapPlan::of(&k.body);
            assert_eq!(plan.rows, Some(vec![AxisId(0), AxisId(1)]));
            let kept: Vec<_> = plan.resident.iter().map(|&v| &*k.body.value(v).name).collect();
            assert_eq!(kept, ["best", "open", "scores", "at"]);
            assert!(matches!(LaunchShape::of(&k).cubes, Cubes::Rows(_)));
            agree(&k, &[&[1, 1], &[2, 3], &[0, 1]]);
            on_the_host(&k, &[2, 3]);
        }
    }
}

#[test]
fn what_does_not_fit_says_why() {
    let why = |body: &str| {
        let k = map("k", body);
        fits(&k.body, &k.body.body.iter().collect::<Vec<_>>()).unwrap_err()
    };
    let ranked = "axes a0=n0, a1=600\nparam p0: f32[a0, a1]\nx: f32[a0, a1] = neg p0\n\
                  y: bool[a0, a1] = top_k x over a1 k 2\nreturn y";
    assert_eq!(why(ranked), "a row of `y` takes 360600 steps, the most is 262144");
    let read = |n: &str| {
        format!(
            "axes a0=n0, a1={n}\nparam p0: f32[a0, a1]\nparam p1: i32[a0]\nm: f32[a0] = reduce_max p0 over a1\n\
             x: f32[a0, a1] = sub p0, m\ny: f32[a0] = gather x, p1 along a1\nreturn y"
        )
    };
    assert_eq!(why(&read("8000")), "a row of `y` keeps 32000 bytes, 30720 fit");
    assert_eq!(why(&read("n1")), "`m` has the run-time size n1 within a row");
    // They run all the same, computing again what they cannot keep.
    let k = map("k", &read("n1"));
    let args = inputs(&k, &[3, 7], &[(1, &[0.0, 6.0, 3.0])]);
    agree_on(&k, &args, &[3, 7], tolerance(&k));
    let product = "axes a0=n0, a1=8\nparam p0: f32[a0, a1]\ny: f32[a0] = contract p0, p0 over a1\nreturn y";
    assert_eq!(why(product), "`contract` has no place there in a map");
    // A row of one number each is as long as it likes.
    let k = map(
        "norm",
        "axes a0=n0, a1=n1\nparam p0: f32[a0, a1]\nm: f32[a0] = reduce_max p0 over a1\n\
         y: f32[a0, a1] = sub p0, m\nreturn y",
    );
    assert_eq!(fits(&k.body, &k.body.body.iter().collect::<Vec<_>>()).unwrap().resident, []);
}

#[test]
fn rows_that_are_kept_go_into_a_cache() {
    let body = "axes a0=n0, a1=6, a2=n1 like a0, a3=2, a4=3\nparam p0: f32[a2, a1]\nparam p1: f32[a0, a1]\n\
                param p2: i32[a0]\nparts: f32[a0, a3, a4] = split p1 axis a1 into a3, a4\n\
                m: f32[a0, a3] = reduce_max parts over a4\nz: f32[a0, a3, a4] = sub parts, m\n\
                x: f32[a0, a1] = merge z axes a3, a4 into a1\n\
                y: f32[a2, a1] = append p0, x, p2 from a0 to a2\nreturn y";
    let k = map("kept_append", body);
    let args = inputs(&k, &[3, 9], &[(2, &[8.0, 0.0, 3.0])]);
    agree_on(&k, &args, &[3, 9], tolerance(&k));
}

#[test]
fn equal_elements_keep_their_order() {
    let k = router([15, 5, 3, 2], 6, "return at");
    let args = inputs(&k, &[1, 1], &[(0, &[1.0; 15])]);
    agree_on(&k, &args, &[1, 1], 0.0);
    assert_eq!(meaning(&k, &args, &[1, 1]).unwrap().data, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
}

/// The host gives what the kernel means.
fn on_the_host(kernel: &Kernel, sizes: &[usize]) {
    let args = inputs(kernel, sizes, &[]);
    let got = launch(&mut Host::new(), kernel, &args, sizes).unwrap();
    let (want, t) = (meaning(kernel, &args, sizes).unwrap(), tolerance(kernel));
    got.close_to(&want, t, t).unwrap_or_else(|e| panic!("host, sizes {sizes:?}: {e}\n{}", kernel.body));
}

/// A row of one operand, extended step by step by whatever op fits, ending in values of the row.
fn row_body(sizes: [u64; 3], steps: &[(u8, u8, u8)]) -> Function {
    let mut f = Function::new("random");
    let axis = |f: &mut Function, size: Size| {
        f.axes.push(Axis { name: format!("a{}", f.axes.len()), size, like: None });
        AxisId(f.axes.len() as u32 - 1)
    };
    let [g, j, few] = sizes;
    let rows = [axis(&mut f, Size::Sym("n0".to_owned())), axis(&mut f, Size::Fixed(2))];
    let whole = axis(&mut f, Size::Fixed(g * j));
    let parts = vec![axis(&mut f, Size::Fixed(g)), axis(&mut f, Size::Fixed(j))];
    let slots = axis(&mut f, Size::Fixed(few.min(g * j)));
    let twice = axis(&mut f, Size::Fixed(2 * g * j));
    let x = f.add_param("p0", Type::new(DType::F32, [rows[0], whole, rows[1]]));
    let table = f.add_param("p1", Type::new(DType::F32, [whole]));
    let mut values = vec![x, table];
    for &(op, x, y) in steps {
        let pick = |n: u8| values[values.len() - 1 - n as usize % values.len()];
        let (x, y) = (pick(x), pick(y));
        let add = |f: &mut Function, op: Op, args: &[ValueId]| {
            let types: Vec<_> = args.iter().map(|&v| f.ty(v)).collect();
            let ty = infer(&op, &types, Want { dtype: None, axes: None }, &f.axes).ok()?;
            let name = format!("v{}", f.values.len());
            Some(f.push(op, args, &[(&name, ty)])[0])
        };
        let inner = f.ty(x).axes.iter().copied().find(|a| !rows.contains(a));
        let reduce = |by| inner.map(|axis| Op::Reduce { by, axis });
        let made = match op {
            0 => add(&mut f, Op::Unary(Unary::Neg), &[x]),
            1 | 2 => add(&mut f, Op::Binary(latentc_ir::Binary::Sub), &[x, y]),
            3 => add(&mut f, Op::Split { axis: whole, into: parts.clone() }, &[x]),
            4 => add(&mut f, Op::Merge { axes: parts.clone(), into: whole }, &[x]),
            5 | 6 => reduce(Reduce::Max).and_then(|op| add(&mut f, op, &[x])),
            7 => reduce(Reduce::Sum).and_then(|op| add(&mut f, op, &[x])),
            8 | 9 => {
                let top = inner.map(|axis| Op::TopK { axis, k: 1 + u64::from(y.0) % 3 });
                let open = top.and_then(|op| add(&mut f, op, &[x]));
                open.and_then(|c| add(&mut f, Op::Select, &[c, x, y]))
            }
            10 | 11 => {
                let at = add(&mut f, Op::TopIndices { axis: whole, into: slots }, &[x]);
                at.and_then(|at| add(&mut f, Op::Gather { axis: whole }, &[y, at]).or(Some(at)))
            }
            12 => add(&mut f, Op::Concat { axes: vec![whole, whole], into: twice }, &[x, y]),
            13 => add(&mut f, Op::Slice { axis: twice, into: whole, start: j }, &[x]),
            _ => None,
        };
        values.extend(made);
    }
    f.results = vec![*values.last().expect("there are parameters")];
    // What nobody reads would only say which axes are rows.
    let mut read = f.results.clone();
    let mut body = Vec::new();
    for inst in f.body.drain(..).rev().collect::<Vec<_>>() {
        if read.contains(&inst.result()) {
            read.extend(&inst.args);
            body.insert(0, inst);
        }
    }
    f.body = body;
    f
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 25, ..ProptestConfig::default() })]

    #[test]
    fn random_rows(
        sizes in [1u64..6, 1..30, 1..5],
        rows in 0usize..4,
        steps in prop::collection::vec((0u8..14, 0u8..4, 0u8..4), 2..12),
    ) {
        let body = row_body(sizes, &steps);
        prop_assume!(!body.body.is_empty() && body.results[0] == body.body.last().unwrap().result());
        let k = Kernel { name: "random".to_owned(), kind: KernelKind::Map, body };
        let bound = vec![rows; k.size_symbols().len()];
        on_the_host(&k, &bound);
        // What does not fit is computed over and over: lavapipe stops a loop at its 65,536th turn.
        if fits(&k.body, &k.body.body.iter().collect::<Vec<_>>()).is_ok() {
            means_the_same(&k, &inputs(&k, &bound, &[]), &bound, tolerance(&k));
            cuda(&k);
        }
    }
}
