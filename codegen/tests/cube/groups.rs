//! Products of groups of planes (`wgmma`): each tile of them, and what the emulator finds in texts that lack something.

use latentc_codegen::check::check;
use latentc_codegen::cube::{Target, cuda_source, cuda_sources, ways};
use latentc_codegen::emulate::Emulator;
use latentc_codegen::program::{By, Kernel, KernelKind};

use crate::bench::{emulated, inputs, kernel, on_cuda};
use crate::matrix::{gradient, two_products, wider};

/// The ways by groups of planes.
fn grouped(kernel: &Kernel) -> Vec<Kernel> {
    let all = ways(kernel, Target::Cuda).into_iter();
    all.filter(|w| matches!(w.kind, KernelKind::Matrix { by: By::Groups, parts: 1, .. })).collect()
}

/// For both sides, or one of the two, they mean what the kernel means, on the emulator at least, spilling nothing. They are so many launches.
fn agree(kernel: &Kernel, sides: &[u8], launches: usize, sizes: &[usize], given: &[(usize, &[f64])]) {
    let all = grouped(kernel);
    assert!(!all.is_empty(), "no such way");
    for way in all {
        let KernelKind::Matrix { wide, .. } = way.kind else { unreachable!("these were taken") };
        if sides.contains(&wide) {
            assert_eq!(cuda_sources(&way).unwrap().len(), launches, "{}", way.name);
            on_cuda(&way, &inputs(&way, sizes, given), sizes, 3e-5);
        }
    }
}

/// Both operands along what is summed, of which there is more than all stages hold and no whole number of them.
fn along(depth: usize) -> Kernel {
    kernel(
        KernelKind::Contract,
        "long",
        &format!(
            "axes a0=n0, a1=70, a2={depth}\nparam p0: bf16[a0, a2]\nparam p1: bf16[a1, a2]\n\
             y: f32[a0, a1] = contract p0, p1 over a2\nreturn y"
        ),
    )
}

#[test]
fn operands_along_and_across() {
    agree(&along(344), &[0, 1], 1, &[131], &[]);
    // Rows along, columns across, head by head; an expression of the sums, stored one by one.
    let k = kernel(
        KernelKind::Contract,
        "heads",
        "axes a0=n0, a1=2, a2=136, a3=8, a4=3\nparam p0: f16[a0, a1, a4, a3]\nparam p1: f16[a1, a4, a3, a2]\n\
         x: f16[a1, a0, a2] = contract p0, p1 over a4, a3\ny: f16[a1, a0, a2] = silu x\nreturn y",
    );
    agree(&k, &[0, 1], 1, &[33], &[]);
    // Both across.
    agree(&gradient(["bf16", "bf16"]), &[0, 1], 1, &[35, 2], &[]);
}

#[test]
fn two_products_meet() {
    agree(&two_products(), &[0], 1, &[131], &[]);
}

#[test]
fn an_operand_in_f32_is_split() {
    agree(&wider(264), &[0], 1, &[37], &[]);
}

#[test]
fn rows_of_groups() {
    let k = kernel(
        KernelKind::Grouped,
        "up",
        "axes a0=n0, a1=3, a2=37, a3=7, a4=72\nparam p0: f32[a0, a1]\nparam p1: i32[a0, a1]\n\
         param p2: bf16[a3, a2, a4]\nparam p3: bf16[a0, a4]\nparam p4: bf16[a3, a2, a4]\n\
         w1: bf16[a0, a1, a2, a4] = gather p2, p1 along a3\nx1: f32[a0, a1, a2] = contract w1, p3 over a4\n\
         w2: bf16[a0, a1, a2, a4] = gather p4, p1 along a3\nx2: f32[a0, a1, a2] = contract w2, p3 over a4\n\
         s: f32[a0, a1, a2] = silu x1\nm: f32[a0, a1, a2] = mul s, x2\ny: f32[a0, a1, a2] = mul p0, m\nreturn y",
    );
    let index: Vec<_> = (0..141).map(|n| if n % 5 == 0 { f64::from(n % 7) } else { 3.0 }).collect();
    agree(&k, &[0, 1], 2, &[47], &[(1, &index)]);
}

/// Asserts that the emulator finds what is wrong with each of these texts, which are the kernel's own with something broken, and says what.
pub(crate) fn all_show(kernel: &Kernel, sizes: &[usize], broken: Vec<(String, String)>) {
    let text = cuda_source(kernel).unwrap();
    let (names, texts): (Vec<_>, Vec<_>) = broken.into_iter().unzip();
    for (name, edited) in names.iter().zip(&texts) {
        assert_ne!(*edited, text, "{name}: nothing to break");
    }
    emulated(|_| {
        let emulators = Emulator::open(3).unwrap().with_each(kernel, texts).unwrap();
        for (name, mut emulator) in names.iter().zip(emulators) {
            // What is wrong is said, or seen in what comes out.
            let found = check(&mut emulator, kernel, sizes, 5).map_or(true, |outcome| !outcome.passes());
            assert!(found, "{name}: nothing was found");
        }
    });
}

/// The text with sums of 16 bits, wherever products are waited for.
pub(crate) fn in_16_bits(text: &str) -> String {
    let rounded = |line: &str| {
        let sums = line.split("\"+f\"(").skip(1).filter(|_| line.contains("wgmma.wait_group"));
        let names = sums.map(|rest| rest.split(')').next().unwrap_or_default());
        names.map(|sum| format!(" {sum} = float(__nv_bfloat16({sum}));")).collect::<String>()
    };
    text.lines().map(|line| format!("{line}{}\n", rounded(line))).collect()
}

#[test]
fn what_a_text_lacks_shows() {
    let way = grouped(&along(400)).swap_remove(0);
    let text = cuda_source(&way).unwrap();
    let broken = [
        ("asm volatile(\"fence.proxy.async.shared::cta;\" ::: \"memory\");\n", ""),
        // Sums that were not waited for; an operand that is written over while it may be read.
        ("[3]) : \"n\"(0)", "[3]) : \"n\"(1)"),
        ("asm volatile(\"wgmma.wait_group.sync.aligned %0;\" :  : \"n\"(1) : \"memory\");\n", ""),
        // Packs that are turned round otherwise where they are written, and where they are read.
        (" ^ ", " + 0 * "),
        ("0x40000040u << 32", "0x80000040u << 32"),
    ];
    let broken = broken.map(|(from, to)| (format!("`{to}` in place of `{from}`"), text.replace(from, to)));
    let sums = ("sums in 16 bits".to_owned(), in_16_bits(&text));
    all_show(&way, &[20], broken.into_iter().chain([sums]).collect());
}
