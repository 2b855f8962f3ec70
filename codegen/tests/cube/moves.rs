//! What formulas say of launches beside what the emulator counts of them.

use latentc_codegen::check::launch;
use latentc_codegen::cube::{Machine, Moves, Target, Way, chosen, moves, ways};
use latentc_codegen::emulate::Count;
use latentc_codegen::program::{By, Kernel, KernelKind};

use crate::bench::{emulated, inputs, kernel, map};
use crate::codes;
use crate::streams::{causal, latent, paged, pages, put};

/// A kernel in one of its ways, at sizes, with some of its inputs.
struct Case {
    kernel: Kernel,
    sizes: Vec<usize>,
    given: Vec<(usize, Vec<f64>)>,
    /// How many times as much formulas may say.
    slack: f64,
    /// Whether cubes go from tile to tile, so that one brings the same more than once. Nothing is read by several of its threads then.
    walks: bool,
}

/// As devices choose, and what is said is exact.
fn case(kernel: &Kernel, sizes: &[usize]) -> Case {
    Case { kernel: chosen(kernel, sizes), sizes: sizes.to_vec(), given: Vec::new(), slack: 1.0, walks: false }
}

/// In the first other way of that kind.
fn by(kernel: &Kernel, sizes: &[usize], which: impl Fn(KernelKind) -> bool) -> Case {
    let way = ways(kernel, Target::Cuda).into_iter().find(|way| which(way.kind));
    Case { kernel: way.expect("there is such a way"), ..case(kernel, sizes) }
}

impl Case {
    fn with(mut self, param: usize, data: impl IntoIterator<Item = f64>) -> Case {
        self.given.push((param, data.into_iter().collect()));
        self
    }

    fn within(self, slack: f64) -> Case {
        Case { slack, ..self }
    }

    fn walking(self) -> Case {
        Case { walks: true, ..self }
    }
}

/// Formulas say as much as is counted, or more within the slack: of each buffer what cubes read each, and of all what is multiplied.
fn compare(case: &Case, counts: &[Count], said: &[Moves]) {
    let Case { kernel, slack, walks, .. } = case;
    let near = |what: &str, counted: u64, said: f64| {
        let counted = counted as f64;
        assert!(said >= counted && said <= slack * counted, "{what}: {said} by formula, {counted} counted");
    };
    assert_eq!(counts.len(), said.len(), "launches of {}", kernel.name);
    for (count, said) in counts.iter().zip(said) {
        assert_eq!((&count.kernel, count.buffers.len()), (&said.kernel, said.buffers.len()));
        for (n, (counted, formula)) in count.buffers.iter().zip(&said.buffers).enumerate() {
            for (what, (counted, formula)) in ["read", "written"].iter().zip(counted.iter().zip(formula)) {
                let what = format!("bytes {what} of buffer {n} of {}", count.kernel);
                near(&what, if *walks { counted.asked } else { counted.by_block }, formula.by_block);
                assert!(formula.distinct >= counted.distinct as f64, "{what}: {counted:?}, {formula:?}");
                assert!(formula.memory <= formula.by_block, "{what}: {formula:?}");
            }
        }
        near(&format!("multiplied by {}", count.kernel), count.multiplied, said.multiplied);
    }
}

#[test]
fn formulas_say_what_is_counted() {
    let contract = |name: &str, body: &str| kernel(KernelKind::Contract, name, body);
    let product = "axes a0=n0, a1=136, a2=192\nparam p0: bf16[a0, a2]\nparam p1: bf16[a1, a2]\nparam p2: bf16[a0, a1]\n\
                   x: f32[a0, a1] = contract p0, p1 over a2\ny: bf16[a0, a1] = add p2, x\nreturn y";
    let experts = "axes a0=n0, a1=2, a2=4, a3=72, a4=64\nparam p0: bf16[a2, a3, a4]\nparam p1: i32[a0, a1]\nparam p2: bf16[a0, a4]\n\
                   w: bf16[a0, a1, a3, a4] = gather p0, p1 along a2\ny: f32[a0, a1, a3] = contract w, p2 over a4\nreturn y";
    let outer = "axes a0=2, a1=72, a2=64, a3=n0\nparam p0: bf16[a3, a1]\nparam p1: bf16[a3, a2]\nparam p2: i32[a3]\n\
                 x: f32[a3, a1, a2] = mul p0, p1\ny: f32[a0, a1, a2] = scatter_add x, p2 along a0\nreturn y";
    let added = "axes a0=100, a1=48, a2=n0\nparam p0: f32[a2, a1]\nparam p1: i32[a2]\n\
                 y: f32[a0, a1] = scatter_add p0, p1 along a0\nreturn y";
    let norm = "axes a0=n0, a1=520\nparam p0: bf16[a0, a1]\nparam p1: bf16[a1]\nsq: f32[a0, a1] = mul p0, p0\n\
                sum: f32[a0] = reduce_sum sq over a1\nr: f32[a0] = rsqrt sum\nx: f32[a0, a1] = mul p0, r\n\
                y: bf16[a0, a1] = mul p1, x\nreturn y";
    let scaled =
        "axes a0=n0, a1=96\nparam p0: bf16[a0, a1]\nparam p1: f32[a0]\ny: f32[a0, a1] = mul p0, p1\nreturn y";
    let columns = "axes a0=n0, a1=64\nparam p0: bf16[a0, a1]\ny: f32[a1] = reduce_sum p0 over a0\nreturn y";
    let rows = "axes a0=n0, a2=40, a3=96\nparam p0: bf16[a2, a3]\nparam p1: i32[a0]\n\
                x: bf16[a0, a3] = gather p0, p1 along a2\nreturn x";
    let plain = "axes a0=n0, a1=70, a2=33\nparam p0: f32[a0, a2]\nparam p1: f32[a1, a2]\n\
                 y: f32[a0, a1] = contract p0, p1 over a2\nreturn y";
    let tokens = |n: usize, groups: usize| (0..n).map(move |i| (i % groups) as f64);
    let any = |kind: KernelKind| matches!(kind, KernelKind::Matrix { rows: 64, .. });
    let cases = [
        case(&map("scaled", scaled), &[50]),
        case(&map("norm", norm), &[3]),
        case(&map("columns", columns), &[70]),
        case(&map("rows", rows), &[12]).with(1, tokens(12, 40)),
        case(&contract("plain", plain), &[150]),
        case(&contract("few", product), &[1]),
        case(&codes::along(37, 4, 32), &[2]),
        case(&codes::across(19, 2, 32), &[2]),
        case(&codes::chosen(21, 2, 32), &[1]).with(2, [4.0, 0.0, 2.0]),
        by(&contract("tiles", product), &[150], any),
        by(&contract("parts", product), &[150], |kind| matches!(kind, KernelKind::Matrix { parts: 2, .. })),
        by(&contract("groups", product), &[150], |kind| {
            matches!(kind, KernelKind::Matrix { by: By::Groups, .. })
        }),
        by(&contract("boxes", product), &[150], |kind| {
            matches!(kind, KernelKind::Matrix { by: By::Boxes, .. })
        })
        .walking(),
        by(&contract("boxes_in_parts", product), &[150], |kind| {
            matches!(kind, KernelKind::Matrix { by: By::Boxes, parts: 2, .. })
        })
        .walking(),
        case(&kernel(KernelKind::Grouped, "one", experts), &[1]).with(1, tokens(2, 4)),
        by(&kernel(KernelKind::Grouped, "experts", experts), &[40], any).with(1, tokens(80, 4)),
        // No cube has two tiles of an index: the formula counts what is known of it for each.
        case(&kernel(KernelKind::Scatter, "outer", outer), &[40]).with(2, tokens(40, 2)),
        case(&kernel(KernelKind::Scatter, "added", added), &[40]).with(1, tokens(40, 100)),
        case(&latent("latents", "bf16", [16, 64, 16]), &[2, 1, 700]).with(4, [699.0, 699.0]),
        case(&latent("wide", "f32", [4, 64, 16]), &[1, 1, 100]).with(4, [99.0]),
        case(&causal("prompt", "bf16", [2, 32, 32]), &[1, 70, 70]),
        by(&causal("groups", "bf16", [2, 64, 64]), &[1, 300, 300], |kind| {
            matches!(kind, KernelKind::StreamMatrix { by: By::Groups, .. })
        })
        // Blocks of positions that a mask hides are counted by the formula, and are not read.
        .within(1.5),
        // There are more pages than are read.
        case(&paged("pages", "bf16", [16, 64, 16], 16), &pages([2, 1, 200], 16))
            .with(4, [199.0, 199.0])
            .with(5, tokens(28, 28))
            .within(1.1),
        case(&put("put", "bf16", [64, 96], 16), &[2, 1, 112, 3]).with(3, [19.0, 3.0]).with(4, tokens(6, 6)),
    ];
    emulated(|emulator| {
        let mut emulator = emulator.clone().counting();
        emulator.prepare(cases.iter().map(|case| &case.kernel)).unwrap();
        for case in &cases {
            let Case { kernel, sizes, given, .. } = case;
            let given: Vec<_> = given.iter().map(|(n, data)| (*n, &data[..])).collect();
            launch(&mut emulator, kernel, &inputs(kernel, sizes, &given), sizes).unwrap();
            let way = Way { kind: kernel.kind, parts: None };
            compare(case, &emulator.take_counts(), &moves(kernel, way, sizes, &Machine::HOPPER).unwrap());
        }
    });
}
