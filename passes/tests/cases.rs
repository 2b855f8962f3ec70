//! Every case beside a pass: IR before, IR after, as whole texts; and both compute the same.
//!
//! A file `src/PASS.ir` holds cases. Each begins with `---- NAME (GRAPH)`, goes on with a module, and ends with `---- after` and the
//! module that the pass makes of it, or with `---- error: MESSAGE`. `LATENTC_BLESS=1 cargo test -p latentc-passes` writes what
//! follows from what stands before; read the difference before you commit it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use latentc_ir::interp::{Caches, Interpreter, Precision};
use latentc_ir::tensor::{SplitMix, Tensor};
use latentc_ir::{Binary, DType, Function, Module, Op, Size, Type, Value, ValueId, Weight, verify};
use latentc_passes::{Context, Graph, Pass, pipeline};
use proptest::prelude::*;

struct Case {
    name: String,
    graph: Graph,
    before: String,
    after: String,
}

fn cases(file: &Path) -> Vec<Case> {
    let text = std::fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let mut cases: Vec<Case> = Vec::new();
    let mut in_after = false;
    for line in text.lines() {
        if let Some(title) = line.strip_prefix("---- ") {
            if title == "after" || title.starts_with("error: ") {
                in_after = true;
            } else {
                let (name, graph) =
                    title.strip_suffix(')').and_then(|t| t.rsplit_once(" (")).expect("---- NAME (GRAPH)");
                let graph = Graph::ALL.into_iter().find(|g| g.name() == graph).expect("a graph's name");
                cases.push(Case {
                    name: name.to_owned(),
                    graph,
                    before: String::new(),
                    after: String::new(),
                });
                in_after = false;
                continue;
            }
        }
        let case = cases.last_mut().expect("a file begins with a case");
        let part = if in_after { &mut case.after } else { &mut case.before };
        part.push_str(line);
        part.push('\n');
    }
    cases
}

#[test]
fn every_pass_does_what_its_cases_show() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let bless = std::env::var_os("LATENTC_BLESS").is_some();
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .expect("the sources are here")
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|e| e == "ir"))
        .collect();
    files.sort();
    for file in files {
        let stem = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let pass =
            pipeline().into_iter().find(|p| p.name == stem).unwrap_or_else(|| panic!("no pass `{stem}`"));
        let mut text = String::new();
        for case in cases(&file) {
            let before = latentc_ir::check(&stem, &case.before)
                .unwrap_or_else(|e| panic!("{}: {}", case.name, e.render()));
            let after = match pass.apply(&before, &mut Context::new(case.graph)) {
                Ok(after) => {
                    same_meaning(&before, &after, &pass, case.graph, 1)
                        .unwrap_or_else(|e| panic!("{}: {e}", case.name));
                    format!("---- after\n\n{after}\n")
                }
                Err(e) => format!("---- error: {e}\n\n"),
            };
            let _ = write!(text, "---- {} ({})\n{}{after}", case.name, case.graph.name(), case.before);
            if !bless {
                assert_eq!(
                    case.after.trim(),
                    after.trim(),
                    "{stem}.ir: {}; LATENTC_BLESS=1 rewrites",
                    case.name
                );
            }
        }
        if bless {
            std::fs::write(&file, text.trim_end().to_owned() + "\n").expect("the sources can be written");
        }
    }
}

/// Runs both modules on the same random arguments, weights and sizes.
fn same_meaning(before: &Module, after: &Module, pass: &Pass, graph: Graph, seed: u64) -> Result<(), String> {
    verify(after).map_err(|e| format!("`{}` breaks the graph: {}\n{after}", pass.name, e[0]))?;
    let mut rng = SplitMix(seed);
    let sizes = [
        ("b", rng.below(3) as usize + 1),
        ("t", rng.below(4) as usize + 1),
        ("q", rng.below(3) as usize + 1),
    ];
    // Serving a whole sequence from its start is what the definition says of it.
    let size = |s: &Size| match s {
        Size::Fixed(n) => *n as usize,
        Size::Sym(s) => sizes.iter().find(|(n, _)| n == s).map_or(sizes[1].1, |(_, n)| *n),
    };
    let entry = before.entry().ok_or("no entry")?;
    let mut args = Vec::new();
    for &p in &entry.params {
        let shape: Vec<_> = entry.ty(p).axes.iter().map(|&a| size(&entry.axis(a).size)).collect();
        args.push(random(entry.ty(p).dtype, shape, &mut rng));
    }
    let run = |m: &Module, args: &[Tensor]| {
        let mut interp = Interpreter::new(m, Precision::Exact);
        for f in &m.functions {
            for a in &f.axes {
                if let Size::Sym(s) = &a.size {
                    interp = interp.with_size(s, size(&a.size));
                }
            }
        }
        let mut weights = |scope: &str, f: &Function, w: &Weight| -> Result<Tensor, String> {
            let ty = f.ty(w.value);
            let shape: Vec<_> = ty.axes.iter().map(|&a| size(&f.axis(a).size)).collect();
            let name = format!("{scope}.{}", f.value(w.value).name);
            let seed = name.bytes().fold(seed, |h, b| h.wrapping_mul(31).wrapping_add(u64::from(b)));
            Ok(random(ty.dtype, shape, &mut SplitMix(seed)))
        };
        interp.run(args, &mut weights, &mut Caches::new())
    };
    let want = if pass.name == "reassociate" { run(&poisoned(before), &args) } else { run(before, &args) };
    let new = after.entry().ok_or("no entry")?;
    for &p in &new.params[args.len()..] {
        // What `derive` adds: where each token stands in its sequence.
        let axes = &new.ty(p).axes;
        let shape: Vec<_> = axes.iter().map(|&a| size(&new.axis(a).size)).collect();
        let at =
            axes.iter().position(|&a| new.axis(a).size == Size::Sym("t".into())).unwrap_or(axes.len() - 1);
        let below: usize = shape[at + 1..].iter().product();
        let data = (0..shape.iter().product()).map(|n: usize| (n / below % shape[at]) as f64).collect();
        args.push(Tensor { dtype: DType::I32, shape, data });
    }
    let got = run(after, &args);
    let (want, got) = match (want, got) {
        (Err(_), _) => return Ok(()),
        // See `poisoned`.
        (Ok(want), _) if want.len() > entry.results.len() && want[entry.results.len()].data != [0.0] => {
            return Ok(());
        }
        (Ok(want), Ok(got)) => (want, got),
        (Ok(_), Err(e)) => {
            return Err(format!("`{}` ({}) makes a graph that fails: {e}\n{after}", pass.name, graph.name()));
        }
    };
    for (w, g) in want.iter().zip(&got) {
        let scale = w.data.iter().filter(|x| x.is_finite()).fold(1.0f64, |m, x| m.max(x.abs()));
        g.close_to(w, 1e-9 * scale, 1e-9).map_err(|e| {
            format!(
                "`{}` ({}) changes a result: {e:?}\nbefore:\n{before}\nafter:\n{after}",
                pass.name,
                graph.name()
            )
        })?;
    }
    Ok(())
}

/// The same module with one result more in every function: 0, or NaN if any value in it or below was not finite. Sums
/// and products of reals may be reordered, but an infinity that one order meets with 0 or with its opposite may meet
/// neither in another.
fn poisoned(module: &Module) -> Module {
    let mut out = module.clone();
    for f in &mut out.functions {
        let mut poison = f.constant("poison", 0.0, DType::F64);
        let zero = poison;
        f.body.rotate_right(1);
        for n in 0..f.body.len() {
            if matches!(f.body[n].op, Op::Call { .. }) {
                f.values.push(Value { name: format!("poison.{n}"), ty: Type::scalar(DType::F64) });
                f.body[n].results.push(ValueId(f.values.len() as u32 - 1));
            }
        }
        for n in 0..f.values.len() as u32 {
            let value = ValueId(n);
            if f.ty(value).dtype.is_float() && value != zero {
                let here = f.push(Op::Contract, &[value, zero], &[("", Type::scalar(DType::F64))])[0];
                poison =
                    f.push(Op::Binary(Binary::Add), &[poison, here], &[("", Type::scalar(DType::F64))])[0];
            }
        }
        f.results.push(poison);
    }
    out
}

fn random(dtype: DType, shape: Vec<usize>, rng: &mut SplitMix) -> Tensor {
    let data = (0..shape.iter().product())
        .map(|_: usize| match dtype {
            DType::Bool => rng.below(2) as f64,
            DType::I32 => rng.below(3) as f64,
            DType::F64 | DType::F32 | DType::Bf16 | DType::F16 => rng.below(33) as f64 / 16.0 - 1.0,
        })
        .collect();
    Tensor { dtype, shape, data }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Each pass of the pipeline, on what the passes before it made of a random definition.
    #[test]
    fn passes_keep_the_meaning_of_random_definitions(
        module in latentc_ir::testing::arb_module(latentc_ir::verify::Stage::Traced),
        graph in prop::sample::select(Graph::ALL.to_vec()),
        seed: u64,
    ) {
        let mut m = module;
        for pass in pipeline() {
            // A random definition may mix sequences that no position can serve; the pass says so.
            let Ok(next) = pass.apply(&m, &mut Context::new(graph)) else { return Ok(()) };
            same_meaning(&m, &next, &pass, graph, seed).map_err(TestCaseError::fail)?;
            m = next;
        }
    }
}
