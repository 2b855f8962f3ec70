//! The run-time sizes of a run: what its arguments say of them, and which a program needs.

use std::collections::{BTreeMap, BTreeSet};

use latentc_codegen::program::{Buffer, Program, Role, Routine, Step};
use latentc_ir::Size;
use smallvec::{SmallVec, smallvec};

use super::RunError;

/// What sizes follow from: the extents of an argument, and how many elements there are.
pub(super) struct Extent<'v> {
    pub(super) shape: &'v [usize],
    pub(super) len: usize,
}

/// The sizes of the past: those that caches grow by, or that are read of pools.
fn past_symbols(program: &Program) -> Vec<String> {
    if let Some(pool) = &program.pool {
        return pool.past.iter().cloned().collect();
    }
    let caches = program.routines.iter().flat_map(|r| &r.buffers).filter(|b| b.role == Role::Cache);
    caches.filter_map(|b| b.dims.first()).filter(|d| d.fixed().is_none()).map(Size::to_string).collect()
}

/// The run-time sizes that buffers and launches of these routines have.
fn symbols<'p>(routines: impl Iterator<Item = &'p Routine>) -> BTreeSet<String> {
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

/// The run-time sizes of a program, which are numbered.
#[derive(Debug)]
pub(super) struct Names {
    /// In order.
    all: Vec<String>,
    /// Those of the past.
    past: Vec<usize>,
    /// That of the slots of pools.
    slots: Option<usize>,
}

/// A size: its number, or which of a program's run-time sizes it is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Dim {
    Fixed(usize),
    Named(usize),
}

impl Names {
    /// Of a program, of which these routines run.
    pub(super) fn of<'p>(program: &Program, routines: impl Iterator<Item = &'p Routine>) -> Names {
        let mut all = symbols(routines);
        let past = past_symbols(program);
        all.extend(past.iter().cloned());
        all.extend(program.pool.iter().map(|pool| pool.slots.clone()));
        let mut names = Names { all: all.into_iter().collect(), past: Vec::new(), slots: None };
        names.past = past.iter().filter_map(|name| names.number(name)).collect();
        names.slots = program.pool.as_ref().and_then(|pool| names.number(&pool.slots));
        names
    }

    fn number(&self, name: &str) -> Option<usize> {
        self.all.binary_search_by(|known| known.as_str().cmp(name)).ok()
    }

    /// A size of the program.
    pub(super) fn dim(&self, size: &Size) -> Dim {
        match size {
            Size::Fixed(n) => Dim::Fixed(*n as usize),
            Size::Sym(name) => Dim::Named(self.number(name).expect("all names of the program are known")),
        }
    }
}

/// The run-time sizes of one run, by their numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sizes(SmallVec<[Option<usize>; 8]>);

impl Sizes {
    /// What arguments say of them.
    pub(super) fn of<'p, 'v>(
        names: &Names,
        params: impl ExactSizeIterator<Item = &'p Buffer> + Clone,
        args: impl ExactSizeIterator<Item = Extent<'v>>,
    ) -> Result<Sizes, RunError> {
        if params.len() != args.len() {
            let given: Vec<_> = params.map(|p| p.name.as_str()).collect();
            return Err(RunError::Argument(format!(
                "the program takes ({}), {} given",
                given.join(", "),
                args.len()
            )));
        }
        let mut bound: SmallVec<[Option<usize>; 8]> = smallvec![None; names.all.len()];
        for (p, Extent { shape, len }) in params.zip(args) {
            let fail = |why: String| Err(RunError::Argument(format!("`{}`: {why}", p.name)));
            if p.dims.len() != shape.len() || shape.iter().product::<usize>() != len {
                return fail(format!(
                    "the shape {shape:?} of {len} elements does not fit {} axes",
                    p.dims.len()
                ));
            }
            for (d, &n) in p.dims.iter().zip(shape) {
                let want = match names.dim(d) {
                    Dim::Fixed(k) => k,
                    Dim::Named(s) => *bound[s].get_or_insert(n),
                };
                if want != n {
                    return fail(format!("size {n} where {d} is {want}"));
                }
            }
        }
        Ok(Sizes(bound))
    }

    /// Says what arguments do not say: slots of pools, and the positions of the past.
    ///
    /// # Errors
    /// If a size is still not known.
    pub(super) fn complete(&mut self, names: &Names, slots: usize, past: usize) -> Result<(), RunError> {
        if let Some(number) = names.slots {
            self.0[number].get_or_insert(slots);
        }
        for &number in &names.past {
            self.0[number].get_or_insert(past);
        }
        match self.0.iter().position(Option::is_none) {
            None => Ok(()),
            Some(number) => Err(RunError::Argument(format!(
                "no argument has the size `{}` that the program needs",
                names.all[number]
            ))),
        }
    }

    /// The number that a size stands for. All are known before a program runs.
    pub(super) fn get(&self, dim: Dim) -> usize {
        match dim {
            Dim::Fixed(n) => n,
            Dim::Named(number) => self.0[number].expect("a size is known"),
        }
    }

    /// What is known of a name.
    pub(super) fn find(&self, names: &Names, name: &str) -> Option<usize> {
        names.number(name).and_then(|number| self.0[number])
    }

    /// All that are known.
    pub(super) fn by_name(&self, names: &Names) -> BTreeMap<String, u64> {
        let known = names.all.iter().zip(&self.0);
        known.filter_map(|(name, n)| Some((name.clone(), (*n)? as u64))).collect()
    }
}
