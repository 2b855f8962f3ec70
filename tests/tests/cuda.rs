//! Every kernel of the published models, in real size, through NVIDIA's own compilers: no GPU is needed for that.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use latentc_codegen::cube::{
    Machine, Source, Tuning, cuda_sources, cuda_together_source, side_by_side, typical,
};
use latentc_codegen::machine_code::{ARCHS, MachineCode};
use latentc_codegen::nvrtc::{Nvrtc, Toolkit};
use latentc_codegen::program::Kernel;
use latentc_models::config::ModelConfig;
use latentc_passes::Graph;
use latentc_tests::compiled;

/// The model whose kernels are looked at instruction by instruction: to disassemble those of all takes three times as long as the rest.
const LOOKED_AT: &str = "deepseek-v2-lite";

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

#[test]
fn every_kernel_of_the_bundled_models_is_accepted_for_sm_90a() {
    // The sources must come out without any toolkit; only what follows needs it.
    let mut kernels: BTreeMap<String, (String, Kernel)> = BTreeMap::new();
    let mut together: BTreeMap<String, Vec<Kernel>> = BTreeMap::new();
    for name in [LOOKED_AT, "deepseek-v2", "deepseek-67b"] {
        let config = ModelConfig::bundled(name).expect("bundled");
        for graph in Graph::ALL {
            let program = compiled(&config, graph).program;
            let text = |k: &Kernel| format!("{}\n{:?}", k.body, k.kind);
            for kernel in program.kernels.iter().flat_map(|k| typical(k, &Machine::HOPPER)) {
                // By the first model and graph that has it: a name is the same from run to run.
                let name = format!("{}/{}/{}", name, graph.name(), kernel.name);
                kernels.entry(text(&kernel)).or_insert((name, kernel));
            }
            for group in program.together().into_iter().filter(|_| graph == Graph::Decode) {
                let group = side_by_side(group, &Tuning::default()).expect("no tuning is wrong");
                together.insert(group.iter().map(text).collect(), group);
            }
        }
    }
    let mut sources = Vec::new();
    for (name, k) in kernels.into_values() {
        let all = cuda_sources(&k).unwrap_or_else(|e| panic!("{e}"));
        // What comes behind the kernel's name says which way it is, and which of its launches.
        sources.extend(all.into_iter().map(|source| {
            let way = source.name.strip_prefix(&k.name).unwrap_or(&source.name);
            (format!("{name}{way}"), source)
        }));
    }
    for group in together.into_values().filter(|group| !group.is_empty()) {
        let source = cuda_together_source(&group).unwrap_or_else(|e| panic!("{e}"));
        sources.extend(source.map(|source| (source.name.clone(), source)));
    }
    println!("{} distinct sources", sources.len());
    let toolkit = match Toolkit::find() {
        Ok(toolkit) => toolkit,
        Err(e) => {
            eprintln!("SKIPPED: every_kernel_of_the_bundled_models_is_accepted_for_sm_90a: {e}");
            return;
        }
    };
    let nvrtc = Nvrtc::load(&toolkit).expect("the toolkit that was found loads");
    let (spilled, table) = (Mutex::new(Vec::new()), Mutex::new(BTreeMap::new()));
    let arch = ARCHS.iter().find(|arch| arch.name == "sm_90a").expect("it is one of them");
    let next = AtomicUsize::new(0);
    let work = || {
        let folder = tempfile::tempdir().expect("a temporary folder");
        while let Some((name, Source { text, launch, .. })) =
            sources.get(next.fetch_add(1, Ordering::Relaxed))
        {
            let ptx = nvrtc.compile(text, arch.name).unwrap_or_else(|e| panic!("{name}: {e}\n{text}"));
            let cubin = toolkit.assemble(&ptx, arch.name, folder.path());
            let cubin = cubin.unwrap_or_else(|e| panic!("{name}: {e}"));
            if cubin.resources.spill_bytes > 0 {
                let found = format!("{name}: {:?}", cubin.resources);
                spilled.lock().expect("no thread has panicked").push(found);
            }
            let Some(short) = name.strip_prefix(LOOKED_AT) else { continue };
            let code = toolkit.disassemble(&cubin, folder.path()).unwrap_or_else(|e| panic!("{name}: {e}"));
            if waits_at_once(text) {
                let early = before_the_wait(&code).unwrap_or_else(|| panic!("{name} does not wait:\n{code}"));
                assert!(early.is_empty(), "{name} touches memory before it waits: {early:?}");
            }
            let code =
                MachineCode::of(arch, cubin.resources, &code, launch.units, launch.shared_bytes as u32);
            let short = short.trim_start_matches('/').to_owned();
            let line = line(&short, &code);
            table.lock().expect("no thread has panicked").insert(short, line);
        }
    };
    // Most of the time is the compilers'.
    let workers = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    thread::scope(|scope| (0..workers).for_each(|_| drop(scope.spawn(work))));
    let spilled = spilled.into_inner().expect("no thread has panicked");
    assert!(spilled.is_empty(), "kernels that spill registers:\n{}", spilled.join("\n"));
    let heads = ["registers", "spills", "shared KiB", "occupancy", "16-byte", "tensor"].join(" ");
    let table: String = table.into_inner().expect("no thread has panicked").into_values().collect();
    insta::assert_snapshot!(format!("{LOOKED_AT:<66} {heads}\n{table}"));
}

/// Whether a text touches no memory before it waits for the grids ahead. Kernels side by side wait each by itself.
fn waits_at_once(source: &str) -> bool {
    let parts: Vec<_> = source.split("griddepcontrol.wait").collect();
    let body = parts[0].split_once("\n) {").map_or(parts[0], |(_, body)| body);
    parts.len() == 2 && !body.contains("buffer_")
}

/// What machine code does with global memory before it waits. The compiler may not move what reads over the wait, even
/// where nobody else is said to write; `None` if it does not wait.
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
