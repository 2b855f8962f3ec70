//! Chains: calls of one function, each of the result of the one before, which the text format folds into one line.
//!
//! The trunk of a model is such a chain, and what is read of it should not grow with its depth. Which calls fold is
//! decided here for the printer, and what a folded line stands for is said here for the parser.

use crate::graph::{Function, Inst};
use crate::ops::Op;

/// A shorter chain is printed call by call.
const LEAST: usize = 3;

/// The calls that all chains of a text may have together. Without a limit a short text could fill the memory.
pub(crate) const MOST: usize = 10_000;

/// Texts that differ in one decimal number, which counts up by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Series<'t> {
    before: &'t str,
    first: u64,
    last: u64,
    after: &'t str,
}

impl<'t> Series<'t> {
    /// The series of names from `x.2` to `x.60`: one base, a dot and the number.
    pub(crate) fn of_names(first: &'t str, last: &'t str) -> Option<Series<'t>> {
        let (base, from) = first.rsplit_once('.')?;
        let (same, to) = last.rsplit_once('.')?;
        if base != same {
            return None;
        }
        Series::new(&first[..=base.len()], from, to, "")
    }

    /// The series of scopes from `layers.1.mlp` to `layers.59.mlp`: the number may stand anywhere.
    pub(crate) fn of_scopes(first: &'t str, last: &'t str) -> Option<Series<'t>> {
        let same: usize =
            first.chars().zip(last.chars()).take_while(|(x, y)| x == y).map(|(c, _)| c.len_utf8()).sum();
        // The digits that `10` and `12` share belong to the number.
        let start = first[..same].trim_end_matches(|c: char| c.is_ascii_digit()).len();
        let split = |text: &'t str| {
            let rest = &text[start..];
            rest.split_at(rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len()))
        };
        let ((from, after), (to, rest)) = (split(first), split(last));
        if after != rest {
            return None;
        }
        Series::new(&first[..start], from, to, after)
    }

    fn new(before: &'t str, from: &str, to: &str, after: &'t str) -> Option<Series<'t>> {
        // A number with leading zeros has another way to count up.
        let number = |text: &str| {
            let plain = text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
            text.parse::<u64>().ok().filter(|_| plain)
        };
        let (first, last) = (number(from)?, number(to)?);
        (first < last).then_some(Series { before, first, last, after })
    }

    /// How many texts there are.
    pub(crate) fn count(&self) -> usize {
        usize::try_from(self.last - self.first).map_or(usize::MAX, |n| n.saturating_add(1))
    }

    /// The texts in order.
    pub(crate) fn texts(&self) -> impl Iterator<Item = String> {
        (self.first..=self.last).map(|n| format!("{}{n}{}", self.before, self.after))
    }

    /// Whether two series count at the same place of the same text.
    fn is_part_of(&self, other: &Series<'_>) -> bool {
        (self.before, self.first, self.after) == (other.before, other.first, other.after)
    }
}

/// How many instructions at the start of these fold into one line; 1 if the first stands alone.
pub(crate) fn length(f: &Function, insts: &[Inst], most: usize) -> usize {
    let Some(first) = insts.first() else { return 0 };
    let Some(start) = Call::of(f, first) else { return 1 };
    let mut scopes: Option<Series<'_>> = None;
    let mut length = 1;
    while let Some(inst) = insts.get(length).filter(|_| length < most) {
        let Some(call) = Call::of(f, inst) else { break };
        // What the parser will make of the line that ends with this call must be what stands here.
        let named = Series::of_names(start.name, call.name).filter(|s| s.count() == length + 1);
        let under = Series::of_scopes(start.scope, call.scope).filter(|s| s.count() == length + 1);
        let (Some(_), Some(under)) = (named, under) else { break };
        let same = call.callee == start.callee
            && f.ty(inst.result()) == f.ty(first.result())
            && inst.args.first() == Some(&insts[length - 1].result())
            && inst.args.get(1..) == first.args.get(1..)
            && inst.origins == first.origins
            && inst.by == first.by;
        if !same || scopes.is_some_and(|s| !under.is_part_of(&s)) {
            break;
        }
        scopes = Some(under);
        length += 1;
    }
    if length < LEAST { 1 } else { length }
}

/// A call that may be a part of a chain.
struct Call<'f> {
    name: &'f str,
    callee: &'f str,
    scope: &'f str,
}

impl<'f> Call<'f> {
    fn of(f: &'f Function, inst: &'f Inst) -> Option<Call<'f>> {
        let (Op::Call { callee, scope }, [result]) = (&inst.op, &inst.results[..]) else { return None };
        let name = &f.values.get(result.0 as usize)?.name;
        Some(Call { name, callee, scope })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(series: Option<Series<'_>>) -> Option<Vec<String>> {
        series.map(|s| s.texts().collect())
    }

    #[test]
    fn names_count_behind_their_last_dot() {
        let names = |first, last| texts(Series::of_names(first, last));
        assert_eq!(names("x.9", "x.11").unwrap(), ["x.9", "x.10", "x.11"]);
        assert_eq!(names("x.1.0", "x.1.1").unwrap(), ["x.1.0", "x.1.1"]);
        assert_eq!(names(".1", ".2").unwrap(), [".1", ".2"]);
        for (first, last) in [
            ("x.1", "y.2"),
            ("x.1", "x.1"),
            ("x.2", "x.1"),
            ("x", "x.1"),
            ("x1", "x2"),
            ("x.1.1", "x.2.1"),
            ("x.01", "x.02"),
            ("x.", "x.1"),
            ("x.+1", "x.+2"),
            ("x.1", "x.99999999999999999999"),
        ] {
            assert_eq!(names(first, last), None, "{first} {last}");
        }
    }

    #[test]
    fn scopes_count_in_one_place() {
        let scopes = |first, last| texts(Series::of_scopes(first, last));
        assert_eq!(scopes("l.9.a1", "l.11.a1").unwrap(), ["l.9.a1", "l.10.a1", "l.11.a1"]);
        assert_eq!(scopes("10", "12").unwrap(), ["10", "11", "12"]);
        assert_eq!(scopes("é1è", "é2è").unwrap(), ["é1è", "é2è"]);
        assert_eq!(scopes("1.1.1", "1.2.1").unwrap(), ["1.1.1", "1.2.1"]);
        assert_eq!(scopes("01.1", "01.2").unwrap(), ["01.1", "01.2"]);
        for (first, last) in [
            ("l", "l"),
            ("l.1", "l.1"),
            ("l", "l1"),
            ("", ""),
            ("l.1.1", "l.2.2"),
            ("l.01", "l.02"),
            ("l.9", "l.010"),
            ("é", "è"),
            ("l.1a", "l.2b"),
            ("l.2", "l.1"),
        ] {
            assert_eq!(scopes(first, last), None, "{first} {last}");
        }
    }

    #[test]
    fn the_longest_series_has_a_count() {
        assert_eq!(Series::of_names("x.0", "x.18446744073709551615").unwrap().count(), usize::MAX);
    }
}
