//! The same kernel with smaller axes.
//!
//! A body's fixed sizes hang together: what is split is the product of its parts, what is concatenated the sum. Each such relation
//! gives one size from others. Sizes that no relation gives are chosen anew and the rest follows; where two relations would give
//! one size differently, what they start from stays as it was.
//!
//! What code is made for a kernel depends on its sizes, so they are chosen in two [`Style`]s: one keeps whole tiles and
//! aligned rows what they are, the other gives everything a tail.

use latentc_ir::{AxisId, Function, Op, Size, Want, infer};

use super::{WORK, work};
use crate::program::Kernel;

/// How sizes are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Multiples of the powers of two that the sizes are multiples of.
    Round,
    /// Primes, where a size is not small already.
    Odd,
}

impl Style {
    /// Both.
    pub const ALL: [Style; 2] = [Style::Round, Style::Odd];

    /// A size of the same kind: larger than a tile if the size is.
    fn first(self, size: u64) -> u64 {
        match (self, size) {
            (_, 0..7) => size,
            (Style::Round, 7..=64) => size,
            (Style::Round, _) => {
                let unit = 1 << size.trailing_zeros().min(6);
                (64 / unit + 1) * unit
            }
            (Style::Odd, 7..=10) => 7,
            (Style::Odd, 11..=32) => 11,
            (Style::Odd, 33..=64) => 37,
            (Style::Odd, _) => 67,
        }
    }

    /// The next smaller one; the same if there is none.
    fn smaller(self, size: u64) -> u64 {
        match (self, size) {
            (_, 0..3) => size,
            (Style::Round, _) => size.div_ceil(2),
            (Style::Odd, 3) => 2,
            (Style::Odd, 4..=7) => size - 2,
            (Style::Odd, 8..=11) => 7,
            (Style::Odd, 12..=37) => 11,
            (Style::Odd, _) => 37,
        }
    }
}

/// The kernel with smaller axes, or as it is if its sizes are small or cannot be changed.
pub fn shrink(kernel: &Kernel, style: Style) -> Kernel {
    let system = System::of(&kernel.body);
    let mut chosen: Vec<u64> = system.sizes.iter().map(|&n| style.first(n)).collect();
    let mut kept = vec![false; chosen.len()];
    loop {
        let sizes = system.solve(&chosen, &mut kept);
        let small = Kernel { body: system.apply(&kernel.body, &sizes), ..kernel.clone() };
        // What is known at launch only can be chosen small then.
        let work = work(&small, &vec![3; small.size_symbols().len()]);
        // The largest first, and those along which memory is contiguous last: they decide how it is accessed.
        let free = |v: &Var| system.root(*v) == *v && !kept[*v] && !system.follows(*v);
        let candidates = (0..chosen.len()).filter(|v| free(v) && style.smaller(chosen[*v]) < chosen[*v]);
        let next = candidates.max_by_key(|&v| (!system.contiguous[v], chosen[v]));
        match next {
            Some(v) if work > WORK => chosen[v] = style.smaller(chosen[v]),
            _ if fits(&small.body) => return small,
            _ => return kernel.clone(),
        }
    }
}

/// Whether every instruction still has the type that follows from its operands.
fn fits(body: &Function) -> bool {
    body.body.iter().all(|inst| {
        let args: Vec<_> = inst.args.iter().map(|&a| body.ty(a)).collect();
        infer(&inst.op, &args, Want::exactly(body.ty(inst.result())), &body.axes).is_ok()
    })
}

/// Something with a size: the first are the body's axes.
type Var = usize;

/// The total is the sum or the product of the parts.
struct Relation {
    total: Var,
    parts: Vec<Var>,
    product: bool,
}

/// A slice's place: which parts of its axis lie before it.
struct Start {
    /// The instruction.
    inst: usize,
    before: Vec<Var>,
}

/// The sizes of a body and how they hang together.
struct System {
    sizes: Vec<u64>,
    /// Another variable of the same size, or itself.
    same: Vec<Var>,
    relations: Vec<Relation>,
    starts: Vec<Start>,
    /// Whether it is the fastest axis of a tensor in memory.
    contiguous: Vec<bool>,
    /// What must not change.
    constants: Vec<Var>,
}

impl System {
    fn of(body: &Function) -> System {
        // What is known at launch only counts as one.
        let sizes: Vec<u64> = body.axes.iter().map(|a| a.size.fixed().unwrap_or(1)).collect();
        let mut system = System {
            same: (0..sizes.len()).collect(),
            contiguous: vec![false; sizes.len()],
            sizes,
            relations: Vec::new(),
            starts: Vec::new(),
            constants: Vec::new(),
        };
        let var = |a: &AxisId| a.0 as usize;
        for inst in &body.body {
            match &inst.op {
                Op::Rename { from, to } | Op::Past { from, to } => system.equal(var(from), var(to)),
                Op::Split { axis, into } => system.relate(var(axis), into.iter().map(var).collect(), true),
                Op::Merge { axes, into } => system.relate(var(into), axes.iter().map(var).collect(), true),
                Op::Concat { axes, into } => system.relate(var(into), axes.iter().map(var).collect(), false),
                Op::Rope { axis, .. } => {
                    let two = system.add(2, false);
                    system.constants.push(two);
                    let freq = body.ty(inst.args[2]).axes.iter().map(var);
                    system.relate(var(axis), freq.chain([two]).collect(), true);
                }
                // Their axes are those of their operands.
                Op::Const(_)
                | Op::Position { .. }
                | Op::Unary(_)
                | Op::Binary(_)
                | Op::Select
                | Op::Cast
                | Op::Contract
                | Op::Reduce { .. }
                | Op::Pack { .. }
                | Op::Unpack { .. }
                | Op::Broadcast { .. }
                | Op::Gather { .. }
                | Op::ScatterAdd { .. }
                | Op::TopK { .. }
                | Op::TopIndices { .. }
                | Op::Append { .. }
                | Op::Softmax { .. }
                | Op::RmsNorm { .. }
                | Op::Call { .. }
                // Together, below.
                | Op::Slice { .. } => {}
            }
        }
        for axis in 0..body.axes.len() {
            system.cut(body, axis);
        }
        let in_memory = body.params.iter().chain(&body.results);
        for last in in_memory.filter_map(|&v| body.ty(v).axes.last()) {
            system.mark_contiguous(var(last));
        }
        system
    }

    /// The slices of an axis cut it into pieces, and each slice is some of them.
    fn cut(&mut self, body: &Function, axis: Var) {
        let slices = body.body.iter().enumerate().filter_map(|(n, inst)| match inst.op {
            Op::Slice { axis: a, into, start } if a.0 as usize == axis => {
                Some((n, into.0 as usize, start, start + self.sizes[into.0 as usize]))
            }
            _ => None,
        });
        let slices: Vec<_> = slices.collect();
        if slices.is_empty() || body.axes[axis].size.fixed().is_none() {
            return;
        }
        let mut cuts: Vec<u64> = slices.iter().flat_map(|&(_, _, from, to)| [from, to]).collect();
        cuts.extend([0, self.sizes[axis]]);
        cuts.sort_unstable();
        cuts.dedup();
        let pieces: Vec<_> = cuts.windows(2).map(|w| (w[0], w[1], self.add(w[1] - w[0], false))).collect();
        let within = |from: u64, to: u64| {
            pieces.iter().filter(|p| p.0 >= from && p.1 <= to).map(|p| p.2).collect::<Vec<_>>()
        };
        let relations: Vec<_> = slices.iter().map(|&(_, into, from, to)| (into, within(from, to))).collect();
        self.starts.extend(slices.iter().map(|&(inst, _, from, _)| Start { inst, before: within(0, from) }));
        self.relate(axis, within(0, self.sizes[axis]), false);
        for (into, pieces) in relations {
            self.relate(into, pieces, false);
        }
    }

    fn add(&mut self, size: u64, contiguous: bool) -> Var {
        self.sizes.push(size);
        self.contiguous.push(contiguous);
        self.same.push(self.same.len());
        self.sizes.len() - 1
    }

    fn root(&self, mut v: Var) -> Var {
        while self.same[v] != v {
            v = self.same[v];
        }
        v
    }

    fn equal(&mut self, a: Var, b: Var) {
        let (a, b) = (self.root(a), self.root(b));
        self.same[a.max(b)] = a.min(b);
    }

    fn relate(&mut self, total: Var, parts: Vec<Var>, product: bool) {
        match parts[..] {
            [one] => self.equal(total, one),
            _ => self.relations.push(Relation { total, parts, product }),
        }
    }

    /// The variable, and the last part of what it is made of.
    fn mark_contiguous(&mut self, v: Var) {
        let v = self.root(v);
        if std::mem::replace(&mut self.contiguous[v], true) {
            return;
        }
        let made = self.relations.iter().filter(|r| self.root(r.total) == v);
        let last: Vec<Var> = made
            .flat_map(
                |r| if r.product { r.parts.last().copied().into_iter().collect() } else { r.parts.clone() },
            )
            .collect();
        last.into_iter().for_each(|p| self.mark_contiguous(p));
    }

    /// Whether a relation gives it.
    fn follows(&self, v: Var) -> bool {
        self.relations.iter().any(|r| self.root(r.total) == v)
    }

    /// All sizes from those chosen for what nothing gives. What leads to a contradiction is kept from then on.
    fn solve(&self, chosen: &[u64], kept: &mut [bool]) -> Vec<u64> {
        for &c in &self.constants {
            kept[self.root(c)] = true;
        }
        loop {
            let own =
                |v: Var| if kept[self.root(v)] { self.sizes[self.root(v)] } else { chosen[self.root(v)] };
            let mut sizes: Vec<u64> = (0..self.sizes.len()).map(own).collect();
            // Each round settles what follows from what was settled before.
            for _ in 0..=self.relations.len() {
                for r in &self.relations {
                    let total = self.total(r, &sizes);
                    let root = self.root(r.total);
                    (0..sizes.len()).filter(|&v| self.root(v) == root).for_each(|v| sizes[v] = total);
                }
            }
            let broken = self.relations.iter().find(|r| self.total(r, &sizes) != sizes[r.total]);
            let Some(broken) = broken else { return sizes };
            let before = kept.iter().filter(|k| **k).count();
            self.keep(self.root(broken.total), kept);
            if kept.iter().filter(|k| **k).count() == before {
                // A circle: nothing is changed.
                return self.sizes.clone();
            }
        }
    }

    fn total(&self, r: &Relation, sizes: &[u64]) -> u64 {
        let parts = r.parts.iter().map(|&p| sizes[p]);
        if r.product { parts.product() } else { parts.sum() }
    }

    /// Keeps a size and all that it is made of.
    fn keep(&self, v: Var, kept: &mut [bool]) {
        if std::mem::replace(&mut kept[v], true) {
            return;
        }
        for r in self.relations.iter().filter(|r| self.root(r.total) == v) {
            r.parts.iter().for_each(|&p| self.keep(self.root(p), kept));
        }
    }

    /// The body with these sizes.
    fn apply(&self, body: &Function, sizes: &[u64]) -> Function {
        let mut body = body.clone();
        for (axis, &size) in body.axes.iter_mut().zip(sizes) {
            if axis.size.fixed().is_some() {
                axis.size = Size::Fixed(size);
            }
        }
        for start in &self.starts {
            if let Op::Slice { start: at, .. } = &mut body.body[start.inst].op {
                *at = start.before.iter().map(|&v| sizes[v]).sum();
            }
        }
        for n in 0..body.body.len() {
            let along = body.ty(body.body[n].result()).axes.first().map(|a| sizes[a.0 as usize]);
            if let (Op::Const(table), Some(size)) = (&mut body.body[n].op, along) {
                table.truncate(size as usize);
            }
        }
        body
    }
}

#[cfg(test)]
mod tests {
    use latentc_ir::parse;

    use super::*;
    use crate::program::KernelKind;

    fn kernel(body: &str) -> Kernel {
        let text = format!("module test entry @k\n\nfunc @k {{\n{body}\n}}\n");
        let module = parse("test", &text).unwrap_or_else(|e| panic!("{e} in\n{text}"));
        Kernel { name: "k".to_owned(), kind: KernelKind::Map, body: module.functions[0].clone() }
    }

    fn sizes(k: &Kernel) -> Vec<u64> {
        k.body.axes.iter().map(|a| a.size.fixed().unwrap_or(0)).collect()
    }

    #[test]
    fn what_hangs_together_shrinks_together() {
        let k = kernel(
            "axes a0=n0, a1=24576, a2=128, a3=192, a4=128, a5=64, a6=32, a7=192, a8=n1\n\
             param p0: bf16[a0, a1]\nparam p1: i32[a0]\nparam p2: f32[a6]\n\
             x: bf16[a0, a2, a3] = split p0 axis a1 into a2, a3\n\
             u: bf16[a0, a2, a4] = slice x axis a3 into a4 start 0\n\
             v: bf16[a0, a2, a5] = slice x axis a3 into a5 start 128\n\
             w: bf16[a0, a2, a5] = rope v, p1, p2 over a5 pairs interleaved\n\
             y: bf16[a0, a2, a7] = concat u, w axes a4, a5 into a7\nreturn y",
        );
        let odd = shrink(&k, Style::Odd);
        // Heads, and the pieces of a head: 67 and twice 11.
        assert_eq!(sizes(&odd), [0, 67 * 89, 67, 89, 67, 22, 11, 89, 0]);
        assert!(matches!(odd.body.body[2].op, Op::Slice { start: 67, .. }));
        let round = shrink(&k, Style::Round);
        assert_eq!(sizes(&round), [0, 128 * 192, 128, 192, 128, 64, 32, 192, 0]);
        assert!(fits(&odd.body) && fits(&round.body));
    }

    #[test]
    fn what_contradicts_itself_stays() {
        let k = kernel(
            "axes a0=5000, a1=50, a2=100, a3=20, a4=250, a5=77\nparam p0: f32[a0, a5]\n\
             x: f32[a1, a2, a5] = split p0 axis a0 into a1, a2\ny: f32[a3, a4, a5] = split p0 axis a0 into a3, a4\n\
             u: f32[a5] = contract x over a1, a2\nv: f32[a5] = contract y over a3, a4\nz: f32[a5] = add u, v\nreturn z",
        );
        assert_eq!(sizes(&shrink(&k, Style::Odd))[..5], [5000, 50, 100, 20, 250]);
    }

    #[test]
    fn work_is_bounded_and_memory_stays_contiguous() {
        let k = kernel(
            "axes a0=n0, a1=5120, a2=12288, a3=160, a4=6\nparam p0: bf16[a3, a2, a1]\nparam p1: f32[a0, a1]\n\
             s: f32[a0, a3] = contract p0, p1 over a2, a1\ny: i32[a0, a4] = top_indices s over a3 into a4\nreturn y",
        );
        for style in Style::ALL {
            let small = shrink(&k, style);
            assert!(work(&small, &[3]) <= WORK);
            let last = sizes(&small)[1];
            assert!(last > 64 && (style == Style::Odd || last.is_multiple_of(64)), "{:?}", sizes(&small));
        }
    }
}
