//! The system's C++ compiler and a folder in which it works.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use tempfile::TempDir;

use super::translate::{self, Part};
use crate::device::DeviceError;

/// The headers that stand in for CUDA's, by the names under which kernels include them.
const HEADERS: [(&str, &str); 11] = [
    ("kernels.h", include_str!("include/kernels.h")),
    ("emulator.h", include_str!("include/emulator.h")),
    ("cuda_runtime.h", include_str!("include/cuda_runtime.h")),
    ("latentc_count.h", include_str!("include/latentc_count.h")),
    ("latentc_narrow.h", include_str!("include/latentc_narrow.h")),
    ("latentc_ptx.h", include_str!("include/latentc_ptx.h")),
    ("latentc_bulk.h", include_str!("include/latentc_bulk.h")),
    ("latentc_wgmma.h", include_str!("include/latentc_wgmma.h")),
    ("cuda_bf16.h", include_str!("include/cuda_bf16.h")),
    ("cuda_fp16.h", include_str!("include/cuda_fp16.h")),
    ("mma.h", include_str!("include/mma.h")),
];

/// What runs the kernels of a program, and what units of the device do for them.
const SOURCES: [(&str, &str); 2] =
    [("emulator.cpp", include_str!("emulator.cpp")), ("units.cpp", include_str!("units.cpp"))];

/// For all that is compiled. Programs run where they are made; what is multiplied and added is not fused unless the kernel says so.
const COMMON: [&str; 4] = ["-std=c++20", "-march=native", "-ffp-contract=off", "-w"];

/// Not optimised: a check runs small sizes a few times, and compilers take three times as long to make a long kernel fast as that takes.
/// Memory is looked at as other types all the time, as on a GPU.
const CHECKED: [&str; 7] = [
    "-O0",
    "-g1",
    "-fsanitize=address,undefined",
    // What is declared in a block has no pointers that outlive it, and to look for these takes compilers half of their time.
    "-fno-sanitize-address-use-after-scope",
    // AddressSanitizer finds the same and says more.
    "-fno-sanitize=object-size",
    "-fno-sanitize-recover=all",
    "-fno-strict-aliasing",
];

/// The headers, read once for all that is checked. GCC finds them so beside the path that it looks for; to others they are headers still.
const READY: [&str; 6] = ["-Iinclude", "-x", "c++-header", "include/kernels.h", "-o", "ready/kernels.h.gch"];

/// For what units of the device do, which read and write for kernels. What is undefined is looked for in kernels themselves.
const UNITS: [&str; 6] = ["-O1", "-fsanitize=address", "-c", "units.cpp", "-o", "units.o"];

/// For kernels where accesses are counted: each is a call, of functions that are ThreadSanitizer's elsewhere.
const COUNTED: [&str; 6] =
    ["-O1", "-g0", "-fsanitize=thread", "-fno-strict-aliasing", "-fno-threadsafe-statics", "-c"];

/// Environment of programs: nothing is kept of stacks that were left, and what is not given back does not matter.
const SANITIZERS: [(&str, &str); 2] = [
    ("ASAN_OPTIONS", "detect_stack_use_after_return=0:detect_leaks=0:allocator_may_return_null=1:exitcode=4"),
    ("UBSAN_OPTIONS", "print_stacktrace=0"),
];

/// Compiles and runs programs of kernels.
#[derive(Debug)]
pub(super) struct Workshop {
    folder: TempDir,
    compiler: PathBuf,
    /// Whether what units of the device do is compiled, or what the compiler says. Many kernels ask them for nothing.
    units: OnceLock<Result<(), String>>,
    /// The same of what runs kernels that count.
    counter: OnceLock<Result<(), String>>,
}

impl Workshop {
    /// The workshop of this process, made anew if nobody has it.
    ///
    /// # Errors
    /// There is no compiler, or it has no sanitizers; says what to install.
    pub(super) fn open() -> Result<Arc<Workshop>, DeviceError> {
        static OPEN: Mutex<Weak<Workshop>> = Mutex::new(Weak::new());
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(workshop) = open.upgrade() {
            return Ok(workshop);
        }
        let workshop = Arc::new(Workshop::new()?);
        *open = Arc::downgrade(&workshop);
        Ok(workshop)
    }

    /// Finds the compiler and compiles what all programs share.
    fn new() -> Result<Workshop, DeviceError> {
        let absent = |why: String| DeviceError::Absent("CUDA emulator", why);
        let compiler = find().ok_or_else(|| {
            absent("no C++ compiler: neither CXX nor c++, g++, clang++ is a program; scripts/setup-cxx.sh installs one".to_owned())
        })?;
        let folder = tempfile::Builder::new().prefix("latentc-emulate-").tempdir();
        let folder = folder.map_err(|e| absent(format!("no temporary folder: {e}")))?;
        let workshop = Workshop { folder, compiler, units: OnceLock::new(), counter: OnceLock::new() };
        let write = |name: &str, text: &str| {
            let path = workshop.path(name);
            std::fs::write(&path, text).map_err(|e| absent(format!("{}: {e}", path.display())))
        };
        for name in ["include", "ready"] {
            std::fs::create_dir(workshop.path(name)).map_err(|e| absent(e.to_string()))?;
        }
        for (name, text) in HEADERS {
            write(&format!("include/{name}"), text)?;
        }
        for (name, text) in SOURCES {
            write(name, text)?;
        }
        // What runs the kernels is not checked itself: it switches threads millions of times.
        let runner = || workshop.compile(&["-O2", "-c", "emulator.cpp", "-o", "emulator.o"]);
        let headers = || workshop.compile(&[&CHECKED[..], &READY].concat());
        let (runner, headers) = rayon::join(runner, headers);
        runner.and(headers).map_err(absent)?;
        Ok(workshop)
    }

    /// A path in the folder.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The compiler, for people.
    pub(super) fn compiler(&self) -> &Path {
        &self.compiler
    }

    /// Makes a program of these kernels, in a file of that name: one that checks what they do, or one that counts it.
    ///
    /// # Errors
    /// What the compiler says.
    pub(super) fn build(&self, name: &str, parts: &[Part<'_>], counts: bool) -> Result<PathBuf, String> {
        let source = format!("{name}.cpp");
        std::fs::write(self.path(&source), translate::program(parts)?)
            .map_err(|e| format!("{source}: {e}"))?;
        if counts {
            self.counter.get_or_init(|| self.counter()).clone()?;
            let object = format!("{name}.o");
            self.compile(&[&COUNTED[..], &["-Iinclude", &source, "-o", &object]].concat())?;
            self.compile(&[&object, "counter.o", "counted_units.o", "-o", name])?;
        } else {
            let files = ["-Iready", "-Iinclude", &source, "emulator.o", "-o", name];
            let units = parts.iter().any(|p| p.source.contains("asm"));
            if units {
                self.units.get_or_init(|| self.compile(&UNITS)).clone()?;
            }
            let units: &[&str] = if units { &["units.o"] } else { &[] };
            self.compile(&[&CHECKED[..], &files, units].concat())?;
        }
        Ok(self.path(name))
    }

    /// Compiles what programs that count share.
    fn counter(&self) -> Result<(), String> {
        self.compile(&["-O2", "-DLATENTC_COUNT", "-c", "emulator.cpp", "-o", "counter.o"])?;
        self.compile(&[&COUNTED[..], &["units.cpp", "-o", "counted_units.o"]].concat())
    }

    fn compile(&self, arguments: &[&str]) -> Result<(), String> {
        let mut command = Command::new(&self.compiler);
        command.current_dir(self.folder.path()).args(COMMON).args(arguments).stdin(Stdio::null());
        let output = command.output().map_err(|e| format!("{}: {e}", self.compiler.display()))?;
        if output.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&output.stderr);
        let lines: Vec<_> =
            text.lines().filter(|l| l.contains("error") || l.contains("undefined")).take(5).collect();
        let shown = if lines.is_empty() { text.trim().to_owned() } else { lines.join("\n") };
        Err(format!("{} refuses the kernel: {shown}", self.compiler.display()))
    }

    /// Runs a program on the launch in one file; what it writes goes to the next, and what it counts to one more.
    ///
    /// # Errors
    /// What is wrong with the kernel, as far as the program or its sanitizers could tell.
    pub(super) fn run(&self, program: &Path, files: &[PathBuf]) -> Result<(), String> {
        let mut command = Command::new(program);
        command.args(files).envs(SANITIZERS).stdin(Stdio::null());
        let output = command.output().map_err(|e| format!("{}: {e}", program.display()))?;
        if output.status.success() { Ok(()) } else { Err(reason(&output)) }
    }
}

/// The compiler that `CXX` names, or the first of the usual ones.
fn find() -> Option<PathBuf> {
    let named = std::env::var_os("CXX").map(PathBuf::from);
    let usual = ["c++", "g++", "clang++"].map(PathBuf::from);
    named.into_iter().chain(usual).find(|compiler| {
        let mut command = Command::new(compiler);
        command.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|s| s.success())
    })
}

/// What a program that failed has to say: what the emulator knows, then what the sanitizers know, and the line of the kernel.
fn reason(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let ours = text.lines().find_map(|l| l.strip_prefix("latentc: "));
    // UndefinedBehaviorSanitizer: `name.cu:46:13: runtime error: …`.
    let undefined = text.lines().find_map(|l| l.split_once(": runtime error: "));
    let mut said: Vec<&str> = ours.into_iter().chain(undefined.map(|(_, what)| what)).collect();
    if said.is_empty() {
        said.extend(text.lines().filter(|l| !l.trim().is_empty()).take(3));
    }
    // AddressSanitizer: `    #0 0x… in kernel_0::name(…) name.cu:46`.
    let frames = text.lines().map(str::trim_start).filter(|l| l.starts_with('#'));
    let mut places = undefined.map(|(place, _)| place).into_iter().chain(frames);
    let place = places.find_map(|place| {
        let (before, after) = place.split_once(".cu:")?;
        let name = before.rsplit(['/', ' ']).next()?;
        Some(format!(", in line {} of {name}.cu", after.split(':').next()?))
    });
    if said.is_empty() {
        return format!("the emulator stopped without a word, {}", output.status);
    }
    said.join(": ") + &place.unwrap_or_default()
}
