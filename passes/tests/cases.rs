//! Every case beside a pass: IR before, IR after, as whole texts; and both compute the same.
//!
//! A file `src/PASS.ir` holds cases. Each begins with `---- NAME (GRAPH)`; behind the graph may be `, CODES by GROUP` for its caches, `, pages of N`,
//! or `, weights by GROUP`. It goes on with a module, and ends with `---- after` and the module that the pass makes of it, or with `---- error: MESSAGE`. `LATENTC_BLESS=1 cargo test -p latentc-passes` writes what
//! follows from what stands before; read the difference before you commit it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use latentc_ir::Module;
use latentc_passes::validate::{Numbers, Verdict, compare};
use latentc_passes::{CacheForm, Codes, Context, Gradients, Graph, Pass, Wanted, WeightForm, pipeline};
use proptest::prelude::*;

struct Case {
    name: String,
    wanted: Wanted,
    /// The same as a text.
    told: String,
    before: String,
    after: String,
}

fn cases(file: &Path) -> Vec<Case> {
    let text = std::fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let mut cases: Vec<Case> = Vec::new();
    let mut in_after = false;
    for line in text.lines() {
        if let Some(title) = line.strip_prefix("---- ") {
            if title == "after" || title.starts_with("error:") {
                in_after = true;
            } else {
                let (name, told) =
                    title.strip_suffix(')').and_then(|t| t.rsplit_once(" (")).expect("---- NAME (GRAPH)");
                cases.push(Case {
                    name: name.to_owned(),
                    wanted: wanted(told)
                        .expect("GRAPH, and perhaps: CODES by GROUP, pages of N, weights by GROUP, gradients as weights"),
                    told: told.to_owned(),
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

/// What the passes are told.
fn wanted(told: &str) -> Option<Wanted> {
    let (graph, cache) = told.split_once(", ").map_or((told, None), |(graph, cache)| (graph, Some(cache)));
    let graph = Graph::ALL.into_iter().find(|g| g.name() == graph)?;
    let Some(cache) = cache else { return Some(graph.into()) };
    if cache == "gradients as weights" {
        return Some(Wanted { gradients: Gradients::Weights, ..graph.into() });
    }
    if let Some(page) = cache.strip_prefix("pages of ") {
        return Some(Wanted { page: Some(page.parse().ok()?), ..graph.into() });
    }
    let (codes, group) = cache.split_once(" by ")?;
    if codes == "weights" {
        return Some(Wanted { weights: Some(WeightForm { group: group.parse().ok()? }), ..graph.into() });
    }
    let codes = Codes::ALL.into_iter().find(|c| c.name() == codes)?;
    let cache = CacheForm { group: group.parse().ok()?, ..CacheForm::new(codes) };
    Some(Wanted { cache: Some(cache), ..graph.into() })
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
            let after = match pass.apply(&before, &mut Context::new(case.wanted)) {
                Ok(after) => {
                    same_meaning(&before, &after, &pass, case.wanted, 1)
                        .unwrap_or_else(|e| panic!("{}: {e}", case.name));
                    format!("---- after\n\n{after}\n")
                }
                Err(e) => format!("---- error: {e}\n\n"),
            };
            let _ = write!(text, "---- {} ({})\n{}{after}", case.name, case.told, case.before);
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

/// Compares both modules on the numbers that this seed chooses.
fn same_meaning(
    before: &Module,
    after: &Module,
    pass: &Pass,
    wanted: impl Into<Wanted>,
    seed: u64,
) -> Result<(), String> {
    let wanted = wanted.into();
    let rounded = pass.rounds.map(|rounded| rounded(before, &Context::new(wanted)));
    let before = rounded.as_ref().unwrap_or(before);
    // Orders of products are equal for reals only; all other laws hold for infinities too.
    let numbers = if pass.name == "reassociate" { Numbers::Reals } else { Numbers::Grid };
    match compare(before, after, seed, numbers) {
        Verdict::Same | Verdict::Unknown(_) => Ok(()),
        Verdict::Differs(difference) => Err(format!(
            "`{}` ({}): {}\nbefore:\n{before}\nafter:\n{after}",
            pass.name,
            wanted.graph.name(),
            difference.what
        )),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Each pass of the pipeline, on what the passes before it made of a random definition.
    #[test]
    fn passes_keep_the_meaning_of_random_definitions(
        module in latentc_ir::testing::arb_module(latentc_ir::verify::Stage::Traced),
        graph in prop::sample::select(Graph::ALL.to_vec()),
        codes in prop::option::of(prop::sample::select(Codes::ALL.to_vec())),
        group in 1..40_u64,
        page in prop::option::of(1..4_u32),
        weights in prop::option::of(1..20_u64),
        gradients in prop::sample::select(vec![Gradients::Sums, Gradients::Weights]),
        seed: u64,
    ) {
        let cache = codes.map(|codes| CacheForm { group, ..CacheForm::new(codes) });
        let weights = weights.map(|group| WeightForm { group });
        let wanted = Wanted { graph, cache, page: page.map(|n| 1 << n), weights, gradients };
        // What is differentiated has one result.
        let mut m = if graph == Graph::Gradient { latentc_ir::testing::objective(&module) } else { module };
        for pass in pipeline() {
            // A random definition may mix sequences that no position can serve; the pass says so.
            let Ok(next) = pass.apply(&m, &mut Context::new(wanted)) else { return Ok(()) };
            same_meaning(&m, &next, &pass, wanted, seed).map_err(TestCaseError::fail)?;
            m = next;
        }
    }
}
