//! Products whose operands the device brings in boxes (`cp.async.bulk.tensor`), and what the emulator finds in texts that lack something.

use latentc_codegen::cube::{Target, cuda_source, ways};
use latentc_codegen::program::{By, Kernel, KernelKind};

use crate::bench::{emulated, inputs, kernel, on_cuda};
use crate::groups::{all_show, in_16_bits};
use crate::matrix::{gradient, two_products, wider};

/// The ways by such copies.
fn brought(kernel: &Kernel) -> Vec<Kernel> {
    let all = ways(kernel, Target::Cuda).into_iter();
    all.filter(|w| matches!(w.kind, KernelKind::Matrix { by: By::Boxes, parts: 1, .. })).collect()
}

/// For one side, those with tiles of these columns mean what the kernel means, on the emulator at least, spilling nothing.
fn agree(kernel: &Kernel, (side, widths): (u8, &[u16]), sizes: &[usize], given: &[(usize, &[f64])]) {
    let mut ways = brought(kernel);
    ways.retain(|w| match w.kind {
        KernelKind::Matrix { wide, columns, .. } => wide == side && widths.contains(&columns),
        _ => false,
    });
    assert_eq!(ways.len(), widths.len(), "such ways");
    // Compiled together, they take as long as two.
    emulated(|emulator| emulator.prepare(&ways).unwrap());
    for way in ways {
        on_cuda(&way, &inputs(&way, sizes, given), sizes, 3e-5);
    }
}

/// Both operands along what is summed, of which there is more than all stages hold and no whole number of them.
fn along(columns: usize, depth: usize) -> Kernel {
    kernel(
        KernelKind::Contract,
        "long",
        &format!(
            "axes a0=n0, a1={columns}, a2={depth}\nparam p0: bf16[a0, a2]\nparam p1: bf16[a1, a2]\n\
             y: bf16[a0, a1] = contract p0, p1 over a2\nreturn y"
        ),
    )
}

#[test]
fn a_cube_multiplies_one_tile_after_another() {
    // Six to nine tiles by two cubes.
    agree(&along(270, 344), (0, &[128, 160, 192, 256]), &[300], &[]);
}

#[test]
fn operands_along_and_across() {
    // Rows along, columns across, head by head and along two axes with another between; an expression of the sums.
    let k = kernel(
        KernelKind::Contract,
        "heads",
        "axes a0=n0, a1=2, a2=136, a3=8, a4=3\nparam p0: f16[a0, a1, a4, a3]\nparam p1: f16[a1, a4, a3, a2]\n\
         x: f16[a1, a0, a2] = contract p0, p1 over a4, a3\ny: f16[a1, a0, a2] = silu x\nreturn y",
    );
    agree(&k, (1, &[256]), &[33], &[]);
    // Both across.
    agree(&gradient(["bf16", "bf16"]), (0, &[192]), &[35, 2], &[]);
}

#[test]
fn two_products_meet() {
    agree(&two_products(), (0, &[64, 192, 256]), &[131], &[]);
}

/// Rows that an index shares out to groups, of which there are more than fill a tile in one.
fn up() -> (Kernel, Vec<f64>) {
    let k = kernel(
        KernelKind::Grouped,
        "up",
        "axes a0=n0, a1=3, a2=37, a3=7, a4=328\nparam p0: f32[a0, a1]\nparam p1: i32[a0, a1]\n\
         param p2: bf16[a3, a2, a4]\nparam p3: bf16[a0, a4]\nw: bf16[a0, a1, a2, a4] = gather p2, p1 along a3\n\
         x: f32[a0, a1, a2] = contract w, p3 over a4\ny: f32[a0, a1, a2] = mul p0, x\nreturn y",
    );
    (k, (0..141).map(|n| if n % 5 == 0 { f64::from(n % 7) } else { 3.0 }).collect())
}

#[test]
fn an_operand_that_is_no_box_is_brought_by_units() {
    let (k, index) = up();
    agree(&k, (0, &[256]), &[47], &[(1, &index)]);
    // Rows with something summed between them.
    let k = kernel(
        KernelKind::Contract,
        "between",
        "axes a0=n0, a1=3, a2=40, a3=41, a4=8\nparam p0: bf16[a0, a3, a1, a4]\nparam p1: bf16[a2, a3, a4]\n\
         y: f32[a0, a1, a2] = contract p0, p1 over a3, a4\nreturn y",
    );
    agree(&k, (1, &[256]), &[50], &[]);
    // Numbers that are split are brought by nobody else than those who multiply.
    assert!(brought(&wider(264)).is_empty());
}

#[test]
fn what_a_text_lacks_shows() {
    let way = brought(&along(70, 400)).pop().expect("such a way");
    let text = cuda_source(&way).unwrap();
    let line = |word: &str, n: usize| {
        let found = text.match_indices(word).nth(n).unwrap_or_else(|| panic!("no `{word}` in\n{text}"));
        let start = text[..found.0].rfind('\n').map_or(0, |at| at + 1);
        let end = found.0 + text[found.0..].find('\n').unwrap_or(0);
        start..end
    };
    let without = |word: &str, n: usize| {
        let line = line(word, n);
        format!("{}{}", &text[..line.start], &text[line.end..])
    };
    let moved = {
        let asked = line("cp.async.bulk.tensor", 1);
        let (before, last) = text[asked.clone()].rsplit_once("\"r\"(").expect("an index");
        format!("{}{before}\"r\"(1 + {last}{}", &text[..asked.start], &text[asked.end..])
    };
    let broken = [
        // Stages that are written over while they are read, that are read before they are there, that nobody gives back.
        ("no wait for an empty stage", without("mbarrier.try_wait", 0)),
        ("no wait for a full stage", without("mbarrier.try_wait", 1)),
        ("no stage is left", without("mbarrier.arrive.shared", 0)),
        // Other bytes than are told; a barrier that copies do not see.
        ("fewer bytes", text.replace("\"n\"(49152)", "\"n\"(49136)")),
        ("more bytes", text.replace("\"n\"(49152)", "\"n\"(65536)")),
        ("no fence", without("fence.mbarrier_init", 0)),
        // Packs that are turned round otherwise than they are read, and a box from elsewhere.
        ("other packs", text.replace("0x40000040u << 32", "0x80000040u << 32")),
        ("another box", moved),
        ("a row beyond the last", text.replace("< info.scalars_uint32[0];", "<= info.scalars_uint32[0];")),
    ];
    all_show(&way, &[20], broken.map(|(what, text)| (what.to_owned(), text)).to_vec());
    // What units bring themselves has to be there, and to be shown to products, before they say so.
    let way = brought(&up().0).pop().expect("such a way");
    let text = cuda_source(&way).unwrap();
    let last = |from: &str, to: &str| {
        let (before, behind) = text.rsplit_once(from).unwrap_or_else(|| panic!("no `{from}` in\n{text}"));
        format!("{before}{to}{behind}")
    };
    let wait = "asm volatile(\"cp.async.wait_group %0;\" :: \"n\"(2) : \"memory\");";
    let broken = [
        ("copies are not waited for", last(wait, "")),
        (
            "copies are not shown",
            text.replace("asm volatile(\"fence.proxy.async.shared::cta;\" ::: \"memory\");\n", ""),
        ),
        ("sums in 16 bits", in_16_bits(&text)),
    ];
    all_show(&way, &[47], broken.map(|(what, text)| (what.to_owned(), text)).to_vec());
}
