//! Streamed softmaxes on tensor cores: the text for CUDA, emulated and through NVIDIA's compilers.

use latentc_codegen::check::check;
use latentc_codegen::cube::{Target, cuda_source, cuda_sources, ways};
use latentc_codegen::emulate::Emulator;
use latentc_codegen::program::{By, Kernel, KernelKind};
use proptest::prelude::*;

use crate::bench::{cuda, cuda_text, emulated, gpu, shows_unawaited};
use crate::streams::{
    arb_case, arb_fold, backward, causal, latent, paged, paged_heads, pages, stream, total,
};

/// The ways of a kernel on tensor cores whose planes multiply by themselves. There are so many.
fn on_tensor_cores(kernel: &Kernel, count: usize) -> Vec<Kernel> {
    let ways: Vec<_> = ways(kernel, Target::Cuda);
    let ways: Vec<_> = ways
        .into_iter()
        .filter(|w| matches!(w.kind, KernelKind::StreamMatrix { by: By::Planes, .. }))
        .collect();
    assert_eq!(ways.len(), count, "{ways:?}");
    ways
}

/// Within the bound of the arithmetic, on the emulator and on a GPU, if there is one.
pub(crate) fn right(way: &Kernel, sizes: &[usize]) {
    let said = |outcome: latentc_codegen::check::Outcome| {
        assert!(outcome.passes(), "{} {:?}: {outcome:?}\n{}", way.name, way.kind, way.body);
    };
    emulated(|emulator| said(check(emulator, way, sizes, 5).unwrap_or_else(|e| panic!("{e}\n{}", way.body))));
    if let Some(mut gpu) = gpu() {
        said(check(&mut gpu, way, sizes, 5).unwrap_or_else(|e| panic!("{e}\n{}", way.body)));
    }
}

/// These of the kernel's ways, of which there are so many, mean what it means, spilling nothing.
fn agree(kernel: &Kernel, count: usize, picked: &[usize], sizes: &[&[usize]]) {
    let ways = on_tensor_cores(kernel, count);
    let ways: Vec<_> = picked.iter().map(|&n| ways[n].clone()).collect();
    // All at once, since what takes time is to compile.
    emulated(|emulator| emulator.prepare(&ways).unwrap());
    for way in ways {
        sizes.iter().for_each(|sizes| right(&way, sizes));
        if let Some(resources) = cuda(&way) {
            assert_eq!(resources.spill_bytes, 0, "{} spills: {resources:?}", way.name);
        }
    }
}

#[test]
fn heads_of_a_prompt() {
    // Whole packs, and sizes that fill neither packs nor tiles.
    agree(&causal("causal", "bf16", [2, 40, 24]), 4, &[0, 3], &[&[1, 70, 70]]);
    agree(&causal("odd", "f16", [3, 7, 5]), 4, &[1], &[&[2, 19, 33]]);
}

#[test]
fn latents_that_are_keys_and_values() {
    // Planes share rows. Positions are shared out as well, in parts that are not equal; there may be none, or no rows.
    let k = &on_tensor_cores(&latent("latent", "bf16", [5, 24, 7]), 4)[0];
    [[2, 3, 70], [1, 2, 0], [0, 1, 5], [1, 3, 300]].iter().for_each(|sizes| right(k, sizes));
    // The rows' operand is wider than the keys.
    let text = latent("wide", "bf16", [3, 200, 16]).body.to_string().replacen("q: bf16", "q: f32", 1);
    let lines: Vec<_> = text.lines().collect();
    agree(&stream("wide", &lines[1..lines.len() - 1].join("\n")), 3, &[2], &[&[1, 9, 75]]);
}

#[test]
fn pages_are_read_where_they_lie() {
    // Smaller than blocks; positions are shared out as well, and the table names pages in any order.
    let latents = &on_tensor_cores(&paged("paged", "bf16", [5, 24, 8], 16), 4)[0];
    let heads = &on_tensor_cores(&paged_heads("heads", "bf16", [2, 40, 24], 32), 4)[3];
    // Both at once, since what takes time is to compile.
    emulated(|emulator| emulator.prepare(&[latents.clone(), heads.clone()]).unwrap());
    [[2, 3, 70], [1, 2, 1], [3, 1, 300]].iter().for_each(|sizes| right(latents, &pages(*sizes, 16)));
    right(heads, &pages([2, 70, 70], 32));
    for k in [latents, heads] {
        let text = &cuda_sources(k).unwrap()[0].text;
        assert!(text.contains("cp.async"), "what lies in packs is copied ahead\n{text}");
    }
}

#[test]
fn a_page_that_is_not_the_one_shows() {
    // Lines of one operand lie in no packs.
    let way = &on_tensor_cores(&paged("paged", "bf16", [5, 24, 7], 64), 4)[0];
    let sizes = pages([2, 3, 100], 64);
    right(way, &sizes);
    let text = cuda_source(way).unwrap();
    // The last positions of a page are looked for in the next.
    let edited = text.replace("/ uint32(64)", "/ uint32(40)");
    assert_ne!(edited, text, "nothing to break");
    emulated(|_| {
        let mut emulator = Emulator::open(3).unwrap();
        emulator.replace(way, edited.clone()).unwrap();
        let outcome = check(&mut emulator, way, &sizes, 5);
        assert!(outcome.as_ref().is_ok_and(|outcome| !outcome.passes()), "{outcome:?}");
    });
}

#[test]
fn codes_are_read_where_they_lie() {
    // Eight bits a number, with a scale for each position and head; two heads of queries share one of keys.
    let k = stream(
        "codes",
        "axes b=n0, t=n1, g=2, h=2, k=20, s=n2, w=5, f=4\n\
         param q: bf16[b, t, g, h, k]\nparam kc: i32[s, b, g, w]\nparam ks: bf16[s, b, g]\n\
         param v: bf16[s, b, g, k]\nparam pos: i32[b, t]\n\
         k0: i32[s, b, g, w, f] = unpack kc over f\nk1: i32[s, b, g, k] = merge k0 axes w, f into k\n\
         mid: i32 = const 127\nk2: i32[s, b, g, k] = sub k1, mid\nk3: f32[s, b, g, k] = cast k2\n\
         key: bf16[s, b, g, k] = mul k3, ks\nat: i32[s] = position of s\nseen: bool[b, t, s] = le at, pos\n\
         z: f32[b, t, g, h, s] = contract q, key over k\nscale: f32 = const 0.004\n\
         x: f32[b, t, g, h, s] = mul z, scale\nleast: f32 = const -inf\n\
         m: f32[b, t, g, h, s] = select seen, x, least\np: bf16[b, t, g, h, s] = softmax m over s\n\
         y: bf16[b, t, g, h, k] = contract p, v over s\nreturn y",
    );
    agree(&k, 4, &[1], &[&[2, 11, 70]]);
}

#[test]
fn sums_of_a_gradient() {
    // In parts of the positions as well, which are not equal.
    let sizes: [&[usize]; 3] = [&[1, 70, 70], &[2, 5, 19], &[1, 3, 300]];
    agree(&backward("backward", "bf16", [2, 40, 24]), 4, &[0, 3], &sizes);
    // Beyond 65504 there is nothing in f16.
    on_tensor_cores(&backward("small", "f16", [2, 40, 24]), 0);
}

#[test]
fn logarithms_of_sums() {
    agree(&total("total", "f16", [2, 40]), 4, &[0, 3], &[&[1, 70, 70], &[2, 5, 0], &[1, 3, 300]]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3, ..ProptestConfig::default() })]
    #[test]
    fn folds_of_axes_in_any_order(
        case in arb_fold(),
        sizes in (1usize..3, 0usize..25, prop_oneof![0usize..80, 256usize..400]),
        tall in 0usize..4,
    ) {
        let ways = on_tensor_cores(&case.of("bf16"), 4);
        right(&ways[tall], &[sizes.0, sizes.1, sizes.2]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2, ..ProptestConfig::default() })]
    #[test]
    fn streams_of_axes_in_any_order(
        case in arb_case(),
        f16 in any::<bool>(),
        sizes in (1usize..3, 0usize..25, prop_oneof![0usize..80, 256usize..400]),
        tall in 0usize..4,
    ) {
        let k = case.of(if f16 { "f16" } else { "bf16" });
        let ways = on_tensor_cores(&k, 4);
        right(&ways[tall], &[sizes.0, sizes.1, sizes.2]);
    }
}

#[test]
fn shapes_of_the_published_models() {
    let latents = on_tensor_cores(&latent("decode", "bf16", [128, 512, 64]), 3);
    let prompts = on_tensor_cores(&causal("prefill", "bf16", [128, 192, 128]), 4);
    let pages = on_tensor_cores(&paged("pages", "bf16", [128, 512, 64], 64), 3);
    for k in [&latents[2], &prompts[3], &pages[2]] {
        // The whole, and the part of the positions.
        let sources = cuda_sources(k).unwrap();
        for resources in sources[..2].iter().filter_map(|s| cuda_text(&s.name, &s.text)) {
            assert_eq!((resources.spill_bytes, resources.stack_bytes), (0, 0), "{}: {resources:?}", k.name);
        }
    }
}

#[test]
fn what_is_not_awaited_shows() {
    let way = &on_tensor_cores(&causal("causal", "bf16", [2, 40, 24]), 4)[0];
    shows_unawaited(way, "asm volatile(\"cp.async.wait_all;\" ::: \"memory\");", &[1, 20, 100]);
}
