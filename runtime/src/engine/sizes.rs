//! The run-time sizes of a run: what its arguments say of them, and which a program needs.

use std::collections::{BTreeMap, BTreeSet};

use latentc_codegen::program::{Buffer, Program, Role, Routine, Step};
use latentc_ir::Size;

use super::RunError;

/// What sizes follow from: the extents of an argument, and how many elements there are.
pub(super) struct Extent<'v> {
    pub(super) shape: &'v [usize],
    pub(super) len: usize,
}

/// The sizes of the past: those that caches grow by, or that are read of pools.
pub(super) fn past_symbols(program: &Program) -> Vec<String> {
    if let Some(pool) = &program.pool {
        return pool.past.iter().cloned().collect();
    }
    let caches = program.routines.iter().flat_map(|r| &r.buffers).filter(|b| b.role == Role::Cache);
    caches.filter_map(|b| b.dims.first()).filter(|d| d.fixed().is_none()).map(Size::to_string).collect()
}

/// The run-time sizes that buffers and launches of these routines have.
pub(super) fn symbols<'p>(routines: impl Iterator<Item = &'p Routine>) -> BTreeSet<String> {
    let of = |routine: &'p Routine| {
        let buffers = routine.buffers.iter().flat_map(|b| &b.dims);
        let launches = routine.steps.iter().flat_map(|s| match s {
            Step::Launch { sizes, .. } => &sizes[..],
            Step::Call { .. } => &[],
        });
        buffers.chain(launches)
    };
    let named = routines.flat_map(of).filter_map(|size| match size {
        Size::Sym(s) => Some(s.clone()),
        Size::Fixed(_) => None,
    });
    named.collect()
}

/// The run-time sizes of one run.
pub(super) struct Sizes {
    pub(super) bound: BTreeMap<String, usize>,
}

impl Sizes {
    pub(super) fn of<'v>(
        params: &[&Buffer],
        args: impl ExactSizeIterator<Item = Extent<'v>>,
    ) -> Result<Sizes, RunError> {
        if params.len() != args.len() {
            let names: Vec<_> = params.iter().map(|p| p.name.as_str()).collect();
            return Err(RunError::Argument(format!(
                "the program takes ({}), {} given",
                names.join(", "),
                args.len()
            )));
        }
        let mut bound: BTreeMap<String, usize> = BTreeMap::new();
        for (p, Extent { shape, len }) in params.iter().zip(args) {
            let fail = |why: String| Err(RunError::Argument(format!("`{}`: {why}", p.name)));
            if p.dims.len() != shape.len() || shape.iter().product::<usize>() != len {
                return fail(format!(
                    "the shape {shape:?} of {len} elements does not fit {} axes",
                    p.dims.len()
                ));
            }
            for (d, &n) in p.dims.iter().zip(shape) {
                let want = match d {
                    Size::Fixed(k) => *k as usize,
                    Size::Sym(s) => *bound.entry(s.clone()).or_insert(n),
                };
                if want != n {
                    return fail(format!("size {n} where {d} is {want}"));
                }
            }
        }
        Ok(Sizes { bound })
    }

    /// The number that a size stands for. All symbols of the program are bound before it runs.
    pub(super) fn get(&self, size: &Size) -> usize {
        match size {
            Size::Fixed(n) => *n as usize,
            Size::Sym(s) => self.bound[s],
        }
    }
}
