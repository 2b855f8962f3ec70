//! The meaning of each op by one small case: operands, op, result, in literal numbers.

use latentc_ir::{
    Axis, AxisId, Binary, Caches, DType, Function, Interpreter, Module, Op, Pairs, Precision, Real, Reduce,
    Size, Tensor, Type, Unary, Want, Weight, infer,
};

/// The axes of all cases: a letter's size, `0` for the empty axis `z`.
const AXES: &[(&str, u64)] =
    &[("i", 2), ("j", 3), ("k", 3), ("l", 6), ("r", 4), ("p", 2), ("z", 0), ("t", 2), ("s", 4), ("c", 1)];
const INF: f64 = f64::INFINITY;
const NAN: f64 = f64::NAN;

fn a(letter: &str) -> AxisId {
    AxisId(AXES.iter().position(|(n, _)| *n == letter).expect("a declared axis") as u32)
}

/// `f32 i j` as a type.
fn ty(text: &str) -> Type {
    let mut words = text.split(' ');
    let dtype = words.next().and_then(DType::from_name).expect("a dtype");
    Type::new(dtype, words.map(a).collect::<Vec<_>>())
}

/// All of them, some like others.
fn table() -> Vec<Axis> {
    let axis =
        |(name, size): &(&str, u64)| Axis { name: (*name).to_owned(), size: Size::Fixed(*size), like: None };
    let mut axes: Vec<Axis> = AXES.iter().map(axis).collect();
    axes[a("s").0 as usize].like = Some(a("t"));
    axes[a("k").0 as usize].like = Some(a("j"));
    axes
}

fn module(args: &[(&str, &[f64])], op: Op, out: &str) -> (Module, Vec<Tensor>) {
    let mut f = Function::new("main");
    f.axes = table();
    let mut ids = Vec::new();
    let mut tensors = Vec::new();
    for (n, (text, data)) in args.iter().enumerate() {
        let ty = ty(text);
        let shape: Vec<_> = ty.axes.iter().map(|x| AXES[x.0 as usize].1 as usize).collect();
        tensors.push(Tensor::new(ty.dtype, shape, data.to_vec()).expect("data of the shape"));
        ids.push(f.add_param(&format!("x{n}"), ty));
    }
    let types: Vec<_> = ids.iter().map(|&x| f.ty(x).clone()).collect();
    let types: Vec<_> = types.iter().collect();
    infer(&op, &types, Want::exactly(&ty(out)), &f.axes).expect("the case is well typed");
    f.results = f.push(op, &ids, &[("y", ty(out))]);
    (Module { name: "case".into(), functions: vec![f], entry: "main".into() }, tensors)
}

fn run(args: &[(&str, &[f64])], op: Op, out: &str, precision: Precision) -> Result<Tensor, String> {
    let (m, tensors) = module(args, op, out);
    let mut none = |_: &str, _: &Function, _: &Weight| Err("no weights here".to_owned());
    let result = Interpreter::new(&m, precision).run(&tensors, &mut none, &mut Caches::new());
    result.map(|mut r| r.remove(0)).map_err(|e| e.to_string())
}

#[track_caller]
fn case(args: &[(&str, &[f64])], op: Op, out: &str, expected: &[f64]) {
    let y = run(args, op, out, Precision::Exact).expect("the case has a result");
    let expected = Tensor::new(y.dtype, y.shape.clone(), expected.to_vec()).expect("data of the shape");
    y.close_to(&expected, 1e-15, 1e-14).unwrap_or_else(|e| panic!("{e}: {:?}", y.data));
}

#[track_caller]
fn refused(args: &[(&str, &[f64])], op: Op, out: &str, message: &str) {
    assert_eq!(run(args, op, out, Precision::Exact).unwrap_err(), message);
}

#[test]
fn constants() {
    case(&[], Op::Const(vec![Real(2.5)]), "f32", &[2.5]);
    case(&[], Op::Const(vec![Real(1.0), Real(-INF)]), "f32 i", &[1.0, -INF]);
    case(&[], Op::Position { axis: a("j") }, "i32 i j", &[0.0, 1.0, 2.0, 0.0, 1.0, 2.0]);
    case(&[], Op::Position { axis: a("j") }, "i32 j i", &[0.0, 0.0, 1.0, 1.0, 2.0, 2.0]);
}

#[test]
fn elementwise() {
    let unary = |u, x: f64, y: f64| case(&[("f32", &[x])], Op::Unary(u), "f32", &[y]);
    unary(Unary::Neg, 2.0, -2.0);
    unary(Unary::Abs, -2.0, 2.0);
    unary(Unary::Exp, 1.0, std::f64::consts::E);
    unary(Unary::Log, std::f64::consts::E, 1.0);
    unary(Unary::Sqrt, 9.0, 3.0);
    unary(Unary::Rsqrt, 4.0, 0.5);
    unary(Unary::Sigmoid, 0.0, 0.5);
    unary(Unary::Silu, 0.0, 0.0);
    unary(Unary::Silu, 1.0, 1.0 / (1.0 + (-1.0f64).exp()));
    unary(Unary::Tanh, 0.0, 0.0);
    unary(Unary::Sin, 0.0, 0.0);
    unary(Unary::Cos, 0.0, 1.0);
    case(&[("bool i", &[0.0, 1.0])], Op::Unary(Unary::Not), "bool i", &[1.0, 0.0]);

    let binary = |b, x: f64, y: f64, z: f64| {
        case(
            &[("i32", &[x]), ("i32", &[y])],
            Op::Binary(b),
            if b.is_comparison() { "bool" } else { "i32" },
            &[z],
        )
    };
    binary(Binary::Add, 7.0, 2.0, 9.0);
    binary(Binary::Sub, 7.0, 2.0, 5.0);
    binary(Binary::Mul, 7.0, 2.0, 14.0);
    binary(Binary::Div, -7.0, 2.0, -3.0);
    binary(Binary::Max, 7.0, 2.0, 7.0);
    binary(Binary::Min, 7.0, 2.0, 2.0);
    binary(Binary::Lt, 2.0, 2.0, 0.0);
    binary(Binary::Le, 2.0, 2.0, 1.0);
    binary(Binary::Eq, 2.0, 7.0, 0.0);
    let both: [(&str, &[f64]); 2] = [("bool i", &[0.0, 1.0]), ("bool i", &[1.0, 1.0])];
    case(&both, Op::Binary(Binary::And), "bool i", &[0.0, 1.0]);
    case(&both, Op::Binary(Binary::Or), "bool i", &[1.0, 1.0]);

    // Operands meet by axis: here neither has both.
    let outer: [(&str, &[f64]); 2] = [("f32 i", &[10.0, 20.0]), ("f32 j", &[1.0, 2.0, 3.0])];
    case(&outer, Op::Binary(Binary::Add), "f32 i j", &[11.0, 12.0, 13.0, 21.0, 22.0, 23.0]);
    case(&outer, Op::Binary(Binary::Add), "f32 j i", &[11.0, 21.0, 12.0, 22.0, 13.0, 23.0]);
    case(
        &[("bool i", &[1.0, 0.0]), ("f32 j", &[1.0, 2.0, 3.0]), ("f32", &[-INF])],
        Op::Select,
        "f32 i j",
        &[1.0, 2.0, 3.0, -INF, -INF, -INF],
    );
    case(&[("f32 i", &[-1.75, 1.75])], Op::Cast, "i32 i", &[-1.0, 1.0]);
    case(&[("f32 i", &[0.0, 0.5])], Op::Cast, "bool i", &[0.0, 1.0]);
}

#[test]
fn a_declared_dtype_rounds_once() {
    let third: [(&str, &[f64]); 2] = [("f32", &[1.0]), ("f32", &[3.0])];
    let y = |precision, out| run(&third, Op::Binary(Binary::Div), out, precision).unwrap().data[0];
    assert_eq!(y(Precision::Exact, "bf16"), 1.0 / 3.0);
    assert_eq!(y(Precision::Declared, "bf16"), 0.333984375);
    assert_eq!(y(Precision::Declared, "f32"), f64::from(1.0f32 / 3.0));
    // 2049 is no f16; the sum is formed before it is rounded.
    let sum: [(&str, &[f64]); 2] = [("f16 i", &[2048.0, 1.0]), ("f16 i", &[1.0, 3.0])];
    let y = run(&sum, Op::Contract, "f16", Precision::Declared).unwrap();
    assert_eq!(y.data, [2052.0]);
}

#[test]
fn contraction() {
    let m: (&str, &[f64]) = ("f32 i j", &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let v: (&str, &[f64]) = ("f32 j", &[1.0, 10.0, 100.0]);
    case(&[m, v], Op::Contract, "f32 i", &[321.0, 654.0]);
    case(&[m, v], Op::Contract, "f32", &[975.0]);
    case(&[m, v], Op::Contract, "f32 j i", &[1.0, 4.0, 20.0, 50.0, 300.0, 600.0]);
    case(&[m, v, ("f32 i", &[1.0, -1.0])], Op::Contract, "f32 j", &[-3.0, -30.0, -300.0]);
    case(&[m], Op::Contract, "f32 j", &[5.0, 7.0, 9.0]);
    case(&[("f32 i z", &[]), ("f32 z", &[])], Op::Contract, "f32 i", &[0.0, 0.0]);
    case(&[("f32 i z", &[]), ("f32 i", &[1.0, 2.0])], Op::Contract, "f32 z", &[]);
}

#[test]
fn reduction() {
    let m: (&str, &[f64]) = ("f32 i j", &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    case(&[m], Op::Reduce { by: Reduce::Sum, axis: a("j") }, "f32 i", &[6.0, 15.0]);
    case(&[m], Op::Reduce { by: Reduce::Sum, axis: a("i") }, "f32 j", &[5.0, 7.0, 9.0]);
    case(&[m], Op::Reduce { by: Reduce::Max, axis: a("i") }, "f32 j", &[4.0, 5.0, 6.0]);
    case(&[("f32 i z", &[])], Op::Reduce { by: Reduce::Max, axis: a("z") }, "f32 i", &[-INF, -INF]);
}

#[test]
fn axes() {
    let m: (&str, &[f64]) = ("f32 i j", &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let l: (&str, &[f64]) = ("f32 l", &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let split = Op::Split { axis: a("l"), into: vec![a("i"), a("j")] };
    let merge = Op::Merge { axes: vec![a("i"), a("j")], into: a("l") };
    case(&[m], Op::Rename { from: a("j"), to: a("k") }, "f32 k i", &[1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    case(&[("f32 i", &[1.0, 2.0])], Op::Broadcast { axes: vec![a("p")] }, "f32 p i", &[1.0, 2.0, 1.0, 2.0]);
    case(&[l], split.clone(), "f32 i j", &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    case(&[l], split, "f32 j i", &[1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    case(&[m], merge.clone(), "f32 l", &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    // The slower part is named first, however the operand lies in memory.
    case(&[("f32 j i", &[1.0, 4.0, 2.0, 5.0, 3.0, 6.0])], merge, "f32 l", &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    case(&[m], Op::Slice { axis: a("j"), into: a("p"), start: 1 }, "f32 i p", &[2.0, 3.0, 5.0, 6.0]);
    case(
        &[("f32 p", &[1.0, 2.0]), ("f32 r", &[3.0, 4.0, 5.0, 6.0])],
        Op::Concat { axes: vec![a("p"), a("r")], into: a("l") },
        "f32 l",
        &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    );
    case(
        &[("f32 i c", &[1.0, 2.0]), ("f32 p i", &[3.0, 4.0, 5.0, 6.0])],
        Op::Concat { axes: vec![a("c"), a("p")], into: a("j") },
        "f32 i j",
        &[1.0, 3.0, 5.0, 2.0, 4.0, 6.0],
    );
}

#[test]
fn words() {
    let pack = |axis| Op::Pack { axis: a(axis) };
    let unpack = |axis| Op::Unpack { axis: a(axis) };
    // Four fields of 8 bits: the sign of a word is the highest bit of the last.
    case(&[("i32 r", &[1.0, 2.0, 3.0, 255.0])], pack("r"), "i32", &[f64::from(0xff03_0201_u32 as i32)]);
    case(&[("i32", &[f64::from(0xff03_0201_u32 as i32)])], unpack("r"), "i32 r", &[1.0, 2.0, 3.0, 255.0]);
    // Of a field that is too large its lowest bits count, of a negative one its two's complement.
    case(&[("i32 r", &[256.0, 257.0, 0.0, -128.0])], pack("r"), "i32", &[f64::from(0x8000_0100_u32 as i32)]);
    // Three fields have 10 bits each, and two are left over.
    case(&[("i32 i j", &[1.0, 0.0, 1023.0, 0.0, 1.0, 0.0])], pack("j"), "i32 i", &[1_072_693_249.0, 1024.0]);
    case(&[("i32 i", &[-1.0, 1024.0])], unpack("j"), "i32 j i", &[1023.0, 0.0, 1023.0, 1.0, 1023.0, 0.0]);
    // One field is the word itself.
    case(&[("i32 c i", &[-7.0, 7.0])], pack("c"), "i32 i", &[-7.0, 7.0]);
    case(&[("i32 i", &[-7.0, 7.0])], unpack("c"), "i32 c i", &[-7.0, 7.0]);
    let types = [&ty("i32 i")];
    let none = infer(&unpack("z"), &types, Want::default(), &axes_of_cases()).expect_err("no fields");
    assert_eq!(none, "axis `z` has size 0; a word has from 1 to 32 fields");
    let float = infer(&pack("i"), &[&ty("f32 i")], Want::default(), &axes_of_cases()).expect_err("a float");
    assert_eq!(float, "the operand f32[i=2] must be i32");
}

/// The table of all cases.
fn axes_of_cases() -> Vec<Axis> {
    let axis =
        |(name, size): &(&str, u64)| Axis { name: (*name).to_owned(), size: Size::Fixed(*size), like: None };
    AXES.iter().map(axis).collect()
}

#[test]
fn indexing() {
    let m: (&str, &[f64]) = ("f32 j i", &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let gather = Op::Gather { axis: a("j") };
    case(&[m, ("i32 p", &[2.0, 0.0])], gather.clone(), "f32 p i", &[5.0, 6.0, 1.0, 2.0]);
    // An axis that both have runs together: y[i] = x[index[i], i].
    case(&[m, ("i32 i", &[2.0, 0.0])], gather.clone(), "f32 i", &[5.0, 2.0]);
    case(&[m, ("i32 z", &[])], gather.clone(), "f32 z i", &[]);
    let message = "@main: y: the index 3 is outside the axis `j` of size 3";
    refused(&[m, ("i32 p", &[0.0, 3.0])], gather.clone(), "f32 p i", message);
    let message = "@main: y: the index -1 is outside the axis `j` of size 3";
    refused(&[m, ("i32 p", &[0.0, -1.0])], gather, "f32 p i", message);

    let scatter = Op::ScatterAdd { axis: a("j") };
    let x: (&str, &[f64]) = ("f32 p i", &[1.0, 2.0, 3.0, 4.0]);
    case(&[x, ("i32 p", &[2.0, 0.0])], scatter.clone(), "f32 j i", &[3.0, 4.0, 0.0, 0.0, 1.0, 2.0]);
    case(&[x, ("i32 p", &[1.0, 1.0])], scatter.clone(), "f32 i j", &[0.0, 4.0, 0.0, 0.0, 6.0, 0.0]);
    // An axis of the index runs together where the result has it, and is summed where not.
    let index: (&str, &[f64]) = ("i32 i p", &[2.0, 0.0, 0.0, 2.0]);
    case(&[x, index], scatter.clone(), "f32 i j", &[3.0, 0.0, 1.0, 2.0, 0.0, 4.0]);
    case(&[x, index], scatter.clone(), "f32 j", &[5.0, 0.0, 5.0]);
    case(&[("f32 z i", &[]), ("i32 z", &[])], scatter.clone(), "f32 j i", &[0.0; 6]);
    let message = "@main: y: the index 3 is outside the axis `j` of size 3";
    refused(&[x, ("i32 p", &[0.0, 3.0])], scatter, "f32 j i", message);

    let top = |x: &[f64], y: &[f64]| case(&[("f32 r", x)], Op::TopK { axis: a("r"), k: 2 }, "bool r", y);
    top(&[1.0, 4.0, 2.0, 3.0], &[0.0, 1.0, 0.0, 1.0]);
    top(&[1.0, 1.0, 1.0, 1.0], &[1.0, 1.0, 0.0, 0.0]);
    top(&[0.0, 5.0, -0.0, 0.0], &[1.0, 1.0, 0.0, 0.0]);
    top(&[NAN, -INF, NAN, -INF], &[0.0, 1.0, 0.0, 1.0]);
    top(&[NAN, NAN, NAN, 0.0], &[1.0, 0.0, 0.0, 1.0]);
    let at = |x: &[f64], y: &[f64]| {
        case(&[("f32 r", x)], Op::TopIndices { axis: a("r"), into: a("i") }, "i32 i", y);
    };
    at(&[1.0, 4.0, 2.0, 3.0], &[1.0, 3.0]);
    at(&[1.0, 1.0, 1.0, 1.0], &[0.0, 1.0]);
    at(&[NAN, -INF, NAN, -INF], &[1.0, 3.0]);
    case(
        &[("f32 i j", &[1.0, 2.0, 3.0, 6.0, 5.0, 4.0])],
        Op::TopK { axis: a("j"), k: 1 },
        "bool j i",
        &[0.0, 1.0, 0.0, 0.0, 1.0, 0.0],
    );
}

#[test]
fn sequences() {
    case(&[("f32 j", &[1.0, 2.0, 3.0])], Op::Past { from: a("j"), to: a("k") }, "f32 k", &[1.0, 2.0, 3.0]);

    let cache: (&str, &[f64]) = ("f32 s i", &[0.0; 8]);
    let x: (&str, &[f64]) = ("f32 t i", &[1.0, 2.0, 3.0, 4.0]);
    let append = Op::Append { from: a("t"), to: a("s") };
    let y: &[f64] = &[0.0, 0.0, 3.0, 4.0, 0.0, 0.0, 1.0, 2.0];
    case(&[cache, x, ("i32 t", &[3.0, 1.0])], append.clone(), "f32 s i", y);
    // Each row of a batch has its own positions.
    let y: &[f64] = &[1.0, 0.0, 3.0, 0.0, 0.0, 4.0, 0.0, 2.0];
    case(&[cache, x, ("i32 t i", &[0.0, 3.0, 1.0, 2.0])], append.clone(), "f32 s i", y);
    let message = "@main: y: the position 4 along `t` is outside the cache's capacity 4 along `s`";
    refused(&[cache, x, ("i32 t", &[3.0, 4.0])], append, "f32 s i", message);

    // A pool is of all rows of a batch.
    let pool = Op::Append { from: a("t"), to: a("l") };
    let cache: (&str, &[f64]) = ("f32 l", &[0.0; 6]);
    case(&[cache, x, ("i32 t i", &[5.0, 0.0, 2.0, 3.0])], pool, "f32 l", &[2.0, 0.0, 3.0, 4.0, 0.0, 1.0]);
    let told = infer(
        &Op::Append { from: a("t"), to: a("s") },
        &[&ty("f32 s"), &ty("f32 t i"), &ty("i32 t i")],
        Want::exactly(&ty("f32 s")),
        &table(),
    );
    let message =
        "the cache f32[s=4] lacks the axis `i`, but its axis `s` counts the positions of one sequence";
    assert_eq!(told, Err(message.to_owned()));

    // A quarter turn takes (x, y) to (-y, x); pair 0 turns once at position 1, pair 1 not at all.
    let freq: (&str, &[f64]) = ("f32 p", &[std::f64::consts::FRAC_PI_2, 0.0]);
    let x: (&str, &[f64]) = ("f32 t r", &[1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0]);
    let pos: (&str, &[f64]) = ("i32 t", &[0.0, 1.0]);
    let rope = |pairs| Op::Rope { axis: a("r"), pairs };
    let y = [1.0, 2.0, 3.0, 4.0, -2.0, 1.0, 3.0, 4.0];
    case(&[x, pos, freq], rope(Pairs::Interleaved), "f32 t r", &y);
    let y = [1.0, 2.0, 3.0, 4.0, -3.0, 2.0, 1.0, 4.0];
    case(&[x, pos, freq], rope(Pairs::Halves), "f32 t r", &y);
}

#[test]
fn composites() {
    let softmax = Op::Softmax { axis: a("j") };
    let (e1, e2) = (1f64.exp(), 2f64.exp());
    let sum = 1.0 + e1 + e2;
    let y = [1.0 / sum, e1 / sum, e2 / sum, 0.0, 1.0, 0.0];
    case(&[("f32 i j", &[1e4, 1e4 + 1.0, 1e4 + 2.0, -INF, 7.0, -INF])], softmax.clone(), "f32 i j", &y);
    // A row that is masked as a whole is zero.
    case(&[("f32 j", &[-INF; 3])], softmax.clone(), "f32 j", &[0.0; 3]);
    case(&[("f32 j", &[0.0, NAN, 0.0])], softmax, "f32 j", &[NAN; 3]);
    case(&[("f32 z", &[])], Op::Softmax { axis: a("z") }, "f32 z", &[]);

    let norm = |eps| Op::RmsNorm { axis: a("i"), eps: Real(eps) };
    let root = 12.5f64.sqrt();
    case(&[("f32 i", &[3.0, 4.0])], norm(0.0), "f32 i", &[3.0 / root, 4.0 / root]);
    case(&[("f32 i", &[3.0, 4.0])], norm(3.5), "f32 i", &[0.75, 1.0]);
}
