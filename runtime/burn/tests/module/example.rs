//! The example learns: burn's learner and AdamW on a compiled model.

#[path = "../../examples/train.rs"]
#[allow(dead_code, reason = "its command line is not for tests")]
mod train;

use latentc_burn::wgpu_device;

#[test]
fn the_example_learns() {
    if let Err(e) = wgpu_device() {
        return eprintln!("SKIPPED: the_example_learns: {e}");
    }
    let out = tempfile::tempdir().expect("there is room");
    let text =
        std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../../ARCHITECTURE.md")).expect("it is there");
    let (before, after) = train::train(&text[..6000], 12, out.path()).expect("it trains");
    // Of 256 bytes none is likelier than another at first: ln 256 is 5.55. How often each comes is soon learned.
    assert!((before - 5.55).abs() < 0.1 && after < 4.5, "{before} before, {after} after");
    assert!(out.path().join("model.mpk").is_file() && !out.path().join("model-new.mpk").exists());

    let why = train::train(b"short", 12, out.path()).expect_err("too short").to_string();
    assert_eq!(why, "a text of 5 bytes, where it takes 641");
}
