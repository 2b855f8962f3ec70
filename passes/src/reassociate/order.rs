//! Orders of a product: what each costs, and which is the cheapest.

use std::collections::BTreeMap;

use latentc_ir::cost::Cost;
use latentc_ir::{Axis, AxisId, Poly, Type};

use super::tree::Product;
use crate::{Machine, Sizes};

/// Up to this many operands all orders are tried; above, the cheapest pair is taken each time.
const EXHAUSTIVE: usize = 10;

/// The cheapest pair is looked for among this many operands, so that the time grows with their number and no faster.
const WINDOW: usize = 32;

/// Two costs that differ by less are equal: they are sums of the same terms in another order.
const EQUAL: f64 = 1e-9;

/// Products of two, operands before what is made of them; each operand the sorted numbers of the leaves in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Order {
    pub steps: Vec<(Vec<usize>, Vec<usize>)>,
}

/// Everything in both, sorted.
pub(super) fn union(a: &[usize], b: &[usize]) -> Vec<usize> {
    let mut all = [a, b].concat();
    all.sort_unstable();
    all
}

impl Order {
    /// `((a b) c) d`: so many operands, from left to right.
    pub(super) fn from_the_left(operands: usize) -> Order {
        Order { steps: (1..operands).map(|n| ((0..n).collect(), vec![n])).collect() }
    }

    /// The two operands that each product is made of.
    pub(super) fn splits(&self) -> BTreeMap<Vec<usize>, [&[usize]; 2]> {
        self.steps.iter().map(|(a, b)| (union(a, b), [&a[..], &b[..]])).collect()
    }
}

/// What an order comes to at some sizes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Weight {
    /// Each step as long as the slower of its arithmetic and its memory takes.
    pub seconds: f64,
    pub flops: f64,
    /// Steps that are as the author wrote them.
    written: usize,
}

impl Weight {
    fn plus(self, other: Weight) -> Weight {
        Weight {
            seconds: self.seconds + other.seconds,
            flops: self.flops + other.flops,
            written: self.written + other.written,
        }
    }

    /// Faster; of equals, with less arithmetic; of those, closer to the text.
    pub(super) fn better(&self, other: &Weight) -> bool {
        let less = |x: f64, y: f64| x < y - EQUAL * y.abs();
        if less(self.seconds, other.seconds) || less(other.seconds, self.seconds) {
            return self.seconds < other.seconds;
        }
        if less(self.flops, other.flops) || less(other.flops, self.flops) {
            return self.flops < other.flops;
        }
        self.written > other.written
    }
}

/// A product at the sizes it is ordered for.
pub(super) struct Search<'s> {
    pub product: &'s Product,
    pub machine: &'s Machine,
    pub sizes: Sizes,
    /// Whether products of weights may be made before the program runs: they cost nothing, but are read.
    pub folding: bool,
    /// The size of each axis of the product.
    extents: Vec<f64>,
}

impl<'s> Search<'s> {
    pub(super) fn new(
        product: &'s Product,
        machine: &'s Machine,
        sizes: &Sizes,
        folding: bool,
    ) -> Search<'s> {
        let of = |a: &Axis| sizes.extent(a) as f64;
        let extents = product.axes.iter().map(of).collect();
        Search { product, machine, sizes: sizes.clone(), folding, extents }
    }

    /// The same with another number of new tokens.
    pub(super) fn at(&self, t: u64) -> Search<'s> {
        Search::new(self.product, self.machine, &self.sizes.at(t), self.folding)
    }

    fn extent<'a>(&self, axes: impl IntoIterator<Item = &'a AxisId>) -> f64 {
        axes.into_iter().map(|a| self.extents[a.0 as usize]).product()
    }

    /// The cheapest order.
    pub(super) fn best(&self) -> Order {
        let n = self.product.leaves.len();
        if n > EXHAUSTIVE { self.greedy() } else { self.exhaustive(n) }
    }

    /// Dynamic programming over the sets of operands: the cheapest way to each from the cheapest ways to two halves.
    fn exhaustive(&self, n: usize) -> Order {
        let sets: Vec<Vec<usize>> =
            (0..1usize << n).map(|set| (0..n).filter(|leaf| set >> leaf & 1 == 1).collect()).collect();
        let types: Vec<Type> = sets.iter().map(|s| self.product.made(s, self.folding)).collect();
        let mut best: Vec<(Weight, usize)> = vec![(Weight::default(), 0); sets.len()];
        for set in 1..sets.len() {
            let mut found: Option<(Weight, usize)> = None;
            for right in halves(set) {
                let left = set & !right;
                let step = self.step(
                    [&sets[left], &sets[right]],
                    &sets[set],
                    [&types[left], &types[right]],
                    &types[set],
                );
                let weight = step.plus(best[left].0).plus(best[right].0);
                if found.is_none_or(|(old, _)| weight.better(&old)) {
                    found = Some((weight, right));
                }
            }
            best[set] = found.unwrap_or_default();
        }
        let mut steps = Vec::new();
        let mut todo = vec![sets.len() - 1];
        while let Some(set) = todo.pop() {
            let right = best[set].1;
            if right != 0 {
                steps.push((sets[set & !right].clone(), sets[right].clone()));
                todo.extend([set & !right, right]);
            }
        }
        steps.reverse();
        Order { steps }
    }

    fn greedy(&self) -> Order {
        let mut parts: Vec<Vec<usize>> = (0..self.product.leaves.len()).map(|n| vec![n]).collect();
        let mut steps = Vec::new();
        while parts.len() > 1 {
            let seen: Vec<_> =
                parts.iter().take(WINDOW).map(|p| self.product.made(p, self.folding)).collect();
            let mut found: Option<(Weight, usize, usize)> = None;
            for a in 0..seen.len() {
                for b in a + 1..seen.len() {
                    let all = union(&parts[a], &parts[b]);
                    let made = self.product.made(&all, self.folding);
                    let weight = self.step([&parts[a], &parts[b]], &all, [&seen[a], &seen[b]], &made);
                    if found.is_none_or(|(old, ..)| weight.better(&old)) {
                        found = Some((weight, a, b));
                    }
                }
            }
            let (_, a, b) = found.unwrap_or((Weight::default(), 0, 1));
            let right = parts.remove(b);
            let left = std::mem::take(&mut parts[a]);
            parts[a] = union(&left, &right);
            steps.push((left, right));
        }
        Order { steps }
    }

    /// All orders of a product of a few operands.
    pub(super) fn all(&self) -> Vec<Order> {
        fn of(set: usize, n: usize) -> Vec<Order> {
            let leaves = |set: usize| (0..n).filter(|leaf| set >> leaf & 1 == 1).collect::<Vec<_>>();
            if set.count_ones() < 2 {
                return vec![Order::default()];
            }
            let mut orders = Vec::new();
            for right in halves(set) {
                let (left, after) = (of(set & !right, n), of(right, n));
                for (x, y) in left.iter().flat_map(|x| after.iter().map(move |y| (x, y))) {
                    let mut steps = [&x.steps[..], &y.steps[..]].concat();
                    steps.push((leaves(set & !right), leaves(right)));
                    orders.push(Order { steps });
                }
            }
            orders
        }
        let n = self.product.leaves.len();
        of((1 << n) - 1, n)
    }

    /// What an order comes to.
    pub(super) fn weigh(&self, order: &Order) -> Weight {
        let made = |s: &[usize]| self.product.made(s, self.folding);
        order.steps.iter().fold(Weight::default(), |sum, (a, b)| {
            let all = union(a, b);
            sum.plus(self.step([a, b], &all, [&made(a), &made(b)], &made(&all)))
        })
    }

    /// Whether all of an order's brackets are the author's.
    pub(super) fn as_written(&self, order: &Order) -> bool {
        self.weigh(order).written == order.steps.len()
    }

    /// Whether the product of these operands is made before the program runs.
    pub(super) fn folds(&self, leaves: &[usize]) -> bool {
        self.folding && leaves.len() > 1 && leaves.iter().all(|&l| self.product.leaves[l].ahead)
    }

    /// A product of two, of these types and that of the result; `all` is what is in both.
    fn step(&self, parts: [&[usize]; 2], all: &[usize], from: [&Type; 2], to: &Type) -> Weight {
        if self.folds(all) {
            return Weight::default();
        }
        let bytes = |leaves: &[usize], ty: &Type| match self.product.stored(leaves) {
            true => self.extent(&ty.axes) * ty.dtype.bytes() as f64,
            false => 0.0,
        };
        let only_second = || from[1].axes.iter().filter(|a| !from[0].has(**a));
        let points = self.extent(&from[0].axes) * self.extent(only_second());
        let sums = from[0].axes.len() + only_second().count() > to.axes.len();
        let flops = points * f64::from(per_point(sums));
        let through = bytes(parts[0], from[0]) + bytes(parts[1], from[1]) + bytes(all, to);
        let seconds = self.machine.seconds(flops, through);
        let same = |n: &&super::tree::Node| {
            n.leaves == all && n.parts.len() == 2 && n.parts.iter().all(|p| parts.contains(&&p[..]))
        };
        Weight { seconds, flops, written: usize::from(self.product.nodes.iter().any(|n| same(&n))) }
    }

    /// What an order costs at any sizes.
    pub(super) fn cost(&self, order: &Order) -> Cost {
        let mut total = Cost::default();
        let extent = |axes: &[AxisId]| {
            let size = |a: &AxisId| Poly::from(&self.product.axes[a.0 as usize].size);
            axes.iter().fold(Poly::constant(1), |n, a| &n * &size(a))
        };
        let bytes = |leaves: &[usize], ty: &Type| match self.product.stored(leaves) {
            true => &extent(&ty.axes) * i128::from(ty.dtype.bytes()),
            false => Poly::default(),
        };
        for (a, b) in &order.steps {
            let all = union(a, b);
            if self.folds(&all) {
                continue;
            }
            let made = |s: &[usize]| self.product.made(s, self.folding);
            let (x, y, to) = (made(a), made(b), made(&all));
            let mut space = x.axes.clone();
            space.extend(y.axes.iter().filter(|a| !x.has(**a)));
            total.flops += &(&extent(&space) * i128::from(per_point(space.len() > to.axes.len())));
            total.bytes_read += &(&bytes(a, &x) + &bytes(b, &y));
            total.bytes_written += &bytes(&all, &to);
        }
        total
    }
}

/// Operations at each point of the space of all axes of a product of two: the product, and a sum where there is one.
fn per_point(sums: bool) -> u32 {
    if sums { 2 } else { 1 }
}

/// The ways to take a part away from a set without its first element, the least and last parts first: of equal
/// orders, the first found multiplies from left to right.
fn halves(set: usize) -> Vec<usize> {
    let rest = set & set.wrapping_sub(1);
    let mut parts = Vec::new();
    let mut part = rest;
    while part != 0 {
        parts.push(part);
        part = (part - 1) & rest;
    }
    parts.sort_by_key(|p| (p.count_ones(), std::cmp::Reverse(*p)));
    parts
}
