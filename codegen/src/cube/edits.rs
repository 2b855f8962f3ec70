//! Texts of kernels that someone has changed, which devices compile in place of their own.
//!
//! `compile` writes the text of each kernel beside the number that it is known by; whoever changes a text there is given what the
//! changed one does. A kernel is known by what it computes and how, not by its name, which depends on what else is compiled.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::kernel::CubeIr;

/// A text that stands for a kernel's own.
#[derive(Debug)]
pub(crate) struct Edit {
    /// Where it was read.
    file: String,
    /// The name of its entry.
    pub(crate) entry: String,
    pub(crate) text: String,
    used: AtomicBool,
}

impl Edit {
    /// Notes that a device compiles it.
    pub(crate) fn take(&self) {
        self.used.store(true, Ordering::Relaxed);
    }
}

impl PartialEq for Edit {
    fn eq(&self, other: &Edit) -> bool {
        (&self.entry, &self.text) == (&other.entry, &other.text)
    }
}

impl Eq for Edit {}

impl Hash for Edit {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (&self.entry, &self.text).hash(state);
    }
}

/// All texts that stand for others. A kernel whose text is among them shares no grid with others.
#[derive(Debug, Default)]
pub struct Edits(HashMap<u64, Arc<Edit>>);

impl Edits {
    /// None at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Puts a text in the place of that which the kernel of that [identity](super::Source::identity) has. Its entry keeps its name.
    pub fn insert(&mut self, identity: u64, file: String, entry: String, text: String) {
        self.0.insert(identity, Arc::new(Edit { file, entry, text, used: AtomicBool::new(false) }));
    }

    /// The text that stands for that of the kernel of this identity.
    pub fn text(&self, identity: u64) -> Option<&str> {
        self.0.get(&identity).map(|edit| edit.text.as_str())
    }

    /// The files of those that no device has compiled, in order.
    pub fn unused(&self) -> Vec<&str> {
        let unused = self.0.values().filter(|edit| !edit.used.load(Ordering::Relaxed));
        let mut files: Vec<_> = unused.map(|edit| edit.file.as_str()).collect();
        files.sort_unstable();
        files
    }

    /// What stands for a kernel's text.
    pub(crate) fn of(&self, ir: &CubeIr) -> Option<&Arc<Edit>> {
        // Most runs have none, and need not ask who a kernel is.
        if self.is_empty() { None } else { self.0.get(&ir.identity()) }
    }

    /// The kernel with the text that it is to have.
    pub(crate) fn apply(&self, ir: CubeIr) -> CubeIr {
        match self.of(&ir) {
            Some(edit) => ir.with_edit(Arc::clone(edit)),
            None => ir,
        }
    }
}
