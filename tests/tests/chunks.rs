//! Prompts that are read in chunks: the logits are those of one run, whatever caches are held in, and whichever program each chunk takes.

use latentc_codegen::host::Host;
use latentc_ir::DType;
use latentc_models::{Goal, trace};
use latentc_passes::{CacheForm, Codes, Graph, Guard, Wanted, pipeline};
use latentc_runtime::compiled::compile_variants;
use latentc_runtime::engine::Engine;
use latentc_runtime::eval::{Batch, Reading};
use latentc_runtime::generate::{Sampler, generate};
use latentc_runtime::session::{Session, Tokens};
use latentc_tests::{Case, cases, max_diff};

/// The largest difference of logits that are summed in another order.
const ORDER: f32 = 2e-4;

/// The same where a number may fall to the other side, between two codes.
const CODES: f32 = 0.1;

/// What caches are held in, and how far logits may be off.
fn forms() -> [(&'static str, Option<Codes>, Option<u64>, f32); 3] {
    [
        ("one piece", None, None, ORDER),
        ("pages", None, Some(4), ORDER),
        ("int8 in pages", Some(Codes::Int8), Some(16), CODES),
    ]
}

/// An engine with both graphs that serve, prefill for all ranges of sizes; and for which these are.
fn loaded(case: &Case, codes: Option<Codes>, page: Option<u64>) -> (Engine<Host>, Vec<Guard>) {
    let traced = trace(&case.config, Goal::Logits, DType::F32).unwrap_or_else(|e| panic!("{}", e.render()));
    let (mut engine, mut guards) = (Engine::new(Host::new()), Vec::new());
    for graph in [Graph::Prefill, Graph::Decode] {
        let wanted = Wanted { cache: codes.map(CacheForm::new), page, ..graph.into() };
        for compiled in compile_variants(&traced.module, wanted, &pipeline()).expect("it compiles") {
            guards.extend(compiled.guard.clone());
            engine.add(&compiled, &case.checkpoint).unwrap_or_else(|e| panic!("{}: {e}", case.name));
        }
    }
    (engine, guards)
}

#[test]
fn chunks_say_what_the_whole_says() {
    for case in cases() {
        // Texts of some cases are of uneven lengths.
        let (ids, shape) = case.integers("input_ids").expect("every case has input_ids");
        let mask = case.integers("attention_mask").map(|m| m.0);
        let batch = Batch::new(&ids, mask.as_deref(), shape[0], shape[1]).expect("the case's batch is right");
        for (name, codes, page, most_off) in forms() {
            let (mut engine, _) = loaded(&case, codes, page);
            let mut read = |chunk| {
                engine.set_chunk(chunk);
                batch
                    .logits(&mut engine, Reading::Whole)
                    .unwrap_or_else(|e| panic!("{}: {e}", case.name))
                    .data
            };
            let whole = read(None);
            for chunk in [1, 3, 7] {
                let off = max_diff(&read(Some(chunk)), &whole);
                assert!(off <= most_off, "{} in chunks of {chunk}, {name}: {off:e}", case.name);
            }
        }
    }
}

#[test]
fn a_text_goes_on_the_same_behind_chunks() {
    let prompt: Vec<i32> = (0..20).map(|p| p * 37 % 101).collect();
    for case in cases() {
        let (mut engine, guards) = loaded(&case, None, None);
        let ends = guards.iter().filter_map(|guard| guard.up_to).max();
        let mut greedy = |chunk| {
            engine.set_chunk(chunk);
            let ids = generate(&mut engine, &prompt, 8, &mut Sampler::greedy(), |_| true);
            ids.unwrap_or_else(|e| panic!("{}: {e}", case.name))
        };
        let whole = greedy(None);
        assert_eq!(whole.len(), 8);
        // On both sides of where one program ends and the next begins, too.
        let around = ends.map_or([5, 6], |end| [end as usize, end as usize + 1]);
        for chunk in [1, 3, 7].into_iter().chain(around) {
            assert_eq!(greedy(Some(chunk)), whole, "{} in chunks of {chunk}", case.name);
        }
    }
}

#[test]
fn rows_that_stand_apart_are_read_in_chunks() {
    let case = cases().into_iter().find(|c| c.name == "tiny").expect("a case of the project");
    for (name, codes, page, most_off) in forms() {
        let (mut engine, _) = loaded(&case, codes, page);
        let mut read = |chunk| {
            engine.set_chunk(chunk);
            let mut session = Session::new(&mut engine, 2, 24).expect("room");
            let ids: Vec<i32> = (0..6).map(|p| p * 29 % 101).collect();
            let first = Tokens { ids, positions: vec![0, 1, 2, 0, 1, 2], len: 3 };
            session.read(Graph::Prefill, &first, &[2, 2], 1).expect("it runs");
            // The second row begins anew beside one that goes on, and what is asked of the rows falls into different chunks.
            session.end(1);
            let ids = (0..22).map(|p| p * 37 % 101).collect();
            let tokens = Tokens { ids, positions: (3..14).chain(0..11).collect(), len: 11 };
            session.read(Graph::Prefill, &tokens, &[10, 0, 4, 4, 5, 9], 3).expect("it runs").data
        };
        let whole = read(None);
        for chunk in [1, 3, 7] {
            let off = max_diff(&read(Some(chunk)), &whole);
            assert!(off <= most_off, "in chunks of {chunk}, {name}: {off:e}");
        }
    }
}

#[test]
fn tokens_out_of_order_are_read_at_once() {
    let case = cases().into_iter().find(|c| c.name == "tiny").expect("a case of the project");
    let (mut engine, _) = loaded(&case, None, None);
    let mut read = |positions: &[i32], ids: &[i32], at: i32, chunk| {
        engine.set_chunk(chunk);
        let mut session = Session::new(&mut engine, 1, 4).expect("room");
        let tokens = Tokens { ids: ids.to_vec(), positions: positions.to_vec(), len: 4 };
        session.read(Graph::Prefill, &tokens, &[at], 1).expect("it runs").data
    };
    // The last token is the first to be given: it needs those behind it.
    let want = read(&[0, 1, 2, 3], &[5, 6, 7, 8], 3, None);
    let got = read(&[3, 0, 1, 2], &[8, 5, 6, 7], 0, Some(1));
    assert!(max_diff(&got, &want) <= ORDER);
}
