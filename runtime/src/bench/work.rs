//! What a kernel does, in the terms of other libraries: enough to measure them at the same.

use std::collections::BTreeMap;

use latentc_codegen::contract::ContractPlan;
use latentc_codegen::program::{Kernel, KernelKind};
use latentc_codegen::scatter::ScatterPlan;
use latentc_codegen::stream::StreamPlan;
use latentc_ir::{AxisId, Op};
use serde::Serialize;

/// The sizes of a kernel's main part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Work {
    /// `count` products of `m` rows and `n` columns with sums of `k` terms, each `batch` times.
    #[expect(missing_docs, reason = "the groups of axes of a contraction, see ContractPlan")]
    Product { count: u64, batch: u64, m: u64, n: u64, k: u64 },
    /// `count` times `rows` rows, each multiplied with one of `groups` matrices of `n` rows of `k`.
    #[expect(missing_docs, reason = "said above")]
    Grouped { count: u64, groups: u64, rows: u64, n: u64, k: u64 },
    /// For each of `groups`, a product of `m` rows and `n` columns that is summed over its share of `rows`.
    #[expect(missing_docs, reason = "said above")]
    Outer { groups: u64, rows: u64, m: u64, n: u64 },
    /// Softmaxes over `positions`: `batch` times for `rows` rows, of scores that are sums of `keys` terms, weighing rows of `values`.
    #[expect(missing_docs, reason = "said above")]
    Stream {
        batch: u64,
        rows: u64,
        positions: u64,
        keys: u64,
        values: u64,
        /// How many tokens the rows belong to; where there is a mask, each sees what is before it.
        tokens: u64,
        causal: bool,
    },
}

impl Work {
    /// Of a kernel at these run-time sizes; `None` if it has no product.
    pub(super) fn of(kernel: &Kernel, sizes: &[usize]) -> Option<Work> {
        let (body, extents) = (&kernel.body, kernel.extents(sizes));
        let of = |axes: &[AxisId]| axes.iter().map(|a| extents[a.0 as usize] as u64).product::<u64>();
        let products: Vec<_> = body.body.iter().filter(|i| i.op == Op::Contract).collect();
        let count = products.len() as u64;
        match kernel.kind {
            KernelKind::Map => None,
            KernelKind::Scatter | KernelKind::ScatterMatrix { .. } => {
                let plan = ScatterPlan::of(body)?;
                let [m, n] = plan.sides(body)?.map(|side| of(&side));
                Some(Work::Outer { groups: of(&[plan.along]), rows: of(&plan.rows), m, n })
            }
            KernelKind::Stream | KernelKind::StreamMatrix { .. } => {
                let plan = StreamPlan::of(body).ok()?;
                let scores = products.iter().filter(|i| i.result() != plan.product);
                let keys = scores.map(|i| of(&body.summed(&i.args, body.ty(i.result())))).sum();
                let mask = plan.mask.map(|m| &body.ty(m).axes);
                let seen: Vec<_> =
                    plan.m.iter().copied().filter(|a| mask.is_some_and(|m| m.contains(a))).collect();
                Some(Work::Stream {
                    batch: of(&plan.batch),
                    rows: of(&plan.m),
                    positions: extents[plan.along.0 as usize] as u64,
                    keys,
                    values: of(&plan.n),
                    tokens: of(&seen),
                    causal: plan.mask.is_some(),
                })
            }
            KernelKind::Contract
            | KernelKind::Grouped
            | KernelKind::Tiles
            | KernelKind::Few { .. }
            | KernelKind::Matrix { .. } => {
                let first = products.first()?;
                let tables: BTreeMap<_, _> = body
                    .body
                    .iter()
                    .filter_map(|i| match i.op {
                        Op::Gather { axis } => Some((i.result(), (axis, i.args[1]))),
                        _ => None,
                    })
                    .collect();
                let y = body.ty(first.result());
                let summed = body.summed(&first.args, y);
                if let Some((along, index)) = first.args.iter().find_map(|a| tables.get(a)) {
                    let rows = &body.ty(*index).axes;
                    let besides = |axes: &[AxisId]| -> Vec<_> {
                        axes.iter().copied().filter(|a| !rows.contains(a)).collect()
                    };
                    return Some(Work::Grouped {
                        count,
                        groups: extents[along.0 as usize] as u64,
                        rows: of(rows),
                        n: of(&besides(&y.axes)),
                        k: of(&besides(&summed)),
                    });
                }
                let plan = ContractPlan::of(body);
                Some(Work::Product {
                    count,
                    batch: of(&plan.batch),
                    m: of(&plan.m),
                    n: of(&plan.n),
                    k: of(&plan.k),
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use latentc_ir::parse;

    use super::*;

    fn of(sizes: &[usize], body: &str) -> Option<Work> {
        let text = format!("module k entry @k\n\nfunc @k {{\n{body}\n}}\n");
        let body = parse("k", &text).unwrap_or_else(|e| panic!("{e}")).functions.remove(0);
        Work::of(&Kernel { name: "k".to_owned(), kind: KernelKind::of(&body), body }, sizes)
    }

    #[test]
    fn a_product_has_the_sizes_of_its_groups() {
        let body = "  axes a0=n0, a1=3, a2=5, a3=7
  param p0: f32[a3=7, a0, a2=5]
  param p1: f32[a3=7, a1=3, a2=5]

  x2: f32[a0, a3=7, a1=3] = contract p0, p1 over a2
  return x2";
        assert_eq!(of(&[11], body), Some(Work::Product { count: 1, batch: 7, m: 11, n: 3, k: 5 }));
        assert_eq!(
            of(&[11], "  axes a0=n0\n  param p0: f32[a0]\n\n  x1: f32[a0] = neg p0\n  return x1"),
            None
        );
    }

    #[test]
    fn rows_of_experts_are_those_of_the_index() {
        let body = "  axes a0=n0, a1=2, a2=45, a4=7, a5=15
  param p0: f32[a0, a1=2, a4=7]
  param p1: f32[a5=15, a2=45, a4=7]
  param p2: i32[a0, a1=2]

  x3: f32[a0, a1=2, a2=45, a4=7] = gather p1, p2 along a5
  x4: f32[a0, a2=45] = contract p0, x3 over a1, a4
  return x4";
        assert_eq!(of(&[4], body), Some(Work::Grouped { count: 1, groups: 15, rows: 8, n: 45, k: 7 }));
    }

    #[test]
    fn gradients_of_experts_are_summed_over_their_rows() {
        let body = "  axes a0=15, a1=45, a2=7, a3=n0, a4=2
  param p0: bf16[a3, a4=2, a1=45]
  param p1: f32[a3, a2=7]
  param p2: i32[a3, a4=2]

  x3: f32[a3, a4=2, a1=45, a2=7] = mul p0, p1
  x4: f32[a0=15, a1=45, a2=7] = scatter_add x3, p2 along a0
  return x4";
        assert_eq!(of(&[4], body), Some(Work::Outer { groups: 15, rows: 8, m: 45, n: 7 }));
        // Rows that are only added up are no product.
        let body = "  axes a0=15, a1=45, a3=n0
  param p0: bf16[a3, a1=45]
  param p1: i32[a3]

  x2: f32[a0=15, a1=45] = scatter_add p0, p1 along a0
  return x2";
        assert_eq!(of(&[4], body), None);
    }

    #[test]
    fn attention_has_keys_and_values() {
        let body = "  axes a0=n0, a1=n1, a2=5, a3=15, a4=n2, a5=12
  param p0: i32[a0, a1]
  param p1: f32[a2=5, a0, a1, a3=15]
  param p2: f32[a4, a0, a3=15]
  param p3: f32[a0, a1, a2=5, a5=12]
  param p4: f32[a4, a0, a5=12]

  x6: i32[a4] = position of a4
  x7: bool[a0, a1, a4] = le x6, p0
  x8: f32[a0, a1, a2=5, a4] = contract p1, p2 over a3
  x9: f32[a0, a1, a2=5, a4] = contract p3, p4 over a5
  x10: f32[a0, a1, a2=5, a4] = add x8, x9
  x11: f32 = const -inf
  x12: f32[a0, a1, a2=5, a4] = select x7, x10, x11
  x13: f32[a0, a1, a2=5, a4] = softmax x12 over a4
  x14: f32[a0, a1, a2=5, a3=15] = contract x13, p2 over a4
  return x14";
        let want =
            Work::Stream { batch: 2, rows: 15, positions: 40, keys: 27, values: 15, tokens: 3, causal: true };
        assert_eq!(of(&[2, 3, 40], body), Some(want));
    }
}
