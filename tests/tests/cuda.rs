//! Every kernel of the published models, in real size, through NVIDIA's own compilers: no GPU is needed for that.

use std::collections::{BTreeMap, BTreeSet};

use latentc_codegen::cube::{
    Machine, Source, Target, Tuning, Way, choose, cuda_sources, cuda_together_source, side_by_side, typical,
};
use latentc_codegen::joined::{Told, told};
use latentc_codegen::machine_code::{ARCHS, Arch, MachineCode};
use latentc_codegen::nvrtc::{Nvrtc, Resources, Toolkit};
use latentc_codegen::program::Kernel;
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

/// What a kernel is compiled from.
struct Text {
    /// The same from run to run: of the first model and graph that has it, and the way.
    name: String,
    way: String,
    source: Source,
}

fn arch(name: &str) -> &'static Arch {
    ARCHS.iter().find(|arch| arch.name == name).expect("it is one of them")
}

/// What the kernels of published models are compiled from in some of their ways.
fn texts(ways: impl Fn(&str, &Kernel) -> Vec<Kernel>) -> Vec<Text> {
    let (mut known, mut texts) = (BTreeSet::new(), Vec::new());
    for name in MODELS {
        let config = ModelConfig::bundled(name).expect("bundled");
        for graph in Graph::ALL {
            let program = compiled(&config, graph).program;
            let all = program.kernels.iter().flat_map(|k| ways(name, k));
            for k in all.filter(|k| known.insert(nameless(k))) {
                for source in cuda_sources(&k).unwrap_or_else(|e| panic!("{e}")) {
                    let way = Way { kind: k.kind, parts: None }.to_string();
                    let name = format!("{name}/{}/{}", graph.name(), source.name);
                    texts.push(Text { name, way, source });
                }
            }
        }
    }
    texts
}

/// The kernels that decode runs at the same time, in one text each.
fn texts_together(machine: &Machine) -> Vec<Text> {
    let tuning = Tuning::new(String::new(), *machine);
    let mut together: BTreeMap<String, Vec<Kernel>> = BTreeMap::new();
    for name in MODELS {
        let config = ModelConfig::bundled(name).expect("bundled");
        let program = compiled(&config, Graph::Decode).program;
        for group in program.together() {
            let group = side_by_side(group, &tuning).expect("no tuning is wrong");
            together.insert(group.iter().map(nameless).collect(), group);
        }
    }
    let groups = together.into_values().filter(|group| !group.is_empty());
    let sources = groups.filter_map(|group| cuda_together_source(&group).unwrap_or_else(|e| panic!("{e}")));
    let text = |source: Source| Text { name: source.name.clone(), way: "side by side".to_owned(), source };
    sources.map(text).collect()
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

/// PTX for an architecture, of each text.
fn ptx((nvrtc, _): &(Nvrtc, Toolkit), arch: &str, texts: &[Text]) -> Vec<String> {
    let one = |Text { name, source, .. }: &Text| {
        let made = nvrtc.compile(&source.text, arch);
        made.unwrap_or_else(|e| panic!("{name}: {e}\n{}", source.text))
    };
    texts.par_iter().map(one).collect()
}

/// What each text takes of an architecture.
fn assembled(compilers: &(Nvrtc, Toolkit), arch: &str, texts: &[Text]) -> Vec<Resources> {
    let folder = || tempfile::tempdir().expect("a temporary folder");
    let ptx = ptx(compilers, arch, texts);
    let one = |folder: &mut TempDir, (ptx, text): (&String, &Text)| {
        let resources = compilers.1.assemble(ptx, arch, folder.path());
        resources.unwrap_or_else(|e| panic!("{}: {e}", text.name))
    };
    ptx.par_iter().zip(texts).map_init(folder, one).collect()
}

/// What kernels take at most of an architecture, way by way: none of them spills.
#[derive(Default)]
struct Most {
    ways: BTreeMap<String, (u32, u32, f64)>,
    spilled: Vec<String>,
}

impl Most {
    fn add(&mut self, arch: &Arch, text: &Text, resources: Resources) {
        if resources.spill_bytes > 0 {
            self.spilled.push(format!("{}: {resources:?}", text.name));
        }
        let launch = &text.source.launch;
        let shared = launch.shared_bytes as u32 + resources.shared_bytes;
        let occupancy = arch.occupancy(launch.units, resources.registers, shared);
        let most = self.ways.entry(text.way.clone()).or_insert((0, 0, 1.0));
        *most = (most.0.max(resources.registers), most.1.max(shared), most.2.min(occupancy));
    }

    /// A line for each way, with some slack.
    fn table(&self, arch: &Arch) -> String {
        assert!(self.spilled.is_empty(), "kernels that spill registers:\n{}", self.spilled.join("\n"));
        let line = |(way, (registers, shared, occupancy)): (&String, &(u32, u32, f64))| {
            let (registers, shared) = (registers.next_multiple_of(16), shared.div_ceil(1 << 10));
            let occupancy = (occupancy * 16.0).ceil() / 16.0 * 100.0;
            format!("{way:<66} {registers:>9} {shared:>10} {occupancy:>9}%\n")
        };
        let lines: String = self.ways.iter().map(line).collect();
        format!("{:<66} registers shared KiB occupancy\n{lines}", arch.name)
    }
}

#[test]
fn every_kernel_of_the_bundled_models_is_accepted_for_sm_90a() {
    // The texts must come out without any toolkit; only what follows needs it.
    let machine = Machine::HOPPER;
    let mut texts = texts(|name, k| match name {
        LOOKED_AT => typical(k, &machine),
        _ => launched(k, &machine),
    });
    texts.extend(texts_together(&machine));
    println!("{} distinct texts", texts.len());
    let Some(compilers) = compilers("every_kernel_of_the_bundled_models_is_accepted_for_sm_90a") else {
        return;
    };
    let arch = arch("sm_90a");
    let (looked_at, others): (Vec<_>, Vec<_>) =
        texts.into_iter().partition(|text| text.name.starts_with(&format!("{LOOKED_AT}/")));
    let mut most = Most::default();
    let resources = assembled(&compilers, arch.name, &others);
    others.iter().zip(resources).for_each(|(text, resources)| most.add(arch, text, resources));
    let mut lines = BTreeSet::new();
    let told = told(&compilers.1, &ptx(&compilers, arch.name, &looked_at), arch.name);
    for (text, told) in looked_at.iter().zip(told) {
        let Text { name, source, .. } = text;
        let Told { resources, instructions } = told.unwrap_or_else(|e| panic!("{name}: {e}"));
        most.add(arch, text, resources);
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
    insta::assert_snapshot!("what_kernels_take_of_sm_90a", most.table(arch));
    let heads = ["registers", "spills", "shared KiB", "occupancy", "16-byte", "tensor"].join(" ");
    let table = lines.into_iter().collect::<String>();
    insta::assert_snapshot!(format!("{LOOKED_AT:<66} {heads}\n{table}"));
}

/// As long as all registers are enough there, too: every kernel in the ways that are taken with one token and with many, and side by side, and
/// of each way that is taken in between or as tf32 the longest text, however many parts its sums are in.
#[test]
fn every_kernel_of_the_bundled_models_spills_nothing_for_other_architectures() {
    let test = "every_kernel_of_the_bundled_models_spills_nothing_for_other_architectures";
    for arch in ["sm_80", "sm_100"].map(arch) {
        let machine = arch.machine();
        let mut all = texts(|_, k| launched(k, &machine));
        all.extend(texts_together(&machine));
        let mut longest: BTreeMap<String, Text> = BTreeMap::new();
        for text in texts(|_, k| ways_taken(k, Target::Cuda, &machine)) {
            let words = text.way.split(", ").filter(|word| !word.ends_with(" parts"));
            let way = words.collect::<Vec<_>>().join(", ");
            let known = longest.get(&way).map_or(0, |known| known.source.text.len());
            if text.source.text.len() > known {
                longest.insert(way, text);
            }
        }
        let known: BTreeSet<_> = all.iter().map(|text| text.source.text.clone()).collect();
        all.extend(longest.into_values().filter(|text| !known.contains(&text.source.text)));
        println!("{} texts for {}", all.len(), arch.name);
        let Some(compilers) = compilers(test) else { return };
        let mut most = Most::default();
        let resources = assembled(&compilers, arch.name, &all);
        all.iter().zip(resources).for_each(|(text, resources)| most.add(arch, text, resources));
        insta::assert_snapshot!(format!("what_kernels_take_of_{}", arch.name), most.table(arch));
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
