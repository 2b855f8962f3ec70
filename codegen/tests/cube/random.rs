//! Random expressions of random shapes, as map kernels.

use latentc_codegen::program::{Kernel, KernelKind};
use latentc_ir::{Axis, AxisId, DType, Function, Op, Reduce, Size, Type, Unary, ValueId, Want, infer};
use proptest::prelude::*;

use crate::bench::{cuda, inputs, means_the_same, tolerance};

/// A choice for each step of an expression.
type Step = (u8, u8, u8);

/// A function with two parameters over some of four axes, extended step by step by whatever op fits.
fn expression(sizes: [u64; 3], steps: &[Step]) -> Function {
    let mut f = Function::new("random");
    let axes = [
        Size::Sym("n0".to_owned()),
        Size::Fixed(sizes[0]),
        Size::Fixed(sizes[1]),
        Size::Sym("n1".to_owned()),
    ];
    f.axes = axes
        .into_iter()
        .enumerate()
        .map(|(n, size)| Axis { name: format!("a{n}"), size, like: None })
        .collect();
    f.axes.push(Axis { name: "whole".to_owned(), size: Size::Fixed(sizes[0] * sizes[1]), like: None });
    f.axes.push(Axis { name: "both".to_owned(), size: Size::Fixed(2 * sizes[0]), like: None });
    let a = AxisId;
    let mut values = vec![
        f.add_param("p0", Type::new(DType::F32, [a(0), a(1), a(2)])),
        f.add_param("p1", Type::new(DType::F32, [a(3), a(1)])),
        f.add_param("p2", Type::new(DType::F32, [a(4), a(0)])),
    ];
    let mut fresh = 0;
    for &(op, x, y) in steps {
        let pick = |n: u8| values[values.len() - 1 - n as usize % values.len()];
        let (x, y) = (pick(x), pick(y));
        let mut add = |f: &mut Function, op: Op, args: &[ValueId], dtype: Option<DType>| {
            let types: Vec<_> = args.iter().map(|&v| f.ty(v)).collect();
            let ty = infer(&op, &types, Want { dtype, axes: None }, &f.axes).ok()?;
            fresh += 1;
            Some(f.push(op, args, &[(&format!("v{fresh}"), ty)])[0])
        };
        let first = f.ty(x).axes.first().copied();
        let made = match op {
            0 => add(&mut f, Op::Unary(Unary::Tanh), &[x], None),
            1 => add(&mut f, Op::Unary(Unary::Silu), &[x], None),
            2 | 3 => add(&mut f, Op::Binary(latentc_ir::Binary::Add), &[x, y], None),
            4 => add(&mut f, Op::Binary(latentc_ir::Binary::Max), &[x, y], None),
            5 => add(&mut f, Op::Binary(latentc_ir::Binary::Lt), &[x, y], None)
                .and_then(|c| add(&mut f, Op::Select, &[c, y, x], None)),
            6 => add(&mut f, Op::Split { axis: a(4), into: vec![a(1), a(2)] }, &[x], None),
            7 => add(&mut f, Op::Merge { axes: vec![a(2), a(1)], into: a(4) }, &[x], None),
            8 => add(
                &mut f,
                Op::Slice { axis: a(5), into: a(1), start: sizes[2] % (sizes[0] + 1) },
                &[x],
                None,
            ),
            9 => add(&mut f, Op::Concat { axes: vec![a(1), a(1)], into: a(5) }, &[x, y], None),
            10 => first.and_then(|axis| add(&mut f, Op::Reduce { by: Reduce::Max, axis }, &[x], None)),
            11 => first.and_then(|axis| add(&mut f, Op::Reduce { by: Reduce::Sum, axis }, &[x], None)),
            12 => add(&mut f, Op::Broadcast { axes: vec![a(3)] }, &[x], None),
            13 => add(&mut f, Op::Position { axis: a(0) }, &[], None)
                .and_then(|p| add(&mut f, Op::Cast, &[p], Some(DType::F32))),
            _ => None,
        };
        values.extend(made);
    }
    f.results = vec![*values.last().expect("there are parameters")];
    f
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn expressions(
        // Some are whole packs.
        columns in prop::sample::select(vec![1u64, 2, 3, 4, 8]),
        others in [1u64..5, 0..5],
        run_time in [0usize..6, 0..40],
        steps in prop::collection::vec((0u8..14, 0u8..4, 0u8..4), 1..12),
    ) {
        let body = expression([columns, others[0], others[1]], &steps);
        prop_assume!(!body.body.is_empty() && body.results[0] == body.body.last().unwrap().result());
        let k = Kernel { name: "random".to_owned(), kind: KernelKind::Map, body };
        let bound: Vec<_> = k.size_symbols().iter().map(|s| run_time[usize::from(*s == "n1")]).collect();
        means_the_same(&k, &inputs(&k, &bound, &[]), &bound, tolerance(&k));
        // Nobody writes such kernels, so a spill is no matter.
        cuda(&k);
    }
}
