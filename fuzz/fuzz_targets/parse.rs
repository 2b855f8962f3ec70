//! Any text is a module that prints and parses back, or an error that renders.

#![no_main]

use latentc_ir::{parse, verify};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    match parse("fuzz.ir", text) {
        Ok(module) => {
            let _ = verify(&module);
            assert_eq!(parse("fuzz.ir", &module.to_string()), Ok(module));
        }
        Err(error) => assert!(!error.render().is_empty()),
    }
});
