//! Grids that begin before those ahead of them are done.
//!
//! A grid is launched, its cubes find out where they are and wait for the first numbers from memory: all of that takes about as long as a
//! short kernel runs, and needs nothing of what the launch before it writes. So a device of compute capability 9.0 or later may begin a
//! grid when all cubes of the one ahead have begun (PTX ISA, `griddepcontrol`; CUDA Programming Guide, "Programmatic Dependent
//! Launch"). Each kernel says at once that the next may begin, and waits for those ahead before it touches what they may write. What
//! no launch of the run writes, weights, may be read before: products with few rows do so. They have to be read there by instructions of
//! their own: `ptxas` takes plain reads from memory that nobody is said to write behind the wait, and behind barriers.
//!
//! What grids ahead may write must not be said to stay as it is: CubeCL says so of all that a kernel only reads (`const … __restrict__`), NVRTC makes
//! it `ld.global.nc`, and `ptxas` moves such reads before the wait. So [`expand`] says it of nothing but what is read early anyhow.
//!
//! A kernel that waits is right in any launch; only a launch that allows it begins early (`queue`), and it does so only if
//! what is read before the wait is known to stay as it is. The emulator gives nothing else out before all units of a block wait.
//!
//! CubeCL 0.10 has no name for any of this: see [`expand`].

use latentc_ir::{Function, ValueId};

use super::emit::GRIDS;
use super::few;
use super::kernel::Form;
use super::target::Target;
use crate::program::Kernel;

/// The instruction that waits, by which a text is known to do so.
pub(crate) const WAIT: &str = "griddepcontrol.wait";
/// The instruction that reads a pack of what is read once.
const LOAD: &str = "ld.global.L1::no_allocate.L2::256B.v4.u32";

/// The parameters that a kernel may read before the grids ahead are done.
pub(super) fn early(body: &Function, form: &Form) -> Vec<ValueId> {
    match form {
        Form::Few(plan, rows) => few::early(body, plan, *rows),
        Form::Map(_)
        | Form::Tiles(_)
        | Form::Scatter(_)
        | Form::ScatterMatrix(..)
        | Form::Stream(_)
        | Form::StreamMatrix(..)
        | Form::Matrix(..) => Vec::new(),
    }
}

/// [`early`] for a kernel in one of its ways.
pub(crate) fn early_of(kernel: &Kernel) -> Vec<ValueId> {
    early(&kernel.body, &Form::of(kernel, Target::Cuda))
}

/// Instructions in place of what [`Emit`](super::emit::Emit) left in a text.
pub(super) fn expand(text: &str) -> String {
    let mut early = Vec::new();
    let text = instructions(text, &mut early);
    let Some((before, signature, after)) = signature(&text) else { return text };
    let parameters: Vec<_> = signature.split(", ").map(|parameter| pointer(parameter, &early)).collect();
    [before, &parameters.join(", "), after].concat()
}

/// The parameters of a text's entry, with what stands before and behind them.
fn signature(text: &str) -> Option<(&str, &str, &str)> {
    let entry = text.find("__global__")?;
    let from = entry + text[entry..].find(" (\n")? + 3;
    let to = from + text[from..].find("\n)")?;
    Some((&text[..from], &text[from..to], &text[to..]))
}

/// A parameter: of pointers, those to what is `early` alone lead to what stays as it is. Nor may a result be said to be where nothing else is: then
/// nobody would write what is read.
fn pointer(parameter: &str, early: &[String]) -> String {
    let name = parameter.trim().rsplit(' ').next().unwrap_or_default();
    let stays = early.iter().any(|e| e == name);
    if stays { parameter.to_owned() } else { parameter.replace("* __restrict__ buffer_", "* buffer_") }
}

/// The same but for pointers. Tells which buffers are read before the wait.
fn instructions(text: &str, early: &mut Vec<String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut lines = text.split_inclusive('\n');
    while let Some(line) = lines.next() {
        let Some(at) = line.find(GRIDS) else {
            out += line;
            continue;
        };
        // It may stand behind something else in its line.
        out += line[..at].trim_end_matches("// ");
        match line[at + GRIDS.len()..].trim_end() {
            "next" => out += &grids("launch_dependents"),
            "wait" => out += &grids("wait"),
            "load" => {
                let [pointer, value] = [(); 2].map(|()| lines.next().unwrap_or_default());
                early.extend(pointer.rsplit(['(', ')']).nth(1).map(str::to_owned));
                out += pointer;
                out += &load(value).unwrap_or_else(|| value.to_owned());
            }
            other => out += &format!("\n#error \"{other}\"\n"),
        }
    }
    out
}

/// An instruction on grids, for devices that have it.
fn grids(what: &str) -> String {
    let instruction = format!("asm volatile(\"griddepcontrol.{what};\" ::: \"memory\");");
    format!("\n#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900\n{instruction}\n#endif\n")
}

/// `const TYPE NAME = POINTER[INDEX];` by an instruction that stays where it is, if it is that. Weights are read once: they need no place in the
/// nearest cache.
fn load(line: &str) -> Option<String> {
    let (declared, place) = line.trim().strip_suffix("];")?.split_once(" = ")?;
    let (ty, name) = declared.strip_prefix("const ")?.split_once(' ')?;
    let (pointer, index) = place.split_once('[')?;
    let words: Vec<_> =
        ["x", "y", "z", "w"].iter().map(|part| format!("\"=r\"({name}_words.{part})")).collect();
    let words = words.join(", ");
    Some(format!(
        "uint4 {name}_words;\nasm volatile(\"{LOAD} {{%0, %1, %2, %3}}, [%4];\" : {words} : \"l\"({pointer} + {index}) : \"memory\");\n\
         const {ty} {name} = *reinterpret_cast<const {ty}*>(&{name}_words);\n"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_stand_for_what_was_left() {
        let text = "a;\n// latentc: grid load\n const wide *_tmp_0 = reinterpret_cast< const wide*>(buffer_0);\n\
                    const wide l_7 = _tmp_0[l_6];\nb; // latentc: grid wait\nc;\n";
        let got = expand(text);
        assert!(got.contains("[%4];\" : \"=r\"(l_7_words.x), "), "{got}");
        assert!(got.contains(": \"l\"(_tmp_0 + l_6) : \"memory\");\nconst wide l_7 = *reinterpret_cast<const wide*>(&l_7_words);\nb; \n#if "), "{got}");
        assert!(got.contains(&format!("asm volatile(\"{WAIT};\" ::: \"memory\");\n#endif\nc;\n")), "{got}");
        assert!(expand("// latentc: grid mistake\n").contains("#error \"mistake\""));
    }

    #[test]
    fn nothing_but_what_is_read_early_is_said_to_stay_as_it_is() {
        let text = "extern \"C\" __global__ void __launch_bounds__(256)f (\n    const __grid_constant__ tensor_map map_0, const float* __restrict__ buffer_0, \
                    const wide* __restrict__ buffer_1, float* buffer_2, const __grid_constant__ info_st info\n) {\n\
                    // latentc: grid load\n const wide *_tmp_0 = reinterpret_cast< const wide*>(buffer_1);\n\
                    const wide l_7 = _tmp_0[l_6];\n// latentc: grid wait\n}\n";
        let got = expand(text);
        let wanted = "f (\n    const __grid_constant__ tensor_map map_0, const float* buffer_0, const wide* __restrict__ buffer_1, \
                      float* buffer_2, const __grid_constant__ info_st info\n) {\n";
        assert!(got.contains(wanted), "{got}");
    }
}
