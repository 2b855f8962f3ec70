//! A graph that is compiled once for each range of sizes: each run takes the program for its own, and all of them share weights
//! and caches.

use latentc_codegen::host::Host;
use latentc_ir::DType;
use latentc_models::{Goal, trace};
use latentc_passes::{Graph, pipeline};
use latentc_runtime::compiled::{Compiled, compile, compile_variants};
use latentc_runtime::engine::{Engine, RunError};
use latentc_runtime::session::{Session, Tokens};
use latentc_tests::{Case, cases, max_diff};

/// The logits after the last token of each part of a text, which is read in parts of these lengths.
fn read(case: &Case, compiled: &[Compiled], parts: &[usize]) -> Result<Vec<f32>, RunError> {
    let mut engine = Engine::new(Host::new());
    for compiled in compiled {
        engine.add(compiled, &case.checkpoint).unwrap_or_else(|e| panic!("{}: {e}", case.name));
    }
    let mut session = Session::new(&mut engine, 1, parts.iter().sum())?;
    let (mut logits, mut start) = (Vec::new(), 0);
    for &len in parts {
        let positions: Vec<i32> = (start as i32..).take(len).collect();
        let ids = positions.iter().map(|p| p * 37 % 101).collect();
        start += len;
        let tokens = Tokens { ids, positions, len };
        logits.extend(session.read(Graph::Prefill, &tokens, &[len as i32 - 1], 1)?.data);
    }
    Ok(logits)
}

#[test]
fn a_run_takes_the_program_for_its_size() {
    let case = cases().into_iter().find(|c| c.name == "tiny").expect("a case of the project");
    let traced = trace(&case.config, Goal::Logits, DType::F32).unwrap_or_else(|e| panic!("{}", e.render()));
    let variants = compile_variants(&traced.module, Graph::Prefill, &pipeline()).expect("it compiles");
    let guards: Vec<_> = variants.iter().map(|v| v.guard.clone().expect("a guard on each")).collect();
    assert!(guards.len() > 1, "{guards:?}");
    for (guard, next) in guards.iter().zip(&guards[1..]) {
        assert_eq!(guard.up_to, Some(next.above), "one begins where the other ends");
    }
    assert_eq!((guards[0].above, guards[guards.len() - 1].up_to), (0, None), "all sizes have a program");

    let end = guards[0].up_to.expect("it ends") as usize;
    let plain = compile(&traced.module, Graph::Prefill, &pipeline()).expect("it compiles");
    for parts in [&[end][..], &[end + 1], &[end, end + 1, 1], &[4 * end, 2, end + 1]] {
        let want = read(&case, std::slice::from_ref(&plain), parts).expect("it runs");
        let got = read(&case, &variants, parts).expect("it runs");
        let off = max_diff(&got, &want);
        assert!(off <= 2e-4, "{parts:?}: {off:e}");
    }

    let first = &variants[..1];
    read(&case, first, &[end]).expect("it is for this size");
    let error = read(&case, first, &[end, end + 1]).expect_err("it is not for this one");
    assert_eq!(error.to_string(), format!("the prefill graph was loaded for t <= {end} only"));
}
