//! What one run of a program cannot do without, however it is scheduled: the arithmetic of its contractions, and its
//! weights and caches through memory. A machine's rates make a bound of it (arXiv 0906.4427, the roofline).
//!
//! Of weights and caches, elements are counted and bytes: by elements, one program can be weighed in several formats; by bytes, as
//! the program says that they are held. What is computed and used within
//! a run is left out, as if it never left the chip; so is arithmetic outside of contractions. Scores of positions that a mask
//! hides are counted like the others.

use std::collections::{BTreeMap, BTreeSet};

use crate::cost::{elements, extent, inst_cost};
use crate::graph::{Def, Function, Inst, Module, ValueId};
use crate::ops::Op;
use crate::poly::Poly;

/// The work of one run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Operations of contractions.
    pub flops: Poly,
    /// Elements of weights that are read whole.
    pub weights: u64,
    /// The bytes that they take.
    pub weight_bytes: u64,
    /// Weights of which rows are read, and how many there are of each kind.
    pub tables: BTreeMap<Table, u64>,
    /// Caches, and how many there are of each kind.
    pub caches: BTreeMap<Cached, u64>,
}

/// A weight that is only gathered from, such as an embedding or the experts that tokens go to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Table {
    /// Elements of a row.
    pub row: u64,
    /// The bytes that they take.
    pub bytes: u64,
    /// How many rows there are.
    pub rows: u64,
    /// How many rows are chosen.
    pub chosen: Poly,
    /// So many of those are chosen together, and differ.
    pub together: u64,
}

/// What is kept of a token in one cache.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cached {
    /// Elements of a token.
    pub row: u64,
    /// The bytes that they take.
    pub bytes: u64,
    /// How many tokens a run reads.
    pub read: Poly,
    /// How many tokens a run writes.
    pub written: Poly,
}

impl Table {
    /// The rows that a run reads on average, each once, if every choice is as likely as every other.
    ///
    /// # Errors
    /// The name of a symbol without a size.
    pub fn distinct(&self, sizes: &BTreeMap<String, u64>) -> Result<f64, String> {
        let times = self.chosen.eval(sizes)? as f64 / self.together as f64;
        let rows = self.rows as f64;
        // The share of rows that none of the choices hits.
        let missed = (1.0 - self.together as f64 / rows).max(0.0).powf(times);
        Ok(rows * (1.0 - missed))
    }
}

impl Work {
    /// Elements of weights that a run reads.
    ///
    /// # Errors
    /// The name of a symbol without a size.
    pub fn weights_read(&self, sizes: &BTreeMap<String, u64>) -> Result<f64, String> {
        let mut sum = self.weights as f64;
        for (table, times) in &self.tables {
            sum += (table.row * times) as f64 * table.distinct(sizes)?;
        }
        Ok(sum)
    }

    /// Bytes of weights that a run reads.
    ///
    /// # Errors
    /// The name of a symbol without a size.
    pub fn weight_bytes_read(&self, sizes: &BTreeMap<String, u64>) -> Result<f64, String> {
        let mut sum = self.weight_bytes as f64;
        for (table, times) in &self.tables {
            sum += (table.bytes * times) as f64 * table.distinct(sizes)?;
        }
        Ok(sum)
    }

    /// Elements that all caches keep of a token.
    pub fn cached(&self) -> u64 {
        self.caches.iter().map(|(cache, times)| cache.row * times).sum()
    }

    /// Bytes that all caches keep of a token.
    pub fn cached_bytes(&self) -> u64 {
        self.caches.iter().map(|(cache, times)| cache.bytes * times).sum()
    }

    fn add(&mut self, other: &Work) {
        self.flops += &other.flops;
        self.weights += other.weights;
        self.weight_bytes += other.weight_bytes;
        for (table, times) in &other.tables {
            *self.tables.entry(table.clone()).or_default() += times;
        }
        for (cache, times) in &other.caches {
            *self.caches.entry(cache.clone()).or_default() += times;
        }
    }
}

/// The work of a program's entry function and all that it calls.
///
/// # Errors
/// An entry that does not exist, or a function that is called before it is defined.
pub fn work(module: &Module) -> Result<Work, String> {
    let mut known: BTreeMap<&str, Work> = BTreeMap::new();
    for f in &module.functions {
        let mut all = own(f);
        for inst in &f.body {
            if let Op::Call { callee, .. } = &inst.op {
                let callee = known.get(callee.as_str());
                all.add(callee.ok_or_else(|| format!("@{}: calls what is not defined above it", f.name))?);
            }
        }
        known.insert(&f.name, all);
    }
    known.remove(module.entry.as_str()).ok_or_else(|| format!("@{}: there is no such function", module.entry))
}

/// The work of a function without what it calls.
fn own(f: &Function) -> Work {
    let mut work = Work::default();
    let mut whole: BTreeSet<ValueId> = f.results.iter().copied().collect();
    let mut gathers: BTreeSet<(ValueId, ValueId)> = BTreeSet::new();
    let defs = f.defs();
    for inst in &f.body {
        match &inst.op {
            Op::Contract => work.flops += &inst_cost(f, &inst.op, inst).flops,
            Op::Append { .. } => {
                let row = fixed(f, inst.args[0]);
                let cache = Cached {
                    row,
                    bytes: row * f.ty(inst.args[0]).dtype.bytes(),
                    read: read_of(f, inst),
                    written: run_time(f, inst.args[1]),
                };
                *work.caches.entry(cache).or_default() += 1;
            }
            _ => {}
        }
        let table = matches!(inst.op, Op::Gather { .. }).then(|| inst.args[0]);
        whole.extend(inst.args.iter().filter(|&&a| Some(a) != table));
        gathers.extend(table.map(|t| (t, inst.args[1])));
    }
    for w in f.weights.iter().map(|w| w.value) {
        if whole.contains(&w) {
            work.weights += fixed(f, w);
            work.weight_bytes += fixed(f, w) * f.ty(w).dtype.bytes();
        }
    }
    for (table, index) in gathers {
        if whole.contains(&table) || !f.weights.iter().any(|w| w.value == table) {
            continue;
        }
        let along = f.body.iter().find_map(|i| match i.op {
            Op::Gather { axis } if i.args == [table, index] => f.axis(axis).size.fixed(),
            _ => None,
        });
        let rows = along.unwrap_or(1).max(1);
        // The indices of one token's largest are different ones.
        let together = match defs[index.0 as usize] {
            Def::Inst(_, inst) => match inst.op {
                Op::TopIndices { into, .. } => f.axis(into).size.fixed().unwrap_or(1).max(1),
                _ => 1,
            },
            Def::Param(_) | Def::Weight(_) | Def::Cache(_) => 1,
        };
        let row = fixed(f, table) / rows;
        let bytes = row * f.ty(table).dtype.bytes();
        let table = Table { row, bytes, rows, chosen: elements(f, index), together };
        *work.tables.entry(table).or_default() += 1;
    }
    work
}

/// How many rows of a cache are read: all of it, but of a pool those that are gathered.
fn read_of(f: &Function, append: &Inst) -> Poly {
    let gathered = |i: &&Inst| matches!(i.op, Op::Gather { .. }) && i.args[0] == append.result();
    match f.body.iter().find(gathered) {
        Some(gather) => run_time(f, gather.result()),
        None => run_time(f, append.args[0]),
    }
}

/// The product of a value's fixed extents.
fn fixed(f: &Function, value: ValueId) -> u64 {
    f.ty(value).axes.iter().filter_map(|&a| f.axis(a).size.fixed()).product()
}

/// The product of a value's other extents.
fn run_time(f: &Function, value: ValueId) -> Poly {
    let axes = f.ty(value).axes.iter().copied();
    extent(f, &axes.filter(|&a| f.axis(a).size.fixed().is_none()).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse;

    #[test]
    fn the_work_of_layers_with_a_cache_and_experts() {
        let module = parse(
            "m.ir",
            r#"
module m entry @model

func @layer {
  axes b, t, s like t, d=8, e=10, k=2
  param x: f32[b, t, d=8]
  param at: i32[b, t]
  weight W: bf16[d=8, e=10] = "gate"[d, e]
  weight E: bf16[e=10, d=8] = "experts"[e, d]
  cache c: bf16[s, b, d=8]

  gate: f32[b, t, e=10] = contract x, W over d
  best: i32[b, t, k=2] = top_indices gate over e into k
  open: bf16[b, t, k=2, d=8] = gather E, best along e
  y: f32[b, t, k=2] = contract x, open over d
  x.s: bf16[s, b, d=8] = append c, x, at from t to s
  z: f32[b, t, s] = contract x, x.s over d
  u: f32[b, t] = contract y, z over k, s
  v: f32[b, t, d=8] = mul u, x
  return v
}

func @model {
  axes b, t, d=8
  param x: f32[b, t, d=8]
  param at: i32[b, t]

  x.1: f32[b, t, d=8] = call @layer(x, at) under "0"
  x.2: f32[b, t, d=8] = call @layer(x.1, at) under "1"
  return x.2
}
"#,
        );
        let work = work(&module.unwrap()).unwrap();
        // Products in each layer: 8 x 10 for the gate, 8 x 2 for the experts, 8 s for the scores, 2 s for the last.
        assert_eq!(work.flops.to_string(), "40 b s t + 384 b t");
        assert_eq!((work.weights, work.cached(), work.cached_bytes()), (160, 16, 32));
        let cache =
            Cached { row: 8, bytes: 16, read: "b s".parse().unwrap(), written: "b t".parse().unwrap() };
        assert_eq!(work.caches, BTreeMap::from([(cache, 2)]));
        let table = Table { row: 8, bytes: 16, rows: 10, chosen: "2 b t".parse().unwrap(), together: 2 };
        assert_eq!(work.tables, BTreeMap::from([(table.clone(), 2)]));

        let sizes = |b: u64| BTreeMap::from([("b".to_owned(), b), ("t".to_owned(), 1)]);
        let near = |x: f64, y: f64| (x - y).abs() < 1e-9;
        assert!(near(table.distinct(&sizes(1)).unwrap(), 2.0), "one token reads its two");
        assert!(near(table.distinct(&sizes(2)).unwrap(), 3.6), "two tokens share one in five");
        assert!(near(table.distinct(&sizes(1000)).unwrap(), 10.0), "many read all");
        assert!(near(work.weights_read(&sizes(1)).unwrap(), 160.0 + 2.0 * 8.0 * 2.0));
        assert!(near(work.weight_bytes_read(&sizes(1)).unwrap(), 2.0 * (160.0 + 2.0 * 8.0 * 2.0)));
    }
}
