//! Properties of random modules, and of random damage to their texts.

use std::collections::BTreeSet;

use latentc_ir::ops::OPS;
use latentc_ir::testing::{arb_module, module_from};
use latentc_ir::{
    Caches, Interpreter, Module, Precision, Size, SplitMix, Stage, Tensor, Tensors, Type, ValueId, check,
    parse, verify, verify_at,
};
use proptest::prelude::*;

fn any_stage() -> impl Strategy<Value = Stage> {
    prop_oneof![Just(Stage::Traced), Just(Stage::Derived)]
}

fn any_module() -> impl Strategy<Value = Module> {
    any_stage().prop_flat_map(arb_module)
}

/// The entry's results on random arguments and weights, where `b` is 2, `t` is 3 and `s` is 4.
fn run(module: &Module) -> Result<Vec<Tensor>, String> {
    let mut rng = SplitMix(1);
    let f = module.entry().ok_or("no entry")?;
    let size = |size: &Size| match size {
        Size::Fixed(n) => *n as usize,
        Size::Sym(s) => ["b", "t", "s"].iter().position(|x| x == s).map_or(1, |n| n + 2),
    };
    let shape = |ty: &Type| ty.axes.iter().map(|a| size(&f.axis(*a).size)).collect::<Vec<_>>();
    let args: Vec<_> =
        f.params.iter().map(|v| Tensor::random(f.ty(*v).dtype, shape(f.ty(*v)), &mut rng)).collect();
    let mut weights = Tensors::new();
    for stored in &module.inventory()?.tensors {
        let shape: Vec<_> = stored.shape.iter().map(|n| *n as usize).collect();
        weights.insert(stored.name.clone(), Tensor::random(stored.dtype, shape, &mut rng));
    }
    Interpreter::new(module, Precision::Exact)
        .with_size("b", 2)
        .with_size("t", 3)
        .with_size("s", 4)
        .run(&args, &mut weights, &mut Caches::new())
        .map_err(|e| e.to_string())
}

/// Words of the format, to be put where they do not belong.
const WORDS: [&str; 32] = [
    "module",
    "entry",
    "func",
    "source",
    "axes",
    "param",
    "weight",
    "cache",
    "return",
    "like",
    "over",
    "into",
    "under",
    "by",
    "contract",
    "call",
    "const",
    "f32",
    "@",
    ":",
    ",",
    "=",
    "[",
    "]",
    "(",
    ")",
    "{",
    "}",
    "*",
    "\"",
    "\n",
    "99999999999999999999999",
];

proptest! {
    #[test]
    fn they_verify_at_their_stage((stage, module) in any_stage().prop_flat_map(|s| (Just(s), arb_module(s)))) {
        let broken = verify_at(&module, stage).err().unwrap_or_default();
        prop_assert!(broken.is_empty(), "{}\n{module}", broken[0]);
    }

    #[test]
    fn they_print_and_parse_back(module in any_module()) {
        let text = module.to_string();
        let back = check("random.ir", &text).map_err(|e| TestCaseError::fail(e.render()))?;
        prop_assert_eq!(back.to_string(), text);
        prop_assert_eq!(back, module);
    }

    #[test]
    fn they_survive_json(module in any_module()) {
        prop_assert_eq!(Module::from_json(&module.to_json()), Ok(module));
    }

    /// No index of theirs is out of range, so every one can be run.
    #[test]
    fn they_run(module in any_module()) {
        let run = run(&module).map_err(|e| TestCaseError::fail(format!("{e}\n{module}")))?;
        prop_assert_eq!(run.len(), module.entry().unwrap().results.len());
    }

    /// Whatever is done to a text, it parses to something that prints, or to an error that renders.
    #[test]
    fn a_damaged_text_is_an_error_and_no_panic(
        module in any_module(),
        damage in prop::collection::vec((any::<u32>(), 0usize..40, 0..WORDS.len() + 1, any::<char>()), 1..5),
    ) {
        let mut text: Vec<char> = module.to_string().chars().collect();
        for (at, length, word, c) in damage {
            let at = at as usize % (text.len() + 1);
            let end = (at + length / 4).min(text.len());
            match WORDS.get(word) {
                Some(word) => drop(text.splice(at..end, word.chars())),
                None => drop(text.splice(at..end, [c])),
            }
        }
        let text: String = text.into_iter().collect();
        match parse("damaged.ir", &text) {
            Ok(module) => {
                let _ = verify(&module);
                prop_assert_eq!(parse("damaged.ir", &module.to_string()), Ok(module));
            }
            Err(error) => {
                prop_assert!(!error.errors.is_empty());
                prop_assert!(error.render().contains("error: "), "{}", error.render());
                prop_assert!(!error.to_string().is_empty());
            }
        }
    }

    /// JSON can say any numbers; the verifier looks at them before anything uses them.
    #[test]
    fn damaged_numbers_are_errors_and_no_panic(
        module in any_module(),
        damage in prop::collection::vec((any::<u32>(), 0u32..40), 1..4),
    ) {
        let json = module.to_json();
        let digits: Vec<_> = json.char_indices().filter(|(_, c)| c.is_ascii_digit()).map(|(n, _)| n).collect();
        let mut json = json.into_bytes();
        for (at, digit) in damage {
            json[digits[at as usize % digits.len()]] = b'0' + (digit % 10) as u8;
        }
        let json = String::from_utf8(json).unwrap();
        if let Ok(module) = serde_json::from_str::<Module>(&json) {
            let _ = module.to_string();
            let _ = module.canonical();
            let _ = Module::from_json(&json).map_err(|e| e.to_string());
        }
    }
}

/// Modules of both stages, the same in every run.
fn some_modules() -> impl Iterator<Item = Module> {
    (0u32..400).map(|seed| {
        let stage = if seed.is_multiple_of(2) { Stage::Traced } else { Stage::Derived };
        // Any spread of numbers will do: Knuth's multiplicative hash of a counter.
        let tape: Vec<_> =
            (0..400).map(|n| (seed * 1000 + n).wrapping_mul(2_654_435_769).rotate_left(16)).collect();
        module_from(&tape, stage)
    })
}

/// Without chains among them, the properties above say nothing of folded lines.
#[test]
fn chains_occur_whole_and_broken() {
    let (mut folded, mut calls_of_results) = (0, 0);
    for module in some_modules() {
        folded += module.to_string().lines().filter(|line| line.contains("\" to \"")).count();
        for f in &module.functions {
            let pairs = f.body.windows(2).filter(|pair| {
                let same = pair[0].op.mnemonic() == "call" && pair[1].op.mnemonic() == "call";
                same && pair[1].args.first() == pair[0].results.first()
            });
            calls_of_results += pairs.count();
        }
    }
    assert!(folded > 20, "{folded} folded lines");
    // A folded line has two such pairs at least, most have three or four.
    assert!(calls_of_results > 5 * folded, "{calls_of_results} pairs in a row, {folded} folded lines");
}

#[test]
fn every_op_occurs() {
    let mut seen = BTreeSet::new();
    for module in some_modules() {
        seen.extend(module.functions.iter().flat_map(|f| &f.body).map(|inst| inst.op.mnemonic()));
    }
    let missing: Vec<_> = OPS.iter().map(|row| row.mnemonic).filter(|m| !seen.contains(m)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn an_empty_tape_makes_the_plainest_module() {
    let module = module_from(&[], Stage::Traced);
    assert_eq!(verify(&module), Ok(()));
    assert_eq!(module.functions.len(), 1);
}

#[test]
fn size_and_depth_are_no_danger() {
    for unit in ["(", "[", "{", "func @f {\n", "x: f32 = neg ", "a, ", "@", "\"", "axes a=", "* (", "}\n"] {
        let error = parse("big.ir", &unit.repeat(100_000)).unwrap_err();
        assert!(error.errors.len() <= 20);
        assert!(!error.to_string().is_empty());
    }
}

#[test]
fn numbers_out_of_range_are_errors() {
    let module = module_from(&[7; 200], Stage::Traced);
    let mut broken = module.clone();
    broken.functions[0].results = vec![ValueId(9999)];
    let errors = verify(&broken).unwrap_err();
    assert!(errors[0].message.contains("returns value 9999"), "{}", errors[0]);
    let _ = broken.to_string();
}
