//! Every kernel of the bundled models, with small axes, in every way in which devices compute it, compared with the interpreter: as CUDA
//! text on the emulator, and as WGSL through a graphics driver. What is the same in several graphs or models is run once.
//!
//! `latentc check` tries more of each: axes of both kinds, and all run-time sizes.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use latentc_codegen::check::{Outcome, Trial, check_together, main_trial, trials_together};
use latentc_codegen::cube::{Machine, Target, Tuning, WgpuDevice, chosen, is_expressible, side_by_side};
use latentc_codegen::device::Device;
use latentc_codegen::emulate::Emulator;
use latentc_codegen::program::{Kernel, Program};
use latentc_models::config::ModelConfig;
use latentc_passes::{CacheForm, Codes, Graph, Wanted, WeightForm, encode};
use latentc_tests::{compiled, nameless, ways_taken};

/// The models that are bundled as configurations.
const MODELS: [&str; 4] = ["bench-moe-0.3b", "deepseek-v2-lite", "deepseek-v2", "deepseek-67b"];

/// What the arguments follow from.
const SEED: u64 = 1;

/// Trials of one launch each, with the names of what they are of.
type Trials = Vec<(String, Vec<Trial>)>;

/// The one that is also held in fewer bits: weights and caches are codes with scales, and caches lie in pages.
const NARROW: &str = "bench-moe-0.3b";

/// All graphs of all models.
fn programs() -> impl Iterator<Item = (String, Graph, Program)> {
    let wide = MODELS.into_iter().flat_map(|name| Graph::ALL.map(|graph| (name, Wanted::from(graph))));
    let narrow = [Graph::Prefill, Graph::Decode].map(|graph| {
        let (cache, weights) = (CacheForm::new(Codes::Int8), WeightForm { group: encode::GROUP });
        (NARROW, Wanted { cache: Some(cache), page: Some(16), weights: Some(weights), ..graph.into() })
    });
    wide.chain(narrow).map(|(name, wanted)| {
        let config = ModelConfig::bundled(name).expect("bundled");
        let held = if wanted.weights.is_some() { " in codes" } else { "" };
        (format!("{name}, {}{held}", wanted.graph.name()), wanted.graph, compiled(&config, wanted).program)
    })
}

/// Each kernel in each way that is taken with one token, with some, or with many, also where f32 may be rounded as tf32.
fn each(target: Target, machine: &Machine) -> Trials {
    let (mut kernels, mut small, mut trials) = (BTreeSet::new(), BTreeSet::new(), Trials::new());
    for (of, _, program) in programs() {
        for kernel in program.kernels.iter().filter(|k| kernels.insert(nameless(k))) {
            for way in ways_taken(kernel, target, machine) {
                let name = format!("{of}: {} as {:?}", kernel.name, way.kind);
                let trial = main_trial(&way);
                assert!(
                    way.kind == kernel.kind || is_expressible(&trial.kernel, target),
                    "small axes leave no room for {name}"
                );
                if small.insert(nameless(&trial.kernel)) {
                    trials.push((name, vec![trial]));
                }
            }
        }
    }
    println!("{} kernels, {} with small axes in all ways", kernels.len(), trials.len());
    trials
}

/// The kernels that decode runs at the same time.
fn side_by_side_in_decode() -> Trials {
    let (mut known, mut trials) = (BTreeSet::new(), Trials::new());
    for (of, _, program) in programs().filter(|(_, graph, _)| *graph == Graph::Decode) {
        for group in program.together() {
            let group: Vec<Kernel> = group.into_iter().cloned().collect();
            if side_by_side(&group, &Tuning::default()).expect("nothing is tuned").is_empty() {
                continue;
            }
            let first = trials_together(&group).swap_remove(0);
            if known.insert(first.iter().map(|t| nameless(&t.kernel)).collect::<String>()) {
                let names: Vec<_> = group.iter().map(|k| &k.name[..]).collect();
                trials.push((format!("{of}: {} at once", names.join(", ")), first));
            }
        }
    }
    trials
}

/// Says of each launch that is wrong what is; on several devices of the same kind at once.
fn wrong<D: Device + Send>(devices: Vec<D>, trials: &Trials) -> Vec<String> {
    let (next, wrong) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = |mut device: D| {
        while let Some((name, trial)) = trials.get(next.fetch_add(1, Ordering::Relaxed)) {
            let said = match check_together(&mut device, trial, SEED) {
                Ok(outcomes) if outcomes.iter().all(Outcome::passes) => continue,
                Ok(outcomes) => format!("{name}: {outcomes:?}"),
                Err(e) => format!("{name}: {e}"),
            };
            wrong.lock().expect("no thread has panicked").push(said);
        }
    };
    thread::scope(|scope| devices.into_iter().for_each(|device| drop(scope.spawn(|| work(device)))));
    wrong.into_inner().expect("no thread has panicked")
}

#[test]
fn every_kernel_is_right_when_its_cuda_text_is_emulated() {
    let mut emulator = Emulator::open(SEED).expect("scripts/setup-cxx.sh installs a compiler");
    let mut trials = each(Target::Cuda, &Machine::HOPPER);
    let launched = trials.iter().map(|(_, t)| chosen(&t[0].kernel, &t[0].sizes)).collect::<Vec<_>>();
    emulator.prepare(&launched).unwrap_or_else(|e| panic!("{e}"));
    trials.extend(side_by_side_in_decode());
    let workers = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let wrong = wrong(vec![emulator; workers], &trials);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_kernel_is_right_through_a_graphics_driver() {
    let device = match WgpuDevice::open() {
        Ok(device) => device,
        Err(e) => {
            eprintln!("SKIPPED: every_kernel_is_right_through_a_graphics_driver: {e}");
            return;
        }
    };
    let (target, machine) = device.machine().expect("it compiles kernels");
    let trials = each(target, &machine);
    let wrong = wrong(vec![device], &trials);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
