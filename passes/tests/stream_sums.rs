//! Random programs whose sums want what products make elementwise: the pass keeps what they mean, and leaves sums along one axis.

use latentc_ir::{Function, Module, Op, SplitMix, check};
use latentc_passes::stream_sums::{Axes, Wanted, regions};
use latentc_passes::validate::{Numbers, Verdict, compare};
use latentc_passes::{Context, Graph, Kind, Machine, Sizes, pipeline};
use proptest::prelude::*;

/// A program: scores of two products, weights of them, and some sums of these, with axes in random order. Also whether anything but a sum
/// wants the weights.
fn program(seed: u64) -> (String, bool) {
    let mut rng = SplitMix(seed);
    let mut pick = |n: u64| rng.next_u64() % n;
    let mut lines = Vec::new();
    let mut results = Vec::new();
    let shuffled = |axes: &[&str], pick: &mut dyn FnMut(u64) -> u64| {
        let mut axes = axes.to_vec();
        for n in (1..axes.len()).rev() {
            axes.swap(n, pick(n as u64 + 1) as usize);
        }
        format!("f32[{}]", axes.join(", "))
    };
    let all = ["b", "t", "s", "i"];
    let params = [
        ("q", &["b", "t", "i", "n"][..]),
        ("qr", &["b", "t", "i", "r"]),
        ("k", &["b", "s", "i", "n"]),
        ("kr", &["b", "s", "r"]),
        ("v", &["b", "s", "i", "v"]),
        ("dy", &["b", "t", "i", "v"]),
        ("row", &["b", "i", "t"]),
    ];
    let params = params.map(|(n, axes)| (n, shuffled(axes, &mut pick)));
    // What is summed stands in the order of its appearance.
    let over = |a: &str, b: &str, result: &[&str]| {
        let axes = |ty: &str| ty[4..ty.len() - 1].split(", ").map(str::to_owned).collect::<Vec<_>>();
        let mut all = axes(a);
        axes(b).into_iter().for_each(|x| {
            if !all.contains(&x) {
                all.push(x)
            }
        });
        all.retain(|x| !result.contains(&&x[..]));
        all.join(", ")
    };
    let of = |name: &str| params.iter().find(|p| p.0 == name).map_or("", |p| &p.1).to_owned();
    let ty = shuffled(&all, &mut pick);
    lines.push(format!("z1: {ty} = contract q, k over n"));
    let other = if pick(2) == 0 { "contract qr, kr over r" } else { "sub z1, row" };
    lines.push(format!("z2: {ty} = {other}"));
    lines.push(format!("z: {ty} = add z1, z2"));
    lines.push(
        "to: i32[t] = position of t\n  at: i32[s] = position of s\n  seen: bool[t, s] = le at, to".to_owned(),
    );
    lines.push("zero: f32 = const 0.0".to_owned());
    let p = match pick(3) {
        0 => {
            lines.push(format!("x: {ty} = tanh z\n  p: {ty} = select seen, x, zero"));
            "p"
        }
        1 => {
            lines.push(format!("x: {ty} = sub z, row\n  p: {ty} = sigmoid x"));
            "p"
        }
        _ => "z",
    };
    // The adjoint of a softmax, with or without the sum that its mean is made of.
    if pick(3) > 0 {
        lines.push(format!("o: {} = contract v, {p} over s", shuffled(&["b", "t", "i", "v"], &mut pick)));
        results.push("o");
    }
    lines.push(format!("dp: {} = contract dy, v over v", shuffled(&all, &mut pick)));
    lines.push(format!(
        "e: {ty} = mul {p}, dp\n  m: {} = reduce_sum e over s",
        shuffled(&["b", "t", "i"], &mut pick)
    ));
    lines.push(format!("c: {ty} = sub dp, m\n  g: {ty} = mul {p}, c"));
    results.push("m");
    let mut sums = vec![
        ("dq", "k", &["b", "t", "i", "n"][..]),
        ("dqr", "kr", &["b", "t", "i", "r"]),
        ("dk", "q", &["b", "s", "i", "n"]),
        ("dkr", "qr", &["b", "s", "r"]),
        ("few", "q", &["i", "s", "n"]),
        ("most", "", &["b", "s", "i"]),
    ];
    while !sums.is_empty() {
        let (name, values, axes) = sums.swap_remove(pick(sums.len() as u64) as usize);
        let sum = match (values, pick(2)) {
            ("", _) => "reduce_max g over t".to_owned(),
            (_, 0) => format!("contract g, {values} over {}", over(&ty, &of(values), axes)),
            _ => format!("contract {values}, g over {}", over(&of(values), &ty, axes)),
        };
        if pick(3) > 0 {
            // Sums of the same pieces meet if they are laid out alike.
            let ty =
                if pick(2) == 0 { format!("f32[{}]", axes.join(", ")) } else { shuffled(axes, &mut pick) };
            let ty = if pick(4) == 0 { ty.replace("f32", "f64") } else { ty };
            lines.push(format!("{name}: {ty} = {sum}"));
            results.push(name);
        }
    }
    let wanted = pick(5) == 0;
    if wanted {
        results.push("g");
    }
    let text = format!(
        "module test entry @f\n\nfunc @f {{\n  axes b, t, s=t like t, i=2, n=4, r=3, v=5\n  {}\n  {}\n  return {}\n}}\n",
        params.iter().map(|(n, ty)| format!("param {n}: {ty}")).collect::<Vec<_>>().join("\n  "),
        lines.join("\n  "),
        results.join(", ")
    );
    (text, wanted)
}

fn parsed(seed: u64) -> (Module, bool) {
    let (text, wanted) = program(seed);
    (check("test", &text).unwrap_or_else(|e| panic!("{}\n{text}", e.render())), wanted)
}

fn sums(f: &Function) -> impl Iterator<Item = usize> {
    let sums = f.body.iter().filter(|i| i.op == Op::Contract);
    sums.map(|i| f.summed(&i.args, f.ty(i.result())).len())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    #[test]
    fn sums_keep_their_meaning(seed: u64) {
        let (before, wanted) = parsed(seed);
        let pass = pipeline().into_iter().find(|p| p.name == "stream_sums").expect("a pass of the pipeline");
        let mut cx = Context::new(Graph::Gradient);
        let after = pass.apply(&before, &mut cx).map_err(|e| TestCaseError::fail(e.to_string()))?;
        match compare(&before, &after, seed, Numbers::Grid) {
            Verdict::Same => {}
            other => return Err(TestCaseError::fail(format!("{other:?}\n{before}\n{after}"))),
        }
        let (f, machine) = (&after.functions[0], Machine::default());
        let sizes = Sizes::new(&after, Graph::Gradient);
        let found = regions(f, &Wanted { sizes: &sizes, machine: &machine, axes: Axes::One }, &|_| false);
        let hidden = |name: &str| f.value_named(name).is_some_and(|v| found.iter().any(|r| r.pieces.contains(&v)));
        if !wanted && f.value_named("dk").is_some() {
            prop_assert!(hidden("z1") && hidden("g"), "{after}");
            prop_assert!(found.iter().all(|r| r.streamed < r.stored));
            prop_assert!(sums(f).all(|axes| axes == 1), "{after}");
            prop_assert!(cx.remarks.iter().all(|r| r.kind == Kind::Applied));
        }
        // What is joined is asked for once.
        let again = pass.apply(&after, &mut cx).map_err(|e| TestCaseError::fail(e.to_string()))?;
        prop_assert_eq!(&after, &again);
    }
}
