//! `docs/ir.md` is true: its op table is the op table, its examples verify and print as they stand.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use latentc_ir::check;
use latentc_ir::ops::OPS;

const START: &str = "<!-- ops: written by ir/tests/docs.rs from the op table -->\n";
const END: &str = "<!-- end of ops -->\n";

fn page() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/ir.md")
}

fn op_table() -> String {
    let mut table = "| op | meaning |\n|---|---|\n".to_owned();
    for row in OPS {
        let cell = |text: String| text.replace('|', "\\|");
        let usage = row.usage().replace(" or ", "` or `");
        writeln!(table, "| `{}` | {} |", cell(usage), cell(format!("`{}`", row.equation))).unwrap();
    }
    table
}

#[test]
fn the_op_table_is_up_to_date() {
    let old = fs::read_to_string(page()).unwrap();
    let (before, rest) = old.split_once(START).expect("the page has the line where the table starts");
    let (_, after) = rest.split_once(END).expect("the page has the line where the table ends");
    let new = format!("{before}{START}{}{END}{after}", op_table());
    if std::env::var_os("LATENTC_BLESS").is_some_and(|v| v == "1") {
        fs::write(page(), new).unwrap();
    } else {
        assert!(
            old == new,
            "docs/ir.md is not what the op table says; LATENTC_BLESS=1 cargo test writes it anew"
        );
    }
}

#[test]
fn the_examples_verify_and_print_as_they_stand() {
    let text = fs::read_to_string(page()).unwrap();
    let examples: Vec<_> =
        text.split("```ir\n").skip(1).filter_map(|rest| Some(rest.split_once("```")?.0)).collect();
    assert!(!examples.is_empty());
    for example in examples {
        let module = check("docs/ir.md", example).unwrap_or_else(|e| panic!("{}", e.render()));
        assert_eq!(module.to_string(), example);
    }
}
