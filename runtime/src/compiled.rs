//! From a definition to a program that a device can run.

use std::collections::BTreeMap;

use latentc_codegen::program::Program;
use latentc_codegen::schedule::{ScheduleError, schedule_explained};
use latentc_ir::Module;
use latentc_passes::{
    CacheForm, Context, Graph, Guard, Pass, PassError, Remark, Variant, Wanted, WeightForm, place_cache,
};

/// A graph after every pass, and its schedule.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// Which graph it is.
    pub graph: Graph,
    /// What its caches are held in, if not in the dtype of what they keep.
    pub cache: Option<CacheForm>,
    /// Positions of a page, if its caches lie in pages.
    pub page: Option<u64>,
    /// What its weights are held in, if not as they are stored.
    pub weights: Option<WeightForm>,
    /// For which sizes it is, unless for all.
    pub guard: Option<Guard>,
    /// The module after each pass, by the pass's name; the definition is the first.
    pub stages: Vec<(&'static str, Module)>,
    /// The launches.
    pub program: Program,
    /// What the passes and the schedule did, and why.
    pub remarks: Vec<Remark>,
}

/// Why a definition did not compile: a fault of the compiler, or of a module that was not verified.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// A pass gave up.
    #[error(transparent)]
    Pass(#[from] PassError),
    /// An op has no kernel.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
}

/// Compiles one graph of a definition with these passes; see [`latentc_passes::selected`].
///
/// # Errors
/// See [`CompileError`].
pub fn compile(
    definition: &Module,
    wanted: impl Into<Wanted>,
    passes: &[Pass],
) -> Result<Compiled, CompileError> {
    let wanted = wanted.into();
    let mut cx = Context::new(wanted);
    let stages = latentc_passes::run(definition, &mut cx, passes)?;
    scheduled(wanted, Variant { guard: None, stages, remarks: cx.remarks })
}

/// Compiles one graph of a definition for all sizes, once for each range of them that wants it otherwise. An
/// [engine](crate::engine::Engine) that has them all chooses at each run.
///
/// # Errors
/// See [`CompileError`].
pub fn compile_variants(
    definition: &Module,
    wanted: impl Into<Wanted>,
    passes: &[Pass],
) -> Result<Vec<Compiled>, CompileError> {
    let wanted = wanted.into();
    let variants = latentc_passes::variants(definition, wanted, passes)?;
    variants.into_iter().map(|variant| scheduled(wanted, variant)).collect()
}

fn scheduled(wanted: Wanted, variant: Variant) -> Result<Compiled, CompileError> {
    let Variant { guard, stages, mut remarks } = variant;
    let cx = Guard::context(guard.as_ref(), wanted);
    let (program, scheduled) = schedule_explained(&stages[stages.len() - 1].1, &cx)?;
    remarks.extend(scheduled);
    Ok(Compiled {
        graph: wanted.graph,
        cache: wanted.cache,
        page: wanted.page,
        weights: wanted.weights,
        guard,
        stages,
        program,
        remarks,
    })
}

impl Compiled {
    /// Compares what authors marked with `cache`, by function, with what is kept. A remark for each that differs is
    /// returned, and added to the others. When training, nothing is kept and nothing is compared.
    pub fn compare_caches<'a>(
        &mut self,
        marked: impl IntoIterator<Item = (&'a str, &'a [String])>,
    ) -> Vec<Remark> {
        let placed = self.stages.iter().find(|(pass, _)| *pass == "place_cache");
        let Some((_, placed)) = placed.filter(|_| self.graph.serves()) else { return Vec::new() };
        let differ = place_cache::compare(placed, marked);
        self.remarks.extend(differ.iter().cloned());
        differ
    }

    /// Whether it is for these sizes.
    pub fn admits(&self, sizes: &BTreeMap<String, u64>) -> bool {
        self.guard.as_ref().is_none_or(|guard| sizes.get(&guard.size).is_some_and(|&n| guard.admits(n)))
    }

    /// The module before the first pass: it has all weights, read or not.
    pub fn definition(&self) -> &Module {
        &self.stages[0].1
    }

    /// The module after the last pass.
    pub fn module(&self) -> &Module {
        &self.stages[self.stages.len() - 1].1
    }
}
