//! Every kernel that random graphs are scheduled into, on the host and in the interpreter.
//!
//! A kernel's body is a function of the IR, so the interpreter runs the very same text in f64. Inputs are quarters of small
//! integers: sums and products of a few are exact in f32, so comparisons and selections fall out alike on both sides and
//! what differs is rounding alone.

mod codes;
mod fuse;
mod kept;
mod loss;
mod rows;
mod stream;
#[path = "../common/streams.rs"]
mod streams;
mod windows;

use std::collections::BTreeMap;
use std::sync::Arc;

use half::{bf16, f16};

use latentc_codegen::cube::Target;
use latentc_codegen::device::{Data, Device, Floats, SharedFloats};
use latentc_codegen::host::{Buffer, Host, LAYOUT};
use latentc_codegen::memory::{Layout, Plan, PlanError, in_place};
use latentc_codegen::program::{Kernel, KernelKind};
use latentc_codegen::schedule::schedule;
use latentc_ir::interp::{Caches, Interpreter, Precision};
use latentc_ir::tensor::{SplitMix, Tensor};
use latentc_ir::verify::Stage;
use latentc_ir::{AxisId, DType, Function, Module, Op, Size, Type, Weight};
use latentc_passes::{Context, Graph};
use proptest::prelude::*;

/// f32 keeps 24 bits; a body of random ops may lose a few of them to cancellation before it is done.
const RELATIVE: f64 = 2e-4;

fn random_input(kernel: &Kernel, param: usize, extents: &[usize], rng: &mut SplitMix) -> Tensor {
    let ty = kernel.body.ty(kernel.body.params[param]);
    let shape: Vec<_> = ty.axes.iter().map(|a| extents[a.0 as usize]).collect();
    let len: usize = shape.iter().product();
    let data = (0..len)
        .map(|_| match ty.dtype {
            DType::Bool => (rng.next_u64() % 2) as f64,
            // Now and then outside of a small axis, which both sides must refuse.
            DType::I32 => (rng.next_u64() % 61).saturating_sub(58) as f64 * 3.0 + (rng.next_u64() % 3) as f64,
            _ => (rng.next_u64() % 33) as f64 / 4.0 - 4.0,
        })
        .collect();
    Tensor { dtype: ty.dtype, shape, data }
}

fn to_data(t: &Tensor) -> Data {
    if t.dtype.is_float() {
        Data::F32(t.data.iter().map(|&x| x as f32).collect())
    } else {
        Data::I32(t.data.iter().map(|&x| x as i32).collect())
    }
}

/// Floats that lie elsewhere as weights do: in their own type, in one piece or in one for each index of the first axis.
#[derive(Debug)]
enum Elsewhere {
    F32(Vec<Vec<f32>>),
    Bf16(Vec<Vec<bf16>>),
    F16(Vec<Vec<f16>>),
}

impl SharedFloats for Elsewhere {
    fn pieces(&self) -> usize {
        match self {
            Elsewhere::F32(x) => x.len(),
            Elsewhere::Bf16(x) => x.len(),
            Elsewhere::F16(x) => x.len(),
        }
    }

    fn piece(&self, n: usize) -> Floats<'_> {
        match self {
            Elsewhere::F32(x) => Floats::F32(&x[n]),
            Elsewhere::Bf16(x) => Floats::Bf16(&x[n]),
            Elsewhere::F16(x) => Floats::F16(&x[n]),
        }
    }
}

/// A tensor in the host's memory: as a weight where it could be one, of three axes as experts' are, else as a value that is
/// written.
fn held(t: &Tensor, written: bool) -> Buffer {
    fn pieces<T>(t: &Tensor, of: impl Fn(f64) -> T) -> Vec<Vec<T>> {
        let count = if t.shape.len() == 3 { t.shape[0].max(1) } else { 1 };
        let each = (t.data.len() / count).max(1);
        let mut pieces: Vec<Vec<T>> =
            t.data.chunks(each).map(|c| c.iter().map(|&x| of(x)).collect()).collect();
        pieces.resize_with(count, Vec::new);
        pieces
    }
    let elsewhere = match t.dtype {
        _ if written => None,
        DType::F32 if t.shape.len() == 3 => Some(Elsewhere::F32(pieces(t, |x| x as f32))),
        DType::Bf16 => Some(Elsewhere::Bf16(pieces(t, bf16::from_f64))),
        DType::F16 => Some(Elsewhere::F16(pieces(t, f16::from_f64))),
        DType::F64 | DType::F32 | DType::I32 | DType::Bool => None,
    };
    match elsewhere {
        Some(floats) => Host::new().share(Arc::new(floats)).expect("the host shares its memory"),
        None => Host::new().upload(t.dtype, to_data(t)).expect("memory"),
    }
}

/// A tensor as a cache, which is held in as many bits as its dtype has.
fn kept(t: &Tensor) -> Buffer {
    let (mut host, len) = (Host::new(), t.data.len());
    let mut kept = host.keep(t.dtype, len).expect("memory");
    host.launch(&copy(t.dtype, len), &[Some(&held(t, true))], &mut kept, &[]).expect("it is a map");
    kept
}

/// Brings elements to another buffer.
fn copy(dtype: DType, len: usize) -> Kernel {
    let mut f = Function::new("copy");
    let n = f.add_axis("n", Size::Fixed(len as u64), None);
    let ty = Type::new(dtype, vec![n]);
    let x = f.add_param("p0", ty.clone());
    f.results = f.push(Op::Cast, &[x], &[("", ty)]);
    Kernel { name: "copy".into(), kind: KernelKind::Map, body: f }
}

fn check(kernel: &Kernel, seed: u64) -> Result<(), TestCaseError> {
    let mut rng = SplitMix(seed);
    let sizes: Vec<usize> = kernel.size_symbols().iter().map(|_| (rng.next_u64() % 5) as usize).collect();
    check_at(kernel, &sizes, rng.next_u64())
}

fn check_at(kernel: &Kernel, sizes: &[usize], seed: u64) -> Result<(), TestCaseError> {
    let mut rng = SplitMix(seed);
    let symbols: Vec<String> = kernel.size_symbols().into_iter().map(str::to_owned).collect();
    let extents = kernel.extents(sizes);
    let args: Vec<_> =
        (0..kernel.body.params.len()).map(|p| random_input(kernel, p, &extents, &mut rng)).collect();

    let module = kernel.module();
    let appends = kernel.cache().is_some();
    let mut caches = Caches::new();
    if let Some(cache) = kernel.cache() {
        caches.insert(kernel.body.value(cache).name.clone(), args[0].clone());
    }
    let mut interp = Interpreter::new(&module, Precision::Exact);
    for (s, n) in symbols.iter().zip(sizes) {
        interp = interp.with_size(s, *n);
    }
    let mut none = |_: &str, _: &Function, _: &Weight| -> Result<Tensor, String> { Err("no weights".into()) };
    let want = interp.run(&args[usize::from(appends)..], &mut none, &mut caches);

    // All rows at once, or some after the others.
    let mut host = match rng.next_u64() % 2 {
        0 => Host::new(),
        _ => Host::new().leaving((rng.next_u64() % 32) as usize),
    };
    // What has 16 bits is a cache, a weight or neither.
    let mut buffers: Vec<_> = args
        .iter()
        .enumerate()
        .map(|(n, a)| match rng.next_u64() % 3 {
            _ if appends && n == 0 => Some(kept(a)),
            0 => Some(kept(a)),
            choice => Some(held(a, choice == 1)),
        })
        .collect();
    let out = kernel.output();
    let len: usize = out.axes.iter().map(|a| extents[a.0 as usize]).product();
    let mut output = match appends {
        true => buffers[0].take().expect("just made"),
        false => host.alloc(out.dtype, len).expect("memory"),
    };
    let inputs: Vec<_> = buffers.iter().map(Option::as_ref).collect();
    let done = host.launch(kernel, &inputs, &mut output, sizes);
    let text = format!("sizes {:?}\n{}", symbols.iter().zip(sizes).collect::<BTreeMap<_, _>>(), kernel.body);
    let gathers = kernel.kind == KernelKind::Stream
        && kernel.body.body.iter().any(|inst| matches!(inst.op, Op::Gather { .. }));
    let (want, ()) = match (want, done) {
        // A streamed softmax has nothing to refuse without a gather, and with one it need not look at what the mask hides.
        (Err(_), Err(_)) if kernel.kind != KernelKind::Stream => return Ok(()),
        (Err(_), _) if gathers => return Ok(()),
        // Where there is nothing to compute, no index is looked at.
        (Err(_), Ok(())) if len == 0 => return Ok(()),
        (Ok(want), Ok(())) => (want, ()),
        (want, done) => {
            return Err(TestCaseError::fail(format!("interpreter {:?}, host {done:?}\n{text}", want.err())));
        }
    };
    let got = match host.read(&output, len).expect("read") {
        Data::F32(v) => v.into_iter().map(f64::from).collect(),
        Data::I32(v) => v.into_iter().map(f64::from).collect::<Vec<_>>(),
    };
    // The same in the place of an operand, where it may be there: to the bit.
    for n in in_place(kernel, &LAYOUT) {
        let arena = host.reserve(4 * len as u64).expect("memory");
        // SAFETY: the kernel may work in place.
        let mut part = || unsafe { host.part(&arena, 0, out.dtype, len) }.expect("it is there");
        let (mut operand, mut output) = (part(), part());
        host.launch(&copy(out.dtype, len), &[buffers[n].as_ref()], &mut operand, &[]).expect("it is a map");
        let mut inputs = inputs.clone();
        inputs[n] = Some(&operand);
        host.launch(kernel, &inputs, &mut output, sizes).expect("it was launched before");
        let there: Vec<f64> = match host.read(&output, len).expect("read") {
            Data::F32(v) => v.into_iter().map(f64::from).collect(),
            Data::I32(v) => v.into_iter().map(f64::from).collect(),
        };
        let same = there.iter().zip(&got).all(|(a, b)| a.to_bits() == b.to_bits());
        prop_assert!(same, "in the place of parameter {n}: {there:?}, not {got:?}\n{text}");
    }
    let got = Tensor { dtype: out.dtype, shape: want[0].shape.clone(), data: got };
    // What f32 cannot hold, it makes infinite.
    let want =
        Tensor { data: want[0].data.iter().map(|&x| f64::from(x as f32)).collect(), ..want[0].clone() };
    let scale = want.data.iter().filter(|x| x.is_finite()).fold(1.0f64, |m, x| m.max(x.abs()));
    // What is appended to a cache is rounded to its dtype.
    let rounding = match out.dtype {
        DType::Bf16 if appends => f64::from(bf16::EPSILON) / 2.0,
        DType::F16 if appends => f64::from(f16::EPSILON) / 2.0,
        _ => 0.0,
    };
    let relative = RELATIVE + rounding;
    got.close_to(&want, relative * scale, relative).map_err(|e| TestCaseError::fail(format!("{e:?}\n{text}")))
}

fn prepare(module: &Module) -> Module {
    let stages = latentc_passes::pipeline();
    let mut m = module.clone();
    for pass in stages.iter().filter(|p| p.name != "derive") {
        m = pass.apply(&m, &mut Context::new(Graph::Decode)).expect("these passes always apply");
    }
    m
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn host_kernels_compute_what_their_bodies_say(
        module in latentc_ir::testing::arb_module(Stage::Derived),
        graph in prop::sample::select(&Graph::ALL),
        seed: u64,
    ) {
        let program = schedule(&prepare(&module), &Context::new(graph)).expect("every op has a kernel");
        for layout in [LAYOUT, Target::Cuda.layout(), Layout { align: 1, page: 4096, ..Target::Cuda.layout() }] {
            let sizes = BTreeMap::from(["b", "t", "s"].map(|s| (s.to_owned(), 1 + seed % 7)));
            let plan = match Plan::new(&program, &sizes, &layout) {
                Err(PlanError::Large { .. }) => continue,
                plan => plan.map_err(|e| TestCaseError::fail(e.to_string()))?,
            };
            plan.replay(&program, &layout).map_err(|e| TestCaseError::fail(format!("{e}\n{program}")))?;
        }
        for kernel in &program.kernels {
            let symbols: Vec<_> = (0..kernel.size_symbols().len()).map(|n| format!("n{n}")).collect();
            prop_assert_eq!(kernel.size_symbols(), symbols, "launches give sizes in this order");
            check(kernel, seed)?;
        }
    }
}

/// A grouped product with its axes in any order: rows `r`, `q`, experts `e`, kept `m`, `n`, summed `k`, `l`.
fn grouped(order: &[usize], sums_rows: bool, dtype: DType, [r, e, m, k]: [u64; 4]) -> Kernel {
    let mut f = Function::new("grouped");
    let sizes = [("r", r), ("q", 2), ("e", e), ("m", m), ("n", 2), ("k", k), ("l", 2)];
    let axes: Vec<_> = sizes.iter().map(|(n, s)| f.add_axis(n, Size::Fixed(*s), None)).collect();
    let [r, q, e, m, n, k, l] = axes[..] else { unreachable!("seven") };
    let of = |mut of: Vec<AxisId>, by: usize| {
        of.sort_by_key(|a| order[(a.0 as usize + by) % order.len()]);
        Type::new(dtype, of)
    };
    let table = f.add_param("p0", of(vec![e, m, n, k, l], 0));
    let index = f.add_param("p1", Type::new(DType::I32, vec![r, q]));
    let x = f.add_param("p2", of(vec![r, q, k, l], 1));
    let w = f.push(Op::Gather { axis: e }, &[table, index], &[("", of(vec![r, q, m, n, k, l], 2))])[0];
    let y = Type::new(DType::F32, of(if sums_rows { vec![r, m, n] } else { vec![r, q, m, n] }, 3).axes);
    f.results = f.push(Op::Contract, &[x, w], &[("", y)]);
    Kernel { name: "grouped".into(), kind: KernelKind::Grouped, body: f }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]
    #[test]
    fn grouped_products_of_axes_in_any_order(
        order in Just((0..7).collect::<Vec<usize>>()).prop_shuffle(),
        sums_rows: bool,
        seed: u64,
    ) {
        check(&grouped(&order, sums_rows, DType::F32, [3, 4, 5, 3]), seed)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]
    #[test]
    fn grouped_products_of_many_rows(
        order in Just((0..7).collect::<Vec<usize>>()).prop_shuffle(),
        sums_rows: bool,
        seed: u64,
    ) {
        // More experts than random indices go to, so that none of the many is refused.
        check(&grouped(&order, sums_rows, DType::Bf16, [41, 9, 23, 17]), seed)?;
    }
}

/// A sum of outer products with its axes in any order: rows `r`, `q`, matrices `e`, of `m` and `n` by `k` and `l`. Rows of the second
/// factor are shared along `q`.
fn outer(order: &[usize], keeps_row: bool) -> Kernel {
    let mut f = Function::new("outer");
    let sizes = [("r", 7u64), ("q", 2), ("e", 4), ("m", 150), ("n", 2), ("k", 3), ("l", 2)];
    let axes: Vec<_> = sizes.iter().map(|(n, s)| f.add_axis(n, Size::Fixed(*s), None)).collect();
    let [r, q, e, m, n, k, l] = axes[..] else { unreachable!("seven") };
    let f32_of = |mut of: Vec<AxisId>, by: usize| {
        of.sort_by_key(|a| order[(a.0 as usize + by) % order.len()]);
        Type::new(DType::F32, of)
    };
    let a = f.add_param("p0", f32_of(vec![r, q, m, n], 0));
    let b = f.add_param("p1", f32_of(vec![r, k, l], 1));
    let index = f.add_param("p2", Type::new(DType::I32, vec![r, q]));
    let x =
        f.push(Op::Binary(latentc_ir::Binary::Mul), &[a, b], &[("", f32_of(vec![r, q, m, n, k, l], 2))])[0];
    let y = if keeps_row { vec![q, e, m, n, k, l] } else { vec![e, m, n, k, l] };
    f.results = f.push(Op::ScatterAdd { axis: e }, &[x, index], &[("", f32_of(y, 3))]);
    Kernel { name: "outer".into(), kind: KernelKind::Scatter, body: f }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]
    #[test]
    fn outer_products_of_axes_in_any_order(
        order in Just((0..7).collect::<Vec<usize>>()).prop_shuffle(),
        keeps_row: bool,
        seed: u64,
    ) {
        check(&outer(&order, keeps_row), seed)?;
    }
}

/// A product of more rows than stream a matrix, with its axes in any order: rows `r`, columns `n`, summed `k`, and perhaps `l`. Where columns
/// of the matrix are lines of memory and the rows are the least of all, it is made turned.
fn many(order: &[usize], sizes: [u64; 3], dtypes: [DType; 2], twice: bool) -> Kernel {
    let mut f = Function::new("many");
    let sizes = [("r", sizes[0]), ("n", sizes[1]), ("k", sizes[2]), ("l", 2)];
    let axes: Vec<_> = sizes.iter().map(|(n, s)| f.add_axis(n, Size::Fixed(*s), None)).collect();
    let [r, n, k, l] = axes[..] else { unreachable!("four") };
    let of = |dtype: DType, mut of: Vec<AxisId>| {
        of.retain(|a| twice || *a != l);
        of.sort_by_key(|a| order[a.0 as usize]);
        Type::new(dtype, of)
    };
    let x = f.add_param("p0", of(dtypes[0], vec![r, k, l]));
    let w = f.add_param("p1", of(dtypes[1], vec![n, k, l]));
    f.results = f.push(Op::Contract, &[x, w], &[("", of(DType::F32, vec![r, n]))]);
    Kernel { name: "many".into(), kind: KernelKind::Contract, body: f }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]
    #[test]
    fn products_of_many_rows_in_any_order(
        // One order in two is that of a matrix whose columns are lines, for sums that are added up.
        order in prop_oneof![Just(vec![1, 2, 3, 0]), Just((0..4).collect::<Vec<usize>>()).prop_shuffle()],
        sizes in [49..90u64, 150..300u64, 150..260u64],
        dtypes in prop::sample::select(vec![[DType::F32; 2], [DType::F32, DType::Bf16], [DType::Bf16; 2]]),
        twice: bool,
        seed: u64,
    ) {
        check(&many(&order, sizes, dtypes, twice), seed)?;
    }
}

/// The CPU's own products of bf16 take subnormal operands as zero, whatever they are multiplied with.
#[test]
fn a_bound_knows_of_subnormal_operands() {
    let kernel = many(&[0, 1, 2, 3], [20, 30, 40], [DType::Bf16; 2], false);
    let full = |shape: [usize; 2], x: f64| Tensor {
        dtype: DType::Bf16,
        shape: shape.to_vec(),
        data: vec![DType::Bf16.round(x); shape[0] * shape[1]],
    };
    let args = [full([20, 40], 1e30), full([30, 40], 1e-39)];
    let got = latentc_codegen::check::launch(&mut Host::new(), &kernel, &args, &[]).unwrap();
    let expected = latentc_codegen::check::Expected::of(&kernel, &args, &[]).unwrap();
    assert!(expected.value.data[0] > 3e-8, "the product itself is not small");
    let outcome = expected.compare(&got, &[], 0);
    assert!(outcome.passes(), "{outcome:?}");
}

/// Which of two equal exponentials comes first hangs on how they are rounded: what is read there has no bound, times whatever.
#[test]
fn a_bound_knows_of_choices_that_hang_on_an_error() {
    let kernel = codes::kernel(
        "axes a0=4, a1=2\nparam p0: f32[a0]\nparam p1: f32[a0]\n\
         x: f32[a0] = exp p0\ni: i32[a1] = top_indices x over a0 into a1\n\
         g: f32[a1] = gather p1, i along a0\nc: f32 = const 16.0\ny: f32[a1] = mul g, c\nreturn y",
    );
    let row = |data: [f64; 4]| Tensor { dtype: DType::F32, shape: vec![4], data: data.to_vec() };
    let expected = |x: [f64; 4]| {
        latentc_codegen::check::Expected::of(&kernel, &[row(x), row([1.0, 2.0, 3.0, 4.0])], &[]).unwrap()
    };
    let other = Tensor { dtype: DType::F32, shape: vec![2], data: vec![48.0, 32.0] };
    assert!(expected([0.0, 1.0, 1.0, -1.0]).compare(&other, &[], 0).passes(), "either may be the first");
    assert!(!expected([0.0, 1.5, 1.0, -1.0]).compare(&other, &[], 0).passes(), "the second is the first");
}

/// A sum over some rows for each column, with its axes in any order: columns `c`, groups `g`, summed `k`, `l`.
fn columns(order: &[usize], sizes: [u64; 2]) -> Kernel {
    let mut f = Function::new("columns");
    let sizes = [("c", sizes[0]), ("g", 3), ("k", sizes[1]), ("l", 2)];
    let axes: Vec<_> = sizes.iter().map(|(n, s)| f.add_axis(n, Size::Fixed(*s), None)).collect();
    let f32_of = |mut of: Vec<AxisId>, by: usize| {
        of.sort_by_key(|a| order[(a.0 as usize + by) % order.len()]);
        Type::new(DType::F32, of)
    };
    let a = f.add_param("p0", f32_of(axes.clone(), 0));
    let b = f.add_param("p1", f32_of(axes.clone(), 0));
    f.results = f.push(Op::Contract, &[a, b], &[("", f32_of(axes[..2].to_vec(), 0))]);
    Kernel { name: "columns".into(), kind: KernelKind::Contract, body: f }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]
    #[test]
    fn sums_of_columns_in_any_order(
        order in Just((0..4).collect::<Vec<usize>>()).prop_shuffle(),
        columns_and_rows in [0..600u64, 0..200u64],
        seed: u64,
    ) {
        check(&columns(&order, columns_and_rows), seed)?;
    }
}

#[test]
fn sizes_are_in_the_order_of_the_symbols() {
    let mut f = Function::new("k");
    let a = f.add_axis("a0", Size::Sym("n0".into()), None);
    let b = f.add_axis("a1", Size::Fixed(3), None);
    let x = f.add_param("p0", Type::new(DType::F32, vec![a, b]));
    f.results = vec![x];
    let kernel = Kernel { name: "k".into(), kind: KernelKind::Map, body: f };
    assert_eq!(kernel.extents(&[7]), [7, 3]);
}
