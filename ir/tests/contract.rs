//! Contraction against nested loops, on random axes and any number of operands.

use latentc_ir::{
    AxisId, Caches, DType, Function, Interpreter, Module, Op, Precision, Size, SplitMix, Tensor, Type, Weight,
};

const EXTENTS: [u64; 7] = [0, 1, 1, 2, 3, 4, 5];

/// The equation itself: every point of the space of all axes adds one product.
fn naive(f: &Function, operands: &[(Type, Tensor)], result: &Type) -> Vec<f64> {
    let extent = |a: AxisId| f.axis(a).size.fixed().unwrap() as usize;
    let offset =
        |ty: &Type, at: &[usize]| ty.axes.iter().fold(0, |offset, &a| offset * extent(a) + at[a.0 as usize]);
    let used = |a: usize| operands.iter().any(|(ty, _)| ty.has(AxisId(a as u32)));
    let space: Vec<usize> =
        (0..f.axes.len()).map(|a| if used(a) { extent(AxisId(a as u32)) } else { 1 }).collect();
    let mut y = vec![0.0; result.axes.iter().map(|&a| extent(a)).product()];
    for point in 0..space.iter().product() {
        let mut rest = point;
        let at: Vec<usize> = space.iter().map(|n| (rest % n, rest /= n).0).collect();
        let product: f64 = operands.iter().map(|(ty, x)| x.data[offset(ty, &at)]).product();
        y[offset(result, &at)] += product;
    }
    y
}

#[test]
fn contraction_is_nested_loops() {
    let mut rng = SplitMix(1);
    for case in 0..400 {
        let mut f = Function::new("main");
        let axes: Vec<_> = (0..1 + rng.below(5))
            .map(|n| f.add_axis(&format!("a{n}"), Size::Fixed(EXTENTS[rng.below(7) as usize]), None))
            .collect();
        let mut some = |of: &[AxisId]| {
            let mut left = of.to_vec();
            let mut axes = Vec::new();
            while !left.is_empty() && rng.below(3) > 0 {
                axes.push(left.swap_remove(rng.below(left.len() as u64) as usize));
            }
            axes
        };
        let types: Vec<_> = (0..1 + case % 4).map(|_| Type::new(DType::F64, some(&axes))).collect();
        let all: Vec<_> = axes.iter().copied().filter(|&a| types.iter().any(|t| t.has(a))).collect();
        let result = Type::new(DType::F64, some(&all));

        let mut operands = Vec::new();
        for ty in types {
            let shape = ty.axes.iter().map(|&a| f.axis(a).size.fixed().unwrap() as usize);
            operands.push((ty.clone(), Tensor::random(DType::F64, shape.collect::<Vec<_>>(), &mut rng)));
            f.add_param("x", ty);
        }
        let params = f.params.clone();
        f.results = f.push(Op::Contract, &params, &[("y", result.clone())]);
        let expected = naive(&f, &operands, &result);
        let m = Module { name: "contract".into(), functions: vec![f], entry: "main".into() };
        let args: Vec<_> = operands.into_iter().map(|(_, x)| x).collect();
        let mut none = |_: &str, _: &Function, _: &Weight| Err(String::new());
        let y = Interpreter::new(&m, Precision::Exact).run(&args, &mut none, &mut Caches::new()).unwrap();
        let expected = Tensor::new(DType::F64, y[0].shape.clone(), expected).unwrap();
        y[0].close_to(&expected, 1e-12, 1e-12).unwrap_or_else(|e| panic!("case {case}: {e}\n{m}"));
    }
}
