//! Every kernel of the published models, in real size, through NVIDIA's own compilers: no GPU is needed for that.

use std::collections::{BTreeMap, BTreeSet};

use latentc_codegen::cube::{
    Machine, Source, Target, Tuning, choose, cuda_sources, cuda_together_source, side_by_side, typical,
};
use latentc_codegen::joined::{Told, told};
use latentc_codegen::machine_code::{ARCHS, Arch, MachineCode};
use latentc_codegen::nvrtc::{Nvrtc, Resources, Toolkit};
use latentc_codegen::program::{Kernel, KernelKind};
use latentc_models::config::ModelConfig;
use latentc_passes::Graph;
use latentc_tests::{compiled, nameless, ways_taken};
use rayon::prelude::*;
use tempfile::TempDir;

/// The model whose kernels are looked at instruction by instruction: to disassemble those of all takes three times as long as the rest.
const LOOKED_AT: &str = "deepseek-v2-lite";

/// The published models that are bundled.
const MODELS: [&str; 3] = [LOOKED_AT, "deepseek-v2", "deepseek-67b"];

/// A line of what a kernel takes, with some slack: a regression is another line, a change of an instruction here or there is not.
fn line(name: &str, code: &MachineCode) -> String {
    let registers = code.resources.registers.next_multiple_of(32);
    let shared = code.shared_bytes.div_ceil(1 << 10);
    let occupancy = (code.occupancy * 8.0).ceil() / 8.0 * 100.0;
    let wide = code.instructions.wide_share();
    let wide = wide.map_or_else(|| "-".to_owned(), |share| format!("{:.0}%", (share * 5.0).round() * 20.0));
    let (spills, tensor) = (code.resources.spill_bytes, code.instructions.tensor);
    format!("{name:<66} {registers:>9} {spills:>6} {shared:>10} {occupancy:>9}% {wide:>7} {tensor:>6}\n")
}

fn arch(name: &str) -> &'static Arch {
    ARCHS.iter().find(|arch| arch.name == name).expect("it is one of them")
}

/// What the kernels of published models are compiled from in some of their ways. Each has a name that is the same from run to run: that of the
/// first model and graph that has it, and the way.
fn sources(models: &[&str], ways: impl Fn(&Kernel) -> Vec<Kernel>) -> Vec<(String, KernelKind, Source)> {
    let (mut known, mut sources) = (BTreeSet::new(), Vec::new());
    for &name in models {
        let config = ModelConfig::bundled(name).expect("bundled");
        for graph in Graph::ALL {
            let program = compiled(&config, graph).program;
            for k in program.kernels.iter().flat_map(&ways).filter(|k| known.insert(nameless(k))) {
                let all = cuda_sources(&k).unwrap_or_else(|e| panic!("{e}"));
                let of = |source: &Source| format!("{name}/{}/{}", graph.name(), source.name);
                sources.extend(all.into_iter().map(|source| (of(&source), k.kind, source)));
            }
        }
    }
    sources
}

/// The kernels that decode runs at the same time, in one source each.
fn sources_together(models: &[&str], machine: &Machine) -> Vec<(String, Source)> {
    let tuning = Tuning::new(String::new(), *machine);
    let mut together: BTreeMap<String, Vec<Kernel>> = BTreeMap::new();
    for name in models {
        let config = ModelConfig::bundled(name).expect("bundled");
        let program = compiled(&config, Graph::Decode).program;
        for group in program.together() {
            let group = side_by_side(group, &tuning).expect("no tuning is wrong");
            together.insert(group.iter().map(nameless).collect(), group);
        }
    }
    let groups = together.into_values().filter(|group| !group.is_empty());
    let sources = groups.filter_map(|group| cuda_together_source(&group).unwrap_or_else(|e| panic!("{e}")));
    sources.map(|source| (source.name.clone(), source)).collect()
}

/// NVIDIA's compilers, if they are here.
fn compilers(test: &str) -> Option<(Nvrtc, Toolkit)> {
    match Toolkit::find() {
        Ok(toolkit) => Some((Nvrtc::load(&toolkit).expect("the toolkit that was found loads"), toolkit)),
        Err(e) => {
            eprintln!("SKIPPED: {test}: {e}");
            None
        }
    }
}

/// PTX for an architecture, of each source.
fn ptx((nvrtc, _): &(Nvrtc, Toolkit), arch: &str, sources: &[(String, Source)]) -> Vec<String> {
    let one = |(name, source): &(String, Source)| {
        let made = nvrtc.compile(&source.text, arch);
        made.unwrap_or_else(|e| panic!("{name}: {e}\n{}", source.text))
    };
    sources.par_iter().map(one).collect()
}

/// What each source takes of an architecture, told by those that spill.
fn spilled(compilers: &(Nvrtc, Toolkit), arch: &str, sources: &[(String, Source)]) -> Vec<String> {
    let folder = || tempfile::tempdir().expect("a temporary folder");
    let ptx = ptx(compilers, arch, sources);
    let one = |folder: &mut TempDir, (ptx, (name, _)): (&String, &(String, Source))| {
        let resources = compilers.1.assemble(ptx, arch, folder.path());
        spills(name, resources.unwrap_or_else(|e| panic!("{name}: {e}")))
    };
    ptx.par_iter().zip(sources).map_init(folder, one).flatten().collect()
}

fn spills(name: &str, resources: Resources) -> Option<String> {
    (resources.spill_bytes > 0).then(|| format!("{name}: {resources:?}"))
}

fn none_spills(spilled: &[String]) {
    assert!(spilled.is_empty(), "kernels that spill registers:\n{}", spilled.join("\n"));
}

#[test]
fn every_kernel_of_the_bundled_models_is_accepted_for_sm_90a() {
    // The sources must come out without any toolkit; only what follows needs it.
    let single = sources(&MODELS, |k| typical(k, &Machine::HOPPER));
    let mut sources: Vec<_> = single.into_iter().map(|(name, _, source)| (name, source)).collect();
    sources.extend(sources_together(&MODELS, &Machine::HOPPER));
    println!("{} distinct sources", sources.len());
    let Some(compilers) = compilers("every_kernel_of_the_bundled_models_is_accepted_for_sm_90a") else {
        return;
    };
    let arch = arch("sm_90a");
    let (looked_at, others): (Vec<_>, Vec<_>) =
        sources.into_iter().partition(|(name, _)| name.starts_with(&format!("{LOOKED_AT}/")));
    let mut spilled = spilled(&compilers, arch.name, &others);
    let mut lines = BTreeSet::new();
    let told = told(&compilers.1, &ptx(&compilers, arch.name, &looked_at), arch.name);
    for ((name, source), told) in looked_at.iter().zip(told) {
        let Told { resources, instructions } = told.unwrap_or_else(|e| panic!("{name}: {e}"));
        spilled.extend(spills(name, resources));
        let mut early =
            before_the_wait(&instructions).unwrap_or_else(|| panic!("{name} does not wait:\n{instructions}"));
        if !waits_at_once(&source.text) {
            // What nobody writes, by the instructions that the text has for that.
            early.retain(|line| !line.contains("LDG.E.NA.") && !line.contains("LDGSTS."));
        }
        assert!(early.is_empty(), "{name} touches memory before it waits: {early:?}");
        let Source { launch, tensor, .. } = source;
        let code = MachineCode::of(arch, resources, &instructions, launch.units, launch.shared_bytes as u32);
        // What a stage needs stands there once, or some whole number of times.
        let counted = code.instructions.tensor;
        let times = if *tensor == 0 { counted == 0 } else { counted > 0 && counted.is_multiple_of(*tensor) };
        assert!(times, "{name}: {counted} instructions of tensor cores, a stage needs {tensor}");
        lines.insert(line(name.split_once('/').map_or("", |(_, short)| short), &code));
    }
    none_spills(&spilled);
    let heads = ["registers", "spills", "shared KiB", "occupancy", "16-byte", "tensor"].join(" ");
    let table = lines.into_iter().collect::<String>();
    insta::assert_snapshot!(format!("{LOOKED_AT:<66} {heads}\n{table}"));
}

/// As long as all registers are enough there, too: every kernel in the ways that are taken with one token and with many, and side by side, and
/// of each way that is taken in between or as tf32 the longest text.
#[test]
fn every_kernel_of_the_bundled_models_spills_nothing_for_other_architectures() {
    let test = "every_kernel_of_the_bundled_models_spills_nothing_for_other_architectures";
    for arch in ["sm_80", "sm_100"].map(arch) {
        let machine = arch.machine();
        let single = sources(&MODELS, |k| launched(k, &machine));
        let mut all: Vec<_> = single.into_iter().map(|(name, _, source)| (name, source)).collect();
        all.extend(sources_together(&MODELS, &machine));
        let mut longest: BTreeMap<String, (String, Source)> = BTreeMap::new();
        for (name, kind, source) in sources(&MODELS, |k| ways_taken(k, Target::Cuda, &machine)) {
            let way = format!("{kind:?}");
            let known = longest.get(&way).map_or(0, |(_, known)| known.text.len());
            if source.text.len() > known {
                longest.insert(way, (name, source));
            }
        }
        let known: BTreeSet<_> = all.iter().map(|(_, source)| source.text.clone()).collect();
        all.extend(longest.into_values().filter(|(_, source)| !known.contains(&source.text)));
        println!("{} sources for {}", all.len(), arch.name);
        let Some(compilers) = compilers(test) else { return };
        none_spills(&spilled(&compilers, arch.name, &all));
    }
}

/// A kernel in the ways that a device takes where all run-time sizes are one, and where all are large.
fn launched(kernel: &Kernel, machine: &Machine) -> Vec<Kernel> {
    let tuning = Tuning::new(String::new(), *machine);
    let kinds = [1, 1000].map(|size| {
        let sizes = vec![size; kernel.size_symbols().len()];
        choose(kernel, Target::Cuda, &sizes, &tuning).expect("nothing is tuned").way.kind
    });
    typical(kernel, machine).into_iter().filter(|way| kinds.contains(&way.kind)).collect()
}

/// Whether a text touches no memory before it waits for the grids ahead. Kernels side by side wait each by itself.
fn waits_at_once(source: &str) -> bool {
    let parts: Vec<_> = source.split("griddepcontrol.wait").collect();
    let body = parts[0].split_once("\n) {").map_or(parts[0], |(_, body)| body);
    parts.len() == 2 && !body.contains("buffer_")
}

/// What machine code does with global memory before it waits. Compilers move what reads over the wait where nobody is said to write;
/// `None` if it does not wait.
fn before_the_wait(code: &str) -> Option<Vec<&str>> {
    let (before, _) = code.split_once("ACQBULK")?;
    let global = ["LDG", "STG", "LDGSTS", "ATOMG", "RED", "REDG", "UBLKCP", "UTMALDG"];
    let touches =
        |line: &&str| line.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| global.contains(&word));
    Some(before.lines().filter(touches).collect())
}

#[test]
fn the_number_of_kernels_does_not_grow_with_depth() {
    let count = |layers: usize| {
        let text = ModelConfig::bundled("deepseek-v2").expect("bundled").to_json().to_string();
        let text = text.replace("\"num_hidden_layers\":60", &format!("\"num_hidden_layers\":{layers}"));
        let config = ModelConfig::from_str("config.json", &text).expect("still right");
        compiled(&config, Graph::Decode).program.kernels.len()
    };
    assert_eq!(count(2), count(60));
}
