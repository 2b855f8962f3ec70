//! What random programs mean: interpreter, definitions, costs and sparsity agree with each other and never panic.

use latentc_ir::sparsity::{Support, sparsity};
use latentc_ir::testing::arb_module;
use latentc_ir::{
    Caches, Def, Function, Interpreter, Module, Precision, Size, SplitMix, Stage, Tensor, Type, Weight, cost,
    expand,
};
use proptest::prelude::*;

const B: usize = 2;
const CAPACITY: usize = 8;

fn shape(f: &Function, ty: &Type, t: usize) -> Vec<usize> {
    let extent = |size: &Size| match size {
        Size::Fixed(n) => *n as usize,
        Size::Sym(s) if s == "b" => B,
        Size::Sym(s) if s == "t" => t,
        Size::Sym(_) => CAPACITY,
    };
    ty.axes.iter().map(|&a| extent(&f.axis(a).size)).collect()
}

type Outcome = Result<(Vec<(String, Tensor)>, Caches), String>;

/// Every value of the entry function, and the caches that it leaves; or what is out of range.
fn outcome(m: &Module, t: usize, precision: Precision) -> Outcome {
    let f = m.entry().unwrap();
    let mut rng = SplitMix(5);
    let args: Vec<_> =
        f.params.iter().map(|&p| Tensor::random(f.ty(p).dtype, shape(f, f.ty(p), t), &mut rng)).collect();
    let mut weights = |scope: &str, f: &Function, w: &Weight| {
        let name = format!("{scope}.{}", f.value(w.value).name);
        let seed = name.bytes().fold(1, |seed: u64, b| seed.wrapping_mul(31).wrapping_add(u64::from(b)));
        let ty = f.ty(w.value);
        Ok::<_, String>(Tensor::random(ty.dtype, shape(f, ty, t), &mut SplitMix(seed)))
    };
    let mut caches = Caches::new();
    let interp = Interpreter::new(m, precision).with_size("b", B).with_size("t", t).with_size("s", CAPACITY);
    let values = interp.trace(&args, &mut weights, &mut caches).map_err(|e| e.to_string())?;
    Ok((values, caches))
}

fn any_module() -> impl Strategy<Value = Module> {
    prop_oneof![Just(Stage::Traced), Just(Stage::Derived)].prop_flat_map(arb_module)
}

/// Whether along the gate's axes no more than `k` elements are other than zero, for every index of the others.
fn gated(f: &Function, ty: &Type, x: &Tensor, gate: &latentc_ir::sparsity::Gate) -> bool {
    let mut counts = std::collections::BTreeMap::new();
    for (n, v) in x.data.iter().enumerate() {
        let mut rest = n;
        let mut others = Vec::new();
        for (&a, &size) in ty.axes.iter().zip(&x.shape).rev() {
            if !gate.axes.contains(&a) {
                others.push(rest % size);
            }
            rest /= size;
        }
        *counts.entry(others).or_insert(0) += u64::from(*v != 0.0);
    }
    assert!(gate.axes.iter().chain(&gate.given).all(|&a| ty.has(a)), "{gate:?} in {}", f.name);
    counts.values().all(|&n| n <= gate.k)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn composites_are_their_definitions(m in any_module(), t in 0usize..4) {
        let expanded = expand(&m);
        prop_assert_eq!(expand(&expanded), expanded.clone());
        match (outcome(&m, t, Precision::Exact), outcome(&expanded, t, Precision::Exact)) {
            (Ok((ours, caches)), Ok((theirs, other_caches))) => {
                for (name, x) in &ours {
                    let y = &theirs.iter().find(|(n, _)| n == name).unwrap().1;
                    prop_assert_eq!(x.close_to(y, 1e-9, 1e-9), Ok(()), "{} of\n{}", name, m);
                }
                for (name, x) in &caches {
                    prop_assert_eq!(x.close_to(&other_caches[name], 1e-9, 1e-9), Ok(()), "{} of\n{}", name, m);
                }
            }
            (ours, theirs) => prop_assert_eq!(ours.err(), theirs.err(), "{}", m),
        }
    }

    #[test]
    fn declared_values_are_of_their_dtypes(m in any_module(), t in 0usize..4) {
        if let Ok((values, _)) = outcome(&m, t, Precision::Declared) {
            for (name, x) in values {
                prop_assert_eq!(x.rounded(x.dtype).close_to(&x, 0.0, 0.0), Ok(()), "{} of\n{}", name, m);
            }
        }
    }

    #[test]
    fn gated_values_are_zero_outside(m in any_module(), t in 0usize..4) {
        let f = m.entry().unwrap();
        let facts = sparsity(f);
        if let Ok((values, _)) = outcome(&m, t, Precision::Exact) {
            // What is not finite times zero is not zero; the analysis speaks of numbers.
            let finite = values.iter().all(|(_, x)| x.data.iter().all(|v| v.is_finite()));
            for (name, x) in values.iter().filter(|_| finite) {
                let id = f.value_named(name).unwrap();
                match &facts.support[id.0 as usize] {
                    Support::Nowhere => prop_assert!(x.data.iter().all(|v| *v == 0.0), "{} of\n{}", name, m),
                    Support::Within(gates) => {
                        for g in gates {
                            prop_assert!(gated(f, f.ty(id), x, g), "{} by {:?} of\n{}", name, g, m);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn everything_has_a_cost(m in any_module()) {
        for f in &m.functions {
            let c = cost(&m, &f.name).unwrap();
            prop_assert_eq!(c.insts.len(), f.body.len());
        }
        for f in &m.functions {
            for def in f.defs() {
                if let Def::Weight(w) = def {
                    let layout = w.stored.layout(f, f.ty(w.value)).unwrap();
                    let copied: u64 =
                        layout.pieces.iter().flat_map(|p| layout.spans(p)).map(|s| s.len).sum();
                    prop_assert_eq!(copied, layout.elements);
                }
            }
        }
    }
}
