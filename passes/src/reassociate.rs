//! Contraction is associative and commutative: multiply in the cheaper order.
//!
//! What   contract q, (contract w, c)  <=>  contract (contract q, w), c         contract a, b, c  =>  contract (mul a, b), c
//!        contract a over k  =>  reduce_sum a over k                            contract a, b (no sum)  =>  mul a, b
//! Why    decode never rebuilds keys and values from the cache (DeepSeek-V2, section 2.1.2 and appendix C, after (47))
//! Needs  any graph, finite values (∞ · 0 is not associative).  Leaves  contractions of two operands whose summed axes both have
//! Cost   seconds on the machine of each product of two (arithmetic or memory, whichever is slower), added up, at the
//!        sizes that the graph is for, without what a streamed softmax keeps out of memory; of equals the fewer operations, then the author's order
//! Cases  reassociate.ir
//!
//! A tree of products in which nothing else sees the inner ones is one product of many, whose order is free. Values
//! that no order needs are gone, and so is the rounding that they were written with; what nobody named is f32 at
//! least, but for a bf16 operand times factors of its rows, which stays bf16. A value that the best order makes anyway stays as the author wrote it, with its name and dtype.
//!
//! Products of weights alone could be made before the program runs. They are weighed as such, and where that would be
//! the best the remark says so, but there is no op that evaluates ahead of time: the best of the others is taken.

mod order;
mod tree;

use std::collections::{BTreeMap, BTreeSet};

use latentc_ir::{AxisId, Binary, Function, Inst, Module, Op, Origin, Reduce, Type, ValueId};

use crate::rewrite::Rebuild;
use crate::{Context, Crossing, Kind, Remark, Sizes, Unit};
use order::{Order, Search, union};
use tree::{Body, Node, Product};

const NAME: &str = "reassociate";

/// A remark lists so many orders, and all of a product of up to [`LISTED_OPERANDS`] is tried for it.
const LISTED: usize = 6;
const LISTED_OPERANDS: usize = 5;

/// Puts every product of the module into the cheapest order.
pub fn reassociate(module: &Module, cx: &mut Context) -> Module {
    let mut sizes = Sizes::new(module, cx.graph);
    if let Some(tokens) = cx.tokens {
        sizes = sizes.at(tokens);
    }
    let functions = module.functions.iter().map(|f| function(f, &sizes, cx)).collect();
    Module { name: module.name.clone(), functions, entry: module.entry.clone() }
}

fn function(f: &Function, sizes: &Sizes, cx: &mut Context) -> Function {
    let body = Body::new(f);
    // From the last to the first, since a product takes those in it along.
    let mut plans: BTreeMap<usize, (Product, Order)> = BTreeMap::new();
    let mut inner = BTreeSet::new();
    let mut remarks = Vec::new();
    for (n, inst) in f.body.iter().enumerate().rev() {
        if inst.op != Op::Contract || !body.live[n] || inner.contains(&n) {
            continue;
        }
        let (product, order, remark) = plan(&body, n, sizes, cx);
        remarks.extend(remark);
        inner.extend(product.nodes.iter().map(|node| node.inst).filter(|&i| i != n));
        plans.insert(n, (product, order));
    }
    cx.remarks.extend(remarks.into_iter().rev());

    let mut r = Rebuild::new(f, NAME);
    r.header();
    for (n, inst) in f.body.iter().enumerate() {
        match plans.get(&n) {
            Some((product, order)) => emit(&mut r, inst, product, order),
            // What nothing needs may use what is no more.
            None if inner.contains(&n) || !body.live[n] => {}
            None => r.copy(inst),
        }
    }
    r.finish()
}

/// Makes products of two of every contraction by itself, from left to right: the least that kernels need.
pub fn pair(module: &Module) -> Module {
    let functions = module.functions.iter().map(|f| {
        let body = Body::new(f);
        let mut r = Rebuild::new(f, NAME);
        r.header();
        for (n, inst) in f.body.iter().enumerate() {
            if inst.op == Op::Contract {
                let product = body.gather(n, &inst.args.iter().copied().collect());
                emit(&mut r, inst, &product, &Order::from_the_left(product.leaves.len()));
            } else {
                r.copy(inst);
            }
        }
        r.finish()
    });
    Module { name: module.name.clone(), functions: functions.collect(), entry: module.entry.clone() }
}

/// The product that an instruction is the root of, without what the best order leaves alone; that order; and why.
fn plan(body: &Body<'_>, root: usize, sizes: &Sizes, cx: &Context) -> (Product, Order, Option<Remark>) {
    let mut closed = BTreeSet::new();
    let mut product = body.gather(root, &closed);
    // What is the same in all orders that matter is no part of the question.
    let question = loop {
        let here = search(&product, sizes, cx).best();
        let few = search(&product, &sizes.at(1), cx).best();
        let many = search(&product, &sizes.at(Sizes::LONG), cx).best();
        // Training changes weights in each run.
        let fold = Search::new(&product, &cx.machine, sizes, cx.graph.serves());
        let folded = fold.best();
        let folds = folded.steps.iter().any(|(a, b)| fold.folds(&union(a, b)))
            && fold.weigh(&folded).better(&fold.weigh(&here));
        let mut orders = vec![here, few, many];
        orders.extend(folds.then_some(folded));
        let left: Vec<_> = orders.iter().map(|o| untouched(body, &product, o)).collect();
        let common: Vec<_> = left[0].iter().filter(|v| left.iter().all(|l| l.contains(v))).copied().collect();
        if common.is_empty() {
            break orders;
        }
        closed.extend(common);
        product = body.gather(root, &closed);
    };
    let remark =
        (product.leaves.len() > 2).then(|| remark(body, root, &search(&product, sizes, cx), &question, cx));
    loop {
        let order = search(&product, sizes, cx).best();
        let left = untouched(body, &product, &order);
        if left.is_empty() {
            return (product, order, remark);
        }
        closed.extend(left);
        product = body.gather(root, &closed);
    }
}

fn search<'s>(product: &'s Product, sizes: &Sizes, cx: &'s Context) -> Search<'s> {
    Search::new(product, &cx.machine, sizes, false)
}

/// The values of a product's brackets that an order makes too.
fn untouched(body: &Body<'_>, product: &Product, order: &Order) -> Vec<ValueId> {
    let splits = order.splits();
    let mut left: BTreeSet<usize> = BTreeSet::new();
    let mut values = Vec::new();
    let inner = product.nodes.split_last().map_or(&[][..], |(_, inner)| inner);
    for node in inner {
        let inst = &body.f.body[node.inst];
        let below = |n: &&Node| inst.args.contains(&body.f.body[n.inst].result());
        let below_left = || product.nodes.iter().filter(below).all(|n| left.contains(&n.inst));
        let stays = if inst.op == Op::Contract {
            // It is the root of a product of its own, and ordered there.
            node.leaves.len() == 1 || splits.contains_key(&node.leaves)
        } else if node.parts.len() == 1 {
            below_left()
        } else {
            let parts = |s: &[&[usize]; 2]| node.parts.iter().all(|p| s.contains(&&p[..]));
            splits.get(&node.leaves).is_some_and(parts) && below_left()
        };
        if stays && product.is_whole(node) {
            left.insert(node.inst);
            values.push(inst.result());
        }
    }
    values
}

/// Says which orders there were. `orders`: that which is taken, those for few and for many tokens, and, if it
/// would be better, the one that folds weights.
fn remark(body: &Body<'_>, root: usize, search: &Search<'_>, orders: &[Order], cx: &Context) -> Remark {
    let f = body.f;
    let (taken, few, many) = (&orders[0], &orders[1], &orders[2]);
    let text = |o: &Order| show(f, search, o);
    let mut listed = Vec::new();
    if search.product.leaves.len() <= LISTED_OPERANDS {
        listed = search.all();
        listed.sort_by(|a, b| search.weigh(a).seconds.total_cmp(&search.weigh(b).seconds));
    }
    // Those of the question first, each once.
    let mut candidates: Vec<&Order> = Vec::new();
    for order in [taken, few, many].into_iter().chain(&listed) {
        let same = |o: &&&Order| sets(o) == sets(order);
        if candidates.len() < LISTED && candidates.iter().find(same).is_none() {
            candidates.push(order);
        }
    }
    let symbols: BTreeSet<String> = candidates
        .iter()
        .map(|o| search.cost(o))
        .flat_map(|c| [c.flops, c.bytes_read, c.bytes_written])
        .flat_map(|p| p.symbols().into_iter().map(str::to_owned).collect::<Vec<_>>())
        .collect();
    let at: BTreeMap<String, u64> =
        symbols.into_iter().map(|s| (s.clone(), search.sizes.symbol(&s))).collect();
    let sizes: Vec<_> = at.iter().map(|(name, size)| format!("{name} = {size}")).collect();
    let mut message = format!("`{}`: the fewest seconds of a run on {}", text(taken), cx.machine.name);
    if !sizes.is_empty() {
        message += &format!(" at {}", sizes.join(", "));
    }
    let crossing = crossing(search, few, many, at);
    if let Some(c) = &crossing {
        let by = match c.by_operations {
            Some(n) => format!(" ({n} if only operations counted)"),
            None => String::new(),
        };
        let (side, other) = if taken == few { ("beyond", many) } else { ("up to", few) };
        message += &format!("; {side} {} = {}{by}, `{}` would be faster", c.size, c.at, text(other));
    }
    if let Some(folded) = orders.get(3) {
        let fold = Search::new(search.product, search.machine, &search.sizes, true);
        message += &format!(
            "; `{}` would take {:.3e}, but nothing multiplies weights before the run yet",
            show(f, &fold, folded),
            fold.weigh(folded).seconds
        );
    }
    let kind = if search.as_written(taken) { Kind::Missed } else { Kind::Applied };
    let mut remark = Remark::new(kind, NAME, f, &f.body[root], message);
    remark.crossing = crossing.map(|c| Crossing { below: text(few), above: text(many), ..c });
    for order in candidates {
        let seconds = search.weigh(order).seconds;
        remark = remark.candidate(text(order), search.cost(order), seconds, Unit::Seconds);
    }
    remark
}

/// What is multiplied with what, whichever is written first.
fn sets(order: &Order) -> BTreeSet<Vec<usize>> {
    order.steps.iter().map(|(a, b)| union(a, b)).collect()
}

/// The largest number of new tokens at which the order for few of them is not the slower one.
fn crossing(search: &Search<'_>, few: &Order, many: &Order, at: BTreeMap<String, u64>) -> Option<Crossing> {
    let size = search.sizes.token_symbol()?;
    let last = |cost: &dyn Fn(&Search<'_>, &Order) -> f64| {
        let few_wins = |t: u64| {
            let there = search.at(t);
            cost(&there, few) <= cost(&there, many)
        };
        if !few_wins(1) || few_wins(Sizes::LONG) {
            return None;
        }
        let (mut yes, mut no) = (1, Sizes::LONG);
        while no - yes > 1 {
            let middle = yes.midpoint(no);
            if few_wins(middle) { yes = middle } else { no = middle }
        }
        Some(yes)
    };
    let by_time = last(&|search, order| search.weigh(order).seconds)?;
    let by_operations = last(&|search, order| search.weigh(order).flops);
    let at_others = at.into_iter().filter(|(name, _)| *name != size).collect();
    Some(Crossing {
        size,
        at: by_time,
        by_operations,
        others: at_others,
        below: String::new(),
        above: String::new(),
    })
}

/// `(q W_UK) c_KV`, and `[A B] x` for weights folded before the run.
fn show(f: &Function, search: &Search<'_>, order: &Order) -> String {
    let mut texts: BTreeMap<Vec<usize>, String> = BTreeMap::new();
    for (n, leaf) in search.product.leaves.iter().enumerate() {
        texts.insert(vec![n], f.value(leaf.value).name.clone());
    }
    let mut last = String::new();
    for (a, b) in &order.steps {
        let all = union(a, b);
        let part = |s: &[usize]| {
            let text = &texts[s];
            let bare = s.len() == 1 || search.folds(s);
            if bare && !search.folds(&all) {
                text.clone()
            } else if search.folds(&all) {
                text.trim_matches(['[', ']']).to_owned()
            } else {
                format!("({text})")
            }
        };
        last = format!("{} {}", part(a), part(b));
        if search.folds(&all) {
            last = format!("[{last}]");
        }
        texts.insert(all, last.clone());
    }
    last
}

/// Appends a product in an order.
fn emit(r: &mut Rebuild<'_>, root: &Inst, product: &Product, order: &Order) {
    let result = r.old.value(root.result()).clone();
    let plain = |l: &tree::Leaf| l.alone.is_empty() && l.renames.is_empty();
    let summed = !r.old.summed(&root.args, &result.ty).is_empty();
    if let [a, b] = &product.leaves[..]
        && product.nodes.len() == 1
        && plain(a)
        && plain(b)
        && summed
    {
        return r.copy(root);
    }
    let mut fresh = BTreeMap::new();
    let mut parts: BTreeMap<Vec<usize>, ValueId> = BTreeMap::new();
    for n in 0..product.leaves.len() {
        let from = origins(r.old, product, &[n]);
        let id = leaf(r, product, n, &mut fresh, &from);
        parts.insert(vec![n], id);
    }
    let real = |fresh: &BTreeMap<_, _>, ty: Type| {
        let axes: Vec<_> = ty.axes.iter().map(|a| fresh.get(a).copied().unwrap_or(*a)).collect();
        Type::new(ty.dtype, axes)
    };
    let mut last = parts.get(&[0][..]).copied();
    for (a, b) in &order.steps {
        let all = union(a, b);
        let (Some(&x), Some(&y)) = (parts.get(a), parts.get(b)) else { continue };
        let ty = real(&fresh, product.made(&all, false));
        let sum = !r.new.summed(&[x, y], &ty).is_empty();
        let op = if sum { Op::Contract } else { Op::Binary(Binary::Mul) };
        let name = match product.named(&all) {
            Some(node) => r.old.value(r.old.body[node.inst].result()).name.clone(),
            None => joined(&r.new.value(x).name, &r.new.value(y).name),
        };
        let from = origins(r.old, product, &all);
        let id = r.emit_at(&from, op, &[x, y], &name, ty);
        parts.insert(all, id);
        last = Some(id);
    }
    if let Some(mut id) = last {
        if order.steps.is_empty() {
            id = r.emit(root, Op::Cast, &[id], &result.name, result.ty);
        }
        r.replace(root.result(), id);
    }
}

/// Appends what must be done to an operand before it meets the others.
fn leaf(
    r: &mut Rebuild<'_>,
    product: &Product,
    n: usize,
    fresh: &mut BTreeMap<AxisId, AxisId>,
    lines: &[Origin],
) -> ValueId {
    let leaf = &product.leaves[n];
    let mut id = r.get(leaf.value);
    for &axis in &leaf.alone {
        let ty = r.new.ty(id);
        let axes: Vec<_> = ty.axes.iter().copied().filter(|&a| a != axis).collect();
        let ty = Type::new(tree::wide(ty.dtype), axes);
        id = r.emit_at(lines, Op::Reduce { by: Reduce::Sum, axis }, &[id], "", ty);
    }
    let mut renames = Vec::new();
    for &(own, name) in &leaf.renames {
        let to = if (name.0 as usize) < r.old.axes.len() {
            name
        } else {
            *fresh.entry(name).or_insert_with(|| copy_axis(r, product, name))
        };
        renames.push((own, to, name));
    }
    while !renames.is_empty() {
        // They happen at once, but are done one by one: none may take a name that is still in use. Where each waits for
        // another, one steps aside.
        let n = renames.iter().position(|(_, to, _)| !r.new.ty(id).has(*to));
        let (from, to) = match n {
            Some(n) => {
                let (from, to, _) = renames.remove(n);
                (from, to)
            }
            None => {
                let (from, _, name) = renames[0];
                renames[0].0 = copy_axis(r, product, name);
                (from, renames[0].0)
            }
        };
        let ty = r.new.ty(id).clone();
        let axes: Vec<_> = ty.axes.iter().map(|&a| if a == from { to } else { a }).collect();
        let name = format!("{}.{}", r.old.value(leaf.value).name, r.new.axis(to).name);
        id = r.emit_at(lines, Op::Rename { from, to }, &[id], &name, Type::new(ty.dtype, axes));
    }
    id
}

/// Another axis like one of a product.
fn copy_axis(r: &mut Rebuild<'_>, product: &Product, axis: AxisId) -> AxisId {
    let axis = product.axes[axis.0 as usize].clone();
    r.new.add_axis(&axis.name, axis.size, axis.like)
}

/// A name for a product that the author did not name, as long as it helps.
fn joined(x: &str, y: &str) -> String {
    let name = format!("{x}.{y}");
    if name.len() <= 24 { name } else { String::new() }
}

/// The lines that the product of some operands computes a part of: those of the brackets within it, of those that its
/// operands stood in, and of the smallest around it.
fn origins(f: &Function, product: &Product, leaves: &[usize]) -> Vec<Origin> {
    let within = |n: &&Node| n.leaves.iter().all(|l| leaves.contains(l));
    let around = |n: &&Node| leaves.iter().all(|l| n.leaves.contains(l));
    let holds = |n: &&Node| n.parts.iter().any(|p| p.len() == 1 && leaves.contains(&p[0]));
    let smallest = product.nodes.iter().find(around).map(|n| n.inst);
    let mut insts: Vec<usize> =
        product.nodes.iter().filter(|n| within(n) || holds(n)).map(|n| n.inst).chain(smallest).collect();
    insts.sort_unstable();
    let mut lines: Vec<Origin> = Vec::new();
    for origin in insts.iter().flat_map(|&n| &f.body[n].origins) {
        if !lines.contains(origin) {
            lines.push(origin.clone());
        }
    }
    lines
}
