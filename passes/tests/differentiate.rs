//! Gradients against central differences, in f64: every op's rule by itself, and whole random programs, before and after all passes.

use std::cell::Cell;
use std::collections::BTreeMap;

use latentc_ir::interp::{Caches, Interpreter, Precision};
use latentc_ir::tensor::{SplitMix, Tensor};
use latentc_ir::testing::{arb_module, objective};
use latentc_ir::verify::Stage;
use latentc_ir::{DType, Function, Module, Size, Weight, verify};
use latentc_passes::differentiate::{Gradients, Keep, differentiate, keeping, weights};
use latentc_passes::{Context, Graph};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

/// The step to both sides: its square is what a difference is off by, the last bit over it what rounding adds.
const STEP: f64 = 1e-5;

/// Weights of a program by scope, function and name.
type Weights = BTreeMap<(String, String, String), Tensor>;

/// What a module is run on.
struct Setting {
    args: Vec<Tensor>,
    weights: Weights,
    sizes: BTreeMap<&'static str, usize>,
}

impl Setting {
    /// Numbers for a module that are nowhere equal, so that no choice is a close one.
    fn new(module: &Module, sizes: &[(&'static str, usize)], seed: u64) -> Setting {
        let mut rng = SplitMix(seed);
        let mut s =
            Setting { args: Vec::new(), weights: Weights::new(), sizes: sizes.iter().copied().collect() };
        let entry = module.entry().expect("an entry");
        for &p in &entry.params {
            let shape = entry.ty(p).axes.iter().map(|&a| s.size(&entry.axis(a).size)).collect();
            s.args.push(random(entry.ty(p).dtype, shape, &mut rng));
        }
        for (scope, f, n) in weights(module) {
            let w = f.weights[n].value;
            let shape = f.ty(w).axes.iter().map(|&a| s.size(&f.axis(a).size)).collect();
            let key = (scope, f.name.clone(), f.value(w).name.clone());
            s.weights.entry(key).or_insert_with(|| random(DType::F64, shape, &mut rng));
        }
        s
    }

    fn size(&self, size: &Size) -> usize {
        match size {
            Size::Fixed(n) => *n as usize,
            Size::Sym(s) => self.sizes.get(s.as_str()).copied().unwrap_or(2),
        }
    }

    fn run(&self, module: &Module) -> Result<Vec<Tensor>, String> {
        Ok(self.run_watched(module)?.0)
    }

    /// The same, and whether a product or a sum met what is no finite number.
    fn run_watched(&self, module: &Module) -> Result<(Vec<Tensor>, bool), String> {
        let mut interp = Interpreter::new(module, Precision::Exact);
        for axis in module.functions.iter().flat_map(|f| &f.axes) {
            if let Size::Sym(s) = &axis.size {
                interp = interp.with_size(s, self.size(&axis.size));
            }
        }
        let mut source = |scope: &str, f: &Function, w: &Weight| {
            // A gradient function reads the weights of the function that it is of.
            let name = f.name.split(".grad").next().unwrap_or_default().to_owned();
            let key = (scope.to_owned(), name, f.value(w.value).name.clone());
            self.weights.get(&key).cloned().ok_or_else(|| format!("no weight {key:?}"))
        };
        let run = interp.run(&self.args, &mut source, &mut Caches::new());
        Ok((run.map_err(|e| e.to_string())?, interp.met_infinity()))
    }
}

fn random(dtype: DType, shape: Vec<usize>, rng: &mut SplitMix) -> Tensor {
    let data = (0..shape.iter().product())
        .map(|_: usize| match dtype {
            DType::Bool | DType::I32 => rng.below(2) as f64,
            DType::F64 | DType::F32 | DType::Bf16 | DType::F16 => {
                let x = rng.below(1 << 30) as f64 / f64::from(1 << 30);
                // Away from 0, where much has a kink or a pole.
                if x < 0.5 { -1.6 + 2.0 * x } else { 2.0 * x - 0.4 }
            }
        })
        .collect();
    Tensor { dtype, shape, data }
}

/// Elements of gradients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Compared {
    elements: usize,
    unreal: usize,
}

/// Compares the gradient of each weight with central differences, and again after all passes. With `smooth`, everywhere;
/// otherwise where the differences of two steps agree, as they do not at a kink, a jump or a pole, and unless the gradient has met an
/// infinity, of which the chain rule says nothing: 0 times it is no number. The elements compared, and those left out for the latter.
fn check(module: &Module, setting: &mut Setting, smooth: bool) -> Result<Compared, String> {
    verify(module).map_err(|e| format!("{}\n{module}", e[0]))?;
    let gradient = differentiate(module, Gradients::Sums).map_err(|e| e.to_string())?;
    verify(&gradient).map_err(|e| format!("breaks the graph: {}\n{gradient}", e[0]))?;
    let Ok(results) = setting.run(module) else { return Ok(Compared::default()) };
    let loss = results[0].data[0];
    let (got, unreal) = setting.run_watched(&gradient).map_err(|e| format!("{e}\n{gradient}"))?;
    let of = weights(module);
    if got.len() != of.len() + 1 || (got[0].data[0] != loss && !loss.is_nan()) {
        return Err(format!(
            "{} gradients of {} weights, loss {loss} or {}",
            got.len() - 1,
            of.len(),
            got[0].data[0]
        ));
    }
    // Called twice under one scope, a weight has two gradients, which add up.
    let mut gradients = Weights::new();
    for ((scope, f, n), g) in of.into_iter().zip(&got[1..]) {
        let key = (scope, f.name.clone(), f.value(f.weights[n].value).name.clone());
        match gradients.get_mut(&key) {
            Some(sum) => sum.data.iter_mut().zip(&g.data).for_each(|(s, x)| *s += x),
            None => {
                gradients.insert(key, g.clone());
            }
        }
    }
    let mut compared = Compared::default();
    for (key, g) in &gradients {
        for n in 0..g.data.len().min(24) {
            let mut at = |step: f64| {
                let x = setting.weights[key].data[n];
                setting.weights.get_mut(key).expect("a weight").data[n] = x + step;
                let loss = setting.run(module).map(|r| r[0].data[0]);
                setting.weights.get_mut(key).expect("a weight").data[n] = x;
                loss.unwrap_or(f64::NAN)
            };
            let mut slope = |step: f64| (at(step) - at(-step)) / (2.0 * step);
            let (wide, near) = (slope(2.0 * STEP), slope(STEP));
            let scale = 1.0 + near.abs() + loss.abs();
            let agree = (wide - near).abs() < 1e-7 * scale;
            if !agree && !smooth {
                continue;
            }
            // Twice as far, four times as wrong: what both are off by is known, up to the next order.
            let want = near + (near - wide) / 3.0;
            if !(agree && (g.data[n] - want).abs() < 1e-6 * scale) {
                if unreal && !smooth {
                    compared.unreal += 1;
                    continue;
                }
                return Err(format!(
                    "{key:?}[{n}] is {}, not {want} (or {wide})\n{module}\n{gradient}",
                    g.data[n]
                ));
            }
            compared.elements += 1;
        }
    }
    after_all_passes(module, setting, &got)?;
    Ok(compared)
}

/// Loss and gradients are the same after the whole pipeline.
fn after_all_passes(module: &Module, setting: &Setting, want: &[Tensor]) -> Result<(), String> {
    // Weights are told apart by function here, and `inline` does away with some.
    let passes = latentc_passes::selected(|pass| pass.name != "inline");
    let stages = latentc_passes::run(module, &mut Context::new(Graph::Gradient), &passes)
        .map_err(|e| e.to_string())?;
    let last = &stages[stages.len() - 1].1;
    verify(last).map_err(|e| format!("the passes break the graph: {}\n{last}", e[0]))?;
    let got = setting.run(last).map_err(|e| format!("{e}\n{last}"))?;
    for (w, g) in want.iter().zip(&got) {
        // An infinity that one order of a sum meets may be met by no other.
        if w.data.iter().all(|x| x.is_finite()) {
            let scale = w.data.iter().fold(1.0f64, |m, x| m.max(x.abs()));
            g.close_to(w, 1e-8 * scale, 1e-8)
                .map_err(|e| format!("after all passes: {e:?}\n{module}\n{last}"))?;
        }
    }
    Ok(())
}

/// One op's rule: `lines` make `y` from the weights `u` and `v`; the loss is a random linear function of `y`. The axes `b` and
/// `t` have several sizes, odd ones and 1 among them.
fn op(axes: &str, u: &str, v: &str, y: &str, lines: &str) {
    for (b, t, seed) in [(1, 1, 1), (2, 3, 2), (3, 5, 3), (5, 2, 4), (1, 7, 5)] {
        let axes = axes.replace("=t", &format!("={t}"));
        let over = y.trim_matches(['[', ']']);
        let text = format!(
            "module op entry @f\n\nfunc @f {{\n  axes b={b}, t={t}{axes}\n  param r: f64{y}\n  weight u: f64{u} = \"u\"{u}\n  \
             weight v: f64{v} = \"v\"{v}\n  {lines}\n  l: f64 = contract y, r over {over}\n  return l\n}}\n"
        );
        let module = latentc_ir::parse("op", &text).unwrap_or_else(|e| panic!("{}\n{text}", e.render()));
        let mut setting = Setting::new(&module, &[], seed);
        let compared = check(&module, &mut setting, true).unwrap_or_else(|e| panic!("{e}"));
        assert!(compared.elements > 0, "nothing to compare");
    }
}

#[test]
fn functions_of_one_number() {
    for name in ["neg", "abs", "exp", "sigmoid", "silu", "tanh", "sin", "cos"] {
        op("", "[b, t]", "[b]", "[b, t]", &format!("x: f64[b, t] = mul u, v\n  y: f64[b, t] = {name} x"));
    }
    for name in ["log", "sqrt", "rsqrt"] {
        op("", "[b, t]", "[b]", "[t, b]", &format!("x: f64[b, t] = mul u, u\n  y: f64[t, b] = {name} x"));
    }
    op("", "[b, t]", "[b]", "[b, t]", "x: f64[t, b] = cast u\n  y: f64[b, t] = mul x, v");
}

#[test]
fn functions_of_two_numbers() {
    for name in ["add", "sub", "mul", "div", "max", "min"] {
        for (u, v) in [("[b, t]", "[t, b]"), ("[b, t]", "[t]"), ("[b]", "[b, t]"), ("[b]", "[t]")] {
            op("", u, v, "[t, b]", &format!("y: f64[t, b] = {name} u, v"));
        }
        op("", "[b]", "[b]", "[b]", &format!("y: f64[b] = {name} u, u"));
    }
    let lines = "c: bool[b, t] = lt u, v\n  y: f64[b, t] = select c, u, v";
    op("", "[b, t]", "[t]", "[b, t]", lines);
    op("", "[b]", "[t]", "[b, t]", lines);
    // A choice that the operands know nothing of.
    op(
        "",
        "[b]",
        "[b]",
        "[t, b]",
        "at: i32[t] = position of t\n  one: i32 = const 1\n  c: bool[t] = le at, one\n  y: f64[t, b] = select c, u, v",
    );
}

/// Where there is no value, something else is taken; what is taken has its gradient, and what is not has none.
#[test]
fn what_has_no_value_is_hidden_both_ways() {
    for name in ["log", "sqrt", "rsqrt"] {
        let hidden =
            format!("zero: f64 = const 0.0\n  c: bool[b, t] = lt zero, u\n  x: f64[b, t] = {name} u\n  ");
        op("", "[b, t]", "[b]", "[b, t]", &format!("{hidden}y: f64[b, t] = select c, x, v"));
        // Through what is made of it.
        let lines = format!("{hidden}z: f64[b, t] = exp x\n  ");
        op("", "[b, t]", "[b]", "[b, t]", &format!("{lines}y: f64[b, t] = select c, z, v"));
        for either in ["max", "min"] {
            for operands in ["x, v", "v, x"] {
                op("", "[b, t]", "[b]", "[b, t]", &format!("{hidden}y: f64[b, t] = {either} {operands}"));
            }
        }
    }
}

#[test]
fn products_and_sums() {
    op(", d=3", "[b, t, d]", "[d, t]", "[b]", "y: f64[b] = contract u, v over t, d");
    op(", d=3", "[b, d]", "[d, t]", "[t, b]", "y: f64[t, b] = contract u, v over d");
    // Axes that one operand alone has are summed; the same operand twice; three; one.
    op(", d=3, e=2", "[b, t, e]", "[d, t]", "[b]", "y: f64[b] = contract u, v over t, e, d");
    op("", "[b, t]", "[t]", "[b]", "y: f64[b] = contract u, u, v over t");
    op("", "[b, t]", "[t]", "[t, b]", "y: f64[t, b] = contract u, v, v");
    op("", "[b, t]", "[t]", "[b]", "x: f64 = contract v over t\n  y: f64[b] = contract u, x over t");
    op(
        "",
        "[b, t]",
        "[t]",
        "[b]",
        "x: f64[b] = reduce_sum u over t\n  z: f64 = reduce_max v over t\n  y: f64[b] = mul x, z",
    );
    op("", "[b, t]", "[b]", "[b]", "x: f64[b] = reduce_max u over t\n  y: f64[b] = mul x, v");
}

#[test]
fn the_largest_share_what_the_maximum_gets() {
    // Where three are equal, no difference says what is right: each has a third.
    let text = "module op entry @f\n\nfunc @f {\n  axes t=3\n  weight u: f64 = \"u\"\n  x: f64[t] = broadcast u over t\n  \
                y: f64 = reduce_max x over t\n  return y\n}\n";
    let module = latentc_ir::check("op", text).unwrap_or_else(|e| panic!("{}", e.render()));
    let mut setting = Setting::new(&module, &[], 1);
    assert_eq!(check(&module, &mut setting, true), Ok(Compared { elements: 1, unreal: 0 }));
}

#[test]
fn a_shift_that_is_put_back_has_no_gradient() {
    let lines = "m: f64[b] = reduce_max u over t\n  z: f64[b, t] = sub u, m\n  e: f64[b, t] = exp z\n  s: f64[b] = reduce_sum e over t\n  \
                 g: f64[b] = log s\n  x: f64[b] = add g, m\n  ";
    op("", "[b, t]", "[b]", "[b]", &format!("{lines}y: f64[b] = mul x, v"));
    // Where something else reads the shift, or it is not all put back, it has one.
    op("", "[b, t]", "[b]", "[b]", &format!("{lines}y: f64[b] = mul x, m"));
    op("", "[b, t]", "[b]", "[b]", &format!("{lines}n: f64[b] = mul v, s\n  y: f64[b] = mul x, n"));
    op("", "[b, t]", "[b]", "[b]", &lines.replace("add g, m", "add g, v").replace("x: f64[b]", "y: f64[b]"));
    // A sum of what is made of nothing.
    let lines = "c: f64[d] = const [1.0, 2.0]\n  s: f64 = reduce_sum c over d\n  g: f64 = log s\n  x: f64[b] = mul v, g\n  ";
    op(", d=2", "[b, t]", "[b]", "[b, t]", &format!("{lines}y: f64[b, t] = mul u, x"));
}

#[test]
fn other_axes() {
    op(
        ", s=t",
        "[b, t]",
        "[t]",
        "[s, b]",
        "x: f64[b, s] = rename u from t to s\n  z: f64[s] = rename v from t to s\n  y: f64[s, b] = mul x, z",
    );
    op(
        ", s=t like t",
        "[b, t]",
        "[t]",
        "[b, t, s]",
        "x: f64[b, s] = past u from t to s\n  z: f64[b, t, s] = mul x, v\n  y: f64[b, t, s] = mul z, u",
    );
    op(
        ", d=3",
        "[b]",
        "[t]",
        "[b, d, t]",
        "x: f64[b, d, t] = broadcast u over d, t\n  y: f64[b, d, t] = mul x, v",
    );
    let six = ", h=6, g=2, j=3, p=2, q=1";
    op(
        six,
        "[b, h]",
        "[j, g]",
        "[g, b, j]",
        "x: f64[j, b, g] = split u axis h into g, j\n  y: f64[g, b, j] = mul x, v",
    );
    op(
        six,
        "[b, j, g]",
        "[h]",
        "[b, h]",
        "x: f64[b, h] = merge u axes g, j into h\n  y: f64[b, h] = mul x, v",
    );
    for start in 0..=4 {
        let lines = format!("x: f64[p, b] = slice u axis h into p start {start}\n  y: f64[b, p] = mul x, v");
        op(six, "[b, h]", "[p]", "[b, p]", &lines);
    }
    op(six, "[h]", "[h]", "[h]", "x: f64[h] = slice u axis h into h start 0\n  y: f64[h] = mul x, v");
    op(
        six,
        "[b, j]",
        "[p, b]",
        "[b, h]",
        "y: f64[b, h] = concat u, v, z axes j, p, q into h"
            .replace("y:", "a: f64[b, q] = slice u axis j into q start 1\n  z: f64[b, q] = exp a\n  y:")
            .as_str(),
    );
    op(six, "[b, j]", "[b]", "[b, h]", "y: f64[b, h] = concat u, u axes j, j into h");
}

#[test]
fn indexing() {
    let axes = ", e=4, k=2, j=3";
    let index = "i: i32[j] = const [2, 0, 2]\n  ";
    op(
        axes,
        "[e, b]",
        "[b]",
        "[b, j]",
        &format!("{index}x: f64[j, b] = gather u, i along e\n  y: f64[b, j] = mul x, v"),
    );
    // An axis that table and index share.
    let both = "i: i32[j] = const [2, 0, 2]\n  n: i32[b, j] = broadcast i over b\n  ";
    op(
        axes,
        "[e, b]",
        "[j]",
        "[b, j]",
        &format!("{both}x: f64[j, b] = gather u, n along e\n  y: f64[b, j] = mul x, v"),
    );
    // One element of each row, which needs no sums.
    let one = "i: i32[j] = const [2, 0, 2]\n  ";
    op(
        axes,
        "[e, b, j]",
        "[j]",
        "[b, j]",
        &format!("{one}x: f64[j, b] = gather u, i along e\n  y: f64[b, j] = mul x, v"),
    );
    op(
        axes,
        "[j, b]",
        "[e]",
        "[b, e]",
        &format!("{index}x: f64[e, b] = scatter_add u, i along e\n  y: f64[b, e] = mul x, v"),
    );
    op(
        axes,
        "[j, b]",
        "[e]",
        "[b, e]",
        &format!("{both}x: f64[e, b] = scatter_add u, n along e\n  y: f64[b, e] = mul x, v"),
    );
    op(
        axes,
        "[j, b]",
        "[e]",
        "[e]",
        &format!("{both}x: f64[e] = scatter_add u, n along e\n  y: f64[e] = mul x, v"),
    );
    // What is selected is a constant, what it selects is not.
    let top = "c: bool[b, e] = top_k u over e k 2\n  zero: f64 = const 0.0\n  x: f64[b, e] = select c, u, zero\n  y: f64[b, e] = mul x, v";
    op(axes, "[b, e]", "[e]", "[b, e]", top);
    let top = "i: i32[b, k] = top_indices u over e into k\n  x: f64[b, k] = gather u, i along e\n  y: f64[b, k] = mul x, v";
    op(axes, "[b, e]", "[k]", "[b, k]", top);
}

#[test]
fn rotations() {
    for pairs in ["interleaved", "halves"] {
        let lines = format!(
            "at: i32[t] = position of t\n  freq: f64[j] = const [1.0, 0.3]\n  \
             x: f64[h, t, b] = rope u, at, freq over h pairs {pairs}\n  y: f64[b, t, h] = mul x, v"
        );
        op(", h=4, j=2", "[b, t, h]", "[h]", "[b, t, h]", &lines);
    }
}

#[test]
fn rows() {
    op(", d=3", "[b, d]", "[d]", "[b, d]", "x: f64[d, b] = softmax u over d\n  y: f64[b, d] = mul x, v");
    // A masked softmax, whose first row sees one element.
    let masked = "at: i32[t] = position of t\n  s: i32[d] = position of d\n  c: bool[t, d] = le s, at\n  \
                  least: f64 = const -inf\n  z: f64[b, t, d] = select c, x, least\n  p: f64[b, t, d] = softmax z over d\n  \
                  y: f64[b, t, d] = mul p, v";
    op(", d=3", "[b, t, d]", "[d]", "[b, t, d]", &masked.replace("select c, x", "select c, u"));
    op(
        ", d=3",
        "[b, d]",
        "[d]",
        "[b, d]",
        "x: f64[d, b] = rms_norm u over d eps 0.1\n  y: f64[b, d] = mul x, v",
    );
    op("", "[b, t]", "[t]", "[b, t]", "y: f64[b, t] = rms_norm u over t eps 1e-6");
}

#[test]
fn a_function_and_its_gradient_are_shared_by_its_calls() {
    let text = "module calls entry @loss\n\nfunc @inner {\n  axes b, d=3\n  param x: f64[b, d]\n  param k: i32[b]\n  \
         weight g: f64[d] = \"g\"[d]\n  z: f64[b, d] = mul x, g\n  y: f64[b, d] = tanh z\n  return y, k\n}\n\n\
         func @layer {\n  axes c=b, d=3, e=3\n  param x: f64[c, d]\n  param k: i32[c]\n  weight W: f64[e, d] = \"W\"[e, d]\n  \
         n: f64[c, d], m: i32[c] = call @inner(x, k) under \"inner\"\n  h: f64[c, e] = contract n, W over d\n  \
         r: f64[c, d] = rename h from e to d\n  s: f64[c, d] = silu r\n  y: f64[c, d] = add s, x\n  return y\n}\n\n\
         func @loss {\n  axes b, d=3\n  param tok: i32[b]\n  param x: f64[b, d]\n  weight g: f64[d] = \"g\"[d]\n  \
         x.0: f64[b, d] = mul x, g\n  x.1 to x.4: f64[b, d] = call @layer(x.0, tok) under \"layers.0\" to \"layers.3\"\n  \
         again: f64[b, d] = call @layer(x.4, tok) under \"layers.3\"\n  y: f64[b, d] = mul again, again\n  \
         l: f64 = contract y over b, d\n  return l\n}\n";
    let module = latentc_ir::check("calls", text).unwrap_or_else(|e| panic!("{}", e.render()));
    let mut setting = Setting::new(&module, &[("b", 3)], 5);
    let compared = check(&module, &mut setting, true).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(compared.elements, 3 + 4 * (3 + 9), "the last two calls share a scope");
    let gradient = differentiate(&module, Gradients::Sums).expect("a loss");
    let names: Vec<_> = gradient.functions.iter().map(|f| f.name.as_str()).collect();
    assert_eq!(names, ["inner", "inner.grad", "layer", "layer.grad", "loss"]);
    let scopes: Vec<_> =
        weights(&module).into_iter().map(|(scope, f, n)| format!("{scope}:{}:{n}", f.name)).collect();
    let wanted = [":loss:0", "layers.0:layer:0", "layers.0.inner:inner:0", "layers.1:layer:0"];
    assert_eq!(scopes[..4], wanted);
}

#[test]
fn what_has_no_gradient_is_refused() {
    let parsed = |lines: &str| {
        let text = format!(
            "module no entry @f\n\nfunc @f {{\n  axes t=4, j=2\n  weight u: f64[t] = \"u\"[t]\n  weight w: f64[j] = \"w\"[j]\n  {lines}\n}}\n"
        );
        latentc_ir::check("no", &text).unwrap_or_else(|e| panic!("{}", e.render()))
    };
    let refused =
        |lines: &str| differentiate(&parsed(lines), Gradients::Sums).expect_err("refused").to_string();
    assert_eq!(
        refused("return u"),
        "differentiate: in @f: the entry returns f64[t=4], which is no loss; a loss is one float without axes"
    );
    // No text says so, but a module may.
    let mut nothing = parsed("return u");
    nothing.functions[0].results.clear();
    assert_eq!(
        differentiate(&nothing, Gradients::Sums).expect_err("refused").to_string(),
        "differentiate: in @f: the entry returns nothing, so no loss"
    );
    assert_eq!(
        refused(
            "at: i32 = const 1\n  x: f64[t] = rope u, at, w over t pairs halves\n  l: f64 = contract x over t\n  return l"
        ),
        "differentiate: in @f: the frequencies `w` of a rotation depend on weights, which has no rule"
    );
}

#[test]
fn random_programs() {
    let config = ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() };
    let of = (arb_module(Stage::Traced), 1usize..4, 1usize..4, any::<u64>());
    let all = Cell::new(Compared::default());
    let run = TestRunner::new(config).run(&of, |(module, b, t, seed)| {
        let module = objective(&module);
        let mut setting = Setting::new(&module, &[("b", b), ("t", t)], seed);
        let Compared { elements, unreal } =
            check(&module, &mut setting, false).map_err(TestCaseError::fail)?;
        let before = all.get();
        all.set(Compared { elements: before.elements + elements, unreal: before.unreal + unreal });
        Ok(())
    });
    run.unwrap_or_else(|e| panic!("{e}"));
    let all = all.get();
    println!("{all:?}");
    assert!(all.elements > 500 && 50 * all.unreal < all.elements, "{all:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is kept instead of computed again, results are the same.
    #[test]
    fn what_is_kept_changes_nothing(
        module in arb_module(Stage::Traced), b in 1usize..4, t in 1usize..4, seed: u64, some: u64
    ) {
        let module = objective(&module);
        let of = |f: &Function| f.values.iter().map(|v| (f.name.clone(), v.name.clone())).collect::<Vec<_>>();
        let mut values: Vec<_> = module.functions.iter().flat_map(of).collect();
        let rng = SplitMix(some);
        let mut n = 0;
        values.retain(|_| {
            n += 1;
            rng.nth(n).is_multiple_of(2)
        });
        let keep: Keep = values.iter().map(|(f, v)| (f.as_str(), v.as_str())).collect();
        let setting = Setting::new(&module, &[("b", b), ("t", t)], seed);
        let Ok(want) = differentiate(&module, Gradients::Sums) else { return Ok(()) };
        let kept = keeping(&module, &keep, Gradients::Sums).map_err(|e| TestCaseError::fail(e.to_string()))?;
        prop_assert!(verify(&kept).is_ok(), "{:?}\n{kept}", verify(&kept));
        let run = |module: &Module| setting.run(module).map_err(TestCaseError::fail);
        for (got, want) in run(&kept)?.iter().zip(run(&want)?) {
            for (got, want) in got.data.iter().zip(want.data) {
                let near = (got - want).abs() <= 1e-9 * (1.0 + want.abs());
                prop_assert!(near || *got == want || got.is_nan() && want.is_nan(), "{got}, not {want}\n{kept}");
            }
        }
    }
}
