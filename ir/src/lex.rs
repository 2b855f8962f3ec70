//! Text to tokens.
//!
//! A statement is a line. A line break counts, unless it stands after a comma or an opening bracket, so
//! that long lists can be wrapped. Comments run from `//` to the end of the line and are dropped.

use std::ops::Range;

use crate::diag::Diagnostic;

/// What a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A bare name or a keyword.
    Ident,
    /// A number, perhaps with sign, fraction and exponent.
    Number,
    /// A string with its quotes.
    Text,
    /// One of `@ : , = [ ] ( ) { } * |`.
    Mark(char),
    /// The end of a statement.
    Newline,
    /// The end of the file.
    End,
}

/// A token and where it stands.
#[derive(Clone, Debug)]
pub(crate) struct Token {
    pub(crate) kind: Kind,
    pub(crate) span: Range<usize>,
}

/// Whether the text format writes this name without quotes: a letter or `_`, then letters, digits, `_`, `.`, `'`.
pub(crate) fn is_ident(name: &str) -> bool {
    let mut chars = name.chars();
    chars.next().is_some_and(starts_ident) && chars.all(continues_ident)
}

fn starts_ident(c: char) -> bool {
    c.is_ascii_alphabetic() || c == '_'
}

fn continues_ident(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '\'')
}

/// The tokens of a text; the last one is [`Kind::End`].
///
/// # Errors
/// Everything that is no token, in order.
pub(crate) fn tokens(text: &str) -> Result<Vec<Token>, Vec<Diagnostic>> {
    let mut lexer = Lexer { text, at: 0 };
    let (mut tokens, mut errors): (Vec<Token>, Vec<Diagnostic>) = (Vec::new(), Vec::new());
    loop {
        let start = lexer.at;
        let kind = match lexer.next() {
            Ok(Some(kind)) => kind,
            Ok(None) => continue,
            Err(error) => {
                errors.push(error);
                continue;
            }
        };
        let silent = kind == Kind::Newline
            && tokens.last().is_none_or(|t| {
                matches!(t.kind, Kind::Newline | Kind::Mark(',') | Kind::Mark('[') | Kind::Mark('('))
            });
        if !silent {
            tokens.push(Token { kind, span: start..lexer.at });
        }
        if kind == Kind::End {
            return if errors.is_empty() { Ok(tokens) } else { Err(errors) };
        }
    }
}

struct Lexer<'t> {
    text: &'t str,
    at: usize,
}

impl Lexer<'_> {
    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    /// Moves past all characters that satisfy the test.
    fn skip(&mut self, test: impl Fn(char) -> bool) {
        let rest = &self.text[self.at..];
        self.at += rest.find(|c| !test(c)).unwrap_or(rest.len());
    }

    /// The token that starts here, or `None` for blanks and comments. It moves on in any case, but at the end.
    fn next(&mut self) -> Result<Option<Kind>, Diagnostic> {
        let start = self.at;
        let Some(c) = self.peek() else { return Ok(Some(Kind::End)) };
        self.at += c.len_utf8();
        Ok(Some(match c {
            '\n' => Kind::Newline,
            ' ' | '\t' | '\r' => return Ok(None),
            '/' if self.peek() == Some('/') => {
                self.skip(|c| c != '\n');
                return Ok(None);
            }
            '@' | ':' | ',' | '=' | '[' | ']' | '(' | ')' | '{' | '}' | '*' | '|' => Kind::Mark(c),
            '"' => {
                self.string(start)?;
                Kind::Text
            }
            '-' | '0'..='9' => {
                self.number(start)?;
                Kind::Number
            }
            c if starts_ident(c) => {
                self.skip(continues_ident);
                Kind::Ident
            }
            c => {
                let error = Diagnostic::new(start..self.at, format!("unexpected character `{}`", escape(c)));
                return Err(
                    error.note("a name with other characters than A-Z a-z 0-9 _ . ' stands in quotes")
                );
            }
        }))
    }

    fn number(&mut self, start: usize) -> Result<(), Diagnostic> {
        loop {
            self.skip(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.');
            let exponent = self.text[start..self.at].ends_with(['e', 'E']);
            if !exponent || !matches!(self.peek(), Some('+' | '-')) {
                break;
            }
            self.at += 1;
        }
        let text = &self.text[start..self.at];
        let digits = text.strip_prefix('-').unwrap_or(text);
        if text == "-inf" || (digits.starts_with(|c: char| c.is_ascii_digit()) && text.parse::<f64>().is_ok())
        {
            return Ok(());
        }
        Err(Diagnostic::new(start..self.at, format!("`{}` is not a number", shorten(text))))
    }

    fn string(&mut self, start: usize) -> Result<(), Diagnostic> {
        let mut bad_escape = None;
        loop {
            self.skip(|c| !matches!(c, '"' | '\\' | '\n'));
            let here = self.at;
            match self.peek() {
                Some('"') => {
                    self.at += 1;
                    return bad_escape.map_or(Ok(()), Err);
                }
                Some('\\') => {
                    let (c, length) = unescape_one(&self.text[here..]);
                    self.at += length;
                    if c.is_none() {
                        bad_escape.get_or_insert(
                            Diagnostic::new(here..self.at, "unknown escape").note(
                                r#"the escapes are \" \\ \n \r \t and \u{…} with a hexadecimal number"#,
                            ),
                        );
                    }
                }
                _ => {
                    return Err(Diagnostic::new(start..here, "unterminated string")
                        .note("a string ends on the line on which it starts"));
                }
            }
        }
    }
}

/// The character that the escape at the start of the text stands for, if it is one, and its length.
fn unescape_one(text: &str) -> (Option<char>, usize) {
    let mut chars = text.chars();
    chars.next();
    match chars.next() {
        Some('n') => (Some('\n'), 2),
        Some('r') => (Some('\r'), 2),
        Some('t') => (Some('\t'), 2),
        Some(c @ ('"' | '\\')) => (Some(c), 2),
        Some('u') => {
            let hex = text[2..].strip_prefix('{').and_then(|rest| rest.split_once('}')).map(|(hex, _)| hex);
            match hex {
                Some(hex) if hex.len() <= 6 && hex.bytes().all(|b| b.is_ascii_hexdigit()) => {
                    (u32::from_str_radix(hex, 16).ok().and_then(char::from_u32), hex.len() + 4)
                }
                _ => (None, 2),
            }
        }
        // The backslash alone, so that the end of the line is still seen as one.
        _ => (None, 1),
    }
}

/// What a string token says.
pub(crate) fn unquote(token: &str) -> String {
    let inner = token.strip_prefix('"').unwrap_or(token);
    let mut rest = inner.strip_suffix('"').unwrap_or(inner);
    let mut out = String::with_capacity(rest.len());
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let (c, length) = unescape_one(&rest[at..]);
        out.extend(c);
        rest = &rest[at + length..];
    }
    out.push_str(rest);
    out
}

/// The string token that says this.
pub(crate) fn quote(text: &str) -> String {
    let inner: String = text.chars().map(escape).collect();
    format!("\"{inner}\"")
}

fn escape(c: char) -> String {
    match c {
        '"' => "\\\"".to_owned(),
        '\\' => "\\\\".to_owned(),
        '\n' => "\\n".to_owned(),
        '\r' => "\\r".to_owned(),
        '\t' => "\\t".to_owned(),
        c if c.is_control() => format!("\\u{{{:x}}}", u32::from(c)),
        c => c.to_string(),
    }
}

/// The start of a text that is too long for a message.
pub(crate) fn shorten(text: &str) -> String {
    const MOST: usize = 40;
    match text.char_indices().nth(MOST) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_and_reads_back() {
        for text in ["", "a b", "\"\\\n\t\r\u{1}", "ü∑", "it's", "\u{85}"] {
            assert_eq!(unquote(&quote(text)), text);
            assert_eq!(tokens(&quote(text)).unwrap().len(), 2);
        }
    }

    #[test]
    fn a_line_break_ends_a_statement_unless_the_line_is_open() {
        let kinds = |text| tokens(text).unwrap().into_iter().map(|t| t.kind).collect::<Vec<_>>();
        assert_eq!(kinds("\n\n// only a comment\n"), [Kind::End]);
        assert_eq!(
            kinds("a\n\n  b // c\n"),
            [Kind::Ident, Kind::Newline, Kind::Ident, Kind::Newline, Kind::End]
        );
        assert_eq!(kinds("a,\nb"), [Kind::Ident, Kind::Mark(','), Kind::Ident, Kind::End]);
    }

    #[test]
    fn refuses_what_is_no_token() {
        for text in ["\"open", "\"\\", "\"\\q\"", "\"\\u{d800}\"", "1x", "-", "-x", "$", "/", "1e", "\"\\\n"]
        {
            assert!(tokens(text).is_err(), "{text:?}");
        }
        for text in ["-inf", "-1.5e-7", "1e+5", "18446744073709551616", "a.b'c"] {
            assert_eq!(tokens(text).unwrap().len(), 2, "{text:?}");
        }
    }
}
