//! Softmax is a streaming monoid: where its elements only weigh a sum, no memory need hold them.
//!
//! What   y = sum over s of softmax[s](x) v, softmax(x) used there alone  =>  stays as it is, for one kernel that walks `s`
//!        any other softmax  =>  its definition
//! Why    of any part of `s`, a maximum, a sum of exponentials and a sum of values times these say all; two parts merge
//!        (arXiv 2112.05682; FlashAttention, arXiv 2205.14135). Attention's scores are its largest values by far
//! Needs  contractions of two operands.  Leaves  the softmaxes that a scheduler streams, and no others
//! Cost   none: as much arithmetic as before, and less memory. The remark has the bytes
//! Cases  stream_softmax.ir

use std::collections::{BTreeMap, BTreeSet};

use latentc_ir::cost::{Cost, bytes, elements};
use latentc_ir::expand::expand_in;
use latentc_ir::poly::Poly;
use latentc_ir::{AxisId, Function, Inst, Module, Op, ValueId};

use crate::stream_sums::only_for;
use crate::{Context, Kind, Remark, Sizes, Unit};

const NAME: &str = "stream_softmax";

/// Operations on each score: the comparison, the difference, the exponential and the sum.
const EACH: i128 = 4;

/// Leaves the softmaxes that only weigh a sum whole, and expands the others.
pub fn stream_softmax(module: &Module, cx: &mut Context) -> Module {
    let sizes = Sizes::new(module, cx.graph);
    let functions = module.functions.iter().map(|f| {
        let users = f.users();
        let mut whole = BTreeSet::new();
        for inst in f.body.iter().filter(|i| matches!(i.op, Op::Softmax { .. })) {
            match weighed(f, &users, inst) {
                Ok(sum) => {
                    whole.insert(inst.result());
                    cx.remarks.push(applied(f, inst, &sum, &sizes, cx));
                }
                Err(why) => cx.remarks.push(Remark::new(
                    Kind::Missed,
                    NAME,
                    f,
                    inst,
                    format!("is computed as it is defined: {why}"),
                )),
            }
        }
        expand_in(f, |inst| matches!(inst.op, Op::Softmax { .. }) && !whole.contains(&inst.result()))
    });
    let functions = functions.collect();
    Module { name: module.name.clone(), functions, entry: module.entry.clone() }
}

/// The least that kernels need: every softmax is its definition.
pub fn define(module: &Module) -> Module {
    let functions = module.functions.iter();
    let functions = functions.map(|f| expand_in(f, |inst| matches!(inst.op, Op::Softmax { .. }))).collect();
    Module { name: module.name.clone(), functions, entry: module.entry.clone() }
}

/// A sum that a softmax weighs.
#[derive(Clone, Copy, Debug)]
pub struct Weighed<'f> {
    /// The axis of both.
    pub along: AxisId,
    /// The contraction.
    pub product: &'f Inst,
    /// Its operand that is the softmax, perhaps cast.
    pub weights: ValueId,
    /// The other one.
    pub values: ValueId,
}

/// The sum that the elements of a softmax weigh, if that is all they do. `users` are those of [`Function::users`].
///
/// # Errors
/// What else becomes of them, in words.
pub fn weighed<'f>(f: &'f Function, users: &[Vec<usize>], softmax: &Inst) -> Result<Weighed<'f>, String> {
    let name = |v: ValueId| format!("`{}`", f.value(v).name);
    let Op::Softmax { axis: along } = softmax.op else {
        return Err(format!("{} is no softmax", name(softmax.result())));
    };
    let mut weights = softmax.result();
    let product = loop {
        let user = match users[weights.0 as usize][..] {
            [user] if !f.results.contains(&weights) => Some(&f.body[user]),
            _ => None,
        };
        match user {
            Some(cast) if cast.op == Op::Cast => weights = cast.result(),
            Some(product) if product.op == Op::Contract => break product,
            _ => return Err(format!("{} goes elsewhere than into one contraction", name(weights))),
        }
    };
    let values = match product.args[..] {
        [a, b] if a == weights && b != weights => b,
        [a, b] if b == weights && a != weights => a,
        _ => return Err(format!("{} is not made of weights and values", name(product.result()))),
    };
    if f.summed(&product.args, f.ty(product.result())) != [along] || !f.ty(values).has(along) {
        let axis = &f.axis(along).name;
        return Err(format!(
            "{} does not sum weights and values over `{axis}` alone",
            name(product.result())
        ));
    }
    let mut all = [softmax.args[0], weights, values, product.result()].into_iter();
    match all.find(|&v| !f.ty(v).dtype.is_float()) {
        Some(v) => Err(format!("{} is no float", name(v))),
        None => Ok(Weighed { along, product, weights, values }),
    }
}

/// The values that need no memory once softmaxes are streamed: weights that only weigh a sum, and what is elementwise on the way to
/// them from the products that scores are made of, these included, as far as nothing else sees it.
pub(crate) fn unstored(f: &Function) -> BTreeSet<ValueId> {
    let users = f.users();
    let mut all = BTreeSet::new();
    for (at, softmax) in f.body.iter().enumerate().filter(|(_, i)| matches!(i.op, Op::Softmax { .. })) {
        if let Ok(sum) = weighed(f, &users, softmax) {
            all.extend([softmax.result(), sum.weights]);
            let fold = [(at, softmax.args[0])];
            all.extend(only_for(f, &users, &fold, &|_| false, &|i| i.op == Op::Contract).into_keys());
        }
    }
    all
}

fn applied(f: &Function, inst: &Inst, sum: &Weighed<'_>, sizes: &Sizes, cx: &Context) -> Remark {
    let (scores, weights) = (inst.args[0], inst.result());
    let mut unstored = vec![weights];
    // What is given has memory.
    if f.body.iter().any(|i| i.results.contains(&scores)) {
        unstored.insert(0, scores);
    }
    let spared = unstored.iter().fold(Poly::default(), |sum, &v| &sum + &bytes(f, v));
    let at: BTreeMap<String, u64> =
        spared.symbols().into_iter().map(|s| (s.to_owned(), sizes.symbol(s))).collect();
    let axes = |v: &ValueId| f.ty(*v).axes.iter().map(|&a| f.axis(a).name.as_str()).collect::<Vec<_>>();
    let names: Vec<_> = unstored
        .iter()
        .map(|v| format!("`{}` {}[{}]", f.value(*v).name, f.ty(*v).dtype, axes(v).join(", ")))
        .collect();
    let axis = &f.axis(sum.along).name;
    let mut message = format!(
        "streams `{axis}` into `{}`: {} {} no memory, {spared} bytes",
        f.value(sum.product.result()).name,
        names.join(" and "),
        if names.len() == 1 { "needs" } else { "need" },
    );
    if !at.is_empty() {
        let sizes: Vec<_> = at.iter().map(|(name, size)| format!("{name} = {size}")).collect();
        let total = spared.eval(&at).unwrap_or_default();
        message += &format!(", which are {total} at {}", sizes.join(", "));
    }
    // Each position of the streamed axis is a product and a sum for each element of the result.
    let product = &elements(f, sum.product.result()) * &Poly::from(&f.axis(sum.along).size);
    let streamed = Cost {
        flops: &(&product * 2) + &(&elements(f, scores) * EACH),
        bytes_read: bytes(f, sum.values),
        bytes_written: bytes(f, sum.product.result()),
    };
    let mut stored = streamed.clone();
    stored.bytes_read += &spared;
    stored.bytes_written += &spared;
    let seconds = |c: &Cost| {
        let at = |p: &Poly| {
            let all = p.symbols().into_iter().map(|s| (s.to_owned(), sizes.symbol(s))).collect();
            p.eval(&all).unwrap_or_default() as f64
        };
        cx.machine.seconds(at(&c.flops), at(&c.bytes_read) + at(&c.bytes_written))
    };
    let (fast, slow) = (seconds(&streamed), seconds(&stored));
    Remark::new(Kind::Applied, NAME, f, inst, message)
        .candidate("streamed", streamed, fast, Unit::Seconds)
        .candidate("stored", stored, slow, Unit::Seconds)
}
