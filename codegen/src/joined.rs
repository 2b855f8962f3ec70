//! Kernels that are assembled and disassembled many at a time: to start a disassembler takes ten times as long as to print a kernel.
//!
//! Code of a kernel is the same whoever is assembled beside it. Those go together that say the same before their entries, such as how their
//! shared memory lies, and whose entries have different names.

use std::collections::BTreeMap;

use rayon::prelude::*;

use crate::nvrtc::{NvrtcError, Resources, Toolkit};

/// The most that are assembled at a time, so that there is work for all cores.
const TOGETHER: usize = 12;

/// Machine code, as its compilers tell of it.
#[derive(Clone, Debug)]
pub struct Told {
    /// What a thread takes.
    pub resources: Resources,
    /// The instructions as `cuobjdump` prints them.
    pub instructions: String,
}

/// What NVRTC made of a kernel.
struct Ptx<'p> {
    /// What it says before its entry, but for comments.
    head: String,
    entry: &'p str,
    body: &'p str,
}

impl<'p> Ptx<'p> {
    fn of(text: &'p str) -> Option<Ptx<'p>> {
        const ENTRY: &str = ".visible .entry ";
        let (head, body) = text.split_at(text.find(ENTRY)?);
        let entry = body[ENTRY.len()..].split('(').next()?;
        let said = head.lines().filter(|line| !line.trim_start().starts_with("//"));
        Some(Ptx { head: said.map(|line| format!("{line}\n")).collect(), entry, body })
    }
}

/// Assembles the PTX of kernels for an architecture and disassembles what came of it, in the order of the kernels; by all cores.
pub fn told(toolkit: &Toolkit, kernels: &[String], arch: &str) -> Vec<Result<Told, NvrtcError>> {
    let (mut groups, mut known) = (BTreeMap::<_, Vec<usize>>::new(), BTreeMap::new());
    let parts: Vec<_> = kernels.iter().map(|text| Ptx::of(text)).collect();
    for (n, part) in parts.iter().enumerate() {
        let Some(Ptx { head, entry, .. }) = part else { continue };
        let times = known.entry(*entry).or_insert(0);
        groups.entry((head, *times)).or_default().push(n);
        *times += 1;
    }
    let together: Vec<_> = groups.values().flat_map(|group| group.chunks(TOGETHER)).collect();
    let several = |numbers: &&[usize]| {
        let of = |numbers: &[usize]| {
            let parts = numbers.iter().filter_map(|n| parts[*n].as_ref());
            at_once(toolkit, &parts.collect::<Vec<_>>(), arch)
        };
        match of(numbers) {
            Ok(told) => numbers.iter().copied().zip(told.into_iter().map(Ok)).collect::<Vec<_>>(),
            // Whose fault it is shows where each is alone.
            Err(_) if numbers.len() > 1 => {
                let alone = |n: &usize| (*n, of(&[*n]).map(|mut told| told.swap_remove(0)));
                numbers.iter().map(alone).collect()
            }
            Err(e) => vec![(numbers[0], Err(e))],
        }
    };
    let mut all: BTreeMap<_, _> = together.par_iter().flat_map_iter(several).collect();
    let none = || Err(NvrtcError::Assemble("there is no entry in the PTX".to_owned()));
    (0..kernels.len()).map(|n| all.remove(&n).unwrap_or_else(none)).collect()
}

/// All of them in one go.
fn at_once(toolkit: &Toolkit, parts: &[&Ptx<'_>], arch: &str) -> Result<Vec<Told>, NvrtcError> {
    let folder = tempfile::tempdir().map_err(|e| NvrtcError::Io(std::env::temp_dir(), e.to_string()))?;
    let bodies: String = parts.iter().map(|part| part.body).collect();
    let text = parts.first().map_or("", |part| &part.head).to_owned() + &bodies;
    let (report, file) = toolkit.assembled(&text, arch, folder.path())?;
    let code = toolkit.disassembled(&file)?;
    let (reports, codes) = (by_entry(&report, "Compiling entry function '"), by_entry(&code, "Function : "));
    let told = |part: &&Ptx<'_>| {
        let (report, code) = (reports.get(part.entry)?, codes.get(part.entry)?);
        Some(Told { resources: Resources::read(report), instructions: (*code).to_owned() })
    };
    let all: Option<Vec<_>> = parts.iter().map(told).collect();
    all.ok_or_else(|| NvrtcError::Assemble(format!("nothing is said of some entries in\n{report}")))
}

/// What stands behind a phrase and the name of each entry.
fn by_entry<'t>(text: &'t str, phrase: &str) -> BTreeMap<&'t str, &'t str> {
    let sections = text.split(phrase).skip(1);
    let name = |section: &'t str| section.split(|c: char| !(c.is_alphanumeric() || c == '_')).next();
    sections.filter_map(|section| Some((name(section)?, section))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_of_several_is_told_of_each() {
        let text = "head\nCompiling entry function 'a' for 'sm_90a'\n 8 bytes spill stores\n\
                    Compiling entry function 'a_b' for 'sm_90a'\n Used 32 registers\n";
        let told = by_entry(text, "Compiling entry function '");
        let resources = ["a", "a_b"].map(|name| Resources::read(told[name]));
        assert_eq!(resources.map(|r| (r.spill_bytes, r.registers)), [(8, 0), (0, 32)]);
    }

    #[test]
    fn an_entry_begins_behind_what_is_said_of_all() {
        let text = "//\n.version 9.0\n\t// .globl\tf\n.extern .shared .b8 m[];\n\n.visible .entry f(\n.param x\n)\n{}\n";
        let Ptx { head, entry, body } = Ptx::of(text).expect("it has an entry");
        assert_eq!(head, ".version 9.0\n.extern .shared .b8 m[];\n\n");
        assert_eq!((entry, body), ("f", ".visible .entry f(\n.param x\n)\n{}\n"));
        assert!(Ptx::of(".version 9.0").is_none());
    }
}
