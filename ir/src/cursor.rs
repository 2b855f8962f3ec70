//! A place in a list of tokens, and what a parser asks of it.

use std::ops::Range;

use crate::diag::Diagnostic;
use crate::lex::{Kind, Token, shorten, unquote};
use crate::ops::Real;

/// An error that the cursor has already noted.
#[derive(Debug)]
pub(crate) struct Reported;

/// What a part of the grammar yields.
pub(crate) type Parsed<T> = Result<T, Reported>;

/// After so many errors the rest is not read.
const MOST_ERRORS: usize = 20;

/// Reads tokens one by one and notes errors.
pub(crate) struct Cursor<'t> {
    text: &'t str,
    tokens: Vec<Token>,
    at: usize,
    pub(crate) errors: Vec<Diagnostic>,
}

impl<'t> Cursor<'t> {
    pub(crate) fn new(text: &'t str, tokens: Vec<Token>) -> Cursor<'t> {
        Cursor { text, tokens, at: 0, errors: Vec::new() }
    }

    fn token(&self, ahead: usize) -> (Kind, Range<usize>) {
        let end = self.text.len()..self.text.len();
        self.tokens.get(self.at + ahead).map_or((Kind::End, end), |t| (t.kind, t.span.clone()))
    }

    /// The kind of the token so far ahead.
    pub(crate) fn kind(&self, ahead: usize) -> Kind {
        self.token(ahead).0
    }

    /// Where the next token stands.
    pub(crate) fn span(&self) -> Range<usize> {
        self.token(0).1
    }

    /// What the next token says.
    pub(crate) fn word(&self) -> &'t str {
        &self.text[self.span()]
    }

    /// From a token's start to the end of the last one read.
    pub(crate) fn since(&self, start: usize) -> Range<usize> {
        let last = self.at.checked_sub(1).and_then(|n| self.tokens.get(n));
        start..last.map_or(start, |t| t.span.end).max(start)
    }

    fn advance(&mut self) {
        self.at = (self.at + 1).min(self.tokens.len());
    }

    // --- errors -----------------------------------------------------------------------------------

    /// Notes an error. With too many of them it also jumps to the end.
    pub(crate) fn note(&mut self, error: Diagnostic) {
        if self.errors.len() < MOST_ERRORS {
            self.errors.push(error);
        }
        if self.errors.len() == MOST_ERRORS {
            self.at = self.tokens.len();
        }
    }

    /// Notes an error and gives up what is being read.
    pub(crate) fn fail<T>(&mut self, error: Diagnostic) -> Parsed<T> {
        self.note(error);
        Err(Reported)
    }

    /// The error that the next token is not what it should be.
    pub(crate) fn unexpected(&self, wanted: &str) -> Diagnostic {
        let found = match self.kind(0) {
            Kind::Newline => "the end of the line".to_owned(),
            Kind::End => "the end of the file".to_owned(),
            Kind::Ident | Kind::Number | Kind::Text | Kind::Mark(_) => format!("`{}`", shorten(self.word())),
        };
        Diagnostic::new(self.span(), format!("expected {wanted}, found {found}"))
    }

    fn expected<T>(&mut self, wanted: &str) -> Parsed<T> {
        let error = self.unexpected(wanted);
        self.fail(error)
    }

    // --- marks and keywords -------------------------------------------------------------------------

    /// Reads this mark if it is next.
    pub(crate) fn eat(&mut self, mark: char) -> bool {
        let found = self.kind(0) == Kind::Mark(mark);
        if found {
            self.advance();
        }
        found
    }

    /// Reads this mark.
    pub(crate) fn mark(&mut self, mark: char) -> Parsed<()> {
        if self.eat(mark) { Ok(()) } else { self.expected(&format!("`{mark}`")) }
    }

    /// Whether this keyword is next.
    pub(crate) fn sees(&self, keyword: &str) -> bool {
        self.kind(0) == Kind::Ident && self.word() == keyword
    }

    /// Whether this keyword is the token after the next.
    pub(crate) fn sees_after(&self, keyword: &str) -> bool {
        let (kind, span) = self.token(1);
        kind == Kind::Ident && self.text[span] == *keyword
    }

    /// Reads this keyword if it is next.
    pub(crate) fn eat_word(&mut self, keyword: &str) -> bool {
        let found = self.sees(keyword);
        if found {
            self.advance();
        }
        found
    }

    /// Reads this keyword.
    pub(crate) fn keyword(&mut self, keyword: &str) -> Parsed<()> {
        if self.eat_word(keyword) { Ok(()) } else { self.expected(&format!("`{keyword}`")) }
    }

    // --- words --------------------------------------------------------------------------------------

    /// Reads a bare word, as it stands.
    pub(crate) fn ident(&mut self, wanted: &str) -> Parsed<(&'t str, Range<usize>)> {
        if self.kind(0) != Kind::Ident {
            return self.expected(wanted);
        }
        let word = (self.word(), self.span());
        self.advance();
        Ok(word)
    }

    /// Reads a name, bare or in quotes.
    pub(crate) fn name(&mut self, wanted: &str) -> Parsed<(String, Range<usize>)> {
        let name = match self.kind(0) {
            Kind::Ident => self.word().to_owned(),
            Kind::Text => unquote(self.word()),
            Kind::Number | Kind::Mark(_) | Kind::Newline | Kind::End => return self.expected(wanted),
        };
        let span = self.span();
        self.advance();
        Ok((name, span))
    }

    /// Reads a string.
    pub(crate) fn string(&mut self, wanted: &str) -> Parsed<String> {
        if self.kind(0) != Kind::Text {
            return self.expected(wanted);
        }
        let text = unquote(self.word());
        self.advance();
        Ok(text)
    }

    /// Reads an equation's tag: a bare word or number, or a string.
    pub(crate) fn tag(&mut self) -> Parsed<String> {
        if self.kind(0) == Kind::Number {
            let tag = self.word().to_owned();
            self.advance();
            return Ok(tag);
        }
        Ok(self.name("an equation's tag")?.0)
    }

    // --- numbers ------------------------------------------------------------------------------------

    /// Reads a natural number up to `most`.
    pub(crate) fn natural(&mut self, wanted: &str, most: u64) -> Parsed<u64> {
        let word = self.word();
        if self.kind(0) != Kind::Number || !word.bytes().all(|b| b.is_ascii_digit()) {
            return self.expected(wanted);
        }
        match word.parse::<u64>() {
            Ok(n) if n <= most => {
                self.advance();
                Ok(n)
            }
            _ => {
                let message = format!("{wanted} of {} is too large, the most is {most}", shorten(word));
                self.fail(Diagnostic::new(self.span(), message))
            }
        }
    }

    /// Reads a number.
    pub(crate) fn real(&mut self) -> Parsed<Real> {
        let (kind, word) = (self.kind(0), self.word());
        let x = match kind {
            Kind::Number => word.parse::<f64>().ok(),
            Kind::Ident if word == "inf" => Some(f64::INFINITY),
            Kind::Ident if word == "NaN" => Some(f64::NAN),
            Kind::Ident | Kind::Text | Kind::Mark(_) | Kind::Newline | Kind::End => None,
        };
        match x {
            None => self.expected("a number"),
            Some(x) if kind == Kind::Number && x.is_infinite() && word != "-inf" => {
                let message = format!("{} is too large for an f64", shorten(word));
                self.fail(Diagnostic::new(self.span(), message).note("infinity is written `inf`"))
            }
            Some(x) => {
                self.advance();
                Ok(Real(x))
            }
        }
    }

    // --- lines --------------------------------------------------------------------------------------

    /// Reads a line break; the end of the file and a closing brace end a line as well.
    pub(crate) fn end_of_line(&mut self) -> Parsed<()> {
        match self.kind(0) {
            Kind::Newline => {
                self.advance();
                Ok(())
            }
            Kind::End | Kind::Mark('}') => Ok(()),
            Kind::Ident | Kind::Number | Kind::Text | Kind::Mark(_) => self.expected("the end of the line"),
        }
    }

    /// Moves past line breaks.
    pub(crate) fn skip_breaks(&mut self) {
        while self.kind(0) == Kind::Newline {
            self.advance();
        }
    }

    /// Moves to the start of the next line.
    pub(crate) fn skip_line(&mut self) {
        while !matches!(self.kind(0), Kind::Newline | Kind::End) {
            self.advance();
        }
        self.skip_breaks();
    }
}
