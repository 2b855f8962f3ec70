//! `simplify` keeps every bit, and leaves nothing for a second time.
//!
//! Its own programs: few operands, many constants, so that every rule meets what it looks for; and arguments that
//! hold both zeros, infinities and NaN, on which equations that are only nearly right come apart.

use latentc_ir::interp::{Caches, Interpreter, Precision};
use latentc_ir::tensor::{SplitMix, Tensor};
use latentc_ir::testing::arb_module;
use latentc_ir::{
    AxisId, Binary, DType, Function, Module, Op, Real, Reduce, Size, Stage, Type, Unary, ValueId, Want,
    Weight, infer, verify,
};
use latentc_passes::simplify::simplify;
use latentc_passes::{Context, Graph, pipeline};
use proptest::prelude::*;

const NUMBERS: [f64; 9] = [0.0, -0.0, 1.0, -1.0, 2.0, 0.1, f64::INFINITY, f64::NEG_INFINITY, -0.5];

fn pick<T: Clone>(rng: &mut SplitMix, of: &[T]) -> T {
    of[rng.below(of.len() as u64) as usize].clone()
}

/// A function over the axes `t`, `a`, `b`, `c` of one size and others that they split into.
fn program(rng: &mut SplitMix) -> Module {
    let mut f = Function::new("f");
    let t = f.add_axis("t", Size::from("t"), None);
    let four: Vec<_> = ["a", "b", "c"].map(|n| f.add_axis(n, Size::from(4), None)).to_vec();
    let two: Vec<_> = ["g", "j"].map(|n| f.add_axis(n, Size::from(2), None)).to_vec();
    let eight = f.add_axis("d", Size::from(8), None);
    let dtypes = [DType::F32, DType::F32, DType::Bf16, DType::F64, DType::I32, DType::Bool];
    for n in 0..5 {
        let axes = pick(rng, &[vec![], vec![t], vec![four[0]], vec![t, four[0]], vec![two[0], two[1]]]);
        f.add_param(&format!("p{n}"), Type::new(pick(rng, &dtypes), axes));
    }
    for _ in 0..rng.below(20) + 4 {
        if rng.below(4) == 0 {
            let dtype = pick(rng, &dtypes);
            let table = rng.below(4) == 0;
            let number = Real(pick(rng, &NUMBERS));
            let number = if dtype.is_float() { number } else { Real(number.0.clamp(-9.0, 9.0)) };
            let ty = Type::new(dtype, if table { vec![four[0]] } else { vec![] });
            f.push(Op::Const(vec![number; if table { 4 } else { 1 }]), &[], &[("", ty)]);
        }
        instruction(&mut f, rng, &four, &two, eight);
    }
    let last = f.values.len() as u32;
    f.results = (last.saturating_sub(4)..last).map(ValueId).collect();
    Module { name: "random".to_owned(), functions: vec![f], entry: "f".to_owned() }
}

/// Appends an instruction, if the one that comes up fits.
fn instruction(f: &mut Function, rng: &mut SplitMix, four: &[AxisId], two: &[AxisId], eight: AxisId) {
    let (x, y, part) = (pick(rng, four), pick(rng, four), pick(rng, two));
    let start = pick(rng, &[0, 1, 2, 4]);
    let (halves, unary, by) = (two.to_vec(), pick(rng, &Unary::ALL), pick(rng, &Reduce::ALL));
    let op = match rng.below(16) {
        0 => Op::Unary(unary),
        1 => Op::Unary(pick(rng, &[Unary::Neg, Unary::Not, Unary::Abs])),
        2..=5 => Op::Binary(pick(rng, &Binary::ALL)),
        6 => Op::Select,
        7 | 8 => Op::Cast,
        9 => Op::Contract,
        10 | 11 => pick(rng, &[Op::Rename { from: x, to: y }, Op::Rename { from: part, to: two[0] }]),
        12 => Op::Broadcast { axes: pick(rng, &[vec![], vec![x], halves]) },
        13 => pick(
            rng,
            &[
                Op::Split { axis: x, into: halves.clone() },
                Op::Merge { axes: halves, into: x },
                Op::Split { axis: x, into: vec![y] },
            ],
        ),
        14 => pick(
            rng,
            &[
                Op::Slice { axis: eight, into: x, start },
                Op::Slice { axis: x, into: part, start },
                Op::Slice { axis: x, into: y, start: 0 },
            ],
        ),
        _ => pick(
            rng,
            &[
                Op::Concat { axes: vec![x, y], into: eight },
                Op::Concat { axes: vec![x], into: y },
                Op::Reduce { by, axis: x },
            ],
        ),
    };
    // Operands that fit are tried for; the last ones and equal ones come up often.
    for _ in 0..12 {
        let arity = match op {
            Op::Binary(_) | Op::Contract => 2,
            Op::Select => 3,
            Op::Concat { ref axes, .. } => axes.len(),
            _ => 1,
        };
        let mut args: Vec<_> = (0..arity)
            .map(|_| {
                let n = f.values.len() as u64;
                ValueId((if rng.below(2) == 0 { n - 1 - rng.below(n.min(4)) } else { rng.below(n) }) as u32)
            })
            .collect();
        if arity > 1 && rng.below(4) == 0 {
            args[arity - 1] = args[arity - 2];
        }
        let types: Vec<_> = args.iter().map(|&a| f.ty(a)).collect();
        let extreme = matches!(op, Op::Binary(Binary::Max | Binary::Min)) && types[0].dtype != DType::I32;
        if extreme && args[0] != args[1] {
            // Which zero is the larger is left open, and which comes out depends on their order.
            continue;
        }
        let dtype = if op == Op::Cast { Some(pick(rng, &DType::ALL)) } else { None };
        let mut axes = None;
        if op == Op::Contract {
            // One axis at most is summed over: the order of a sum is left open.
            let all = [&types[0].axes[..], &types[1].axes].concat();
            let drop = rng.below(all.len() as u64 + 1) as usize;
            let mut kept: Vec<AxisId> = Vec::new();
            for &a in &all {
                if Some(&a) != all.get(drop) && !kept.contains(&a) {
                    kept.push(a);
                }
            }
            axes = Some(kept);
        }
        let Ok(mut ty) = infer(&op, &types, Want { dtype, axes: axes.as_deref() }, &f.axes) else { continue };
        if ty.axes.len() > 3 {
            continue;
        }
        if ty.dtype.is_float() && rng.below(4) == 0 {
            let other = Type::new(pick(rng, &[DType::F32, DType::Bf16, DType::F64]), ty.axes.clone());
            ty = infer(&op, &types, Want::exactly(&other), &f.axes).unwrap_or(ty);
        }
        f.push(op, &args, &[("", ty)]);
        return;
    }
}

/// The results on arguments that hold every special value.
fn results(m: &Module, precision: Precision, seed: u64) -> Vec<Tensor> {
    let mut rng = SplitMix(seed);
    let f = &m.functions[0];
    let mut args = Vec::new();
    for &p in &f.params {
        let ty = f.ty(p);
        let shape: Vec<_> =
            ty.axes.iter().map(|&a| f.axis(a).size.fixed().map_or(3, |n| n as usize)).collect();
        let element = |rng: &mut SplitMix| match ty.dtype {
            DType::Bool => rng.below(2) as f64,
            DType::I32 => pick(rng, &[0.0, 1.0, -1.0, 7.0, f64::from(i32::MIN), f64::from(i32::MAX)]),
            DType::F64 | DType::F32 | DType::Bf16 | DType::F16 => match rng.below(12) {
                n @ 0..9 => NUMBERS[n as usize],
                9 => f64::NAN,
                10 => 1e38,
                _ => rng.below(1000) as f64 / 37.0,
            },
        };
        let data = (0..shape.iter().product::<usize>()).map(|_| element(&mut rng)).collect();
        args.push(Tensor { dtype: ty.dtype, shape, data });
    }
    let mut weights = |_: &str, _: &Function, _: &Weight| Err("no weights here".to_owned());
    let interp = Interpreter::new(m, precision).with_size("t", 3);
    interp.run(&args, &mut weights, &mut Caches::new()).unwrap_or_else(|e| panic!("{e}\n{m}"))
}

/// Bits, with one NaN.
fn bits(t: &Tensor) -> Vec<u64> {
    t.data.iter().map(|x| if x.is_nan() { f64::NAN.to_bits() } else { x.to_bits() }).collect()
}

fn nothing_is_left(m: &Module) -> Result<(), TestCaseError> {
    let once = simplify(m);
    prop_assert!(verify(&once).is_ok(), "{:?}\n{m}\n{once}", verify(&once));
    prop_assert_eq!(&simplify(&once), &once, "twice differs from once\n{}", m);
    let read = latentc_ir::check("once", &once.to_string());
    prop_assert!(read.is_ok_and(|r| r == once), "does not read back\n{once}");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_bit_is_kept(seed: u64) {
        let m = program(&mut SplitMix(seed));
        prop_assert!(verify(&m).is_ok(), "{:?}\n{m}", verify(&m));
        let simple = simplify(&m);
        for precision in [Precision::Declared, Precision::Exact] {
            for (n, (w, g)) in results(&m, precision, seed).iter().zip(results(&simple, precision, seed)).enumerate() {
                prop_assert_eq!(bits(w), bits(&g), "result {} ({:?})\n{}\n{}", n, precision, m, simple);
            }
        }
    }

    #[test]
    fn once_is_enough_for_programs_full_of_crumbs(seed: u64) {
        nothing_is_left(&program(&mut SplitMix(seed)))?;
    }

    #[test]
    fn once_is_enough_after_any_pass(
        module in arb_module(Stage::Traced),
        graph in prop::sample::select(Graph::ALL.to_vec()),
    ) {
        let mut m = module;
        nothing_is_left(&m)?;
        for pass in pipeline() {
            let Ok(next) = pass.apply(&m, &mut Context::new(graph)) else { return Ok(()) };
            nothing_is_left(&next)?;
            m = next;
        }
    }
}
