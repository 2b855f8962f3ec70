//! Texts of kernels to machine code: found among what was compiled before, or compiled on another thread.
//!
//! The launches of a run are enqueued without waiting for the device, nor for compilers: each kernel begins to be compiled when it is first
//! launched, and all launches behind it wait in the queue ([`queue`](super::queue)). So the kernels of a run are compiled side by side.

use std::sync::{Arc, OnceLock};

use super::codes::Codes;
use crate::nvrtc::{Nvrtc, NvrtcError};

/// Machine code that may still be on its way, or why there is none.
#[derive(Debug, Default)]
pub(super) struct Code(OnceLock<Result<Vec<u8>, String>>);

impl Code {
    /// One that is there.
    fn of(code: Vec<u8>) -> Arc<Code> {
        Arc::new(Code(OnceLock::from(Ok(code))))
    }

    /// Whether it need not be waited for.
    pub(super) fn is_there(&self) -> bool {
        self.0.get().is_some()
    }

    /// Waits for it.
    ///
    /// # Errors
    /// The compiler's log.
    pub(super) fn wait(&self) -> Result<&[u8], String> {
        // A thread of those that compile does their work meanwhile: it may be the only one.
        while !self.is_there() && rayon::yield_now().is_some() {}
        self.0.wait().as_deref().map_err(String::clone)
    }

    /// Says what came of the text.
    pub(super) fn arrive(&self, code: Result<Vec<u8>, String>) {
        self.0.get_or_init(|| code);
    }
}

/// A compiler for one architecture, and what it made before.
pub(super) struct Compiler {
    nvrtc: Nvrtc,
    arch: String,
    codes: Option<Codes>,
    /// What decides, beside a text, what is made of it.
    decided_by: String,
}

impl Compiler {
    /// For an architecture, such as `sm_90a`. Where there are codes, all that is made is kept there.
    ///
    /// # Errors
    /// If the library is not what it should be.
    pub(super) fn new(nvrtc: Nvrtc, arch: String, codes: Option<Codes>) -> Result<Compiler, NvrtcError> {
        let decided_by = format!("latentc {} {}", env!("CARGO_PKG_VERSION"), nvrtc.decided_by(&arch)?);
        Ok(Compiler { nvrtc, arch, codes, decided_by })
    }

    /// The code of a text: that of before, or else another thread begins to make it.
    pub(super) fn begin(self: &Arc<Compiler>, text: String) -> Arc<Code> {
        let made_of = format!("{}\n{text}", self.decided_by);
        if let Some(code) = self.codes.as_ref().and_then(|codes| codes.find(&made_of)) {
            return Code::of(code);
        }
        let (code, compiler) = (Arc::<Code>::default(), Arc::clone(self));
        let to = Arc::clone(&code);
        rayon::spawn(move || {
            let made = compiler.nvrtc.machine_code(&text, &compiler.arch);
            if let (Ok(code), Some(codes)) = (&made, &compiler.codes) {
                // What cannot be kept is made again next time.
                let _ = codes.keep(&made_of, code);
            }
            to.arrive(made.map_err(|e| e.to_string()));
        });
        code
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::nvrtc::Toolkit;

    #[test]
    fn what_was_compiled_is_found_by_the_next_compiler() {
        let toolkit = match Toolkit::find() {
            Ok(toolkit) => toolkit,
            Err(e) => {
                eprintln!("SKIPPED: machine code by nvrtc: {e}");
                return;
            }
        };
        let folder = tempfile::tempdir().unwrap();
        let compiler = || {
            let nvrtc = Nvrtc::load(&toolkit).unwrap();
            let codes = Codes::at(folder.path().to_owned());
            Arc::new(Compiler::new(nvrtc, "sm_90a".to_owned(), Some(codes)).unwrap())
        };
        let text =
            |n: u32| format!("extern \"C\" __global__ void f(unsigned* y) {{ y[threadIdx.x] = {n}; }}");
        let first = compiler();
        let made = [1, 2].map(|n| first.begin(text(n)));
        let made = made.map(|code| code.wait().unwrap().to_vec());
        assert!(made.iter().all(|code| code.starts_with(b"\x7fELF")) && made[0] != made[1]);
        let next = compiler();
        for (n, made) in [1, 2].into_iter().zip(&made) {
            let code = next.begin(text(n));
            assert!(code.is_there(), "it was compiled before");
            assert_eq!(code.wait().unwrap(), made);
        }
        // A damaged file is made again.
        for entry in fs::read_dir(folder.path()).unwrap() {
            fs::write(entry.unwrap().path(), "something else").unwrap();
        }
        let again = next.begin(text(1));
        assert!(!again.is_there());
        assert_eq!(again.wait().unwrap(), made[0]);
        assert!(compiler().begin(text(1)).is_there());
        // What does not compile is said each time.
        let wrong = next.begin("extern \"C\" __global__ void f() { nothing; }".to_owned());
        assert!(wrong.wait().unwrap_err().contains("identifier \"nothing\" is undefined"));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
