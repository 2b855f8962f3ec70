//! Parameter counts: how many a program has, and how many of them are active for a token.
//!
//! Both come from the graph. All are the elements of the distinct stored tensors ([`Inventory`](crate::Inventory)).
//! Active for a token is what its results need ([`sparsity`]): of weights behind a top-k gate, k of n. An
//! embedding table counts as a whole although a token reads one row of it: so does the count of 21.4B for
//! DeepSeek-V2. [`Count::looked_up`] tells how many active parameters are of that kind.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::graph::{Function, Module};
use crate::interp::scoped;
use crate::sparsity::{Need, sparsity};
use crate::stored::Part;

/// Numbers of parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// All.
    pub total: u64,
    /// Those that the results for one token depend on.
    pub active: u64,
    /// Those of the active ones that are in tables of which a token reads a row.
    pub looked_up: u64,
}

/// The parameters that the calls of a function under one scope read, without those of functions that it calls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// The scope; empty for the entry function.
    pub scope: String,
    /// The function.
    pub function: String,
    /// What it reads that no row above reads.
    pub count: Count,
}

/// Parameter counts by scope.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Census {
    /// In the order in which the program first uses a weight of each.
    pub rows: Vec<Row>,
    /// The sum.
    pub count: Count,
}

/// Counts a program's parameters. Tensors that several weights read count once.
///
/// # Errors
/// Those of [`Module::inventory`].
pub fn census(module: &Module) -> Result<Census, String> {
    let needs: BTreeMap<&str, Vec<Need>> =
        module.functions.iter().map(|f| (f.name.as_str(), sparsity(f).need)).collect();
    // Elements of tensors that no weight reads belong to the first reader of the tensor.
    let inventory = module.inventory()?;
    let unread: BTreeMap<&str, u64> = inventory.tensors.iter().map(|t| (t.name.as_str(), t.unread)).collect();

    let mut rows: Vec<Row> = Vec::new();
    // What is already counted, by where it is stored: the row, and the count that it got there.
    let mut counted: BTreeMap<(String, Vec<Part>), (usize, Count)> = BTreeMap::new();
    let mut seen_unread = BTreeSet::new();
    module.walk_weights(|scope, f, placed| {
        let at = match rows.iter().position(|r| r.scope == scope && r.function == f.name) {
            Some(at) => at,
            None => {
                let (scope, function) = (scope.to_owned(), f.name.clone());
                rows.push(Row { scope, function, count: Count::default() });
                rows.len() - 1
            }
        };
        let elements = placed.layout.elements;
        let need = needs.get(f.name.as_str()).and_then(|n| n.get(placed.value.0 as usize));
        let mut count = part(f, need.unwrap_or(&Need::Nowhere), elements);
        for piece in &placed.layout.pieces {
            let name = scoped(scope, &piece.tensor);
            let left = unread.get(name.as_str()).copied().unwrap_or(0);
            if left > 0 && seen_unread.insert(name) {
                rows[at].count.total += left;
            }
        }
        let stored = f.weights.iter().find(|w| w.value == placed.value).map(|w| w.stored.tensor.as_str());
        let key = (scoped(scope, stored.unwrap_or("")), placed.layout.part.clone());
        match counted.get(&key).copied() {
            None => {
                rows[at].count.add(count);
                counted.insert(key, (at, count));
            }
            // Tied: counted where it was first read, as active as its most active use.
            Some((first, before)) => {
                let looked_up = count.looked_up == count.active && before.looked_up == before.active;
                count.active = count.active.max(before.active);
                count.looked_up = if looked_up { count.active } else { 0 };
                let row = &mut rows[first].count;
                row.active = row.active - before.active + count.active;
                row.looked_up = row.looked_up - before.looked_up + count.looked_up;
                counted.insert(key, (first, count));
            }
        }
        Ok(())
    })?;
    let mut count = Count::default();
    rows.iter().for_each(|r| count.add(r.count));
    Ok(Census { rows, count })
}

fn part(f: &Function, need: &Need, elements: u64) -> Count {
    let (of, all) = need.fraction(f);
    let active = (u128::from(elements) * u128::from(of) / u128::from(all.max(1))) as u64;
    Count { total: elements, active, looked_up: if *need == Need::Rows { active } else { 0 } }
}

impl Count {
    fn add(&mut self, other: Count) {
        self.total += other.total;
        self.active += other.active;
        self.looked_up += other.looked_up;
    }
}

impl Census {
    /// The parameters under a scope, those of functions called there included.
    pub fn under(&self, scope: &str) -> Count {
        let mut count = Count::default();
        let within = |s: &str| match s.strip_prefix(scope) {
            Some(rest) => scope.is_empty() || rest.is_empty() || rest.starts_with('.'),
            None => false,
        };
        self.rows.iter().filter(|r| within(&r.scope)).for_each(|r| count.add(r.count));
        count
    }
}

impl fmt::Display for Census {
    /// A line for each function, with its scopes counted and added up, then the sum.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines: Vec<(String, u64, Count)> = Vec::new();
        for row in &self.rows {
            let name = format!("@{}", row.function);
            match lines.iter_mut().find(|l| l.0 == name) {
                Some((_, calls, count)) => {
                    *calls += 1;
                    count.add(row.count);
                }
                None => lines.push((name, 1, row.count)),
            }
        }
        let width = lines.iter().map(|l| l.0.len()).max().unwrap_or(0).max("function".len());
        writeln!(f, "{:width$}  {:>6}  {:>15}  {:>15}", "function", "scopes", "parameters", "active")?;
        for (name, calls, c) in &lines {
            writeln!(f, "{name:width$}  {calls:>6}  {:>15}  {:>15}", c.total, c.active)?;
        }
        let c = self.count;
        writeln!(f, "{:width$}  {:>6}  {:>15}  {:>15}", "all", self.rows.len(), c.total, c.active)
    }
}
