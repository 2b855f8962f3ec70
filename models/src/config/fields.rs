//! A typed reader of one JSON object that notes problems and reads on.
//!
//! A reader that stops at the first problem makes its user run it once per mistake. Here every getter
//! returns a value whatever it finds; where the file is wrong it notes why and returns a stand-in, and the
//! caller throws the stand-ins away by asking [`Fields::finish`] before it uses any.

use std::fmt;

use serde_json::{Map, Value};

/// One thing that is wrong in a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where: a key of the file, with dots into nested objects (`rope_scaling.factor`).
    pub key: String,
    /// What: the two facts that disagree, and what to do.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`: {}", self.key, self.what)
    }
}

/// No axis of a model is longer than this. It keeps products of sizes far from overflow.
pub(super) const MAX_SIZE: usize = 1 << 24;

/// The keys of one object, and what was wrong with those read so far.
pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    prefix: String,
    problems: Vec<Problem>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(map: &'a Map<String, Value>) -> Self {
        Fields { map, prefix: String::new(), problems: Vec::new() }
    }

    /// The object under `key`, or `None` where it is null or missing. Hand it back to [`Fields::absorb`].
    pub(super) fn object(&mut self, key: &str) -> Option<Fields<'a>> {
        match self.value(key)? {
            Value::Object(map) => {
                Some(Fields { map, prefix: format!("{}{key}.", self.prefix), problems: Vec::new() })
            }
            other => {
                self.wrong_type(key, other, "an object or null");
                None
            }
        }
    }

    /// Takes over the problems of a nested object.
    pub(super) fn absorb(&mut self, inner: Fields<'a>) {
        self.problems.extend(inner.problems);
    }

    /// The problems found, in the order in which they were met.
    pub(super) fn finish(self) -> Result<(), Vec<Problem>> {
        if self.problems.is_empty() { Ok(()) } else { Err(self.problems) }
    }

    /// The object itself.
    pub(super) fn source(&self) -> Map<String, Value> {
        self.map.clone()
    }

    /// Refuses a model so large that the bytes of its weights, or of their gradients, could not be counted.
    pub(super) fn check_total(&mut self, parameters: u128) {
        self.check(&["hidden_size"], parameters < 1 << 48, || {
            format!("with the other sizes makes {parameters} weights, more than any machine holds")
        });
    }

    /// True where the file states something other than null under `key`.
    pub(super) fn states(&self, key: &str) -> bool {
        self.value(key).is_some()
    }

    /// A length or number of things: a whole number from 1 to [`MAX_SIZE`].
    pub(super) fn size(&mut self, key: &str) -> usize {
        self.required(key).and_then(|v| self.whole(key, v, 1, MAX_SIZE)).unwrap_or(1)
    }

    /// As [`Fields::size`], with another upper end.
    pub(super) fn size_up_to(&mut self, key: &str, high: usize) -> usize {
        self.required(key).and_then(|v| self.whole(key, v, 1, high)).unwrap_or(1)
    }

    /// As [`Fields::size`], of something that RoPE turns in pairs.
    pub(super) fn even_size(&mut self, key: &str) -> usize {
        let size = self.size(key);
        self.check(&[key], size.is_multiple_of(2), || {
            format!("is {size}, but RoPE turns pairs; write an even number")
        });
        size
    }

    /// As [`Fields::size`], with the value to take where the key is null or missing.
    pub(super) fn size_or(&mut self, key: &str, default: usize) -> usize {
        self.whole_or(key, default, 1, MAX_SIZE)
    }

    /// As [`Fields::size`]; null means that the model has none, and a missing key is a problem.
    pub(super) fn size_or_null(&mut self, key: &str) -> Option<usize> {
        match self.map.get(key) {
            Some(Value::Null) => None,
            Some(value) => self.whole(key, value, 1, MAX_SIZE),
            None => {
                self.note(key, "missing; write a whole number, or null if the model has none".into());
                None
            }
        }
    }

    /// A whole number in `low..=high`, with the value to take where the key is null or missing.
    pub(super) fn whole_or(&mut self, key: &str, default: usize, low: usize, high: usize) -> usize {
        self.value(key).and_then(|v| self.whole(key, v, low, high)).unwrap_or(default)
    }

    /// A finite number greater than `above`, or `None` where the key is null or missing.
    pub(super) fn number(&mut self, key: &str, above: f64) -> Option<f64> {
        self.bounded(key, |x| x > above, || format!("a finite number greater than {above}"))
    }

    /// A finite number, 0 or more, or `None` where the key is null or missing.
    pub(super) fn factor(&mut self, key: &str) -> Option<f64> {
        self.bounded(key, |x| x >= 0.0, || "a finite number, 0 or more".into())
    }

    /// As [`Fields::number`], and missing is a problem.
    pub(super) fn required_number(&mut self, key: &str, above: f64) -> f64 {
        self.required(key).and_then(|_| self.number(key, above)).unwrap_or(above + 1.0)
    }

    /// True or false, with the value to take where the key is null or missing.
    pub(super) fn flag_or(&mut self, key: &str, default: bool) -> bool {
        match self.value(key) {
            None => default,
            Some(Value::Bool(b)) => *b,
            Some(other) => {
                self.wrong_type(key, other, "true or false");
                default
            }
        }
    }

    /// A string, or `None` where the key is null or missing.
    pub(super) fn word(&mut self, key: &str) -> Option<&'a str> {
        match self.value(key)? {
            Value::String(s) => Some(s),
            other => {
                self.wrong_type(key, other, "a string");
                None
            }
        }
    }

    /// One token id, a list of them, or none: the three ways in which `eos_token_id` is written.
    pub(super) fn token_ids(&mut self, key: &str) -> Vec<u32> {
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let Some(value) = self.value(key) else { return Vec::new() };
        let ids = match value {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|n| vec![n]),
        };
        ids.unwrap_or_else(|| {
            self.wrong_type(key, value, "a token id, a list of token ids, or null");
            Vec::new()
        })
    }

    /// Refuses every stated value of `key` but `only`, the one that this compiler implements.
    pub(super) fn supports_only(&mut self, key: &str, only: &Value) {
        if let Some(found) = self.value(key)
            && found != only
            // 1 and 1.0 are the same number in two spellings.
            && found.as_f64().is_none_or(|x| Some(x) != only.as_f64())
        {
            self.note(key, format!("not supported: is {}, only {only} is", shown(found)));
        }
    }

    /// Notes `what` under the first of `keys` unless `holds`, or unless one of `keys` is wrong already: a
    /// disagreement with a stand-in is no news.
    pub(super) fn check(&mut self, keys: &[&str], holds: bool, what: impl FnOnce() -> String) {
        let known_bad = |key: &&str| {
            let path = self.path(key);
            self.problems.iter().any(|p| p.key == path)
        };
        if !holds && !keys.iter().any(known_bad) {
            self.note(keys[0], what());
        }
    }

    /// Notes a problem.
    pub(super) fn note(&mut self, key: &str, what: String) {
        let key = self.path(key);
        self.problems.push(Problem { key, what });
    }

    fn path(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn value(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn required(&mut self, key: &str) -> Option<&'a Value> {
        let value = self.value(key);
        if value.is_none() {
            let how = if self.map.contains_key(key) { "null" } else { "missing" };
            self.note(key, format!("{how}, but the model's shapes need it; write a number"));
        }
        value
    }

    fn bounded(
        &mut self,
        key: &str,
        holds: impl Fn(f64) -> bool,
        wanted: impl Fn() -> String,
    ) -> Option<f64> {
        let value = self.value(key)?;
        match value.as_f64() {
            Some(x) if x.is_finite() && holds(x) => return Some(x),
            Some(x) => self.note(key, format!("is {x}, but must be {}", wanted())),
            None => self.wrong_type(key, value, &wanted()),
        }
        None
    }

    fn whole(&mut self, key: &str, value: &Value, low: usize, high: usize) -> Option<usize> {
        let Some(x) = value.as_f64() else {
            self.wrong_type(key, value, "a whole number");
            return None;
        };
        // 4096.0 is a whole number; f64 holds every whole number up to `high` exactly.
        if x.fract() == 0.0 && x >= low as f64 && x <= high as f64 {
            return Some(x as usize);
        }
        self.note(key, format!("is {value}, but must be a whole number from {low} to {high}"));
        None
    }

    fn wrong_type(&mut self, key: &str, found: &Value, wanted: &str) {
        self.note(key, format!("is {}, but must be {wanted}", shown(found)));
    }
}

/// A value as an error shows it: its kind, and its text where that is short.
fn shown(value: &Value) -> String {
    match value {
        Value::Array(list) => format!("a list of {} items", list.len()),
        Value::Object(map) => format!("an object of {} keys", map.len()),
        Value::Null | Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(s) => format!("the string {:?}", s.chars().take(40).collect::<String>()),
    }
}
