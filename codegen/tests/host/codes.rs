//! What `check` allows a kernel of narrow caches: enough for its arithmetic, and no more.

use latentc_codegen::check::{Expected, random_inputs};
use latentc_codegen::program::{Kernel, KernelKind};
use latentc_ir::Tensor;

fn kernel(body: &str) -> Kernel {
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
