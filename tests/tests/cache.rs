//! Caches in fewer bits, end to end: how far the logits of the reference cases are off, beside docs/cache-formats.md.
//!
//! `LATENTC_BLESS=1 cargo test -p latentc-tests --test cache` writes the table. Where a number falls between two codes hangs on
//! the last bit of a sum, and so does then which experts a token goes to: of one case a figure may be another tomorrow. The test
//! looks at those of all cases together, which may come out larger by [`SLACK`].

use std::fmt::Write as _;

use latentc_codegen::cube::WgpuDevice;
use latentc_codegen::device::Device;
use latentc_codegen::host::Host;
use latentc_ir::DType;
use latentc_passes::{CacheForm, Codes, Graph, Wanted, pipeline};
use latentc_runtime::engine::Engine;
use latentc_runtime::eval::{Batch, Reading};
use latentc_tests::{Case, cases, max_diff, workspace};

/// How many times its figure in the table the error of all cases may be.
const SLACK: f64 = 1.5;

/// The name of all cases.
const ALL: &str = "all";

/// The largest difference on two devices, of logits of up to 7: a code that falls to the other side on one of them.
const DEVICES: f32 = 0.1;

/// The rows of a case. On the host bf16 is held as f32, so that there is nothing to see of it.
const FORMS: [(&str, Option<Codes>, bool); 5] = [
    ("fp8", Some(Codes::Fp8), false),
    ("int8", Some(Codes::Int8), false),
    ("int6, rotated keys wide", Some(Codes::Int6), true),
    ("int6", Some(Codes::Int6), false),
    ("as computed", None, false),
];

/// The logits of a case read token by token, so that all but those of the first position hang on what is kept.
fn logits<D: Device>(case: &Case, device: D, cache: Option<CacheForm>) -> Vec<f32> {
    let mut engine = Engine::new(device);
    for graph in [Graph::Prefill, Graph::Decode] {
        let compiled = case.compile(Wanted { graph, cache }, DType::F32, &pipeline());
        engine.add(&compiled, &case.checkpoint).unwrap_or_else(|e| panic!("{}: {e}", case.name));
    }
    let (ids, shape) = case.integers("input_ids").expect("every case has input_ids");
    let mask = case.integers("attention_mask").map(|m| m.0);
    let batch = Batch::new(&ids, mask.as_deref(), shape[0], shape[1]).expect("the case's batch is right");
    let reading = Reading::TokenByToken { prefill: 1 };
    batch.logits(&mut engine, reading).unwrap_or_else(|e| panic!("{}: {e}", case.name)).data
}

fn form(codes: Option<Codes>, rotated_wide: bool) -> Option<CacheForm> {
    codes.map(|codes| CacheForm { rotated_wide, ..CacheForm::new(codes) })
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

const BEGIN: &str = "<!-- measured: written by tests/tests/cache.rs -->\n";
const END: &str = "<!-- end of measured -->";

#[test]
fn logits_are_off_by_what_the_table_says() {
    let file = workspace().join("docs/cache-formats.md");
    let page = std::fs::read_to_string(&file).expect("the page is there");
    let (head, rest) = page.split_once(BEGIN).expect("the page has a table");
    let (table, tail) = rest.split_once(END).expect("the table ends");
    let mut made =
        String::from("| case | caches | relative error | largest | other tokens |\n|---|---|---|---|---|\n");
    let mut pooled: Vec<(Vec<f32>, Vec<f32>)> = vec![Default::default(); FORMS.len()];
    for case in cases() {
        let (want, shape) = case.floats("prefill_logits");
        for ((name, codes, wide), (all_got, all_want)) in FORMS.into_iter().zip(&mut pooled) {
            let got = logits(&case, Host::new(), form(codes, wide));
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
    for ((name, ..), (got, want)) in FORMS.into_iter().zip(&pooled) {
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
        assert!(wrong.is_empty(), "docs/cache-formats.md; LATENTC_BLESS=1 rewrites\n{}", wrong.join("\n"));
    }
}

#[test]
fn devices_agree_on_what_is_kept() {
    for case in cases().iter().take(2) {
        for codes in Codes::ALL {
            let device = match WgpuDevice::open() {
                Ok(device) => device,
                Err(e) => return eprintln!("SKIPPED: devices_agree_on_what_is_kept: {e}"),
            };
            let form = form(Some(codes), false);
            let off = max_diff(&logits(case, device, form), &logits(case, Host::new(), form));
            println!("{} {codes}: {off:.1e}", case.name);
            assert!(off <= DEVICES, "{} {codes}: the devices differ by {off:e}", case.name);
        }
    }
}
