//! What is wrong with a spec, and where.

use std::fmt;
use std::path::{Path, PathBuf};

use codespan_reporting::diagnostic::{self, Label};
use codespan_reporting::files::SimpleFiles;
use codespan_reporting::term::{self, Config};

use crate::expr::Spot;

/// One mistake: what it is, where it is, what it disagrees with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// Lower case, no full stop, both facts.
    pub message: String,
    /// The place.
    pub at: Spot,
    /// Places that it disagrees with, and what is there.
    pub related: Vec<(Spot, String)>,
    /// How to mend it.
    pub notes: Vec<String>,
}

impl Diagnostic {
    /// A mistake at a place.
    pub fn new(at: Spot, message: impl Into<String>) -> Diagnostic {
        Diagnostic { message: message.into(), at, related: Vec::new(), notes: Vec::new() }
    }

    /// With another place that has to do with it.
    #[must_use]
    pub fn related(mut self, at: Spot, what: impl Into<String>) -> Diagnostic {
        self.related.push((at, what.into()));
        self
    }

    /// With advice.
    #[must_use]
    pub fn note(mut self, note: impl Into<String>) -> Diagnostic {
        self.notes.push(note.into());
        self
    }
}

/// All mistakes of a spec. `Display` gives a line for each; [`SpecError::render`] draws the author's lines.
#[derive(Clone, Debug, thiserror::Error)]
pub struct SpecError {
    /// In the order in which they were met.
    pub diagnostics: Vec<Diagnostic>,
}

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, d) in self.diagnostics.iter().enumerate() {
            if n > 0 {
                writeln!(f)?;
            }
            write!(f, "{}:{}:{}: {}", d.at.file, d.at.line, d.at.col, d.message)?;
        }
        Ok(())
    }
}

impl SpecError {
    /// The errors with the lines that they are about, where the source can be read; without them, where not.
    pub fn render(&self) -> String {
        let mut out = String::new();
        for d in &self.diagnostics {
            match draw(d) {
                Some(text) => out.push_str(&text),
                None => out.push_str(&plain(d)),
            }
        }
        out
    }
}

fn plain(d: &Diagnostic) -> String {
    let mut out = format!("error: {}\n  ┌─ {}:{}:{}\n", d.message, d.at.file, d.at.line, d.at.col);
    for (at, what) in &d.related {
        out.push_str(&format!("  = {}:{}:{}: {what}\n", at.file, at.line, at.col));
    }
    for note in &d.notes {
        out.push_str(&format!("  = {note}\n"));
    }
    out
}

fn draw(d: &Diagnostic) -> Option<String> {
    let mut files = SimpleFiles::new();
    let mut known: Vec<(&str, usize, String)> = Vec::new();
    let mut labels = Vec::new();
    let spots = std::iter::once((d.at, "")).chain(d.related.iter().map(|(at, what)| (*at, what.as_str())));
    for (n, (at, what)) in spots.enumerate() {
        let (id, text) = match known.iter().find(|k| k.0 == at.file) {
            Some(k) => (k.1, k.2.clone()),
            None => {
                let text = std::fs::read_to_string(locate(at.file)?).ok()?;
                let id = files.add(at.file, text.clone());
                known.push((at.file, id, text.clone()));
                (id, text)
            }
        };
        let span = span(&text, at)?;
        labels.push(if n == 0 {
            Label::primary(id, span)
        } else {
            Label::secondary(id, span).with_message(what)
        });
    }
    let report = diagnostic::Diagnostic::error()
        .with_message(&d.message)
        .with_labels(labels)
        .with_notes(d.notes.clone());
    term::emit_into_string(&Config::default(), &files, &report).ok()
}

/// The file, from here or from a folder above: tests run in the folder of their crate, spots count from the workspace.
fn locate(file: &str) -> Option<PathBuf> {
    let here = std::env::current_dir().ok()?;
    here.ancestors().map(|dir: &Path| dir.join(file)).find(|path| path.is_file())
}

/// The bytes of the word at a place.
fn span(text: &str, at: Spot) -> Option<std::ops::Range<usize>> {
    let line_start: usize =
        text.split_inclusive('\n').take((at.line as usize).checked_sub(1)?).map(str::len).sum();
    let line = text.get(line_start..)?.lines().next()?;
    let (start, _) = line.char_indices().nth((at.col as usize).checked_sub(1)?)?;
    let word = line[start..].chars().take_while(|c| c.is_alphanumeric() || *c == '_');
    let len = word.map(char::len_utf8).sum::<usize>().max(1);
    Some(line_start + start..line_start + start + len)
}
