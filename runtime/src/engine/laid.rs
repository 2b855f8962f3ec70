//! A run of a program laid out: its launches in order, calls and all, and where each finds what it works on. It holds as long as the plan of
//! memory does; what is left to a run is to put numbers to its sizes.

use latentc_codegen::memory::{Place, Plan};
use latentc_codegen::program::{BufferId, Routine, Step};
use latentc_ir::DType;

use super::sizes::Dim;
use super::{Loaded, Slot, Source};

/// A program's launches in the order of a run.
#[derive(Debug)]
pub(super) struct Laid {
    steps: Vec<LaidLaunch>,
    /// The bytes that the plan needs, page by page.
    pub(super) pages: Vec<u64>,
    /// The entry's results; `None` for one that nothing writes.
    pub(super) results: Vec<Option<At>>,
}

/// Where a buffer of a run is.
#[derive(Clone, Debug)]
pub(super) enum At {
    /// In memory of its own.
    Held(Slot),
    /// A temporary with these extents.
    Planned(Place, DType, Vec<Dim>),
}

/// A launch of a run.
#[derive(Debug)]
pub(super) struct LaidLaunch {
    /// The number of its kernel.
    pub(super) kernel: usize,
    pub(super) inputs: Vec<Option<At>>,
    /// Where each of them comes from.
    pub(super) sources: Vec<Source>,
    pub(super) output: At,
    /// Whether the result takes the place of an input.
    pub(super) in_place: bool,
    /// Which of the inputs no launch writes, as bits.
    pub(super) still: u64,
    pub(super) sizes: Vec<Dim>,
    /// Whether it may run at the same time as the launch before it.
    beside: bool,
}

impl Laid {
    /// A program's launches, whose temporaries lie where a plan says. `sources` are those of what is held; results have places in the plan
    /// unless the program's are [elsewhere](Loaded::elsewhere).
    pub(super) fn new(loaded: &Loaded, plan: &Plan, sources: &[Source]) -> Laid {
        let mut layer = Layer { loaded, plan, sources, calls: 0, steps: Vec::new() };
        let held = |slots: &[Slot]| slots.iter().map(|&slot| At::Held(slot)).collect::<Vec<_>>();
        let results = if loaded.elsewhere { held(&loaded.results) } else { Vec::new() };
        layer.instance(loaded.top(), &held(&loaded.args), &results);
        let results = match results.is_empty() {
            true => loaded.entry().results.iter().map(|&id| layer.planned(0, loaded.entry(), id)).collect(),
            false => results.into_iter().map(Some).collect(),
        };
        Laid { steps: layer.steps, pages: plan.pages.clone(), results }
    }

    /// The launches, with those that may run at the same time in one slice.
    pub(super) fn groups(&self) -> impl Iterator<Item = &[LaidLaunch]> {
        self.steps.chunk_by(|_, next| next.beside)
    }
}

impl At {
    /// Whether the two share memory that a plan has shared out.
    fn meets(&self, other: &At) -> bool {
        match (self, other) {
            (At::Planned(a, ..), At::Planned(b, ..)) => a.meets(*b),
            (At::Held(_) | At::Planned(..), _) => false,
        }
    }
}

/// What lays a program out.
struct Layer<'a> {
    loaded: &'a Loaded,
    plan: &'a Plan,
    sources: &'a [Source],
    /// How many calls have begun: the plan numbers them so.
    calls: usize,
    steps: Vec<LaidLaunch>,
}

impl Layer<'_> {
    /// Where a temporary of a call lies.
    fn planned(&self, call: usize, routine: &Routine, id: BufferId) -> Option<At> {
        let buffer = routine.buffer(id);
        let dims = buffer.dims.iter().map(|size| self.loaded.names.dim(size)).collect();
        Some(At::Planned(self.plan.place(call, id)?, buffer.dtype, dims))
    }

    /// The launches of an instance. `results` are those of its results that the caller has memory for: all of them, or none.
    fn instance(&mut self, n: usize, params: &[At], results: &[At]) {
        let call = self.calls;
        self.calls += 1;
        let loaded = self.loaded;
        let instance = &loaded.instances[n];
        let routine = &loaded.program.routines[instance.routine];
        let mut known: Vec<Option<At>> = vec![None; routine.buffers.len()];
        for (id, at) in routine.results.iter().zip(results).chain(routine.params.iter().zip(params)) {
            known[id.0 as usize] = Some(at.clone());
        }
        for &(id, slot) in &instance.owned {
            known[id.0 as usize] = Some(At::Held(slot));
        }
        for (n, step) in routine.steps.iter().enumerate() {
            let mut place = |id: &BufferId| {
                let known = &mut known[id.0 as usize];
                if known.is_none() {
                    *known = self.planned(call, routine, *id);
                }
                known.clone().expect("a buffer is written before it is read")
            };
            let inputs: Vec<_> = step.inputs().iter().map(&mut place).collect();
            let mut outputs: Vec<_> = step.outputs().iter().map(&mut place).collect();
            match step {
                Step::Launch { kernel, sizes, beside, .. } => {
                    let after = n > 0 && matches!(routine.steps[n - 1], Step::Launch { .. });
                    let output = outputs.remove(0);
                    self.launch(*kernel, inputs, output, sizes.iter().map(|s| loaded.names.dim(s)).collect());
                    self.steps.last_mut().expect("just laid").beside = *beside && after;
                }
                Step::Call { .. } => self.instance(instance.calls[&n], &inputs, &outputs),
            }
        }
    }

    fn launch(&mut self, kernel: usize, inputs: Vec<At>, output: At, sizes: Vec<Dim>) {
        // Of a kernel that appends, the first input is the output.
        let appends = self.loaded.program.kernels[kernel].cache().is_some();
        let inputs = inputs.into_iter().enumerate().map(|(n, at)| (n > 0 || !appends).then_some(at));
        let inputs: Vec<_> = inputs.collect();
        let source = |at: &Option<At>| match at {
            Some(At::Held(slot)) => self.sources[*slot],
            Some(At::Planned(..)) | None => Source::Run,
        };
        let sources: Vec<_> = inputs.iter().map(source).collect();
        let weights = sources.iter().take(64).enumerate().filter(|(_, of)| **of == Source::Weight);
        self.steps.push(LaidLaunch {
            kernel,
            in_place: inputs.iter().flatten().any(|at| at.meets(&output)),
            still: weights.fold(0, |bits, (n, _)| bits | 1 << n),
            inputs,
            sources,
            output,
            sizes,
            beside: false,
        });
    }
}
