//! A tree of products, flattened: operands that meet by axis, and where the author put brackets.

use std::collections::{BTreeMap, BTreeSet};

use latentc_ir::{Axis, AxisId, Binary, DType, Def, Function, Op, Type, ValueId};

use crate::rewrite::live;
use crate::stream_softmax::unstored;

/// Deeper trees are cut, so that no input exhausts the stack.
const DEEPEST: usize = 64;

/// An operand of a flat product.
pub(super) struct Leaf {
    /// What it is.
    pub value: ValueId,
    /// Its axes that the product knows by another name, and that name.
    pub renames: Vec<(AxisId, AxisId)>,
    /// Its own axes that no other operand has and nobody wants: they are summed before anything else.
    pub alone: Vec<AxisId>,
    /// What meets the other operands.
    pub ty: Type,
    /// Whether it is the same in each run.
    pub ahead: bool,
    /// Whether it is made where it is read: see [`unstored`].
    pub unstored: bool,
}

/// A bracket of the author's: an instruction whose value is a product of some of the operands.
pub(super) struct Node {
    /// Its place in the body.
    pub inst: usize,
    /// The operands below it, sorted.
    pub leaves: Vec<usize>,
    /// The operands below each of its own.
    pub parts: Vec<Vec<usize>>,
    /// The axes of its value, in the product's names.
    axes: Vec<AxisId>,
    /// Whether its value has the product's names for them.
    own_names: bool,
}

/// A flat product, and the author's brackets in it; the root is the last.
pub(super) struct Product {
    /// The function's axes, and behind them those that tell apart what two sums call by one name.
    pub axes: Vec<Axis>,
    /// What is multiplied.
    pub leaves: Vec<Leaf>,
    /// Operands before what is made of them.
    pub nodes: Vec<Node>,
    /// The types that the author gave to brackets, by operands below.
    written: BTreeMap<Vec<usize>, Type>,
    result: Type,
    /// Whether the result is used where it is made.
    unstored: bool,
    /// Whether the result is only added up.
    added: bool,
    wide: DType,
}

/// What of a function may become one product.
pub(super) struct Body<'a> {
    pub f: &'a Function,
    defs: Vec<Def<'a>>,
    /// Which instructions something needs.
    pub live: Vec<bool>,
    /// How often each value is used.
    uses: Vec<usize>,
    /// Which instructions are products with a contraction in them that nothing else sees.
    holds: Vec<bool>,
    /// What takes no memory.
    unstored: BTreeSet<ValueId>,
}

impl<'a> Body<'a> {
    pub(super) fn new(f: &'a Function) -> Body<'a> {
        let live = live(f);
        let mut uses = vec![0; f.values.len()];
        let args = f.body.iter().zip(&live).filter(|(_, live)| **live).flat_map(|(inst, _)| &inst.args);
        for v in args.chain(&f.results) {
            uses[v.0 as usize] += 1;
        }
        let mut body =
            Body { f, defs: f.defs(), live, uses, holds: vec![false; f.body.len()], unstored: unstored(f) };
        for (n, inst) in f.body.iter().enumerate() {
            // A plain product or another name is looked through only on the way to a contraction: by itself it costs
            // nothing where it is read, and moving it would gain nothing.
            let through = matches!(inst.op, Op::Binary(Binary::Mul) | Op::Rename { .. });
            body.holds[n] =
                inst.op == Op::Contract || (through && inst.args.iter().any(|&a| body.inner(a).is_some()));
        }
        body
    }

    /// The instruction that makes a value which is seen by one other only, if that is a product with a contraction in it.
    fn inner(&self, value: ValueId) -> Option<usize> {
        match self.defs[value.0 as usize] {
            Def::Inst(n, _) => (self.holds[n] && self.uses[value.0 as usize] == 1).then_some(n),
            Def::Param(_) | Def::Weight(_) | Def::Cache(_) => None,
        }
    }

    /// Whether a value is only added up, where an index says.
    fn added(&self, value: ValueId) -> bool {
        let users =
            self.f.body.iter().zip(&self.live).filter(|(inst, live)| **live && inst.args.contains(&value));
        let mut adds =
            users.map(|(inst, _)| matches!(inst.op, Op::ScatterAdd { .. }) && inst.args[0] == value);
        self.uses[value.0 as usize] == 1 && adds.all(|adds| adds) && !self.f.results.contains(&value)
    }

    /// The product that an instruction is the root of. What makes the values in `closed` stays out of it.
    pub(super) fn gather(&self, root: usize, closed: &BTreeSet<ValueId>) -> Product {
        let inst = &self.f.body[root];
        let result = self.f.ty(inst.result()).clone();
        let mut taken: BTreeSet<AxisId> = result.axes.iter().copied().collect();
        inst.args.iter().for_each(|&a| taken.extend(&self.f.ty(a).axes));
        let product = Product {
            axes: self.f.axes.clone(),
            leaves: Vec::new(),
            nodes: Vec::new(),
            written: BTreeMap::new(),
            wide: wide(result.dtype),
            unstored: self.unstored.contains(&inst.result()),
            added: self.added(inst.result()),
            result,
        };
        let same = taken.iter().map(|&a| (a, a)).collect();
        let mut walk = Walk { body: self, closed, taken, product };
        walk.node(root, &same, 0);
        walk.product.finish(self.f)
    }
}

/// One walk down a tree.
struct Walk<'w> {
    body: &'w Body<'w>,
    closed: &'w BTreeSet<ValueId>,
    /// The product's names for axes so far.
    taken: BTreeSet<AxisId>,
    product: Product,
}

impl Walk<'_> {
    /// Adds what makes a value or, if that stays out, the value; `names` says what the product calls its axes.
    fn value(&mut self, value: ValueId, names: &BTreeMap<AxisId, AxisId>, depth: usize) -> Vec<usize> {
        if let Some(n) = self.body.inner(value)
            && !self.closed.contains(&value)
            && depth < DEEPEST
        {
            return self.node(n, names, depth);
        }
        let own = self.body.f.ty(value);
        let axes: Vec<_> = own.axes.iter().map(|a| names[a]).collect();
        let renames = own.axes.iter().copied().zip(axes.iter().copied()).filter(|(a, b)| a != b).collect();
        let ahead = match self.body.defs[value.0 as usize] {
            Def::Weight(_) => true,
            Def::Inst(_, inst) => matches!(inst.op, Op::Const(_)),
            Def::Param(_) | Def::Cache(_) => false,
        };
        let ty = Type::new(own.dtype, axes);
        let unstored = self.body.unstored.contains(&value);
        self.product.leaves.push(Leaf { value, renames, alone: Vec::new(), ty, ahead, unstored });
        vec![self.product.leaves.len() - 1]
    }

    fn node(&mut self, n: usize, names: &BTreeMap<AxisId, AxisId>, depth: usize) -> Vec<usize> {
        let inst = &self.body.f.body[n];
        let ty = self.body.f.ty(inst.result());
        let mut below = names.clone();
        if let Op::Rename { from, to } = inst.op {
            below.insert(from, names[&to]);
        }
        if depth > 0 && inst.op == Op::Contract {
            for axis in self.body.f.summed(&inst.args, ty) {
                // Σ_d W[c,d] h[d] inside of what has a `d` of its own: the inner one needs another name.
                let name = if self.taken.contains(&axis) { self.product.fresh(axis) } else { axis };
                self.taken.insert(name);
                below.insert(axis, name);
            }
        }
        let parts: Vec<_> = inst.args.iter().map(|&a| self.value(a, &below, depth + 1)).collect();
        let mut leaves = parts.concat();
        leaves.sort_unstable();
        let axes: Vec<_> = ty.axes.iter().map(|a| names[a]).collect();
        let own_names = axes == ty.axes;
        if own_names {
            self.product.written.insert(leaves.clone(), ty.clone());
        }
        self.product.wide = wide(ty.dtype.promote(self.product.wide).unwrap_or(ty.dtype));
        self.product.nodes.push(Node { inst: n, leaves: leaves.clone(), parts, axes, own_names });
        leaves
    }
}

impl Product {
    fn fresh(&mut self, axis: AxisId) -> AxisId {
        let copy = self.axes[axis.0 as usize].clone();
        self.axes.push(copy);
        AxisId(self.axes.len() as u32 - 1)
    }

    /// Sums what only one operand has: Σ_k a[i,k] b[i] = (Σ_k a[i,k]) b[i].
    fn finish(mut self, f: &Function) -> Product {
        let mut having: BTreeMap<AxisId, usize> = BTreeMap::new();
        for axis in self.leaves.iter().flat_map(|l| &l.ty.axes) {
            *having.entry(*axis).or_default() += 1;
        }
        for leaf in &mut self.leaves {
            let alone = |a: &AxisId| having[a] == 1 && !self.result.has(*a);
            let own = f.ty(leaf.value).axes.iter().zip(&leaf.ty.axes);
            leaf.alone = own.filter(|(_, a)| alone(a)).map(|(own, _)| *own).collect();
            if !leaf.alone.is_empty() {
                leaf.ty.axes.retain(|a| !alone(a));
                leaf.renames.retain(|(_, a)| leaf.ty.has(*a));
                leaf.ty.dtype = wide(leaf.ty.dtype);
                leaf.ahead = false;
            }
        }
        self
    }

    /// The type of the product of some operands. `folded`: of weights, made before the program runs.
    pub(super) fn made(&self, leaves: &[usize], folded: bool) -> Type {
        if let &[leaf] = leaves {
            return self.leaves[leaf].ty.clone();
        }
        if leaves.len() == self.leaves.len() {
            return self.result.clone();
        }
        let axes = self.kept(leaves);
        if folded && leaves.iter().all(|&l| self.leaves[l].ahead) {
            let dtypes = leaves.iter().map(|&l| self.leaves[l].ty.dtype);
            return Type::new(dtypes.reduce(|a, b| a.promote(b).unwrap_or(a)).unwrap_or(self.wide), axes);
        }
        // What the author named is rounded as the author said; what nobody named is not, unless it is a rounded value scaled.
        match self.written.get(leaves) {
            Some(ty) if same_set(&ty.axes, &axes) => ty.clone(),
            Some(_) | None => Type::new(self.scaled(leaves, &axes).unwrap_or(self.wide), axes),
        }
    }

    /// The dtype of a product of some operands that only scales the elements of one, before they are summed: that one's, if it is
    /// bf16. Its elements are rounded to as many bits as before, and bf16 has the range of f32, so that the sum errs no more by it
    /// than by the operand itself, and matrix units take it as it is. f16 has not the range.
    fn scaled(&self, leaves: &[usize], axes: &[AxisId]) -> Option<DType> {
        let whole = |l: &&usize| same_set(&self.leaves[**l].ty.axes, axes);
        let sums = leaves.iter().flat_map(|&l| &self.leaves[l].ty.axes).any(|a| !axes.contains(a));
        let mut of = leaves.iter().filter(whole);
        let narrow = of.next().map(|&l| self.leaves[l].ty.dtype).filter(|d| *d == DType::Bf16);
        let later = self.added || axes.iter().any(|a| !self.result.has(*a));
        narrow.filter(|_| !sums && later && of.next().is_none())
    }

    /// Whether the product of some operands passes through memory.
    pub(super) fn stored(&self, leaves: &[usize]) -> bool {
        match leaves {
            &[leaf] => !self.leaves[leaf].unstored,
            _ => leaves.len() < self.leaves.len() || !self.unstored,
        }
    }

    /// The axes of the product of some operands that the others or the result need.
    fn kept(&self, leaves: &[usize]) -> Vec<AxisId> {
        let mut axes = Vec::new();
        for axis in leaves.iter().flat_map(|&l| &self.leaves[l].ty.axes) {
            let outside = |(n, l): (usize, &Leaf)| !leaves.contains(&n) && l.ty.has(*axis);
            let needed = self.result.has(*axis) || self.leaves.iter().enumerate().any(outside);
            if needed && !axes.contains(axis) {
                axes.push(*axis);
            }
        }
        axes
    }

    /// Whether the value of a bracket is just what the product of its operands must be.
    pub(super) fn is_whole(&self, node: &Node) -> bool {
        match node.leaves[..] {
            [leaf] => same_set(&node.axes, &self.leaves[leaf].ty.axes),
            _ => same_set(&node.axes, &self.kept(&node.leaves)),
        }
    }

    /// The bracket around just these operands whose value has the product's names for axes.
    pub(super) fn named(&self, leaves: &[usize]) -> Option<&Node> {
        let fits = |n: &&Node| n.own_names && n.leaves == leaves && self.is_whole(n);
        self.nodes.iter().rev().find(fits)
    }
}

fn same_set(a: &[AxisId], b: &[AxisId]) -> bool {
    a.len() == b.len() && a.iter().all(|x| b.contains(x))
}

/// What lies between is kept in f32 at least.
pub(super) fn wide(dtype: DType) -> DType {
    dtype.promote(DType::F32).unwrap_or(dtype)
}
