//! One definition, three graphs: what `past` and `position` mean when training and when serving.
//!
//! What   train:          past x  =>  rename x                     (the whole sequence is there)
//!        prefill/decode: past x  =>  append cache, x, pos         (what came before is in a cache)
//!                        position of t  =>  pos                   (a parameter: where the new tokens stand)
//! Why    the author writes attention over the past once (DeepSeek-V2, section 2.1)
//! Needs  a traced graph.  Leaves  no `past`; when serving, caches, and a parameter `pos` of every function that reads them
//! Cases  derive.ir

mod tokens;

use std::collections::BTreeMap;

use latentc_ir::{AxisId, DType, Function, Inst, Module, Op, Size, Type, ValueId};

use crate::rewrite::Rebuild;
use crate::{Graph, PassError};

const NAME: &str = "derive";

/// Derives the graph from the definition.
///
/// # Errors
/// If functions that pass a value along its past disagree about the axes of a position, or tokens are picked in a way that no run
/// that serves can follow.
pub fn derive(module: &Module, graph: Graph) -> Result<Module, PassError> {
    let mut out = Module { name: module.name.clone(), functions: Vec::new(), entry: module.entry.clone() };
    if !graph.serves() {
        out.functions = module.functions.iter().map(train).collect();
        return Ok(out);
    }
    let symbols = past_symbols(module);
    tokens::check(module, &|size| symbols.contains_key(size))?;
    for f in &module.functions {
        let served = serve(f, &out, &symbols)?;
        out.functions.push(served);
    }
    // A definition may treat the past as if it were the present: rename it to `t`, or take it from a caller.
    latentc_ir::verify(&out).map_err(|errors| {
        let e = &errors[0];
        let f = e.function.as_deref().and_then(|f| module.function(f)).unwrap_or(&module.functions[0]);
        PassError::new(
            NAME,
            f,
            format!("the past is longer than the tokens at hand, so this cannot be served: {e}"),
        )
    })?;
    Ok(out)
}

/// When training, every position of the sequence is computed at once: the past is the sequence itself.
fn train(f: &Function) -> Function {
    let mut r = Rebuild::new(f, NAME);
    r.header();
    for inst in &f.body {
        if let Op::Past { from, to } = inst.op {
            let (args, value) = (r.args(inst), f.value(inst.result()));
            let id = r.emit(inst, Op::Rename { from, to }, &args, &value.name, value.ty.clone());
            r.replace(inst.result(), id);
        } else {
            r.copy(inst);
        }
    }
    r.finish()
}

/// The run-time size of the past of each run-time size: the name of the first axis declared `like` one of that size.
fn past_symbols(module: &Module) -> BTreeMap<Size, Size> {
    let mut symbols = BTreeMap::new();
    let taken: Vec<_> = module.functions.iter().flat_map(|f| &f.axes).map(|a| a.size.clone()).collect();
    for f in &module.functions {
        for axis in f.axes.iter().filter(|a| a.like.is_some()) {
            symbols.entry(axis.size.clone()).or_insert_with(|| {
                let mut symbol = Size::Sym(axis.name.clone());
                while taken.contains(&symbol) {
                    symbol = Size::Sym(format!("{symbol}_past"));
                }
                symbol
            });
        }
    }
    symbols
}

/// The sequence axes of a function and the type that a position has in it.
fn pos_type(f: &Function, done: &Module) -> Result<Option<Type>, PassError> {
    let mut found: Option<Type> = None;
    let mut meet = |ty: Type| match &found {
        None => {
            found = Some(ty);
            Ok(())
        }
        Some(other) if other.same_elements(&ty) => Ok(()),
        Some(other) => Err(PassError::new(
            NAME,
            f,
            format!(
                "positions are {} in one place and {} in another; a function has one sequence",
                latentc_ir::infer::show_type(other, &f.axes),
                latentc_ir::infer::show_type(&ty, &f.axes)
            ),
        )),
    };
    for inst in &f.body {
        match &inst.op {
            Op::Position { axis } if f.axis(*axis).like.is_none() => meet(f.ty(inst.result()).clone())?,
            Op::Past { .. } => {
                // Run-time axes number rows of a batch and tokens: a position belongs to each.
                let x = f.ty(inst.args[0]);
                let axes: Vec<_> =
                    x.axes.iter().copied().filter(|&a| f.axis(a).size.fixed().is_none()).collect();
                meet(Type::new(DType::I32, axes))?;
            }
            Op::Call { callee, .. } => {
                let Some(g) = done.function(callee) else { continue };
                let Some(&pos) = g.params.get(inst.args.len()) else { continue };
                let axes: Option<Vec<AxisId>> =
                    g.ty(pos).axes.iter().map(|&a| caller_axis(f, g, &inst.args, a)).collect();
                let axes = axes.ok_or_else(|| {
                    PassError::new(
                        NAME,
                        f,
                        format!("@{callee} needs positions, but no operand has their axes"),
                    )
                })?;
                meet(Type::new(DType::I32, axes))?;
            }
            _ => {}
        }
    }
    Ok(found)
}

/// The caller's axis that an operand of a call puts in the place of the callee's.
pub(crate) fn caller_axis(f: &Function, g: &Function, args: &[ValueId], axis: AxisId) -> Option<AxisId> {
    args.iter().zip(&g.params).find_map(|(&a, &p)| {
        let at = g.ty(p).position(axis)?;
        f.ty(a).axes.get(at).copied()
    })
}

fn serve(f: &Function, done: &Module, symbols: &BTreeMap<Size, Size>) -> Result<Function, PassError> {
    let pos_type = pos_type(f, done)?;
    let mut r = Rebuild::new(f, NAME);
    for axis in r.new.axes.iter_mut().filter(|a| a.like.is_some()) {
        if let Some(symbol) = symbols.get(&axis.size) {
            axis.size = symbol.clone();
        }
    }
    let pos = pos_type.map(|ty| r.new.add_param("pos", ty));
    r.header();
    // Values are numbered in order of definition, so the caches come before the first instruction.
    let mut caches = Vec::new();
    for inst in &f.body {
        if let Op::Past { from, to } = inst.op {
            let x = f.value(inst.args[0]);
            // The past comes first in memory: a prefix of the cache is then one block, whatever its length.
            let mut axes = vec![to];
            axes.extend(x.ty.axes.iter().copied().filter(|&a| a != from));
            caches.push(r.new.add_cache(&format!("{}.cache", x.name), Type::new(x.ty.dtype, axes)));
        }
    }
    let mut caches = caches.into_iter();
    for inst in &f.body {
        match (&inst.op, pos) {
            (Op::Position { axis }, Some(pos)) if f.axis(*axis).like.is_none() => {
                let position = f.value(inst.result());
                let same_order = r.new.ty(pos) == &position.ty;
                let id = if same_order || !ordered(f, inst.result()) {
                    pos
                } else {
                    r.emit(inst, Op::Cast, &[pos], &position.name, position.ty.clone())
                };
                r.replace(inst.result(), id);
            }
            (&Op::Past { from, to }, Some(pos)) => {
                let cache = caches.next().expect("one was made for each past");
                let ty = r.new.ty(cache).clone();
                let args = [cache, r.get(inst.args[0]), pos];
                let past = f.value(inst.result());
                let mut id = r.emit(inst, Op::Append { from, to }, &args, &past.name, ty);
                if ordered(f, inst.result()) {
                    id = r.emit(inst, Op::Cast, &[id], &past.name, past.ty.clone());
                }
                r.replace(inst.result(), id);
            }
            (Op::Call { callee, .. }, Some(pos))
                if done.function(callee).is_some_and(|g| g.params.len() > inst.args.len()) =>
            {
                r.copy(inst);
                r.new.body.last_mut().expect("one was just pushed").args.push(pos);
            }
            _ => r.copy(inst),
        }
    }
    Ok(r.finish())
}

/// Whether others see the memory order of a value: callers, or a callee.
fn ordered(f: &Function, value: ValueId) -> bool {
    let passed = |i: &Inst| matches!(i.op, Op::Call { .. }) && i.args.contains(&value);
    f.results.contains(&value) || f.body.iter().any(passed)
}
