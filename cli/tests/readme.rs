//! Every command that the README shows is run, and prints what the README says.
//!
//! A `console` block holds commands after `$ ` and their output. A line `…` stands for any lines, `…` within a line for any text.

use std::path::Path;
use std::process::Command;

fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this crate is a folder of the workspace")
}

/// The commands of the README with the output that it shows.
fn shown() -> Vec<(String, Vec<String>)> {
    let text = std::fs::read_to_string(workspace().join("README.md")).expect("there is a README");
    let mut commands: Vec<(String, Vec<String>)> = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        match (inside, line) {
            (false, "```console") => inside = true,
            (true, "```") => inside = false,
            (true, _) => match line.strip_prefix("$ ") {
                Some(command) => commands.push((command.to_owned(), Vec::new())),
                None => commands.last_mut().expect("a block begins with a command").1.push(line.to_owned()),
            },
            (false, _) => {}
        }
    }
    commands
}

fn line_matches(shown: &str, printed: &str) -> bool {
    let mut parts = shown.split('…');
    let Some(mut rest) = printed.strip_prefix(parts.next().unwrap_or_default()) else { return false };
    let parts: Vec<_> = parts.collect();
    for (n, part) in parts.iter().enumerate() {
        let at = if n + 1 == parts.len() && rest.ends_with(part) {
            Some(rest.len() - part.len())
        } else {
            rest.find(part)
        };
        let Some(at) = at else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.is_empty()
}

fn lines_match(shown: &[String], printed: &[&str]) -> bool {
    match shown.split_first() {
        None => printed.is_empty(),
        Some((first, rest)) if first == "…" => {
            (0..=printed.len()).any(|n| lines_match(rest, &printed[n..]))
        }
        Some((first, rest)) => {
            printed.first().is_some_and(|p| line_matches(first, p)) && lines_match(rest, &printed[1..])
        }
    }
}

#[test]
fn the_readme_shows_what_happens() {
    // Models that an earlier run made: commands overwrite nothing.
    let made = workspace().join("target/readme");
    if made.exists() {
        std::fs::remove_dir_all(&made).expect("the folder is ours");
    }
    let commands = shown();
    assert!(commands.len() >= 6, "the README shows its commands in `console` blocks");
    let mut wrong = Vec::new();
    for (line, output) in commands {
        let mut words = line.split_whitespace();
        let program = match words.next() {
            Some("latentc") => env!("CARGO_BIN_EXE_latentc").into(),
            Some(script) => workspace().join(script),
            None => panic!("an empty command"),
        };
        let mut command = Command::new(program);
        // Scripts take the command that is built already.
        command.args(words).current_dir(workspace()).env("LATENTC", env!("CARGO_BIN_EXE_latentc"));
        let run = command.output().expect("the command starts");
        assert!(run.status.success(), "$ {line}\n{}", String::from_utf8_lossy(&run.stderr));
        let printed = String::from_utf8_lossy(&run.stdout);
        let lines: Vec<_> = printed.lines().collect();
        if !lines_match(&output, &lines) {
            wrong.push(format!("$ {line}\nprints\n{printed}\nthe README says\n{}\n", output.join("\n")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn dots_stand_for_anything() {
    assert!(line_matches("a … c", "a b c") && line_matches("…", "") && !line_matches("a…", "b"));
    let shown = ["x".to_owned(), "…".to_owned(), "z".to_owned()];
    assert!(
        lines_match(&shown, &["x", "z"])
            && lines_match(&shown, &["x", "y", "y", "z"])
            && !lines_match(&shown, &["x"])
    );
}
