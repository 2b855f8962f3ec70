//! Errors with carets: what is wrong with a text, and where.

use std::fmt;
use std::ops::Range;

use codespan_reporting::diagnostic::{Diagnostic as Shown, Label};
use codespan_reporting::files::{Files, SimpleFile};
use codespan_reporting::term;
use codespan_reporting::term::termcolor::{Ansi, NoColor, WriteColor};

/// One error in a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// What is wrong, with both facts where two disagree.
    pub message: String,
    /// The bytes at fault.
    pub span: Range<usize>,
    /// What is said right under the caret; may be empty.
    pub label: String,
    /// Other places that matter, and why.
    pub related: Vec<(Range<usize>, String)>,
    /// Help, one sentence each.
    pub notes: Vec<String>,
}

impl Diagnostic {
    /// An error at these bytes.
    pub fn new(span: Range<usize>, message: impl Into<String>) -> Diagnostic {
        Diagnostic {
            message: message.into(),
            span,
            label: String::new(),
            related: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Says something under the caret.
    #[must_use]
    pub fn label(mut self, text: impl Into<String>) -> Diagnostic {
        self.label = text.into();
        self
    }

    /// Points at another place.
    #[must_use]
    pub fn related(mut self, span: Range<usize>, text: impl Into<String>) -> Diagnostic {
        self.related.push((span, text.into()));
        self
    }

    /// Adds help.
    #[must_use]
    pub fn note(mut self, text: impl Into<String>) -> Diagnostic {
        self.notes.push(text.into());
        self
    }
}

/// What is wrong with a text in the IR's format: at least one error, in order of the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseError {
    /// The name of the file, for messages only.
    pub file: String,
    /// The whole text.
    pub text: String,
    /// The errors.
    pub errors: Vec<Diagnostic>,
}

impl ParseError {
    /// All errors with line, column, the line itself and carets, without colours.
    pub fn render(&self) -> String {
        self.emit(NoColor::new(Vec::new()), NoColor::into_inner)
    }

    /// The same with ANSI colours, for a terminal.
    pub fn render_in_colour(&self) -> String {
        self.emit(Ansi::new(Vec::new()), Ansi::into_inner)
    }

    fn emit<W: WriteColor>(&self, mut out: W, bytes: impl FnOnce(W) -> Vec<u8>) -> String {
        let file = SimpleFile::new(&self.file, &self.text);
        for (n, error) in self.errors.iter().enumerate() {
            let primary = Label::primary((), error.span.clone()).with_message(&error.label);
            let related = error
                .related
                .iter()
                .map(|(span, text)| Label::secondary((), span.clone()).with_message(text));
            let shown = Shown::error()
                .with_message(&error.message)
                .with_labels(std::iter::once(primary).chain(related).collect())
                .with_notes(error.notes.clone());
            // Writing to memory does not fail, and a span out of range, which is a bug, is not worth a panic.
            let newline = if n > 0 { writeln!(out) } else { Ok(()) };
            if newline.is_err()
                || term::emit_to_write_style(&mut out, &term::Config::default(), &file, &shown).is_err()
            {
                let _ = writeln!(out, "error: {}", error.message);
            }
        }
        let text = String::from_utf8_lossy(&bytes(out)).into_owned();
        // Codespan ends each report with an empty line; one between two is enough.
        let mut lines: Vec<_> = text.lines().map(str::trim_end).collect();
        lines.dedup_by(|a, b| a.is_empty() && b.is_empty());
        while lines.last().is_some_and(|l| l.is_empty()) {
            lines.pop();
        }
        lines.join("\n") + "\n"
    }
}

impl fmt::Display for ParseError {
    /// One line an error: `file:line:column: message`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = SimpleFile::new(&self.file, &self.text);
        for (n, error) in self.errors.iter().enumerate() {
            if n > 0 {
                writeln!(f)?;
            }
            write!(f, "{}:", self.file)?;
            if let Ok(place) = file.location((), error.span.start) {
                write!(f, "{}:{}:", place.line_number, place.column_number)?;
            }
            write!(f, " {}", error.message)?;
        }
        Ok(())
    }
}

impl std::error::Error for ParseError {}

/// The candidate that a misspelt word most likely stands for.
pub(crate) fn did_you_mean<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<String> {
    // Nobody misspells a name of such length by a letter or two, and comparing takes the product of the lengths.
    const LONGEST: usize = 64;
    if word.len() > LONGEST {
        return None;
    }
    candidates
        .into_iter()
        .filter(|c| c.len() <= LONGEST)
        .map(|c| (strsim::osa_distance(word, c), c))
        .filter(|(d, c)| {
            let length = word.len().max(c.len());
            d * 3 <= length || (*d == 1 && length > 1)
        })
        .min()
        .map(|(_, c)| format!("did you mean `{c}`?"))
}
