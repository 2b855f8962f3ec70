//! Reductions and selections that feed one another are one kernel.

use latentc_codegen::program::{KernelKind, Step};
use latentc_codegen::schedule::schedule;
use latentc_passes::{Context, Graph};
use proptest::prelude::*;

use crate::{check, prepare};

/// A router: the largest groups of experts by the softmax of their scores, the largest experts in these, and what these make of a
/// token, weighed. Groups may be left out, gates scaled to a sum of one, and scores read by others too.
fn router(groups: bool, renormalised: bool, kept: bool) -> String {
    let open = if groups {
        "parts: f32[b, t, g, j] = split a axis e into g, j\n  best: f32[b, t, g] = reduce_max parts over j\n  \
         in: bool[b, t, g] = top_k best over g k 2\n  none: f32 = const 0.0\n  \
         some: f32[b, t, g, j] = select in, parts, none\n  s: f32[b, t, e] = merge some axes g, j into e"
    } else {
        "s: f32[b, t, e] = cast a"
    };
    let gates = if renormalised {
        "all: f32[b, t] = reduce_sum picked over k\n  gate: f32[b, t, k] = div picked, all"
    } else {
        "sixteen: f32 = const 16.0\n  gate: f32[b, t, k] = mul picked, sixteen"
    };
    let results = if kept { "y, a" } else { "y" };
    format!(
        "module test entry @f\n\nfunc @f {{\n  axes b, t, d=5, e=12, g=4, j=3, k=3, f=7\n  param x: f32[b, t, d]\n  \
         param E: f32[e, d]\n  param W: f32[e, f, d]\n  param V: f32[e, d, f]\n\n  \
         l: f32[b, t, e] = contract E, x over d\n  a: f32[b, t, e] = softmax l over e\n  {open}\n  \
         at: i32[b, t, k] = top_indices s over e into k\n  picked: f32[b, t, k] = gather s, at along e\n  {gates}\n  \
         w: f32[b, t, k, f, d] = gather W, at along e\n  o: f32[b, t, k, f] = contract w, x over d\n  h: f32[b, t, k, f] = silu o\n  \
         z: f32[b, t, k, f] = mul gate, h\n  v: f32[b, t, k, d, f] = gather V, at along e\n  \
         y: f32[b, t, d] = contract v, z over k, f\n  return {results}\n}}\n"
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    /// Whatever its rule, a router is two kernels that read the scores: one for the indices, and one for the gates. This chooses once more and
    /// stands beside the other where no choice of groups is below, which might fall out otherwise.
    #[test]
    fn routers(groups: bool, renormalised: bool, kept: bool, prefill: bool, seed: u64) {
        let text = router(groups, renormalised, kept);
        let module = latentc_ir::check("test", &text).map_err(|e| TestCaseError::fail(e.render()))?;
        let graph = if prefill { Graph::Prefill } else { Graph::Decode };
        let program = schedule(&prepare(&module), &Context::new(graph));
        let program = program.map_err(|e| TestCaseError::fail(e.to_string()))?;
        let mut maps = Vec::new();
        for step in &program.routines[0].steps {
            let Step::Launch { kernel, inputs, beside, .. } = step else { continue };
            if program.kernels[*kernel].kind == KernelKind::Map {
                let names = inputs.iter().map(|&b| &*program.routines[0].buffer(b).name);
                maps.push((names.collect::<Vec<_>>(), *beside));
            }
        }
        if kept {
            // What is returned has memory, and is read there.
            prop_assert!(maps.len() <= 3, "{}", program);
        } else {
            let gates = if groups { (vec!["l", "at"], false) } else { (vec!["l"], true) };
            prop_assert_eq!(maps, [(vec!["l"], false), gates], "{}", program);
        }
        for kernel in &program.kernels {
            check(kernel, seed)?;
        }
    }
}
