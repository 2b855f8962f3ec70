//! CUDA C++ as CubeCL prints it, made into C++ for the system's compiler.
//!
//! The headers of the emulator give nearly all of CUDA a meaning, so little is changed, and never a line: errors of the compiler and
//! of the sanitizers point into the text that `compile` writes. What no header can do is done here:
//!
//! - `extern "C"` goes, since each kernel has a namespace of its own;
//! - `extern __shared__` names the block's memory, which is defined before the kernel with the size of the launch;
//! - inline PTX becomes the call of a function that is named after the instruction.

use std::fmt::Write;

/// A kernel in the C++ of one program.
pub(super) struct Part<'a> {
    /// The entry.
    pub(super) name: &'a str,
    /// CUDA C++.
    pub(super) source: &'a str,
    /// Of the block's memory.
    pub(super) shared_bytes: usize,
    /// Whether it waits for the grids ahead.
    pub(super) waits: bool,
}

/// One translation unit with these kernels, whose entries are numbered in this order.
///
/// # Errors
/// What of the text is not understood.
pub(super) fn program(parts: &[Part<'_>]) -> Result<String, String> {
    // All headers outside of any namespace; where they stand in the kernels, they are then there already.
    let mut text = String::from("#include \"kernels.h\"\n");
    for (n, part) in parts.iter().enumerate() {
        let _ = writeln!(text, "namespace kernel_{n} {{");
        if part.shared_bytes > 0 {
            let bytes = part.shared_bytes;
            let _ =
                writeln!(text, "alignas(1024) unsigned char dynamic_shared_mem[{bytes} + emulate::BEYOND];");
        }
        let _ = writeln!(text, "#line 1 \"{}.cu\"", part.name);
        text += &calls_for_assembly(part.source)
            .map_err(|e| format!("{}.cu: {e}", part.name))?
            .replace("extern \"C\" __global__", "__global__")
            .replace("extern __shared__", "extern");
        let _ = writeln!(text, "\n}}");
    }
    text += "const emulate::Entry emulate::entries[] = {\n";
    for (n, part) in parts.iter().enumerate() {
        let shared = if part.shared_bytes > 0 {
            format!("kernel_{n}::dynamic_shared_mem")
        } else {
            "nullptr".to_owned()
        };
        let Part { name, shared_bytes: bytes, waits, .. } = part;
        let _ = writeln!(text, "    {{emulate::Call<kernel_{n}::{name}>::run, {shared}, {bytes}, {waits}}},");
    }
    let _ = writeln!(text, "}};\nconst size_t emulate::entry_count = {};", parts.len());
    Ok(text)
}

/// Each `asm("mma.sync… {%0}, …;" : "=f"(d) : "r"(a))` as `ptx_mma_sync…(d, a)`; line breaks stay.
fn calls_for_assembly(source: &str) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = source;
    while let Some(at) = rest.find("asm") {
        let word = !rest[..at].ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
        let head = rest[at + 3..].trim_start();
        let head = head.strip_prefix("volatile").map_or(head, str::trim_start);
        let Some(inside) = head.strip_prefix('(').filter(|_| word) else {
            out += &rest[..at + 3];
            rest = &rest[at + 3..];
            continue;
        };
        out += &rest[..at];
        let line = 1 + out.matches('\n').count();
        let end = closing(inside).ok_or_else(|| format!("line {line}: assembly without an end"))?;
        out += &call(&inside[..end]).map_err(|e| format!("line {line}: {e}"))?;
        let whole = &rest[at..rest.len() - inside.len() + end + 1];
        out.extend(whole.chars().filter(|&c| c == '\n'));
        rest = &rest[at + whole.len()..];
    }
    Ok(out + rest)
}

/// Where the parenthesis that is open before the text closes.
fn closing(text: &str) -> Option<usize> {
    let (mut depth, mut quoted) = (0, false);
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' if quoted => {
                chars.next();
            }
            '"' => quoted = !quoted,
            '(' if !quoted => depth += 1,
            ')' if !quoted && depth == 0 => return Some(at),
            ')' if !quoted => depth -= 1,
            _ => {}
        }
    }
    None
}

/// What is between the parentheses of a piece of assembly, as a call.
fn call(inside: &str) -> Result<String, String> {
    let mut code = String::new();
    let mut operands = Vec::new();
    let mut rest = inside.trim_start();
    let mut in_code = true;
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix('"') {
            let end = after.find('"').ok_or("a string without an end")?;
            if in_code {
                code += &after[..end].replace("\\n", "\n");
                rest = &after[end + 1..];
            } else {
                // A constraint, or a note of what is written; an operand follows the first.
                rest = after[end + 1..].trim_start();
                if let Some(operand) = rest.strip_prefix('(') {
                    let end = closing(operand).ok_or("an operand without an end")?;
                    operands.push(operand[..end].trim());
                    rest = &operand[end + 1..];
                }
            }
        } else {
            in_code &= !rest.starts_with(':');
            rest = &rest[1..];
        }
        rest = rest.trim_start();
    }
    // The instruction is the first word that neither declares a register nor sets a predicate.
    let mut statements = code.split([';', '\n', '{', '}']).map(str::trim);
    let does = |s: &&str| s.starts_with(|c: char| c.is_ascii_lowercase()) && !s.starts_with("setp.");
    let instruction = statements.find(does);
    let word =
        instruction.and_then(|s| s.split_whitespace().next()).ok_or("assembly without an instruction")?;
    let name: String = word.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    Ok(format!("ptx_{}({})", name.replace("__", "_"), operands.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn assembly_is_a_call_of_its_instruction() {
        let source = "void f(float &d, uint32 const &a) {\n  asm volatile(\"mma.sync.aligned.f32.bf16\"\n    \
                      \" {%0}, {%1};\"\n    : \"=f\"(d)\n    : \"r\"(a), \"r\"(g(1)));\n  }\n\
                      int asmx = 1; asm volatile(\"cp.async.wait_all;\\n\" ::: \"memory\");\n";
        let want = "void f(float &d, uint32 const &a) {\n  ptx_mma_sync_aligned_f32_bf16(d, a, g(1))\n\n\n;\n  }\n\
                    int asmx = 1; ptx_cp_async_wait_all();\n";
        assert_eq!(calls_for_assembly(source).unwrap(), want);
        let elect = "[&]() { uint32 pred = 0;\nasm volatile(\n\"{\\n\"\n\"  .reg .pred %%px;\\n\"\n\
                     \"  elect.sync _|%%px, 0xffffffff;\\n\"\n\"}\\n\"\n: \"+r\"(pred)); }";
        let want = "[&]() { uint32 pred = 0;\nptx_elect_sync(pred)\n\n\n\n\n; }";
        assert_eq!(calls_for_assembly(elect).unwrap(), want);
        let group = "asm volatile(\"{.reg .pred p; setp.ne.b32 p, %3, 0; wgmma.m64n8 {%0}, %1, %2, p;}\" \
                     : \"+f\"(d[0]) : \"l\"(a | 1ull), \"l\"(b), \"n\"(1));";
        assert_eq!(calls_for_assembly(group).unwrap(), "ptx_wgmma_m64n8(d[0], a | 1ull, b, 1);");
        assert_eq!(calls_for_assembly("\nasm(\"x\"").unwrap_err(), "line 2: assembly without an end");
    }
}
