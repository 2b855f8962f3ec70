//! Products on tensor cores, in each of their ways and with all launches that they come to.

use latentc_codegen::check::{Expected, launch, meaning};
use latentc_codegen::cube::{Target, chosen, cuda_source, cuda_sources, ways};
use latentc_codegen::program::{Kernel, KernelKind};

use crate::bench::{emulated, inputs, kernel, on_cuda, shows_unawaited};
use crate::groups::all_show;

/// The ways on tensor cores.
fn tiled(kernel: &Kernel) -> Vec<Kernel> {
    ways(kernel, Target::Cuda)
        .into_iter()
        .filter(|w| matches!(w.kind, KernelKind::Matrix { tf32: false, .. }))
        .collect()
}

/// Those with tiles of these rows mean what the kernel means, on the emulator at least, spilling nothing. They are so many launches.
fn agree(kernel: &Kernel, tiles: &[u16], launches: usize, sizes: &[usize], given: &[(usize, &[f64])]) {
    let ways = tiled(kernel);
    let whole = |w: &&Kernel| matches!(w.kind, KernelKind::Matrix { parts: 1, .. });
    let names: Vec<_> = ways.iter().map(|w| &w.name).collect();
    // As many for each side that can be the wide one.
    let count = ways.iter().filter(whole).count();
    assert!(count >= 3, "{names:?}");
    for way in ways.iter().filter(whole) {
        let KernelKind::Matrix { rows, columns, by, .. } = way.kind else { unreachable!("these were taken") };
        assert_eq!(cuda_sources(way).unwrap().len(), launches, "{}", way.name);
        // The largest of those with as many rows runs through the same code.
        if tiles.contains(&rows) && columns <= 128 && !by.in_groups() {
            let tolerance = if kernel.name == "normed" { 1e-2 } else { 3e-5 };
            on_cuda(way, &inputs(way, sizes, given), sizes, tolerance);
        }
    }
}

/// Two products of the same rows, which meet.
pub(crate) fn two_products() -> Kernel {
    kernel(
        KernelKind::Contract,
        "many",
        "axes a0=n0, a1=70, a2=72\nparam p0: bf16[a1, a2]\nparam p1: bf16[a0, a2]\nparam p2: bf16[a1, a2]\n\
         param p3: f32[a0]\ng: f32[a0, a1] = contract p0, p1 over a2\nu: f32[a0, a1] = contract p2, p1 over a2\n\
         s: f32[a0, a1] = mul g, u\ny: f32[a0, a1] = add s, p3\nreturn y",
    )
}

#[test]
fn many_rows() {
    // Along the summed axes, which are more than one stage and end within a pack of stages; two products meet.
    agree(&two_products(), &[32, 64, 128], 1, &[131], &[]);
    // Across the columns, head by head, and along two axes with another between.
    let k = kernel(
        KernelKind::Contract,
        "heads",
        "axes a0=n0, a1=2, a2=136, a3=8, a4=3\nparam p0: f16[a0, a1, a4, a3]\nparam p1: f16[a1, a4, a3, a2]\n\
         y: f16[a1, a0, a2] = contract p0, p1 over a4, a3\nreturn y",
    );
    agree(&k, &[64, 128], 1, &[33], &[]);
}

/// A product of an operand that is wider than the other, with so many terms.
pub(crate) fn wider(depth: usize) -> Kernel {
    kernel(
        KernelKind::Contract,
        "wider",
        &format!(
            "axes a0=n0, a1=40, a2={depth}\nparam p0: f32[a0, a2]\nparam p1: bf16[a1, a2]\n\
             y: f32[a0, a1] = contract p0, p1 over a2\nreturn y"
        ),
    )
}

#[test]
fn an_operand_in_f32_loses_nothing() {
    // So few terms that three numbers of 16 bits stand for each, and so many that two do.
    for (depth, rows) in [(24, 32), (72, 128)] {
        agree(&wider(depth), &[rows], 1, &[37], &[]);
    }
}

/// The gradient of a matrix: both operands have their rows side by side.
pub(crate) fn gradient(dtypes: [&str; 2]) -> Kernel {
    let [one, other] = dtypes;
    kernel(
        KernelKind::Contract,
        "gradient",
        &format!(
            "axes a0=n0, a1=5, a2=8, a3=72, a4=n1\nparam p0: {one}[a4, a0, a1, a2]\nparam p1: {other}[a4, a0, a3]\n\
             y: f32[a1, a2, a3] = contract p0, p1 over a4, a0\nreturn y"
        ),
    )
}

#[test]
fn rows_side_by_side() {
    agree(&gradient(["bf16", "bf16"]), &[32, 128], 1, &[35, 2], &[]);
    agree(&gradient(["f16", "f16"]), &[64], 1, &[35, 2], &[]);
}

#[test]
fn neighbours_of_the_result_are_in_one_row_of_a_tile() {
    // Whichever operand has more rows.
    for (first, second) in [(64, 4096), (4096, 64)] {
        let k = kernel(
            KernelKind::Contract,
            "sides",
            &format!(
                "axes a0=n0, a1={first}, a2={second}\nparam p0: bf16[a0, a1]\nparam p1: bf16[a0, a2]\n\
                 y: f32[a1, a2] = contract p0, p1 over a0\nreturn y"
            ),
        );
        let KernelKind::Matrix { wide, .. } = chosen(&k, &[500]).kind else { panic!("no tensor cores") };
        assert_eq!(wide, 1, "{first} x {second}");
    }
}

#[test]
fn operands_in_f32_err_no_more_than_sums_do() {
    for (dtypes, least) in [(["f32", "f32"], 192usize), (["bf16", "f32"], 64), (["bf16", "bf16"], 0)] {
        let k = gradient(dtypes);
        let on_tensor_cores = |n: usize| matches!(chosen(&k, &[n, 3]).kind, KernelKind::Matrix { .. });
        assert!(on_tensor_cores(least.div_ceil(3)), "{dtypes:?}");
        assert!(least == 0 || !on_tensor_cores(least / 3 - 1), "{dtypes:?}");
    }
    // What `check` allows is what sums of so many terms may be off.
    let k = gradient(["f32", "f32"]);
    for way in tiled(&k).iter().take(1) {
        let args = inputs(way, &[97, 2], &[]);
        let allowed = Expected::of(way, &args, &[97, 2]).unwrap();
        emulated(|emulator| {
            let got = launch(emulator, way, &args, &[97, 2]).unwrap();
            let far = got.data.iter().zip(&allowed.value.data).zip(&allowed.tolerance);
            let worst = far.map(|((got, want), may)| (got - want).abs() / may).fold(0.0, f64::max);
            assert!(worst < 1.0, "{}: {worst} of what is allowed", way.name);
        });
    }
    // So few terms that three numbers of 16 bits stand for each.
    let k = kernel(
        KernelKind::Contract,
        "fine",
        "axes a0=n0, a1=24, a2=40\nparam p0: f32[a0, a1]\nparam p1: f32[a2, a1]\n\
         y: f32[a0, a2] = contract p0, p1 over a1\nreturn y",
    );
    agree(&k, &[32], 1, &[37], &[]);
}

#[test]
fn an_operand_that_is_an_expression_is_stored_first() {
    let k = kernel(
        KernelKind::Contract,
        "normed",
        "axes a0=n0, a1=40, a2=48\nparam p0: bf16[a1, a2]\nparam p1: bf16[a2]\nparam p2: bf16[a0, a2]\n\
         param p3: bf16[a0, a1]\nsquares: f32[a0, a2] = mul p2, p2\nsum: f32[a0] = reduce_sum squares over a2\n\
         scale: f32[a0] = rsqrt sum\nnormed: f32[a0, a2] = mul p2, scale\nh: bf16[a0, a2] = mul normed, p1\n\
         g: bf16[a0, a1] = contract p0, h over a2\ny: f32[a0, a1] = add g, p3\nreturn y",
    );
    // The operand is rounded, as its dtype says.
    agree(&k, &[32], 2, &[35], &[]);
}

/// The ways in two parts.
fn in_parts(kernel: &Kernel) -> Vec<Kernel> {
    let all = tiled(kernel).into_iter();
    all.filter(|w| matches!(w.kind, KernelKind::Matrix { parts: 2, .. })).collect()
}

#[test]
fn summed_axes_in_parts() {
    // Along and across, with a normed operand and two products; what is left is added up by a map.
    for (first, second) in [("a1, a2", "a1, a2"), ("a2, a1", "a2, a1")] {
        let k = kernel(
            KernelKind::Contract,
            "deep",
            &format!(
                "axes a0=n0, a1=40, a2=144\nparam p0: bf16[{first}]\nparam p1: bf16[a0, a2]\nparam p2: f32[a0]\n\
                 param p3: bf16[{second}]\nh: f32[a0, a2] = mul p1, p2\ng: f32[a0, a1] = contract p0, h over a2\n\
                 u: bf16[a0, a1] = contract p3, h over a2\ny: f32[a0, a1] = mul g, u\nreturn y"
            ),
        );
        let ways = in_parts(&k);
        assert_eq!(ways.len(), 2, "by planes and by groups of them: {ways:?}");
        for way in ways {
            // The operand, both products, what they come to.
            assert_eq!(cuda_sources(&way).unwrap().len(), 4);
            on_cuda(&way, &inputs(&way, &[35], &[]), &[35], 1e-4);
        }
    }
}

#[test]
fn sums_of_any_length_in_parts() {
    // Along two axes of which no part has a whole number, over the rows of a batch: two stages and a half in two parts, and in more parts than
    // there are stages, so that some have none.
    let k = kernel(
        KernelKind::Contract,
        "tokens",
        "axes a0=n0, a1=2, a2=n1, a3=72, a4=16\nparam p0: bf16[a1, a0, a2, a3]\nparam p1: bf16[a1, a0, a2, a4]\n\
         y: f32[a1, a3, a4] = contract p0, p1 over a0, a2\nreturn y",
    );
    let mut ways = in_parts(&k);
    ways.retain(|w| matches!(w.kind, KernelKind::Matrix { wide: 0, .. }));
    assert_eq!(ways.len(), 3, "by planes, by groups and by boxes: {ways:?}");
    for mut way in ways {
        let KernelKind::Matrix { parts, .. } = &mut way.kind else { unreachable!("these were taken") };
        *parts = if way.name.contains("groups") { 4 } else { 2 };
        on_cuda(&way, &inputs(&way, &[20, 8], &[]), &[20, 8], 1e-4);
    }
}

#[test]
fn products_of_different_operands_are_stored_one_by_one() {
    let k = kernel(
        KernelKind::Contract,
        "both",
        "axes a0=n0, a1=40, a2=16\nparam p0: bf16[a0, a2]\nparam p1: bf16[a2, a1]\nparam p2: bf16[a0, a2]\n\
         param p3: bf16[a2, a1]\nx: bf16[a0, a1] = contract p0, p1 over a2\n\
         z: f32[a0, a1] = contract p2, p3 over a2\ny: f32[a0, a1] = add x, z\nreturn y",
    );
    agree(&k, &[32], 3, &[35], &[]);
}

/// One whose depth is more than all stages hold.
fn long() -> Kernel {
    let k = kernel(
        KernelKind::Contract,
        "long",
        "axes a0=n0, a1=24, a2=600\nparam p0: bf16[a0, a2]\nparam p1: bf16[a1, a2]\n\
         y: f32[a0, a1] = contract p0, p1 over a2\nreturn y",
    );
    tiled(&k).swap_remove(0)
}

#[test]
fn copies_that_are_not_awaited_show() {
    shows_unawaited(&long(), "asm volatile(\"cp.async.wait_group %0;\" :: \"n\"(6) : \"memory\");", &[20]);
}

#[test]
fn what_is_broken_shows() {
    let way = long();
    let text = cuda_source(&way).unwrap();
    let narrow = |text: String, n: u32| {
        text.replace(&format!("\"f\"(reg_c_{n})"), &format!("\"f\"(float(__half(reg_c_{n})))"))
    };
    let broken = [
        ("a row beyond the last", text.replace("< info.scalars_uint32[0];", "<= info.scalars_uint32[0];")),
        ("a depth beyond the last", text.replace("< uint32(600);", "<= uint32(600);")),
        ("a pack that lies otherwise than it is read", text.replacen(" ^ ", " + 0 * ", 1)),
        ("sums in 16 bits", (0..4).fold(format!("#include <cuda_fp16.h>\n{text}"), narrow)),
    ];
    all_show(&way, &[20], broken.map(|(what, text)| (what.to_owned(), text)).to_vec());
}

/// Experts for three groups of rows: some have none, one has most.
fn skewed(lines: usize) -> Vec<f64> {
    (0..lines).map(|n| if n % 5 == 0 { (n % 7) as f64 } else { 3.0 }).collect()
}

/// Gate and up, SwiGLU and the gate's weight: rows are gathered, and results go to their own places.
fn up(groups: usize) -> Kernel {
    kernel(
        KernelKind::Grouped,
        "up",
        &format!(
            "axes a0=n0, a1=3, a2=37, a3={groups}, a4=72\nparam p0: f32[a0, a1]\nparam p1: i32[a0, a1]\n\
             param p2: bf16[a3, a2, a4]\nparam p3: bf16[a0, a4]\nparam p4: bf16[a3, a2, a4]\n\
             w1: bf16[a0, a1, a2, a4] = gather p2, p1 along a3\n\
             x1: f32[a0, a1, a2] = contract w1, p3 over a4\n\
             w2: bf16[a0, a1, a2, a4] = gather p4, p1 along a3\n\
             x2: f32[a0, a1, a2] = contract w2, p3 over a4\n\
             s: f32[a0, a1, a2] = silu x1\nm: f32[a0, a1, a2] = mul s, x2\ny: f32[a0, a1, a2] = mul p0, m\nreturn y"
        ),
    )
}

#[test]
fn groups_of_rows() {
    agree(&up(7), &[32, 128], 2, &[47], &[(1, &skewed(141))]);
    // One group has all rows.
    agree(&up(7), &[64], 2, &[23], &[(1, &[6.0; 69])]);
    // More groups than units of a cube, and than rows.
    let spread: Vec<f64> = (0..6).map(|n| (n * 59 % 300) as f64).collect();
    agree(&up(300), &[32], 2, &[2], &[(1, &spread)]);
}

#[test]
fn groups_that_are_added_up_by_row() {
    let k = kernel(
        KernelKind::Grouped,
        "down",
        "axes a0=n0, a1=19, a2=3, a3=72, a4=7\nparam p0: f32[a0, a2, a3]\nparam p1: bf16[a4, a1, a3]\n\
         param p2: i32[a0, a2]\nparam p3: f32[a0, a1]\nw: bf16[a0, a2, a1, a3] = gather p1, p2 along a4\n\
         x: f32[a0, a1] = contract p0, w over a2, a3\ny: f32[a0, a1] = add x, p3\nreturn y",
    );
    // What sorts, what multiplies, what adds up.
    agree(&k, &[64], 3, &[47], &[(2, &skewed(141))]);
}

#[test]
fn the_order_of_rows_is_made_once() {
    let k = kernel(
        KernelKind::Grouped,
        "back",
        "axes a0=n0, a1=16, a2=3, a3=24, a4=7\nparam p0: bf16[a0, a2, a3]\nparam p1: bf16[a4, a3, a1]\n\
         param p2: i32[a0, a2]\nparam p3: bf16[a0, a2, a3]\nparam p4: bf16[a4, a3, a1]\n\
         w: bf16[a0, a2, a3, a1] = gather p1, p2 along a4\nx: f32[a0, a1] = contract p0, w over a2, a3\n\
         v: bf16[a0, a2, a3, a1] = gather p4, p2 along a4\nz: f32[a0, a1] = contract p3, v over a2, a3\n\
         y: f32[a0, a1] = add x, z\nreturn y",
    );
    agree(&k, &[32], 4, &[47], &[(2, &skewed(141))]);
}

#[test]
fn an_index_that_is_none_reads_zero() {
    let k = kernel(
        KernelKind::Grouped,
        "none",
        "axes a0=n0, a1=16, a2=4, a3=8\nparam p0: i32[a0]\nparam p1: bf16[a2, a1, a3]\nparam p2: bf16[a0, a3]\n\
         w: bf16[a0, a1, a3] = gather p1, p0 along a2\nx: f32[a0, a1] = contract w, p2 over a3\n\
         y: f32[a0, a1] = mul x, x\nreturn y",
    );
    let index = [1.0, -1.0, 3.0, 4.0, 0.0];
    let way = tiled(&k).swap_remove(0);
    let mut args = inputs(&way, &[5], &[(0, &index)]);
    emulated(|emulator| {
        let got = launch(emulator, &way, &args, &[5]).unwrap();
        args[0].data = index.iter().map(|&i| if (0.0..4.0).contains(&i) { i } else { 0.0 }).collect();
        let mut want = meaning(&way, &args, &[5]).unwrap();
        for row in [1, 3] {
            want.data[16 * row..16 * row + 16].fill(0.0);
        }
        got.close_to(&want, 3e-5, 3e-5).unwrap();
    });
}
