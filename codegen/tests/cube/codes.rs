//! Products with few rows whose wide operand is held as codes, which are read 16 at once.

use latentc_codegen::check::{Outcome, check};
use latentc_codegen::cube::{Target, cuda_source, cuda_sources, ways};
use latentc_codegen::device::DeviceError;
use latentc_codegen::program::{By, Kernel, KernelKind};
use proptest::prelude::*;

use crate::bench::{cuda_text, device, emulated, gpu, kernel};

/// What holds a matrix as codes, and what makes its elements of them.
struct Matrix {
    params: String,
    body: String,
}

/// A matrix `name`, of rows with the axes `rows` and elements along the last axis `along`, in groups; `index` chooses one of the axis `x`, if
/// there is one. The axes of groups, words, fields and within are g, w, f and e.
fn matrix(name: &str, rows: &str, along: &str, index: Option<&str>) -> Matrix {
    let (held, lines) = match index {
        None => (rows.to_owned(), rows.to_owned()),
        Some(lines) => (format!("x, {rows}"), format!("{lines}, {rows}")),
    };
    let params = format!("param {name}_words: i32[{held}, g, w]\nparam {name}_scales: f32[{held}, g]\n");
    let chosen = match index {
        None => String::new(),
        Some(lines) => format!(
            "{name}_own: i32[{lines}, {rows}, g, w] = gather {name}_words, index along x\n\
             {name}_scale: f32[{lines}, {rows}, g] = gather {name}_scales, index along x\n"
        ),
    };
    let [words, scales] = if index.is_some() { ["own", "scale"] } else { ["words", "scales"] };
    let body = format!(
        "{chosen}{name}_fields: i32[{lines}, g, w, f] = unpack {name}_{words} over f
{name}_codes: i32[{lines}, g, e] = merge {name}_fields axes w, f into e
{name}_centre: i32 = const 127.0
{name}_centred: i32[{lines}, g, e] = sub {name}_codes, {name}_centre
{name}_numbers: f32[{lines}, g, e] = cast {name}_centred
{name}_scaled: bf16[{lines}, g, e] = mul {name}_numbers, {name}_{scales}
{name}: bf16[{lines}, {along}] = merge {name}_scaled axes g, e into {along}
"
    );
    Matrix { params, body }
}

/// Groups of a row of elements, and elements of a group, as axes.
fn axes(groups: u64, group: u64) -> String {
    format!("g={groups}, w={}, f=4, e={group}, k={}", group / 4, groups * group)
}

/// Gate and up of a normed row: along the groups.
pub(crate) fn along(columns: u64, groups: u64, group: u64) -> Kernel {
    let [gate, up] = ["gate", "up"].map(|name| matrix(name, "m", "k", None));
    let body = format!(
        "axes n=n0, m={columns}, {}\n{}{}param p: f32[n, k]\nparam gain: f32[k]\n{}{}\
         squares: f32[n, k] = mul p, p\nsum: f32[n] = reduce_sum squares over k\nscale: f32[n] = rsqrt sum\n\
         normed: f32[n, k] = mul p, scale\nh: f32[n, k] = mul normed, gain\n\
         a: f32[n, m] = contract gate, h over k\nb: f32[n, m] = contract up, h over k\n\
         open: f32[n, m] = silu a\ny: f32[n, m] = mul open, b\nreturn y",
        axes(groups, group),
        gate.params,
        up.params,
        gate.body,
        up.body
    );
    kernel(KernelKind::Contract, "along", &body)
}

/// A matrix for each of three heads, by columns along the groups.
pub(crate) fn across(depth: u64, groups: u64, group: u64) -> Kernel {
    let Matrix { params, body } = matrix("wide", "i, d", "k", None);
    let body = format!(
        "axes n=n0, i=3, d={depth}, {}\n{params}param p: f32[n, i, d]\n{body}\
         y: f32[n, i, k] = contract p, wide over d\nreturn y",
        axes(groups, group)
    );
    kernel(KernelKind::Contract, "across", &body)
}

/// Those that an index chooses, added up.
pub(crate) fn chosen(columns: u64, groups: u64, group: u64) -> Kernel {
    let Matrix { params, body } = matrix("wide", "m", "k", Some("n, t"));
    let body = format!(
        "axes n=n0, t=3, x=5, m={columns}, {}\n{params}param index: i32[n, t]\nparam p: bf16[n, t, k]\n{body}\
         y: f32[n, m] = contract p, wide over t, k\nreturn y",
        axes(groups, group)
    );
    kernel(KernelKind::Grouped, "chosen", &body)
}

/// The ways with few rows that read codes: their text makes numbers of the last bits of 2^23 and a code.
fn few(kernel: &Kernel) -> Vec<Kernel> {
    let few = |way: &Kernel| matches!(way.kind, KernelKind::Few { rows: 1 | 8, .. });
    let reads = |way: &Kernel| cuda_source(way).unwrap().contains("8388735");
    let all: Vec<_> = ways(kernel, Target::Cuda).into_iter().filter(|way| few(way) && reads(way)).collect();
    assert_eq!(all.len(), 2, "{} has a way for one row and one for eight", kernel.name);
    all
}

/// The kernel means what its body says, wherever it can run, and spills nothing.
fn right(kernel: &Kernel, rows: usize) {
    let one = |outcome: Result<Outcome, DeviceError>| {
        let outcome = outcome.unwrap_or_else(|e| panic!("{e}"));
        assert!(outcome.passes(), "{} of {rows} rows: {outcome:?}\n{}", kernel.name, kernel.body);
    };
    emulated(|emulator| one(check(emulator, kernel, &[rows], 1)));
    if let Some(mut device) = device().filter(|_| !matches!(kernel.kind, KernelKind::Matrix { .. })) {
        one(check(&mut device, kernel, &[rows], 1));
    }
    if let Some(mut device) = gpu() {
        one(check(&mut device, kernel, &[rows], 1));
    }
    for source in cuda_sources(kernel).unwrap() {
        if let Some(resources) = cuda_text(&source.name, &source.text) {
            assert_eq!(resources.spill_bytes, 0, "{} spills: {resources:?}", source.name);
        }
    }
}

#[test]
fn whole_and_broken_packs() {
    // Sixteen codes are of one group, then eight, then four; and deep rows are on their way past the registers.
    for (groups, group) in [(4, 32), (3, 24), (5, 12), (16, 128)] {
        few(&along(37, groups, group)).iter().for_each(|way| right(way, 3));
    }
    for (groups, group) in [(2, 32), (3, 20)] {
        few(&across(19, groups, group)).iter().for_each(|way| right(way, 3));
        few(&chosen(21, groups, group)).iter().for_each(|way| right(way, 2));
    }
}

/// Tensor cores multiply elements, which are made once: of all that rows are chosen of, too.
#[test]
fn many_rows_are_multiplied_by_what_is_decoded_once() {
    for kernel in [along(40, 2, 32), across(16, 3, 16), chosen(24, 2, 32)] {
        let tiled =
            |way: &Kernel| matches!(way.kind, KernelKind::Matrix { by: By::Planes, rows: 32, parts: 1, .. });
        let all: Vec<_> = ways(&kernel, Target::Cuda).into_iter().filter(tiled).collect();
        assert!(!all.is_empty(), "{} has tiles", kernel.name);
        for way in all {
            let names: Vec<_> = cuda_sources(&way).unwrap().into_iter().map(|source| source.name).collect();
            assert!(
                names.iter().any(|name| name.contains("_weights0") || name.contains("_operand")),
                "{names:?}"
            );
            right(&way, 70);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4, ..ProptestConfig::default() })]
    #[test]
    fn of_any_size(
        which in 0usize..3,
        other in 1u64..70,
        (groups, words) in (1u64..9, 1u64..33),
        rows in 1usize..12,
    ) {
        let kernel = [along, across, chosen][which](other, groups, 4 * words);
        few(&kernel).iter().for_each(|way| right(way, rows));
    }
}
