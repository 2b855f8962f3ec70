//! What the run-time sizes of a program count: new tokens, positions of the past, sequences.

use std::collections::{BTreeMap, BTreeSet};

use crate::graph::{Module, ValueId};
use crate::types::Size;

/// The symbols among the sizes of a program, by what they count.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Symbols {
    /// Positions that a token sees: sizes of axes that are `like` another.
    pub past: BTreeSet<String>,
    /// New tokens: sizes of the axes that those are like. When training they are the past as well.
    pub new: BTreeSet<String>,
    /// Sequences: the other sizes that caches have, and those beside tokens in what the entry takes.
    pub batch: BTreeSet<String>,
    /// All that is left.
    pub other: BTreeSet<String>,
}

impl Symbols {
    /// Those of a module.
    pub fn of(module: &Module) -> Symbols {
        let mut found = Symbols::default();
        for f in &module.functions {
            for axis in &f.axes {
                let Size::Sym(size) = &axis.size else { continue };
                found.other.insert(size.clone());
                if let Some(tokens) = axis.like {
                    found.past.insert(size.clone());
                    if let Size::Sym(size) = &f.axis(tokens).size {
                        found.new.insert(size.clone());
                    }
                }
            }
            for &cache in &f.caches {
                let sizes = f.ty(cache).axes.iter().filter_map(|&a| match &f.axis(a).size {
                    Size::Sym(size) => Some(size.clone()),
                    Size::Fixed(_) => None,
                });
                found.batch.extend(sizes);
            }
        }
        // What tokens come in: programs without caches have sequences, too.
        if let Some(f) = module.entry() {
            let symbols = |&p: &ValueId| f.ty(p).axes.iter().map(|&a| f.axis(a).size.to_string()).collect();
            let params = f.params.iter().map(symbols);
            let tokens = params.filter(|s: &BTreeSet<String>| s.iter().any(|s| found.new.contains(s)));
            let beside: Vec<_> = tokens.flatten().filter(|s| found.other.contains(s)).collect();
            found.batch.extend(beside);
        }
        found.batch.retain(|s| !found.past.contains(s) && !found.new.contains(s));
        for known in [&found.past, &found.new, &found.batch] {
            found.other.retain(|s| !known.contains(s));
        }
        found
    }

    /// All symbols as numbers; what is neither a token, a position nor a sequence is there once.
    pub fn bind(&self, batch: u64, new: u64, past: u64) -> BTreeMap<String, u64> {
        let all =
            |symbols: &BTreeSet<String>, n| symbols.iter().map(move |s| (s.clone(), n)).collect::<Vec<_>>();
        let mut bound = BTreeMap::new();
        // A size that is both counts new tokens.
        for (symbols, n) in [(&self.other, 1), (&self.batch, batch), (&self.past, past), (&self.new, new)] {
            bound.extend(all(symbols, n));
        }
        bound
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse;

    #[test]
    fn sizes_are_told_apart_by_what_counts_them() {
        let module = parse(
            "m.ir",
            r#"
module m entry @f

func @f {
  axes b, t, q, s like t, d=4
  param x: f32[b, t, d=4]
  param at: i32[b, t]
  param which: i32[b, q]
  cache c: f32[s, b, d=4]

  x.s: f32[s, b, d=4] = append c, x, at from t to s
  y: f32[s, b, q, d=4] = broadcast x.s over q
  return y
}
"#,
        );
        let symbols = Symbols::of(&module.unwrap());
        let set = |s: &str| BTreeSet::from([s.to_owned()]);
        let want = Symbols { past: set("s"), new: set("t"), batch: set("b"), other: set("q") };
        assert_eq!(symbols, want);
        let bound: Vec<_> = symbols.bind(8, 2, 100).into_iter().collect();
        let want = [("b", 8), ("q", 1), ("s", 100), ("t", 2)].map(|(s, n)| (s.to_owned(), n));
        assert_eq!(bound, want);
    }

    #[test]
    fn tokens_come_in_sequences_without_caches_too() {
        let text = r#"
module m entry @f

func @f {
  axes b, t, q, s=t like t
  param x: f32[b, t]
  param z: f32[q]

  p: f32[b, s] = past x from t to s
  y: f32[q, b, s] = mul p, z
  return y
}
"#;
        let symbols = Symbols::of(&parse("m.ir", text).unwrap());
        let set = |s: &str| BTreeSet::from([s.to_owned()]);
        let want = Symbols { past: set("t"), new: set("t"), batch: set("b"), other: set("q") };
        assert_eq!(symbols, want);
    }
}
