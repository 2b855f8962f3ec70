//! Products where one operand has few rows: the other is read once, and that is all the time they take.
//!
//! The *wide* operand lies in memory, as elements or as [codes](crate::coded), or is what an index chooses of what does (the weights of an
//! expert); its elements are wanted once for every few rows of the *narrow* one, which may be an expression. The axes fall into those that
//! both share or an index has (*batch*), the narrow one's (*rows*), the wide one's (*columns*) and what is summed. How the wide one lies in
//! memory says how it is walked: *along* its summed axes if these come last, or else *across* its columns.

use std::collections::BTreeSet;

use latentc_ir::{AxisId, Function, Inst, Op, Pairs, Size, Type, ValueId};

use crate::coded::{Source, Table, made_in};
use crate::contract::{ContractPlan, Rotation};
use crate::map::made;

/// The parts of a product with few rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FewPlan {
    /// In the result and both operands, or in an index, in the result's order.
    pub batch: Vec<AxisId>,
    /// In the result and the narrow operand, in the result's order.
    pub rows: Vec<AxisId>,
    /// In the result and the wide operand, in the wide one's order.
    pub columns: Vec<AxisId>,
    /// Summed, one index after the other: those of an index, and what does not lie with the inner ones.
    pub outer: Vec<AxisId>,
    /// Summed, in the wide operand's order. Along these, they are its last axes.
    pub inner: Vec<AxisId>,
    /// Whether the wide operand's last axes are summed; they are columns if not.
    pub along: bool,
    /// What is multiplied.
    pub products: Vec<FewProduct>,
}

/// One of the products, which all have the same axes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FewProduct {
    /// What the contraction makes.
    pub result: ValueId,
    /// The wide operand, or what it is gathered from; parameters.
    pub table: Table,
    /// The type of its elements, in the order in which they lie.
    pub elements: Type,
    /// Along which axis of the table it is gathered, and by which index.
    pub index: Option<(AxisId, ValueId)>,
    /// The narrow operand.
    pub narrow: ValueId,
}

impl FewProduct {
    /// Elements of the wide operand that 16 bytes hold.
    pub fn pack(&self) -> u64 {
        match self.table {
            Table::Elements(_) => (16 / self.elements.dtype.bytes()).max(1),
            Table::Codes(coded, _) => 4 * coded.fields,
        }
    }
}

impl FewPlan {
    /// The plan of a body of products, where the operands of one side (0 have the axes *m* of a [`ContractPlan`], 1 the axes *n*)
    /// are the wide ones. `None` if they cannot be.
    pub fn of(body: &Function, wide: usize) -> Option<FewPlan> {
        let contractions = || body.body.iter().filter(|i| i.op == Op::Contract);
        let set = |v: ValueId| body.ty(v).axes.iter().copied().collect::<BTreeSet<_>>();
        let root = set(made(body));
        let known = contractions().all(|i| i.args.len() == 2 && set(i.result()) == root);
        if !known || contractions().next().is_none() {
            return None;
        }
        let mut plan: Option<FewPlan> = None;
        for product in ContractPlan::of(body).products(body) {
            let [w, narrow] = [product.operands[wide], product.operands[1 - wide]];
            let found = FewPlan::single(body, product.inst, w, narrow)?;
            match &mut plan {
                None => plan = Some(found),
                Some(plan) if plan.walks_like(&found) => plan.products.extend(found.products),
                Some(_) => return None,
            }
        }
        let plan = plan.filter(|plan| Rotation::of(body).is_none_or(|r| plan.has_partners(body, r)))?;
        plan.factor(body).is_multiple_of(plan.least()).then_some(plan)
    }

    /// The fewest elements that can be read of a wide operand: those of a word, where one is held as codes.
    pub fn least(&self) -> u64 {
        let of = |p: &FewProduct| match p.table {
            Table::Elements(_) => 1,
            Table::Codes(coded, _) => coded.fields,
        };
        self.products.iter().map(of).max().unwrap_or(1)
    }

    /// Whether the partners of a rotation are columns side by side, or can be read as if they were.
    fn has_partners(&self, body: &Function, rotation: Rotation) -> bool {
        rotation.ends(body, &self.columns) && (self.along || rotation.pairs == Pairs::Interleaved)
    }

    fn walks_like(&self, other: &FewPlan) -> bool {
        let axes = |p: &FewPlan| [&p.batch, &p.rows, &p.columns, &p.outer, &p.inner].map(Clone::clone);
        axes(self) == axes(other) && self.along == other.along
    }

    fn single(body: &Function, inst: &Inst, wide: ValueId, narrow: ValueId) -> Option<FewPlan> {
        let Source { table, elements: t, gather } = Source::of(body, &made_in(body), wide);
        let index = gather.and_then(|gather| match gather.op {
            Op::Gather { axis } => Some((axis, gather.args[1])),
            _ => None,
        });
        let (x, y) = (body.ty(narrow), body.ty(inst.result()));
        let chosen = |a: AxisId| index.is_some_and(|(_, i)| body.ty(i).has(a));
        let own = |a: AxisId| t.has(a) && index.is_none_or(|(along, _)| along != a);
        // An index must have something to choose from, and choose whole matrices.
        let chooses = index.is_none_or(|(along, i)| {
            body.axis(along).size.fixed().is_some_and(|n| n > 0)
                && !body.ty(i).axes.iter().any(|&a| own(a))
                && !x.has(along)
        });
        let there = table.held().iter().all(|v| body.params.contains(v));
        if !there || !t.dtype.is_float() || !x.dtype.is_float() || !chooses {
            return None;
        }
        let summed = body.summed(&inst.args, y);
        if !summed.iter().all(|&a| chosen(a) || (own(a) && x.has(a))) {
            return None;
        }
        let pick = |wanted: &dyn Fn(AxisId) -> bool| y.axes.iter().copied().filter(|&a| wanted(a)).collect();
        let batch: Vec<AxisId> = pick(&|a| chosen(a) || (own(a) && x.has(a)));
        let rows: Vec<AxisId> = pick(&|a| x.has(a) && !own(a) && !chosen(a));
        let columns: Vec<AxisId> =
            t.axes.iter().copied().filter(|&a| own(a) && y.has(a) && !x.has(a)).collect();
        if columns.is_empty() || batch.len() + rows.len() + columns.len() != y.axes.len() {
            return None;
        }
        let wide_axis = |a: &AxisId| body.axis(*a).size != Size::Fixed(1);
        let last = t.axes.iter().copied().rfind(wide_axis).or(columns.last().copied())?;
        let along = summed.contains(&last);
        if !along && !columns.contains(&last) {
            return None;
        }
        let inner: Vec<AxisId> = if along {
            let run = t.axes.iter().rev().take_while(|a| summed.contains(a) || !wide_axis(a));
            let mut run: Vec<_> = run.copied().filter(|a| summed.contains(a)).collect();
            run.reverse();
            run
        } else {
            t.axes.iter().copied().filter(|a| summed.contains(a)).collect()
        };
        let outer = summed.into_iter().filter(|a| !inner.contains(a)).collect();
        let products = vec![FewProduct { result: inst.result(), table, elements: t, index, narrow }];
        Some(FewPlan { batch, rows, columns, outer, inner, along, products })
    }

    /// The distinct narrow operands.
    pub fn narrows(&self) -> Vec<ValueId> {
        let mut distinct: Vec<ValueId> = Vec::new();
        for product in &self.products {
            if !distinct.contains(&product.narrow) {
                distinct.push(product.narrow);
            }
        }
        distinct
    }

    /// A number that surely divides the length of what lies behind one another in a wide operand and is walked together, with one scale if
    /// it is held as codes.
    pub fn factor(&self, body: &Function) -> u64 {
        let known = |a: &AxisId| body.axis(*a).size.fixed().unwrap_or(1);
        let of = |p: &FewProduct| {
            let own = if self.along { &self.inner } else { &self.columns };
            let run = p.elements.axes.iter().rev();
            let run = run.take_while(|a| own.contains(a) || body.axis(**a).size == Size::Fixed(1));
            let run = run.map(known).fold(1u64, u64::saturating_mul);
            match p.table {
                Table::Elements(_) => run,
                Table::Codes(coded, _) => gcd(run, coded.group),
            }
        };
        self.products.iter().map(of).fold(0, gcd)
    }
}

/// The greatest common divisor.
pub(crate) fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}
