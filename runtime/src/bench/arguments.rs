//! What a program is given when it is measured.

use std::collections::BTreeMap;

use latentc_codegen::program::Program;
use latentc_ir::{DType, Function, Module, Op, Size, SplitMix, ValueId};
use latentc_passes::page::TABLE;

use super::{BenchError, Shape};
use crate::engine::Value;
use crate::init::normal;

/// So many normal numbers are repeated: a prime, so that rows differ.
const SOME: usize = 65_521;

/// What a run is given.
#[derive(Clone, Debug)]
pub struct Arguments {
    /// The entry's arguments.
    pub values: Vec<Value>,
    /// Sequences that caches have room for.
    pub batch: usize,
    /// Positions that caches have room for, all of them filled.
    pub past: usize,
    /// New tokens, if the program reads any.
    pub tokens: Option<u64>,
    /// Whether floats among the arguments are read from memory, as weights are: they stand for what was made long before.
    pub cold: bool,
}

impl Arguments {
    /// Random tokens below `vocab`, at the end of each sequence.
    ///
    /// # Errors
    /// [`BenchError::Argument`] if the program takes something that no model does.
    pub fn of_model(
        program: &Program,
        shape: Shape,
        vocab: usize,
        seed: u64,
    ) -> Result<Arguments, BenchError> {
        let mut rng = SplitMix(seed);
        let all = [shape.batch, shape.tokens];
        let count = shape.batch * shape.tokens;
        let mut tokens = || (0..count).map(|_| rng.below(vocab as u64) as i32).collect::<Vec<_>>();
        let first = shape.context - shape.tokens;
        // Pages of all sequences, in any order.
        let pages = program.pool.as_ref().map_or(0, |pool| pool.pages_for(shape.context as u64) as usize);
        let mut table: Vec<i32> = (0..(shape.batch * pages) as i32).collect();
        let mut order = SplitMix(seed ^ 1);
        table.sort_by_cached_key(|_| order.next_u64());
        let entry = program.routine(&program.entry);
        let names = entry.iter().flat_map(|e| e.params.iter().map(|&p| e.buffer(p).name.clone()));
        let value = |name: String| {
            Ok(match name.as_str() {
                "tok" | "target" => Value::i32(tokens(), &all),
                "pos" => {
                    let row = (first..shape.context).map(|p| p as i32);
                    Value::i32((0..shape.batch).flat_map(|_| row.clone()).collect(), &all)
                }
                // The logits of the last one are wanted.
                "at" => Value::i32(vec![shape.tokens as i32 - 1; shape.batch], &[shape.batch, 1]),
                TABLE => Value::i32(table.clone(), &[shape.batch, pages]),
                "weight" | "here" => Value::f32(vec![1.0; count], &all),
                "part" => Value::f32(vec![1.0], &[]),
                // Of all sequences tokens may be dropped.
                "bound" => Value::f32(vec![1.0; shape.batch], &[shape.batch]),
                _ => return Err(BenchError::Argument(name)),
            })
        };
        let values = names.map(value).collect::<Result<_, _>>()?;
        Ok(Arguments {
            values,
            batch: shape.batch,
            past: shape.context,
            tokens: Some(count as u64),
            cold: false,
        })
    }

    /// For any module, at these sizes: normal floats; integers that index an axis are drawn from it, with probabilities that fall as the
    /// `skew`-th power of the index (0: all alike), and all others are the last positions there are.
    ///
    /// # Errors
    /// A size that is missing, by name; a module that keeps something from run to run.
    pub fn of_module(
        module: &Module,
        sizes: &BTreeMap<String, u64>,
        skew: f64,
        seed: u64,
    ) -> Result<Arguments, BenchError> {
        let entry =
            module.function(&module.entry).ok_or_else(|| BenchError::Argument(module.entry.clone()))?;
        if let Some(cache) = module.functions.iter().flat_map(|f| f.caches.iter().map(|&c| f.value(c))).next()
        {
            return Err(BenchError::Cache(cache.name.clone()));
        }
        let number = |size: &Size| match size {
            Size::Fixed(n) => Ok(*n as usize),
            Size::Sym(s) => match sizes.get(s) {
                Some(&n) => Ok(n as usize),
                None => Err(BenchError::Size(s.clone())),
            },
        };
        let mut rng = SplitMix(seed);
        let last = positions(module, &number)?;
        let value = |&param: &ValueId| {
            let ty = entry.ty(param);
            let shape =
                ty.axes.iter().map(|&a| number(&entry.axis(a).size)).collect::<Result<Vec<_>, _>>()?;
            let len: usize = shape.iter().product();
            if ty.dtype.is_float() {
                let start = rng.next_u64();
                let some: Vec<_> = (0..len.min(SOME) as u64).map(|i| normal(start, i) as f32).collect();
                return Ok(Value::f32(some.into_iter().cycle().take(len).collect(), &shape));
            }
            let data = match meaning(module, entry, param) {
                _ if ty.dtype == DType::Bool => (0..len).map(|_| rng.below(2) as i32).collect(),
                Meaning::Word => (0..len).map(|_| rng.below(1 << 32) as u32 as i32).collect(),
                Meaning::Index(size) => draw(&mut rng, number(&size)?, skew, len),
                Meaning::Position => {
                    let row = shape.last().copied().unwrap_or(1);
                    (0..len).map(|n| (last.saturating_sub(row) + n % row.max(1)) as i32).collect()
                }
            };
            Ok(Value::i32(data, &shape))
        };
        let values = entry.params.iter().map(value).collect::<Result<_, BenchError>>()?;
        Ok(Arguments { values, batch: 1, past: 0, tokens: None, cold: true })
    }
}

/// What the numbers of an integer are for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Meaning {
    /// They index an axis of this size.
    Index(Size),
    /// Their bits are codes.
    Word,
    /// They say where something stands in its sequence.
    Position,
}

fn meaning(module: &Module, f: &Function, value: ValueId) -> Meaning {
    for inst in f.body.iter().filter(|i| i.args.contains(&value)) {
        let found = match &inst.op {
            Op::Gather { axis } | Op::ScatterAdd { axis } if inst.args[1] == value => {
                Meaning::Index(f.axis(*axis).size.clone())
            }
            Op::Unpack { .. } => Meaning::Word,
            Op::Call { callee, .. } => {
                let inner = module.function(callee);
                let at = inst.args.iter().position(|&a| a == value);
                match inner.zip(at) {
                    Some((inner, at)) => meaning(module, inner, inner.params[at]),
                    None => Meaning::Position,
                }
            }
            // The same numbers at other places.
            Op::Rename { .. }
            | Op::Broadcast { .. }
            | Op::Split { .. }
            | Op::Merge { .. }
            | Op::Slice { .. }
            | Op::Concat { .. }
            | Op::Gather { .. }
            | Op::Past { .. } => meaning(module, f, inst.result()),
            Op::Const(_)
            | Op::Position { .. }
            | Op::Unary(_)
            | Op::Binary(_)
            | Op::Select
            | Op::Cast
            | Op::Contract
            | Op::Reduce { .. }
            | Op::Pack { .. }
            | Op::TopK { .. }
            | Op::TopIndices { .. }
            | Op::ScatterAdd { .. }
            | Op::Append { .. }
            | Op::Rope { .. }
            | Op::Softmax { .. }
            | Op::RmsNorm { .. } => Meaning::Position,
        };
        if found != Meaning::Position {
            return found;
        }
    }
    Meaning::Position
}

/// The longest axis whose positions are asked for.
fn positions(
    module: &Module,
    number: &impl Fn(&Size) -> Result<usize, BenchError>,
) -> Result<usize, BenchError> {
    let asked = module.functions.iter().flat_map(|f| {
        f.body.iter().filter_map(|i| match i.op {
            Op::Position { axis } => Some(number(&f.axis(axis).size)),
            _ => None,
        })
    });
    asked.collect::<Result<Vec<_>, _>>().map(|all| all.into_iter().max().unwrap_or(0))
}

/// So many indices below `n`, index `i` with a probability that falls as `(i + 1)^-skew`.
fn draw(rng: &mut SplitMix, n: usize, skew: f64, len: usize) -> Vec<i32> {
    let mut sums = Vec::with_capacity(n);
    let mut sum = 0.0;
    for i in 0..n {
        sum += (i as f64 + 1.0).powf(-skew);
        sums.push(sum);
    }
    let mut one = || {
        let at = rng.unit() * sum;
        sums.partition_point(|&s| s <= at).min(n.saturating_sub(1)) as i32
    };
    (0..len).map(|_| one()).collect()
}

#[cfg(test)]
mod tests {
    use latentc_codegen::device::Data;
    use latentc_ir::parse;

    use super::*;

    const TEXT: &str = "module m entry @f

func @g {
  axes b, e=9, d=2
  param which: i32[b]
  param x: f32[e=9, d=2]

  y: f32[b, d=2] = gather x, which along e
  return y
}

func @f {
  axes b, e=9, d=2, s, t
  param which: i32[b]
  param pos: i32[b, t]
  param x: f32[e=9, d=2]

  y: f32[b, d=2] = call @g(which, x)
  at: i32[s] = position of s
  seen: bool[b, t, s] = le at, pos
  return y, seen
}
";

    fn sizes(pairs: &[(&str, u64)]) -> BTreeMap<String, u64> {
        pairs.iter().map(|&(s, n)| (s.to_owned(), n)).collect()
    }

    #[test]
    fn integers_are_indices_or_positions() {
        let module = parse("m", TEXT).unwrap();
        let all = sizes(&[("b", 200), ("s", 50), ("t", 3)]);
        let values = Arguments::of_module(&module, &all, 0.0, 1).unwrap().values;
        let ints = |v: &Value| match &v.data {
            Data::I32(x) => x.clone(),
            Data::F32(_) => panic!("integers"),
        };
        let which = ints(&values[0]);
        assert_eq!((which.len(), which.iter().min(), which.iter().max()), (200, Some(&0), Some(&8)));
        assert_eq!(
            (&values[1].shape[..], &ints(&values[1])[..6]),
            (&[200, 3][..], &[47, 48, 49, 47, 48, 49][..])
        );
        assert_eq!(values[2].shape, [9, 2]);
        // The first of nine is drawn every third time and more.
        let skewed = ints(&Arguments::of_module(&module, &all, 1.0, 1).unwrap().values[0]);
        let count = |of: &[i32]| of.iter().filter(|&&i| i == 0).count();
        assert!(count(&skewed) > 50 && count(&which) < 40, "{} and {}", count(&skewed), count(&which));
    }

    #[test]
    fn a_size_that_is_missing_is_named() {
        let module = parse("m", TEXT).unwrap();
        let said = Arguments::of_module(&module, &sizes(&[("b", 2), ("s", 5)]), 0.0, 1).unwrap_err();
        assert!(said.to_string().contains("the size `t`"), "{said}");
    }
}
