//! `latentc opt`: some passes on a text in the IR's format.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use latentc_ir::{Module, ParseError};
use latentc_passes::{Context, Pass};

use crate::folder::write_file;
use crate::held::FormArgs;
use crate::model::GraphArg;
use crate::passes::{Validation, named};
use crate::{Rendered, colours, print, progress};

/// Runs passes on IR text, in the order given, and prints what they make of it. The IR is verified before and after each.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A file as `dump` and `compile` write it; `-` is standard input.
    file: PathBuf,
    /// Names of `dump --print-pipeline`, separated by commas; one may come more than once.
    #[arg(long, value_delimiter = ',', required = true, value_name = "PASS,…")]
    passes: Vec<String>,
    /// Which graph the passes are told to make.
    #[arg(long, value_enum, default_value = "prefill")]
    graph: GraphArg,
    #[command(flatten)]
    form: FormArgs,
    /// New tokens of a sequence that costs are weighed for; as many as is usual for the graph if not given.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    tokens: Option<u64>,
    /// Run what each pass is given and what it makes on small instances, and fail if they differ.
    #[arg(long)]
    validate: bool,
    /// The file to write, instead of standard output.
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,
}

pub(crate) fn opt(args: &Args) -> anyhow::Result<()> {
    // A wrong name is found before the text is read: it may come from a pipe.
    let passes: Vec<Pass> = args.passes.iter().map(|name| named(name)).collect::<Result<_, _>>()?;
    let (name, text) = read(&args.file)?;
    let module = check(&name, &text)?;
    let mut cx = Context { tokens: args.tokens, ..Context::new(args.form.of(args.graph)) };
    let stages = latentc_passes::run(&module, &mut cx, &passes)?;
    if args.validate {
        let mut validation = Validation::default();
        validation.add(&passes, &cx, &stages, &progress::spinner("validating"))?;
        eprintln!("{}", validation.summary());
    }
    let text = stages.last().map_or_else(String::new, |(_, module)| module.to_string());
    match &args.out {
        Some(out) => write_file(out, &text),
        None => print(&text),
    }
}

/// The text, and what to call it in errors.
pub(crate) fn read(file: &Path) -> anyhow::Result<(String, String)> {
    if file == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).context("cannot read standard input")?;
        return Ok(("standard input".to_owned(), text));
    }
    let name = file.display().to_string();
    let text = fs::read_to_string(file).with_context(|| format!("{name}: cannot read"))?;
    Ok((name, text))
}

/// The module of a text, verified.
pub(crate) fn check(name: &str, text: &str) -> anyhow::Result<Module> {
    let render = |e: ParseError| Rendered(if colours() { e.render_in_colour() } else { e.render() });
    Ok(latentc_ir::check(name, text).map_err(render)?)
}
