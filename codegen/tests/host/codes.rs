//! What `check` allows a kernel of narrow caches: enough for its arithmetic, and no more. And products with weights that are held as codes.

use latentc_codegen::check::{Expected, check, random_inputs};
use latentc_codegen::host::Host;
use latentc_codegen::pieces::pieces;
use latentc_codegen::program::{Kernel, KernelKind};
use latentc_ir::Tensor;

pub(crate) fn kernel(body: &str) -> Kernel {
    let text = format!("module m entry @f\n\nfunc @f {{\n{body}\n}}\n");
    let module = latentc_ir::check("m.ir", &text).unwrap_or_else(|e| panic!("{}", e.render()));
    let body = module.functions[0].clone();
    Kernel { name: "f".to_owned(), kind: KernelKind::of(&body), body }
}

/// Latents of 8 bits, with a scale each, are attended to.
const READS: &str = "axes a0=n0, a1=8, a2=n1, a3=2, a4=4
param p0: bf16[a0, a1]
param p1: i32[a2, a3]
param p2: bf16[a2]
most: i32 = const 127.0
field: i32[a2, a3, a4] = unpack p1 over a4
code: i32[a2, a1] = merge field axes a3, a4 into a1
centred: i32[a2, a1] = sub code, most
number: f32[a2, a1] = cast centred
c: bf16[a2, a1] = mul number, p2
score: f32[a0, a2] = contract p0, c over a1
P: bf16[a0, a2] = softmax score over a2
o: f32[a0, a1] = contract P, c over a2
return o";

/// Rows of 8 numbers become two words of 4 codes.
const PACKS: &str = "axes a0=n0, a1=8, a2=2, a3=4
param p0: bf16[a0, a1]
param p1: bf16[a0, a1]
per: f32 = const 0.007874015748031496
centre: f32 = const 127.5
x: bf16[a0, a1] = mul p0, p1
size: bf16[a0, a1] = abs x
most: f32[a0] = reduce_max size over a1
step: f32[a0] = mul most, per
row: bf16[a0, a2, a3] = split x axis a1 into a2, a3
scaled: f32[a0, a2, a3] = div row, step
shifted: f32[a0, a2, a3] = add scaled, centre
code: i32[a0, a2, a3] = cast shifted
y: i32[a0, a2] = pack code over a3
return y";

#[test]
fn what_reads_codes_is_bounded_by_a_part_of_what_it_makes() {
    let kernel = kernel(READS);
    let args = random_inputs(&kernel, &[3, 17], 1);
    let Expected { value, tolerance, .. } = Expected::of(&kernel, &args, &[3, 17]).unwrap();
    let size = value.data.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    let widest = tolerance.iter().fold(0.0f64, |m, &x| m.max(x));
    assert!(size > 0.05 && widest < 0.3 * size, "off by {widest} of {size}");
}

#[test]
fn codes_may_be_another_but_not_any() {
    let kernel = kernel(PACKS);
    let args = random_inputs(&kernel, &[5], 1);
    let expected = Expected::of(&kernel, &args, &[5]).unwrap();
    assert_eq!(expected.fields.map(|f| f.0), Some(4));
    assert!(expected.tolerance.iter().all(|&t| t <= 4.0), "{:?}", expected.tolerance);
    assert!(expected.tolerance.iter().any(|&t| t > 0.0), "rounding to bf16 tips no code over");
    // Neighbours of a code in each field are as good where arithmetic tips it over; the words in another order are not.
    let swapped = Tensor {
        data: expected.value.data.iter().map(|&w| f64::from((w as i32).swap_bytes())).collect(),
        ..expected.value.clone()
    };
    assert!(!expected.compare(&swapped, &[5], 1).passes());
    let next = expected
        .value
        .data
        .iter()
        .zip(&expected.tolerance)
        .map(|(&w, &t)| w + if t > 0.0 { 1.0 } else { 0.0 });
    let next = Tensor { data: next.collect(), ..expected.value.clone() };
    assert!(expected.compare(&next, &[5], 1).passes());
}

/// Rows of a matrix that is held as codes, in groups of 8.
const WIDE: &str = "axes a0=n0, a1=5, a2=24, a3=3, a4=2, a5=4, a6=8
param p0: f32[a0, a2]
param p1: i32[a1, a3, a4]
param p2: f32[a1, a3]
fields: i32[a1, a3, a4, a5] = unpack p1 over a5
code: i32[a1, a3, a6] = merge fields axes a4, a5 into a6
most: i32 = const 127.0
centred: i32[a1, a3, a6] = sub code, most
number: f32[a1, a3, a6] = cast centred
scaled: f32[a1, a3, a6] = mul number, p2
w: f32[a1, a2] = merge scaled axes a3, a6 into a2
";

/// The same of the experts that rows go to, chosen of seven, in groups of 16.
const CHOSEN: &str = "axes a0=n0, a1=2, a2=7, a3=5, a4=48, a5=3, a6=4, a7=4, a8=16
param p0: f32[a0, a4]
param p1: i32[a2, a3, a5, a6]
param p2: f32[a2, a3, a5]
param p3: i32[a0, a1]
words: i32[a0, a1, a3, a5, a6] = gather p1, p3 along a2
scales: f32[a0, a1, a3, a5] = gather p2, p3 along a2
fields: i32[a0, a1, a3, a5, a6, a7] = unpack words over a7
code: i32[a0, a1, a3, a5, a8] = merge fields axes a6, a7 into a8
most: i32 = const 127.0
centred: i32[a0, a1, a3, a5, a8] = sub code, most
number: f32[a0, a1, a3, a5, a8] = cast centred
scaled: f32[a0, a1, a3, a5, a8] = mul number, scales
w: f32[a0, a1, a3, a4] = merge scaled axes a5, a8 into a4
y: f32[a0, a1, a3] = contract p0, w over a4
return y";

/// Multiplied along its groups, across them, and where its rows are the fewer; and chosen by an index. The host reads codes there, in
/// pieces of which none is what they stand for.
#[test]
fn products_read_codes() {
    let along = format!("{WIDE}y: f32[a0, a1] = contract p0, w over a2\nreturn y");
    let across = WIDE.replace("p0: f32[a0, a2]", "p0: f32[a0, a1]");
    let across = format!("{across}y: f32[a0, a2] = contract p0, w over a1\nreturn y");
    for (body, kind) in
        [(&along[..], KernelKind::Contract), (&across, KernelKind::Contract), (CHOSEN, KernelKind::Grouped)]
    {
        let kernel = kernel(body);
        assert_eq!(kernel.kind, kind);
        assert_eq!(pieces(&kernel).len(), 1, "{}", kernel.body);
        for rows in [1, 2, 3, 7, 60] {
            let outcome = check(&mut Host::new(), &kernel, &[rows], 1).unwrap();
            assert!(outcome.passes(), "{rows} rows: {outcome:?}\n{}", kernel.body);
        }
    }
}
