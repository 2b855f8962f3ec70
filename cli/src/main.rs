//! The `latentc` command.
//!
//! One file per subcommand. Results go to standard output, progress and errors to standard error; what is
//! written to disk appears complete or not at all.

mod bench;
mod check;
mod compile;
mod dump;
mod edits;
mod eval;
mod explain;
mod folder;
mod gradient;
mod held;
mod init;
mod manifest;
mod model;
mod opt;
mod params;
mod passes;
mod progress;
mod report;
mod roofline;
mod run;
mod share;
mod table;
mod target;
mod train;
mod tune;
mod tuning;
mod verify;

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// What is not said on the command line.
const ENVIRONMENT: &str = "Environment:
  LATENTC_CACHE  the folder below which compiled CUDA kernels are kept from run to run, or `off`;
                 if not set, latentc in the user's folder of caches, such as ~/.cache";

/// Compiles latent-attention mixture-of-experts models to GPU kernels.
///
/// MODEL is a folder in Hugging Face form, a config.json, or the name of a bundled configuration
/// (deepseek-v2, deepseek-v2-lite, deepseek-67b, bench-moe-0.3b). A path that exists comes first.
#[derive(Parser)]
#[command(name = "latentc", version, max_term_width = 100, after_help = ENVIRONMENT)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Params(params::Args),
    Dump(dump::Args),
    Explain(explain::Args),
    Report(report::Args),
    Roofline(roofline::Args),
    Compile(compile::Args),
    Check(check::Args),
    Bench(bench::Args),
    Tune(tune::Args),
    Init(init::Args),
    Run(run::Args),
    Eval(eval::Args),
    Train(Box<train::Args>),
    Verify(verify::Args),
    Opt(opt::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command {
        Command::Params(args) => params::params(&args),
        Command::Dump(args) => dump::dump(&args),
        Command::Explain(args) => explain::explain(&args),
        Command::Report(args) => report::report(&args),
        Command::Roofline(args) => roofline::roofline(&args),
        Command::Compile(args) => compile::compile(&args),
        Command::Check(args) => check::check(&args),
        Command::Bench(args) => bench::bench(&args),
        Command::Tune(args) => tune::tune(&args),
        Command::Init(args) => init::init(&args),
        Command::Run(args) => run::run(&args),
        Command::Eval(args) => eval::eval(&args),
        Command::Train(args) => train::train(&args),
        Command::Verify(args) => verify::verify(&args),
        Command::Opt(args) => opt::opt(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has seen enough: `latentc dump … | head` is no error.
        Err(e) if closed(&e) => ExitCode::SUCCESS,
        Err(e) => {
            let text = match e.downcast_ref::<Rendered>() {
                Some(rendered) => rendered.0.clone(),
                None => chain(&e),
            };
            // There is nowhere left to complain to if standard error is closed as well.
            let _ = writeln!(io::stderr(), "{}", text.trim_end());
            ExitCode::FAILURE
        }
    }
}

/// An error that is already drawn for people, with its own `error:` lines.
#[derive(Debug)]
struct Rendered(String);

impl fmt::Display for Rendered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Rendered {}

/// The error and its causes on one line. Many of our messages end with their cause already; none is said twice.
fn chain(error: &anyhow::Error) -> String {
    let mut text = "error".to_owned();
    for cause in error.chain().map(ToString::to_string) {
        if !text.ends_with(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

/// Whether standard output was closed by its reader.
fn closed(error: &anyhow::Error) -> bool {
    error.is::<io::Error>()
        && error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

/// What takes a number of tokens, sequences or positions.
fn size() -> clap::builder::RangedU64ValueParser {
    clap::value_parser!(u64).range(1..=1 << 30)
}

/// Writes a text to standard output.
fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Writes indented JSON and a newline to standard output.
fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    print(&(serde_json::to_string_pretty(value)? + "\n"))
}

/// Whether errors may have colours: on a terminal, unless the user wants none (no-color.org).
fn colours() -> bool {
    io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn the_help_names_what_is_bundled() {
        use clap::CommandFactory;
        let help = Cli::command().render_long_help().to_string();
        for name in latentc_models::config::ModelConfig::bundled_names() {
            assert!(help.contains(name), "{name} is missing in:\n{help}");
        }
    }

    #[test]
    fn a_cause_is_said_once() {
        let system = io::Error::other("disk on fire");
        let error =
            anyhow::Error::new(system).context("config.json: cannot read: disk on fire").context("start");
        assert_eq!(chain(&error), "error: start: config.json: cannot read: disk on fire");
    }
}
