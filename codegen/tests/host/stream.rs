//! Streams against the interpreter.

use latentc_codegen::host::Host;
use latentc_codegen::program::{Kernel, KernelKind};
use latentc_codegen::schedule::schedule;
use latentc_codegen::stream::StreamPlan;
use latentc_ir::Module;
use latentc_passes::{Context, Graph};
use proptest::prelude::*;

use crate::streams::{
    arb_case, arb_fold, backward, causal, latent, paged, paged_codes, paged_heads, pages, put, stream, total,
};
use crate::{check, check_at, prepare};

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

    #[test]
    fn folds_of_axes_in_any_order(
        case in arb_fold(),
        sizes in (0usize..4, prop_oneof![0usize..4, 20usize..50], prop_oneof![0usize..6, 100usize..400]),
        seed: u64,
    ) {
        check_at(&case.kernel(), &[sizes.0, sizes.1, sizes.2], seed)?;
    }

}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20, ..ProptestConfig::default() })]
    /// Of sizes that tiles are cut from, and of smaller ones.
    #[test]
    fn pages_in_any_order(
        [b, t, s] in [1usize..4, 1usize..9, 1usize..100],
        page in prop::sample::select(vec![2u64, 16, 64, 256]),
        seed: u64,
    ) {
        let mut host = Host::new();
        let mut right = |kernel: &Kernel, sizes: &[usize]| {
            let outcome = latentc_codegen::check::check(&mut host, kernel, sizes, seed).expect("it runs");
            prop_assert!(outcome.passes(), "{outcome:?}");
            Ok(())
        };
        right(&paged("paged", "f32", [4, 8, 4], page), &pages([b, t, s], page))?;
        right(&paged_heads("heads", "f32", [3, 6, 5], page), &pages([b, s, s], page))?;
        right(&paged_codes("codes", [4, 16, 8], page), &pages([b, t, s], page))?;
        let sizes = pages([b, t, t], page);
        right(&put("put", "f32", [7, 5], page), &[b, t, sizes[3], sizes[4]])?;
    }
}

#[test]
fn a_table_that_names_no_page_of_the_pool_is_an_error() {
    let kernel = paged("paged", "f32", [4, 8, 4], 16);
    let sizes = pages([2, 1, 40], 16);
    let mut args = latentc_codegen::check::random_inputs(&kernel, &sizes, 1);
    let table = args.last_mut().expect("it has a table");
    table.data[1] = (sizes[3] / 16) as f64;
    let said = latentc_codegen::check::launch(&mut Host::new(), &kernel, &args, &sizes)
        .expect_err("there is no such page");
    assert!(said.to_string().contains("index 9 is outside of an axis of size 9"), "{said}");
}

#[test]
fn rows_and_positions_beyond_a_tile() {
    for sizes in [[1, 1, 9000], [1, 3, 5000], [2, 5, 1000], [1, 200, 300], [3, 1, 7], [0, 1, 5], [1, 1, 0]] {
        check_at(&latent("latent", "f32", [4, 8, 4]), &sizes, 3).unwrap();
        check_at(&causal("causal", "f32", [3, 6, 5]), &sizes, 4).unwrap();
        check_at(&backward("backward", "f32", [3, 6, 5]), &sizes, 5).unwrap();
        check_at(&total("total", "f32", [3, 6]), &sizes, 6).unwrap();
    }
}

/// Products of a tile are then of bf16, and so are the weights in them.
#[test]
fn tiles_of_narrow_numbers_round_as_their_types_say() {
    let kernels = [latent("latent", "bf16", [4, 40, 24]), causal("causal", "bf16", [3, 50, 30])];
    for (kernel, sizes) in kernels.iter().zip([[2, 33, 150], [1, 140, 70]]) {
        let outcome = latentc_codegen::check::check(&mut Host::new(), kernel, &sizes, 3).unwrap();
        assert!(outcome.passes(), "{outcome:?}");
    }
}

#[test]
fn masks_hide_what_is_nothing_to_a_fold() {
    let mask = |kernel: &Kernel| {
        let plan = StreamPlan::of(&kernel.body).unwrap();
        plan.mask.map(|m| kernel.body.value(m).name.clone())
    };
    assert_eq!(mask(&causal("causal", "f32", [3, 6, 5])).as_deref(), Some("seen"));
    assert_eq!(mask(&backward("backward", "f32", [3, 6, 5])).as_deref(), Some("seen"));
    let of = |lines: &str| {
        stream(
            "f",
            &format!(
                "axes t=n0, s=n1, k=3\nparam q: f32[t, k]\nparam kk: f32[s, k]\nparam seen: bool[t, s]\n\
                 z: f32[t, s] = contract q, kk over k\nzero: f32 = const 0.0\nleast: f32 = const -inf\n{lines}\nreturn y"
            ),
        )
    };
    let masked = "m: f32[t, s] = select seen, z, least\n";
    let sum = |w: &str| of(&format!("{masked}w: f32[t, s] = {w}\ny: f32[t] = reduce_sum w over s"));
    assert_eq!(mask(&sum("exp m")).as_deref(), Some("seen"));
    // The sum of -inf is -inf.
    assert_eq!(mask(&sum("neg m")), None);
    assert_eq!(mask(&of(&format!("{masked}y: f32[t] = reduce_max m over s"))).as_deref(), Some("seen"));
    let kept = "m: f32[t, s] = select seen, z, zero\ny: f32[t] = reduce_max m over s";
    assert_eq!(mask(&of(kept)), None);
}

#[test]
fn bodies_that_are_no_streams() {
    let why = |body: &str| StreamPlan::of(&stream("no", body).body).unwrap_err();
    let head = "axes t=4, s=n0, k=3, v=2\nparam q: f32[t, k]\nparam kk: f32[s, k]\nparam vv: f32[s, v]\n";
    assert_eq!(
        why(&format!("{head}y: f32[t, s] = contract q, kk over k\nreturn y")),
        "0 sums or maxima are of what is made of products; a stream has one, or one `softmax`"
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

/// A function of which a softmax that weighs a sum is a part; what there is besides, by bits of `with`. Also whether all scores
/// can go without memory.
fn around(with: u16) -> (Module, bool) {
    let has = |bit: u16| with >> bit & 1 == 1;
    let mut lines: Vec<&str> = Vec::new();
    let mut results = vec!["y"];
    lines.push(if has(0) {
        // A product that lacks an axis of the scores is made once for all heads.
        "z0: f32[b, t, s] = contract q0, kk over k\n  ones: f32[h] = const [1.0, 0.5]\n  z: f32[b, t, h, s] = mul z0, ones"
    } else {
        "z: f32[b, t, h, s] = contract q, kk over k"
    });
    let mut x = "z";
    if has(1) {
        lines.push("z2: f32[b, t, h, s] = contract kr, qr over r\n  z3: f32[b, t, h, s] = add z2, z");
        x = "z3";
    }
    let bias;
    if has(2) {
        // What is folded has memory before the stream begins.
        bias = format!("row: f32[s, b] = reduce_max kr over r\n  z4: f32[b, t, h, s] = sub {x}, row");
        lines.push(&bias);
        x = "z4";
    }
    if has(3) {
        results.push(x);
    }
    let masked = format!("z5: f32[b, t, h, s] = select seen, {x}, least");
    lines.extend([
        "at: i32[s] = position of s",
        "seen: bool[b, t, s] = le at, pos",
        "least: f32 = const -inf",
        &masked,
    ]);
    lines.push("p0: f32[b, t, h, s] = softmax z5 over s\n  p: f32[b, t, h, s] = cast p0");
    if has(4) {
        results.push("p");
    }
    lines.push(match (has(5), has(6)) {
        (false, false) => "w: f32[b, s, k] = cast kk",
        // A product, which is there before the stream begins.
        (false, true) => "w: f32[b, s, k] = contract kr, q0r over r",
        (true, false) => "n: f32[b, s] = reduce_sum kk over k\n  w: f32[b, s, k] = sub kk, n",
        (true, true) => "w: f32[b, s, k] = gather table, which along e",
    });
    lines.push("y0: f32[b, t, h, k] = contract w, p over s");
    lines.push(match (has(7), has(8)) {
        (false, _) => "y: f32[b, t, h, k] = silu y0",
        (true, false) => "g: f32[h] = reduce_max q0h over k\n  y: f32[b, t, h, k] = mul g, y0",
        // Two streams of one shape meet; they are two kernels.
        (true, true) => {
            "u0: f32[b, t, h, s] = contract qr, kr over r\n  u: f32[b, t, h, s] = softmax u0 over s\n  \
             y1: f32[b, t, h, k] = contract u, kk over s\n  y: f32[b, t, h, k] = sub y0, y1"
        }
    });
    let text = format!(
        "module test entry @f\n\nfunc @f {{\n  axes b, t, s, h=2, k=3, r=2, e=4\n  param q: f32[b, t, h, k]\n  \
         param q0: f32[b, t, k]\n  param q0h: f32[h, k]\n  param q0r: f32[r, k]\n  param qr: f32[b, t, h, r]\n  param kk: f32[s, b, k]\n  \
         param kr: f32[s, b, r]\n  param pos: i32[b, t]\n  param table: f32[e, k]\n  param which: i32[b, s]\n\n  {}\n  return {}\n}}\n",
        lines.join("\n  "),
        results.join(", ")
    );
    // Two streams that want one product have it from memory.
    let common = has(1) && has(7) && has(8);
    let hidden = !(has(3) || has(4) || common);
    (latentc_ir::check("test", &text).unwrap_or_else(|e| panic!("{}\n{text}", e.render())), hidden)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]
    /// Whatever stands around a softmax: the scheduler makes a stream that its kernels can run, and gives no scores memory
    /// that nothing else wants.
    #[test]
    fn streams_that_are_scheduled(with in 0u16..512, graph in prop::sample::select(&Graph::ALL), seed: u64) {
        let (module, hidden) = around(with);
        let program = schedule(&prepare(&module), &Context::new(graph));
        let program = program.map_err(|e| TestCaseError::fail(e.to_string()))?;
        let streams = program.kernels.iter().filter(|k| k.kind == KernelKind::Stream).count();
        let softmaxes = if with >> 7 & 3 == 3 { 2 } else { 1 };
        // Where weights are wanted elsewhere, a product of values may be what is made piece by piece.
        if with >> 4 & 0b111 != 0b101 {
            prop_assert_eq!(streams, softmaxes - usize::from(with >> 4 & 1), "{}", program);
        }
        let s = latentc_ir::Size::Sym("s".to_owned());
        let scores = program.routines[0].buffers.iter().filter(|b| b.dims.len() == 4 && b.dims.contains(&s));
        prop_assert_eq!(scores.count() == 0, hidden, "{}", program);
        for kernel in &program.kernels {
            if kernel.kind == KernelKind::Stream {
                StreamPlan::of(&kernel.body).map_err(TestCaseError::fail)?;
            }
            check(kernel, seed)?;
        }
    }
}

/// The gradient of a sum that a softmax weighs, as it is defined; what there is besides, by bits of `with`. Also whether anything as long
/// as tokens and positions needs memory.
fn gradient(with: u16) -> (Module, bool) {
    let has = |bit: u16| with >> bit & 1 == 1;
    let mut results = vec!["dv", "dk", "dq"];
    // What weights weigh may be wanted by a sum alone.
    let (values, sum) =
        if has(4) { ("u", "dw: f32[h, k] = contract y, w over b, t") } else { ("v", "few: f32 = const 3.0") };
    results.push(if has(4) { "dw" } else { "y" });
    let second = if has(0) {
        "z2: f32[b, t, h, s] = contract qr, kr over r"
    } else {
        "z2: f32[b, t, h, s] = sub z1, one"
    };
    let shared = if has(1) {
        // Of keys that all heads share.
        results.push("dkr");
        "dkr: f32[b, s, r] = contract g, qr over t, h"
    } else {
        "none: f32 = const 2.0"
    };
    if has(2) {
        results.push("p");
    }
    let round = if has(3) { "bf16" } else { "f32" };
    let text = format!(
        "module test entry @f\n\nfunc @f {{\n  axes b, t, s, h=2, k=3, r=2\n  param q: f32[b, t, h, k]\n  \
         param qr: f32[b, t, h, r]\n  param kk: f32[b, s, h, k]\n  param kr: f32[b, s, r]\n  param v: f32[b, s, h, k]\n  \
         param dy: f32[b, t, h, k]\n  param pos: i32[b, t]\n  \
         param u: f32[b, s, h, k]\n  param w: f32[b, t, h]\n\n  z1: f32[b, t, h, s] = contract q, kk over k\n  one: f32 = const 1.0\n  {second}\n  z: f32[b, t, h, s] = add z1, z2\n  \
         at: i32[s] = position of s\n  seen: bool[b, t, s] = le at, pos\n  least: f32 = const -inf\n  \
         x: f32[b, t, h, s] = select seen, z, least\n  p: {round}[b, t, h, s] = softmax x over s\n  \
         y: f32[b, t, h, k] = contract p, {values} over s\n  {sum}\n  dv: f32[b, s, h, k] = contract p, dy over t\n  \
         dp: f32[b, t, h, s] = contract v, dy over k\n  e: f32[b, t, h, s] = mul p, dp\n  m: f32[b, t, h] = reduce_sum e over s\n  \
         c: f32[b, t, h, s] = sub dp, m\n  d: f32[b, t, h, s] = mul p, c\n  zero: f32 = const 0.0\n  \
         g: f32[b, t, h, s] = select seen, d, zero\n  dk: f32[b, s, h, k] = contract q, g over t\n  \
         dq: f32[b, t, h, k] = contract g, kk over s\n  {shared}\n  return {}\n}}\n",
        results.join(", ")
    );
    (latentc_ir::check("test", &text).unwrap_or_else(|e| panic!("{}\n{text}", e.render())), has(2))
}

/// Gradients add up what they make piece by piece, and only what something else wants has memory.
#[test]
fn gradients_that_are_scheduled() {
    for with in 0..32 {
        let (module, wanted) = gradient(with);
        let program = schedule(&prepare(&module), &Context::new(Graph::Gradient)).unwrap();
        let long = |b: &latentc_codegen::program::Buffer| {
            ["t", "s"].iter().all(|&n| b.dims.contains(&latentc_ir::Size::Sym(n.to_owned())))
        };
        let stored: Vec<_> =
            program.routines[0].buffers.iter().filter(|b| long(b)).map(|b| &b.name).collect();
        assert_eq!(stored.is_empty(), !wanted, "{stored:?}\n{program}");
        // A row's largest score and what it shifts are one kernel.
        let is_total = |k: &&Kernel| StreamPlan::of(&k.body).is_ok_and(|plan| plan.top.is_some());
        assert_eq!(program.kernels.iter().filter(is_total).count(), usize::from(!wanted), "{program}");
        for kernel in &program.kernels {
            check(kernel, u64::from(with)).unwrap();
            check_at(kernel, &vec![9; kernel.size_symbols().len()], 7).unwrap();
        }
    }
}
