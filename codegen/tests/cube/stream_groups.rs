//! Streams whose products groups of planes multiply (`wgmma`): what they mean, what the emulator finds in texts that lack something, and
//! who gets them.

use latentc_codegen::check::check;
use latentc_codegen::cube::{Machine, Target, Tuning, cuda_source, cuda_sources, taken, typical, ways};
use latentc_codegen::emulate::Emulator;
use latentc_codegen::machine_code::ARCHS;
use latentc_codegen::program::{Kernel, KernelKind};

use crate::bench::{cuda_text, emulated, kernel};
use crate::stream_matrix::right;
use crate::streams::{backward, causal, latent, stream, total};

/// The ways by groups of planes: one that copies, and one for which the device brings boxes, or none.
fn grouped(kernel: &Kernel) -> Vec<Kernel> {
    let all = ways(kernel, Target::Cuda).into_iter();
    all.filter(|w| matches!(w.kind, KernelKind::StreamMatrix { by, .. } if by.in_groups())).collect()
}

/// The ways by groups of planes mean what the kernel means, in one piece, and where a launch shares positions out. They spill nothing.
fn agree(kernel: &Kernel, sizes: &[&[usize]], shared_out: &[&[usize]]) {
    let all = grouped(kernel);
    assert_eq!(all.len(), 2, "groups do not multiply, or not in both ways\n{}", kernel.body);
    for way in all {
        for sizes in sizes {
            let said = whole(&way, &cuda_source(&way).unwrap(), 1, sizes);
            assert_eq!(said, None, "{}: {sizes:?}\n{}", way.name, way.body);
        }
        shared_out.iter().for_each(|sizes| right(&way, sizes));
        without_spills(&way);
    }
}

fn without_spills(way: &Kernel) {
    // The whole, and the part of the positions.
    for resources in cuda_sources(way).unwrap()[..2].iter().filter_map(|s| cuda_text(&s.name, &s.text)) {
        assert_eq!((resources.spill_bytes, resources.stack_bytes), (0, 0), "{}: {resources:?}", way.name);
    }
}

/// What is wrong with a text that stands for a whole kernel, in one order of threads.
fn whole(way: &Kernel, text: &str, seed: u64, sizes: &[usize]) -> Option<String> {
    let mut said = None;
    emulated(|_| {
        let mut emulator = Emulator::open(seed).unwrap();
        emulator.replace(way, text.to_owned()).unwrap();
        said = match check(&mut emulator, way, sizes, 5) {
            Ok(outcome) if outcome.passes() => None,
            Ok(outcome) => Some(format!("{outcome:?}")),
            Err(e) => Some(e.to_string()),
        };
    });
    said
}

#[test]
fn heads_of_a_prompt() {
    // Depth and columns fill neither packs of 64 nor each other; three blocks, the last of which has few positions and rows. No row, no
    // position.
    let k = causal("causal", "bf16", [1, 72, 24]);
    agree(&k, &[&[1, 300, 300], &[2, 70, 40], &[1, 0, 9], &[1, 65, 0]], &[&[1, 150, 200]]);
}

#[test]
fn keys_of_two_products() {
    // One of them for each head, one for all heads, as with rotated keys; values that are not as many as either. In f16.
    let k = stream(
        "two",
        "axes t=n0, i=2, k=64, r=24, v=40, s=n1\nparam q: f16[t, i, k]\nparam qr: f16[t, i, r]\nparam key: f16[s, i, k]\n\
         param kr: f16[s, r]\nparam value: f16[s, i, v]\nparam pos: i32[t]\nat: i32[s] = position of s\n\
         seen: bool[t, s] = le at, pos\nz: f32[t, i, s] = contract q, key over k\nzr: f32[t, i, s] = contract qr, kr over r\n\
         a: f32[t, i, s] = add z, zr\nscale: f32 = const 0.1\nx: f32[t, i, s] = mul a, scale\nleast: f32 = const -inf\n\
         m: f32[t, i, s] = select seen, x, least\np: f32[t, i, s] = softmax m over s\ny: f32[t, i, v] = contract p, value over s\n\
         o: f16[t, i, v] = cast y\nreturn o",
    );
    agree(&k, &[&[140, 180]], &[]);
}

#[test]
fn sums_of_a_gradient() {
    // Positions are seen from one on. What is weighed is what scores are made of.
    agree(&backward("backward", "bf16", [1, 72, 24]), &[&[1, 150, 300], &[1, 30, 20]], &[]);
}

#[test]
fn logarithms_of_sums() {
    // Nothing is weighed. Rows that see nothing are what their definition says.
    agree(&total("total", "bf16", [1, 72]), &[&[1, 300, 420], &[2, 70, 40], &[1, 65, 0]], &[&[1, 150, 200]]);
}

#[test]
fn what_a_text_lacks_shows() {
    // No mask, so that there is less of it.
    let ways = grouped(&stream(
        "plain",
        "axes t=n0, k=16, v=16, s=n1\nparam q: bf16[t, k]\nparam key: bf16[s, k]\nparam value: bf16[s, v]\n\
         z: f32[t, s] = contract q, key over k\np: f32[t, s] = softmax z over s\ny: f32[t, v] = contract p, value over s\nreturn y",
    ));
    let mut compiler = false;
    emulated(|_| compiler = true);
    let [copies, boxes] = &ways[..] else { panic!("both ways, not {ways:?}") };
    let shows = |way: &Kernel, what: &str, edit: &dyn Fn(&str) -> String| {
        let text = cuda_source(way).unwrap();
        let edited = edit(&text);
        assert_ne!(text, edited, "{what}: nothing to break in\n{text}");
        let mut seeds = (3..9).take_while(|_| compiler);
        let found = seeds.any(|seed| whole(way, &edited, seed, &[20, 300]).is_some());
        assert!(found || !compiler, "{}: {what}: nothing is found", way.name);
    };
    let missing = |way: &Kernel, what: &str, from: &str| shows(way, what, &|text| text.replace(from, ""));
    let fence = "asm volatile(\"fence.proxy.async.shared::cta;\" ::: \"memory\");\n";
    missing(copies, "copies that products may not see", fence);
    let wait = "asm volatile(\"cp.async.wait_all;\" ::: \"memory\");\n";
    missing(copies, "copies that are not there", wait);
    let registers = "asm volatile(\"wgmma.fence.sync.aligned;\" ::: \"memory\");\n";
    missing(copies, "registers that products may not see", registers);
    shows(copies, "scores that are not there", &|text| text.replace("[3]) : \"n\"(1)", "[3]) : \"n\"(2)"));
    let in_use = |text: &str| text.replace("[3])) : \"n\"(0)", "[3])) : \"n\"(1)");
    shows(copies, "sums and weights that are in use", &in_use);
    // Of boxes, one line of many is left out: what is waited for, and what is told.
    let without = |text: &str, word: &str, n: usize| {
        let found = text.match_indices(word).nth(n).unwrap_or_else(|| panic!("no `{word}` in\n{text}")).0;
        let start = text[..found].rfind('\n').map_or(0, |at| at + 1);
        let end = found + text[found..].find('\n').unwrap_or(0);
        format!("{}{}", &text[..start], &text[end..])
    };
    for n in 0..4 {
        let what = format!("stage {n} of those that are waited for, which is not there");
        shows(boxes, &what, &|text| without(text, "mbarrier.try_wait", n));
    }
    missing(boxes, "the last block, which products may not see", fence);
    missing(boxes, "the last block, which is not there", wait);
    let told = |line: &&str| !line.contains("mbarrier.arrive.shared");
    let untold = |text: &str| text.lines().filter(told).map(|line| format!("{line}\n")).collect();
    shows(boxes, "a block that nobody tells of", &untold);
    shows(boxes, "fewer bytes", &|text| text.replacen("\"n\"(16384)", "\"n\"(16368)", 1));
    let beyond = |text: &str| text.replace("< info.scalars_uint32[1];", "<= info.scalars_uint32[1];");
    shows(boxes, "a position beyond the last", &beyond);
    shows(boxes, "rows that lie otherwise than they are read", &|text| text.replace(" ^ ", " + 0 * "));
    shows(boxes, "boxes that are read otherwise than they lie", &|text| {
        text.replace("0x4000004", "0x8000004")
    });
}

#[test]
fn shapes_of_the_published_models() {
    for (name, sizes) in [("prefill", [128, 192, 128]), ("narrow", [16, 128, 64])] {
        grouped(&causal(name, "bf16", sizes)).iter().for_each(without_spills);
    }
    // Sums of so many columns have no room in a unit.
    assert!(grouped(&latent("decode", "bf16", [128, 512, 64])).is_empty());
    // What is no pack in memory is no copy.
    assert!(grouped(&causal("odd", "bf16", [3, 7, 5])).is_empty());
}

#[test]
fn devices_without_groups_get_none() {
    let body = "axes a0=n0, a1=4096, a2=512\nparam p0: bf16[a1, a2]\nparam p1: bf16[a0, a2]\n\
                y: bf16[a0, a1] = contract p0, p1 over a2\nreturn y";
    let kernels = [causal("causal", "bf16", [2, 64, 64]), kernel(KernelKind::Contract, "product", body)];
    let sizes = [vec![1, 4096, 4096], vec![4096]];
    for (k, sizes) in kernels.iter().zip(sizes) {
        let in_groups = |kernels: &[Kernel]| kernels.iter().any(|k| k.kind.in_groups());
        for arch in ARCHS {
            assert_eq!(
                in_groups(&typical(k, &arch.machine())),
                arch.name == "sm_90a",
                "{} for {}",
                k.name,
                arch.name
            );
        }
        for (target, has) in [(Target::Cuda, true), (Target::Wgsl, false)] {
            let all = taken(k, target, &Machine::HOPPER, std::slice::from_ref(&sizes), &Tuning::default());
            assert_eq!(in_groups(&all.unwrap()), has, "{} in {target}", k.name);
        }
        assert!(!in_groups(&ways(k, Target::Wgsl)), "{}", k.name);
    }
}
