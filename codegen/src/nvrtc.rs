//! CUDA C++ to machine code with no GPU and no driver: NVRTC loaded at run time, and `ptxas` for its report.
//!
//! Both come as wheels of the Python registry; `scripts/setup-cuda.sh` installs them.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;

use libloading::Library;
use serde::Serialize;

/// The environment variable that names the virtual environment with the wheels.
pub const VENV: &str = "LATENTC_CUDA_VENV";

/// Where the CUDA pieces lie.
#[derive(Clone, Debug)]
pub struct Toolkit {
    nvrtc: PathBuf,
    builtins: Option<PathBuf>,
    ptxas: PathBuf,
    cuobjdump: PathBuf,
    include_dirs: Vec<PathBuf>,
}

/// Why CUDA C++ could not be compiled.
#[derive(Debug, thiserror::Error)]
pub enum NvrtcError {
    /// The pieces are not where they were looked for.
    #[error("no CUDA toolkit: {0}; scripts/setup-cuda.sh installs one")]
    Absent(String),
    /// A file or program could not be used.
    #[error("{0}: {1}")]
    Io(PathBuf, String),
    /// The compiler refuses the source; its log.
    #[error("nvrtc: {0}")]
    Compile(String),
    /// The assembler refuses the PTX; its log.
    #[error("ptxas: {0}")]
    Assemble(String),
}

impl Toolkit {
    /// The toolkit in the virtual environment that [`VENV`] names, or else in `.venv-cuda` of the current directory or one above.
    ///
    /// # Errors
    /// If there is none; says where it was looked for.
    pub fn find() -> Result<Toolkit, NvrtcError> {
        if let Some(venv) = std::env::var_os(VENV) {
            return Toolkit::in_venv(Path::new(&venv));
        }
        let here = std::env::current_dir().map_err(|e| NvrtcError::Absent(e.to_string()))?;
        let venv = here.ancestors().map(|dir| dir.join(".venv-cuda")).find(|venv| venv.is_dir());
        let Some(venv) = venv else {
            return Err(NvrtcError::Absent(format!("{VENV} is not set and there is no .venv-cuda")));
        };
        Toolkit::in_venv(&venv)
    }

    /// The wheels in a virtual environment.
    ///
    /// # Errors
    /// If some are missing; says which.
    pub fn in_venv(venv: &Path) -> Result<Toolkit, NvrtcError> {
        let absent =
            |what: &str, dir: &Path| NvrtcError::Absent(format!("no {what} under {}", dir.display()));
        let lib = venv.join("lib");
        let packages = entries(&lib).into_iter().map(|python| python.join("site-packages/nvidia"));
        let nvidia =
            packages.into_iter().find(|p| p.is_dir()).ok_or_else(|| absent("nvidia wheels", &lib))?;
        // The wheels of one major version share one folder.
        let root = entries(&nvidia).into_iter().find(|p| p.join("include/cuda_runtime.h").is_file());
        let root = root.ok_or_else(|| absent("include/cuda_runtime.h", &nvidia))?;
        let libraries = entries(&root.join("lib"));
        let named = |prefix: &str| {
            let name = |p: &&PathBuf| p.file_name().unwrap_or_default().to_string_lossy().into_owned();
            libraries.iter().find(|p| name(p).starts_with(prefix) && !name(p).contains(".alt.")).cloned()
        };
        let program = |name: &str| {
            let path = root.join(name);
            if path.is_file() { Ok(path) } else { Err(absent(name, &root)) }
        };
        Ok(Toolkit {
            nvrtc: named("libnvrtc.so").ok_or_else(|| absent("lib/libnvrtc.so", &root))?,
            builtins: named("libnvrtc-builtins.so"),
            ptxas: program("bin/ptxas")?,
            cuobjdump: program("bin/cuobjdump")?,
            include_dirs: vec![root.join("include"), root.join("include/cccl")],
        })
    }

    /// Assembles PTX for a real architecture, such as `sm_90a`.
    ///
    /// # Errors
    /// If the assembler refuses it or a file cannot be written.
    pub fn assemble(&self, ptx: &str, arch: &str, dir: &Path) -> Result<Resources, NvrtcError> {
        Ok(Resources::read(&self.assembled(ptx, arch, dir)?.0))
    }

    /// Assembles PTX, and gives the assembler's report and the file with the machine code.
    pub(crate) fn assembled(
        &self,
        ptx: &str,
        arch: &str,
        dir: &Path,
    ) -> Result<(String, PathBuf), NvrtcError> {
        let (from, to) = (dir.join("kernel.ptx"), dir.join("kernel.cubin"));
        std::fs::write(&from, ptx).map_err(|e| NvrtcError::Io(from.clone(), e.to_string()))?;
        let mut ptxas = Command::new(&self.ptxas);
        ptxas.arg(format!("-arch={arch}")).arg("-v").arg(&from).arg("-o").arg(&to);
        let output = ptxas.output().map_err(|e| NvrtcError::Io(self.ptxas.clone(), e.to_string()))?;
        // The report is on one stream or the other, by version.
        let streams = [output.stderr, output.stdout].concat();
        let report = String::from_utf8_lossy(&streams).into_owned();
        // Products of groups of planes that wait for one another are right, but idle for most of the time: it is said in a warning only.
        if !output.status.success() || report.contains("wgmma.mma_async instructions are serialized") {
            return Err(NvrtcError::Assemble(report));
        }
        Ok((report, to))
    }

    /// The instructions of a file with machine code as `cuobjdump` prints them.
    ///
    /// # Errors
    /// If it does not know the code.
    pub(crate) fn disassembled(&self, file: &Path) -> Result<String, NvrtcError> {
        let output = Command::new(&self.cuobjdump).arg("-sass").arg(file).output();
        let output = output.map_err(|e| NvrtcError::Io(self.cuobjdump.clone(), e.to_string()))?;
        if !output.status.success() {
            return Err(NvrtcError::Assemble(String::from_utf8_lossy(&output.stderr).into_owned()));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// What is in a folder, by name; nothing if it cannot be read.
fn entries(dir: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> =
        std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
    paths.sort();
    paths
}

/// What the assembler says that a thread takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Resources {
    /// Registers.
    pub registers: u32,
    /// Bytes of stack.
    pub stack_bytes: u32,
    /// Bytes written and read because there were too few registers.
    pub spill_bytes: u32,
    /// Bytes of shared memory of a block, without what a launch adds.
    pub shared_bytes: u32,
}

impl Resources {
    /// From the report of `ptxas -v`: the number before each known phrase.
    pub(crate) fn read(report: &str) -> Resources {
        let before = |phrase: &str| -> u32 {
            let Some(at) = report.find(phrase) else { return 0 };
            let word = report[..at].rsplit(|c: char| !c.is_ascii_digit()).next();
            word.and_then(|w| w.parse().ok()).unwrap_or(0)
        };
        Resources {
            registers: before(" registers"),
            stack_bytes: before(" bytes stack frame"),
            spill_bytes: before(" bytes spill stores") + before(" bytes spill loads"),
            shared_bytes: before(" bytes smem"),
        }
    }
}

type Program = *mut c_void;
type Strings = *const *const c_char;
type Create =
    unsafe extern "C" fn(*mut Program, *const c_char, *const c_char, c_int, Strings, Strings) -> c_int;
type Compile = unsafe extern "C" fn(Program, c_int, Strings) -> c_int;
type GetSize = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type GetText = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;
type Version = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;

/// What the library is called, where the system finds it.
const NAMES: [&str; 4] = ["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12", "nvrtc64_130_0.dll"];

/// NVRTC, loaded.
pub struct Nvrtc {
    library: Library,
    /// NVRTC loads its builtins by name; loaded before it by their path, they need not be on the library path.
    _builtins: Option<Library>,
    options: Vec<CString>,
}

impl Nvrtc {
    /// Loads the toolkit's library.
    ///
    /// # Errors
    /// If it cannot be loaded.
    pub fn load(toolkit: &Toolkit) -> Result<Nvrtc, NvrtcError> {
        let open = |path: &Path| {
            // SAFETY: loading these libraries asks nothing of the process.
            unsafe { Library::new(path) }.map_err(|e| NvrtcError::Io(path.to_owned(), e.to_string()))
        };
        let builtins = toolkit.builtins.as_deref().map(open).transpose()?;
        Nvrtc::of(open(&toolkit.nvrtc)?, builtins, &toolkit.include_dirs)
    }

    /// Loads the library that the system finds by its name; headers are in these folders.
    ///
    /// # Errors
    /// If there is none.
    pub fn installed(include_dirs: &[PathBuf]) -> Result<Nvrtc, NvrtcError> {
        // SAFETY: as above.
        let library = NAMES.iter().find_map(|name| unsafe { Library::new(name) }.ok());
        let absent = || NvrtcError::Absent("libnvrtc.so is not on the library path".to_owned());
        Nvrtc::of(library.ok_or_else(absent)?, None, include_dirs)
    }

    fn of(
        library: Library,
        builtins: Option<Library>,
        include_dirs: &[PathBuf],
    ) -> Result<Nvrtc, NvrtcError> {
        let includes = include_dirs.iter().map(|d| format!("--include-path={}", d.display()));
        let options = includes.map(CString::new).collect::<Result<_, _>>();
        let options = options.map_err(|e| NvrtcError::Absent(e.to_string()))?;
        Ok(Nvrtc { library, _builtins: builtins, options })
    }

    /// What decides, beside a text, which [machine code](Nvrtc::machine_code) is made of it for an architecture: the compiler's
    /// version and its options.
    ///
    /// # Errors
    /// If the library does not say.
    pub fn decided_by(&self, arch: &str) -> Result<String, NvrtcError> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the function has this type in every NVRTC, and both pointers outlive the call.
        let code = unsafe { self.function::<Version>(c"nvrtcVersion")?(&raw mut major, &raw mut minor) };
        if code != 0 {
            return Err(NvrtcError::Compile(format!("no version, code {code}")));
        }
        let options = self.for_machine(arch)?;
        let options: Vec<_> = options.iter().chain(&self.options).map(|o| o.to_string_lossy()).collect();
        Ok(format!("nvrtc {major}.{minor} {}", options.join(" ")))
    }

    /// Options for machine code. Profilers show the lines of the text.
    fn for_machine(&self, arch: &str) -> Result<[CString; 2], NvrtcError> {
        Ok([text(format!("--gpu-architecture={arch}"))?, c"-lineinfo".to_owned()])
    }

    /// Compiles CUDA C++ to machine code of a real architecture, such as `sm_90a`, by any thread.
    ///
    /// # Errors
    /// The compiler's log.
    pub fn machine_code(&self, source: &str, arch: &str) -> Result<Vec<u8>, NvrtcError> {
        let options = self.for_machine(arch)?;
        self.made(source, &options, c"nvrtcGetCUBINSize", c"nvrtcGetCUBIN")
    }

    /// Compiles CUDA C++ to PTX for an architecture, such as `sm_90a`.
    ///
    /// # Errors
    /// The compiler's log.
    pub fn compile(&self, source: &str, arch: &str) -> Result<String, NvrtcError> {
        // A virtual architecture, so that the result is PTX.
        let arch = text(format!("--gpu-architecture={}", arch.replace("sm_", "compute_")))?;
        let ptx = self.made(source, &[arch], c"nvrtcGetPTXSize", c"nvrtcGetPTX")?;
        Ok(read(&ptx))
    }

    /// What the pair of functions of these names, a size and an output of that size, give of a text.
    fn made(
        &self,
        source: &str,
        options: &[CString],
        size: &CStr,
        output: &CStr,
    ) -> Result<Vec<u8>, NvrtcError> {
        let source = text(source.to_owned())?;
        let options: Vec<_> = options.iter().chain(&self.options).map(|o| o.as_ptr()).collect();
        // SAFETY: the functions have these types in every NVRTC since 11, every pointer outlives its call, and the program is
        // destroyed once.
        unsafe {
            let create: Create = self.function(c"nvrtcCreateProgram")?;
            let compile: Compile = self.function(c"nvrtcCompileProgram")?;
            let destroy: Destroy = self.function(c"nvrtcDestroyProgram")?;
            let (mut program, none) = (std::ptr::null_mut(), std::ptr::null());
            let code = create(&raw mut program, source.as_ptr(), c"kernel.cu".as_ptr(), 0, none, none);
            if code != 0 {
                return Err(NvrtcError::Compile(format!("no program, code {code}")));
            }
            let code = compile(program, options.len() as c_int, options.as_ptr());
            let result = if code == 0 {
                self.output(program, size, output)
            } else {
                let log = self.output(program, c"nvrtcGetProgramLogSize", c"nvrtcGetProgramLog");
                let log = log.map(|log| read(&log));
                Err(NvrtcError::Compile(log.unwrap_or_else(|e| format!("code {code}, and {e}"))))
            };
            destroy(&raw mut program);
            result
        }
    }

    /// # Safety
    /// The function must have that type.
    unsafe fn function<T: Copy>(&self, name: &CStr) -> Result<T, NvrtcError> {
        // SAFETY: by this function's contract.
        let symbol = unsafe { self.library.get::<T>(name.to_bytes_with_nul()) };
        symbol.map(|s| *s).map_err(|e| NvrtcError::Absent(e.to_string()))
    }

    /// # Safety
    /// The program must be alive, and the names those of a pair of functions that give a size and an output of that size.
    unsafe fn output(&self, program: Program, size: &CStr, output: &CStr) -> Result<Vec<u8>, NvrtcError> {
        // SAFETY: by this function's contract.
        unsafe {
            let (size, output): (GetSize, GetText) = (self.function(size)?, self.function(output)?);
            let mut len = 0;
            if size(program, &raw mut len) != 0 {
                return Err(NvrtcError::Compile("no size of the output".to_owned()));
            }
            let mut bytes = vec![0u8; len.max(1)];
            if output(program, bytes.as_mut_ptr().cast()) != 0 {
                return Err(NvrtcError::Compile("no output".to_owned()));
            }
            Ok(bytes)
        }
    }
}

/// A text as the library takes it.
fn text(text: String) -> Result<CString, NvrtcError> {
    CString::new(text).map_err(|e| NvrtcError::Compile(e.to_string()))
}

/// A text as the library gives it: up to its closing zero.
fn read(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.split(|&byte| byte == 0).next().unwrap_or_default()).into_owned()
}
