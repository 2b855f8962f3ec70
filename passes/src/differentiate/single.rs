//! One function as a program to be trained.

use latentc_ir::{DType, Factor, Function, Held, Module, Op, Size, Stored, Type};

/// A program that does what a step of training does of one function: `loss = sum of y[…] dy[…]`, so that the gradient of `loss` is what
/// the function's gradient makes of `dy`, the adjoint of its first result. Its entry takes the function's parameters, the first of
/// them scaled by a weight, lest nobody asks for its adjoint, and `dy`.
///
/// # Errors
/// If there is no such function, or its first parameter and result are not floats with an axis of fixed size at the end.
pub fn single(module: &Module, name: &str) -> Result<Module, String> {
    let names = || module.functions.iter().map(|f| f.name.as_str()).collect::<Vec<_>>().join(", ");
    let at = module.functions.iter().position(|f| f.name == name);
    let at = at.ok_or_else(|| format!("there is no function `{name}`; there are {}", names()))?;
    let f = &module.functions[at];
    let mut entry = Function::new("step");
    entry.axes.clone_from(&f.axes);
    let wide = |n: Option<&latentc_ir::ValueId>| {
        let ty = f.ty(*n?);
        let last = ty.axes.last()?;
        let fixed = matches!(f.axis(*last).size, Size::Fixed(_));
        (fixed && ty.dtype.is_float()).then(|| (ty.clone(), *last))
    };
    let (Some((x, last)), Some((y, _))) = (wide(f.params.first()), wide(f.results.first())) else {
        return Err(format!(
            "`{name}` is no layer: a layer takes and returns floats with a fixed size at the end"
        ));
    };
    let params: Vec<_> =
        f.params.iter().map(|&p| entry.add_param(&f.value(p).name, f.ty(p).clone())).collect();
    let dy = entry.add_param(&format!("{}.adjoint", f.value(f.results[0]).name), y);
    let dims = vec![vec![Factor::Axis(last)]];
    let stored = Stored { tensor: "input.weight".to_owned(), dims, held: Held::Elements };
    let scale = entry.add_weight("scale", Type::new(x.dtype, vec![last]), stored);
    let mut args = params;
    args[0] = entry.push(Op::Binary(latentc_ir::Binary::Mul), &[args[0], scale], &[("x.scaled", x)])[0];
    let results: Vec<_> = f.results.iter().map(|&r| (f.value(r).name.as_str(), f.ty(r).clone())).collect();
    let call = Op::Call { callee: name.to_owned(), scope: String::new() };
    let made = entry.push(call, &args, &results);
    let loss = ("loss", Type::scalar(DType::F32));
    entry.results = entry.push(Op::Contract, &[made[0], dy], &[loss]);
    let mut functions = module.functions[..=at].to_vec();
    functions.push(entry);
    Ok(Module { name: format!("{}.{name}", module.name), functions, entry: "step".to_owned() }.canonical())
}
