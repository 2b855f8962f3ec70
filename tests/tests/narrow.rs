//! Caches and weights in fewer bits, end to end: how far the logits of the reference cases are off, beside docs/narrow-formats.md.
//!
//! `LATENTC_BLESS=1 cargo test -p latentc-tests --test narrow` writes the table. Where a number falls between two codes hangs on
//! the last bit of a sum, and so does then which experts a token goes to: of one case a figure may be another tomorrow. The test
//! looks at those of all cases together, which may come out larger by [`SLACK`].

use std::fmt::Write as _;

use latentc_codegen::cube::WgpuDevice;
use latentc_codegen::device::Device;
use latentc_codegen::host::Host;
use latentc_ir::DType;
use latentc_passes::{CacheForm, Codes, Graph, Wanted, WeightForm, pipeline};
use latentc_runtime::engine::Engine;
use latentc_runtime::eval::{Batch, Reading};
use latentc_runtime::session::{Session, Tokens};
use latentc_tests::{Case, cases, max_diff, workspace};

/// How many times its figure in the table the error of all cases may be.
const SLACK: f64 = 1.5;

/// The name of all cases.
const ALL: &str = "all";

/// The largest difference on two devices, of logits of up to 7: a code that falls to the other side on one of them.
const DEVICES: f32 = 0.1;

/// What a case is held in.
#[derive(Clone, Copy, Default)]
struct Form {
    cache: Option<CacheForm>,
    page: Option<u64>,
    weights: Option<WeightForm>,
}

impl Form {
    fn cache(codes: Codes, rotated_wide: bool) -> Form {
        Form { cache: Some(CacheForm { rotated_wide, ..CacheForm::new(codes) }), ..Form::default() }
    }

    fn weights(group: u64) -> Form {
        Form { weights: Some(WeightForm { group }), ..Form::default() }
    }
}

/// The rows of a case. All compute in f32, so that there is nothing to see of bf16.
fn forms() -> [(&'static str, Form); 6] {
    [
        ("fp8", Form::cache(Codes::Fp8, false)),
        ("int8", Form::cache(Codes::Int8, false)),
        ("int6, rotated keys wide", Form::cache(Codes::Int6, true)),
        ("int6", Form::cache(Codes::Int6, false)),
        ("as computed; weights int8", Form::weights(128)),
        ("as computed", Form::default()),
    ]
}

/// The logits of a case read token by token, so that all but those of the first position hang on what is kept.
fn logits<D: Device>(case: &Case, device: D, form: Form) -> Vec<f32> {
    let mut engine = loaded(case, device, form);
    let (ids, shape) = case.integers("input_ids").expect("every case has input_ids");
    let mask = case.integers("attention_mask").map(|m| m.0);
    let batch = Batch::new(&ids, mask.as_deref(), shape[0], shape[1]).expect("the case's batch is right");
    let reading = Reading::TokenByToken { prefill: 1 };
    batch.logits(&mut engine, reading).unwrap_or_else(|e| panic!("{}: {e}", case.name)).data
}

/// Both graphs of a case that serve.
fn loaded<D: Device>(case: &Case, device: D, Form { cache, page, weights }: Form) -> Engine<D> {
    let mut engine = Engine::new(device);
    for graph in [Graph::Prefill, Graph::Decode] {
        let compiled = case.compile(Wanted { cache, page, weights, ..graph.into() }, DType::F32, &pipeline());
        engine.add(&compiled, &case.checkpoint).unwrap_or_else(|e| panic!("{}: {e}", case.name));
    }
    engine
}

/// The difference's 2-norm relative to that of what is right.
fn relative(got: &[f32], want: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let off: f64 = got.iter().zip(want).map(|(a, b)| square(a - b)).sum();
    (off / want.iter().map(|&x| square(x)).sum::<f64>()).sqrt()
}

/// Positions whose likeliest token is another one, of all whose logits are not padding.
fn others(got: &[f32], want: &[f32], vocabulary: usize) -> (usize, usize) {
    let best = |row: &[f32]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
    let rows =
        got.chunks(vocabulary).zip(want.chunks(vocabulary)).filter(|(_, w)| w.iter().any(|&x| x != 0.0));
    rows.fold((0, 0), |(n, all), (g, w)| (n + usize::from(best(g) != best(w)), all + 1))
}

const BEGIN: &str = "<!-- measured: written by tests/tests/narrow.rs -->\n";
const END: &str = "<!-- end of measured -->";

#[test]
fn logits_are_off_by_what_the_table_says() {
    let file = workspace().join("docs/narrow-formats.md");
    let page = std::fs::read_to_string(&file).expect("the page is there");
    let (head, rest) = page.split_once(BEGIN).expect("the page has a table");
    let (table, tail) = rest.split_once(END).expect("the table ends");
    let mut made =
        String::from("| case | caches | relative error | largest | other tokens |\n|---|---|---|---|---|\n");
    let mut pooled: Vec<(Vec<f32>, Vec<f32>)> = vec![Default::default(); forms().len()];
    for case in cases() {
        let (want, shape) = case.floats("prefill_logits");
        for ((name, form), (all_got, all_want)) in forms().into_iter().zip(&mut pooled) {
            let got = logits(&case, Host::new(), form);
            let (relative, largest) = (relative(&got, &want), max_diff(&got, &want));
            let (other, of) = others(&got, &want, shape[2]);
            let _ = writeln!(
                made,
                "| {} | {name} | {relative:.1e} | {largest:.1e} | {other} of {of} |",
                case.name
            );
            all_got.extend(got);
            all_want.extend(&want);
        }
    }
    let mut wrong = Vec::new();
    for ((name, _), (got, want)) in forms().into_iter().zip(&pooled) {
        let off = relative(got, want);
        let start = format!("| {ALL} | {name} | ");
        let _ = writeln!(made, "{start}{off:.1e} | {:.1e} | |", max_diff(got, want));
        let told: Option<f64> =
            table.lines().find_map(|line| line.strip_prefix(&start)?.split(" | ").next()?.parse().ok());
        match told {
            Some(told) if off <= SLACK * told => {}
            told => wrong.push(format!("{name}: the error is {off:.1e}, the page says {told:?}")),
        }
    }
    if std::env::var_os("LATENTC_BLESS").is_some() {
        std::fs::write(&file, format!("{head}{BEGIN}{made}{END}{tail}")).expect("the page can be written");
    } else {
        assert!(wrong.is_empty(), "docs/narrow-formats.md; LATENTC_BLESS=1 rewrites\n{}", wrong.join("\n"));
    }
}

#[test]
fn devices_agree_on_what_is_held() {
    for case in cases().iter().take(2) {
        let caches = Codes::ALL.map(|codes| (codes.name(), Form::cache(codes, false)));
        for (name, form) in caches.into_iter().chain([("weights int8", Form::weights(128))]) {
            let device = match WgpuDevice::open() {
                Ok(device) => device,
                Err(e) => return eprintln!("SKIPPED: devices_agree_on_what_is_held: {e}"),
            };
            let off = max_diff(&logits(case, device, form), &logits(case, Host::new(), form));
            println!("{} {name}: {off:.1e}", case.name);
            assert!(off <= DEVICES, "{} {name}: the devices differ by {off:e}", case.name);
        }
    }
}

/// The largest difference of logits that are summed in another order.
const ORDER: f32 = 2e-4;

#[test]
fn pages_hold_what_one_piece_holds() {
    for case in cases() {
        let want = logits(&case, Host::new(), Form::default());
        // Pages that the host reads in tiles, and smaller ones.
        for page in [4, 16] {
            let off =
                max_diff(&logits(&case, Host::new(), Form { page: Some(page), ..Form::default() }), &want);
            assert!(off <= ORDER, "{} in pages of {page}: {off:e}", case.name);
        }
        let form = Form::cache(Codes::Int8, false);
        let paged = Form { page: Some(16), ..form };
        let off = max_diff(&logits(&case, Host::new(), paged), &logits(&case, Host::new(), form));
        assert!(off <= DEVICES, "{} in pages, in int8: {off:e}", case.name);
    }
}

#[test]
fn pages_on_a_device() {
    let case = &cases()[0];
    let device = match WgpuDevice::open() {
        Ok(device) => device,
        Err(e) => return eprintln!("SKIPPED: pages_on_a_device: {e}"),
    };
    let paged = Form { page: Some(8), ..Form::default() };
    let off = max_diff(&logits(case, device, paged), &logits(case, Host::new(), Form::default()));
    assert!(off <= DEVICES, "{off:e}");
}

#[test]
fn sequences_take_pages_as_they_grow_and_share_what_they_begin_with() {
    let case = &cases()[0];
    let text: Vec<i32> = (0..12).map(|p| p * 37 % 101).collect();
    let one = |ids: &[i32], at: usize| Tokens { ids: ids.to_vec(), positions: vec![at as i32], len: 1 };
    // What each token is followed by, in a cache of one piece.
    let mut engine = loaded(case, Host::new(), Form::default());
    let mut alone = Session::new(&mut engine, 1, 12).expect("room");
    let want: Vec<Vec<f32>> = (0..12)
        .map(|at| alone.read(Graph::Decode, &one(&text[at..][..1], at), &[0], 1).expect("it runs").data)
        .collect();

    let mut engine = loaded(case, Host::new(), Form { page: Some(2), ..Form::default() });
    engine.set_pool_pages(Some(8));
    let mut session =
        Session::new(&mut engine, 2, 100).expect("room for what is filled, not for what may be");
    assert_eq!(session.pages(), Some((0, 8)));
    // The second row begins with something else, of which nothing is left.
    let ids: Vec<i32> = text[..6].iter().copied().chain([5, 4, 3, 2, 1, 0]).collect();
    let positions = (0..6).chain(0..6).collect();
    session.read(Graph::Prefill, &Tokens { ids, positions, len: 6 }, &[5, 5], 1).expect("it runs");
    assert_eq!(session.pages(), Some((6, 8)));
    assert_eq!(session.fork(0, 1).expect("there are pages"), 4);
    assert_eq!(session.pages(), Some((3, 8)));
    // The rows stand at different places: the second has yet to read what it does not share.
    for at in 4..8 {
        let ids = vec![text[at + 2], text[at]];
        let tokens = Tokens { ids, positions: vec![at as i32 + 2, at as i32], len: 1 };
        let got = session.read(Graph::Decode, &tokens, &[0, 0], 1).expect("it runs");
        for (row, at) in [(0, at + 2), (1, at)] {
            let off = max_diff(got.row(row, 0), &want[at]);
            assert!(off <= ORDER, "row {row} at {at}: {off:e}");
        }
    }
    // Two pages of both, three of the first, two of the second.
    assert_eq!(session.pages(), Some((7, 8)));
    let tokens = |at| Tokens { ids: vec![1, 1], positions: vec![at, at], len: 1 };
    let shared = session.read(Graph::Decode, &tokens(1), &[0, 0], 1).expect_err("both rows have that page");
    assert!(shared.to_string().contains("another sequence has"), "{shared}");
    let full = session.read(Graph::Decode, &tokens(11), &[0, 0], 1).expect_err("there are not so many pages");
    assert!(
        full.to_string().contains("the pool has 8 pages of 2 positions")
            && full.to_string().contains("--cache-pool")
    );
    // What was given back is used again: a row that ended begins anew beside one that goes on.
    session.end(0);
    let tokens = Tokens { ids: vec![text[0], text[8]], positions: vec![0, 8], len: 1 };
    let got = session.read(Graph::Decode, &tokens, &[0, 0], 1).expect("there are pages again");
    for (row, at) in [(0, 0), (1, 8)] {
        let off = max_diff(got.row(row, 0), &want[at]);
        assert!(off <= ORDER, "row {row} at {at}: {off:e}");
    }
}
