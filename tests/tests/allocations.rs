//! Decode on the host allocates nothing but what it gives away: a step of a token takes the logits' vector of the heap, and nothing else,
//! whatever weights are held in.
//!
//! The first steps of a session find out what launches come to at its sizes, and threads get the memory that they work in. Threads that have
//! slept are woken by a message, which is memory as well: it is part of no step.

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use latentc_codegen::host::Host;
use latentc_ir::DType;
use latentc_models::config::ModelConfig;
use latentc_models::{Goal, trace};
use latentc_passes::{Graph, Wanted, WeightForm, pipeline};
use latentc_runtime::checkpoint::{Checkpoint, DType as Stored};
use latentc_runtime::compiled::compile;
use latentc_runtime::engine::Engine;
use latentc_runtime::init::{Init, init};
use latentc_runtime::session::{Session, Tokens};
use latentc_tests::workspace;

/// The system's allocator, which remembers who asks while it is told to.
struct Watched;

static WATCHED: AtomicBool = AtomicBool::new(false);
static ASKED: Mutex<Vec<Backtrace>> = Mutex::new(Vec::new());

/// Lines of each that are told.
const LINES: usize = 4;

thread_local! {
    /// Whether this thread is remembering, for which it needs memory.
    static REMEMBERS: Cell<bool> = const { Cell::new(false) };
}

fn remember() {
    if WATCHED.load(Ordering::Relaxed) && !REMEMBERS.replace(true) {
        ASKED.lock().expect("nobody panics here").push(Backtrace::force_capture());
        REMEMBERS.set(false);
    }
}

// SAFETY: all is left to the system's.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        remember();
        // SAFETY: by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        remember();
        // SAFETY: by the caller.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        remember();
        // SAFETY: by the caller.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: by the caller.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

/// Who asks for memory in the meantime, and how often: the project's own lines, innermost first.
fn asked(run: impl FnOnce()) -> BTreeMap<String, usize> {
    WATCHED.store(true, Ordering::SeqCst);
    run();
    WATCHED.store(false, Ordering::SeqCst);
    let root = format!("at {}/", workspace().display());
    let mut sites = BTreeMap::new();
    for trace in std::mem::take(&mut *ASKED.lock().expect("nobody panics here")) {
        let trace = trace.to_string();
        let own = trace.lines().filter_map(|line| line.trim().strip_prefix(&root));
        let own = own.take(LINES).collect::<Vec<_>>().join(", ");
        if !own.contains("host/awake.rs") {
            *sites.entry(own).or_default() += 1;
        }
    }
    sites
}

/// The small bench model in a few layers, narrower.
fn config() -> ModelConfig {
    let text = std::fs::read_to_string(workspace().join("models/configs/bench-moe-0.3b.json"));
    let mut json: serde_json::Value =
        serde_json::from_str(&text.expect("the model is bundled")).expect("it is JSON");
    let smaller = [
        ("vocab_size", 512),
        ("hidden_size", 256),
        ("intermediate_size", 384),
        ("moe_intermediate_size", 128),
        ("num_hidden_layers", 3),
        ("kv_lora_rank", 128),
    ];
    for (key, number) in smaller {
        json[key] = number.into();
    }
    ModelConfig::from_str("smaller.json", &json.to_string()).unwrap_or_else(|e| panic!("{e}"))
}

/// How a model is held.
struct Form {
    name: &'static str,
    dtype: DType,
    stored: Stored,
    weights: Option<WeightForm>,
}

const FORMS: [Form; 3] = [
    Form { name: "f32", dtype: DType::F32, stored: Stored::F32, weights: None },
    Form { name: "bf16", dtype: DType::Bf16, stored: Stored::BF16, weights: None },
    Form { name: "int8", dtype: DType::F32, stored: Stored::F32, weights: Some(WeightForm { group: 64 }) },
];

#[test]
fn a_step_of_decode_allocates_its_logits_alone() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().expect("threads");
    pool.install(|| {
        let (folder, config) = (tempfile::tempdir().expect("a folder"), config());
        let mut found = Vec::new();
        for form in &FORMS {
            let traced =
                trace(&config, Goal::Logits, form.dtype).unwrap_or_else(|e| panic!("{}", e.render()));
            let inventory = traced.module.inventory().expect("its weights make sense");
            let path = folder.path().join(form.name);
            let with = Init { seed: 1, std: 0.05, dtype: form.stored };
            std::fs::create_dir(&path).expect("a folder");
            init(&path, &inventory, with, |_| {}).unwrap_or_else(|e| panic!("{e}"));
            let checkpoint = Arc::new(Checkpoint::open(&path).unwrap_or_else(|e| panic!("{e}")));
            let mut engine = Engine::new(Host::new());
            for graph in [Graph::Prefill, Graph::Decode] {
                let wanted = Wanted { weights: form.weights, ..graph.into() };
                let compiled = compile(&traced.module, wanted, &pipeline()).unwrap_or_else(|e| panic!("{e}"));
                engine.add(&compiled, &checkpoint).unwrap_or_else(|e| panic!("{e}"));
            }
            for batch in [1, 2] {
                let mut session = Session::new(&mut engine, batch, 24).expect("there is room");
                let mut read = |graph, at: usize, len: usize| {
                    let positions = (0..batch).flat_map(|_| at..at + len).map(|p| p as i32);
                    let positions: Vec<_> = positions.collect();
                    let ids = positions.iter().map(|p| p * 37 % 512).collect();
                    let tokens = Tokens { ids, positions, len };
                    let last = vec![len as i32 - 1; batch];
                    let mut logits = None;
                    let sites = asked(|| logits = Some(session.read(graph, &tokens, &last, 1)));
                    logits.expect("it was run").unwrap_or_else(|e| panic!("{e}"));
                    sites
                };
                read(Graph::Prefill, 0, 7);
                read(Graph::Decode, 7, 1);
                read(Graph::Decode, 8, 1);
                for at in 9..14 {
                    let sites = read(Graph::Decode, at, 1);
                    let count: usize = sites.values().sum();
                    if count != 1 {
                        found.push(format!("{}, {batch} sequences, position {at}: {count} times", form.name));
                        found.extend(sites.iter().map(|(site, count)| format!("  {count} {site}")));
                    }
                }
            }
        }
        assert!(found.is_empty(), "memory was asked for in steps of decode:\n{}", found.join("\n"));
    });
}
