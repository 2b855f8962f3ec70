//! Ways that were found to be the best, which devices take in place of what the rules of [`ways`](super::ways) say.
//!
//! A kernel is known by what it computes, as for [`Edits`](super::Edits), and a choice holds for a class of run-time sizes: those whose
//! next powers of two are the same. So decode, whose past is longer with each token, keeps its choices.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

use super::machine::Machine;
use super::refuse;
use super::source::identity;
use super::target::Target;
use super::ways::Ways;
use crate::device::DeviceError;
use crate::program::{By, Kernel, KernelKind};

/// How a kernel is computed. People, and files, know a way by its text: `few rows, 2` or `matrix, 128 x 256, groups`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Way {
    /// As which kind.
    pub kind: KernelKind,
    /// Of a stream: parts that its positions are cut into, each for cubes of its own; as many as keep the device busy if it is not said.
    pub parts: Option<usize>,
}

/// Who multiplies, and who brings what.
fn told(by: By) -> &'static str {
    match by {
        By::Planes => "",
        By::Groups => ", groups",
        By::Boxes => ", groups, boxes",
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind)?;
        let mut side = 0;
        match self.kind {
            KernelKind::Few { wide, rows } => {
                side = wide;
                write!(f, ", {rows}")?;
            }
            KernelKind::ScatterMatrix { side, by } => {
                write!(f, ", {side}{}", told(by))?;
            }
            KernelKind::StreamMatrix { tall, by } => {
                write!(f, ", {}{}", 16 * u16::from(tall), told(by))?;
            }
            KernelKind::Matrix { wide, rows, columns, by, parts, tf32 } => {
                side = wide;
                write!(f, ", {rows} x {columns}{}", told(by))?;
                write!(f, "{}", if tf32 { ", tf32" } else { "" })?;
                if parts > 1 {
                    write!(f, ", {parts} parts")?;
                }
            }
            KernelKind::Map
            | KernelKind::Contract
            | KernelKind::Grouped
            | KernelKind::Scatter
            | KernelKind::Stream
            | KernelKind::Tiles => {}
        }
        // Weights mostly come first, and are the wide ones.
        if side == 1 {
            write!(f, ", second wide")?;
        }
        self.parts.map_or(Ok(()), |parts| write!(f, ", {parts} parts"))
    }
}

impl Way {
    /// One of these kinds by its text.
    fn named(text: &str, kinds: &[KernelKind]) -> Option<Way> {
        let of = |text: &str, parts: Option<usize>| {
            let way = |kind: &KernelKind| Way { kind: *kind, parts: None };
            kinds.iter().map(way).find(|way| way.to_string() == text).map(|way| Way { parts, ..way })
        };
        of(text, None).or_else(|| {
            let (kind, parts) = text.strip_suffix(" parts")?.rsplit_once(", ")?;
            let parts = parts.parse().ok().filter(|&n| n > 0)?;
            of(kind, Some(parts)).filter(|way| way.kind.streams())
        })
    }
}

/// The way that is taken, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// The way.
    pub way: Way,
    /// Whether a [`Tuning`] says so; else the rules do.
    pub tuned: bool,
}

impl Chosen {
    /// What rules say.
    pub(crate) fn by_rule(kind: KernelKind) -> Chosen {
        Chosen { way: Way { kind, parts: None }, tuned: false }
    }
}

/// Run-time sizes in the order of [`Kernel::size_symbols`] as the class that they are of: each the next power of two, or 0.
pub fn class(sizes: &[usize]) -> Vec<usize> {
    sizes.iter().map(|&n| if n == 0 { 0 } else { n.next_power_of_two() }).collect()
}

/// Choices of ways, by kernel and class of sizes.
#[derive(Debug, Default)]
pub struct Tuning {
    /// Where they were read.
    file: String,
    /// The device that they are for, which is asked where no device is at hand.
    pub machine: Machine,
    /// Whether products of f32 may be rounded as tf32.
    tf32: bool,
    of: HashMap<u64, Vec<Entry>>,
}

#[derive(Debug)]
struct Entry {
    /// By the names of sizes, each the largest of its class.
    up_to: BTreeMap<String, usize>,
    way: String,
    taken: AtomicBool,
}

impl Tuning {
    /// None yet, from a file, for a device.
    pub fn new(file: String, machine: Machine) -> Tuning {
        Tuning { file, machine, ..Tuning::default() }
    }

    /// The same where products of f32 may be rounded as tf32, to 11 bits of each factor: the rules take such ways then.
    pub fn with_tf32(self, tf32: bool) -> Tuning {
        Tuning { tf32, ..self }
    }

    /// One choice: the way of a kernel of that [identity], as its text, where run-time sizes are of the class whose largest are these.
    pub fn insert(&mut self, identity: u64, up_to: BTreeMap<String, usize>, way: String) {
        let entry = Entry { up_to, way, taken: AtomicBool::new(false) };
        self.of.entry(identity).or_default().push(entry);
    }

    /// How many choices there are.
    pub fn len(&self) -> usize {
        self.of.values().map(Vec::len).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.of.is_empty()
    }

    /// How many choices some launch has taken, or some text was written for.
    pub fn taken(&self) -> usize {
        self.of.values().flatten().filter(|entry| entry.taken.load(Ordering::Relaxed)).count()
    }
}

/// The ways of a kernel, and what a tuning says of them.
#[derive(Debug)]
pub(crate) struct Choices {
    ways: Ways,
    /// For classes of sizes, each with its number in the tuning. What other devices have and this one has not is left out.
    told: Vec<(usize, Vec<usize>, Way)>,
    identity: u64,
}

impl Choices {
    /// Those of a kernel on a device.
    ///
    /// # Errors
    /// If the tuning names sizes or a way that the kernel does not have on any device.
    pub(crate) fn of(
        kernel: &Kernel,
        target: Target,
        machine: &Machine,
        tuning: &Tuning,
    ) -> Result<Choices, DeviceError> {
        let ways = Ways::of(kernel, target, machine).with_tf32(tuning.tf32);
        // Most runs have no tuning, and need not ask who a kernel is.
        if tuning.is_empty() {
            return Ok(Choices { ways, told: Vec::new(), identity: 0 });
        }
        let (identity, file) = (identity(kernel, target), &tuning.file);
        let symbols = kernel.size_symbols();
        let (here, anywhere) = (ways.all(), Ways::anywhere(kernel, target, machine.multiprocessors).all());
        let mut told = Vec::new();
        for (n, Entry { up_to, way, .. }) in tuning.of.get(&identity).into_iter().flatten().enumerate() {
            let sizes: Option<Vec<_>> = symbols.iter().map(|s| up_to.get(*s).copied()).collect();
            let sizes = sizes.filter(|_| up_to.len() == symbols.len()).ok_or_else(|| {
                let given: Vec<_> = up_to.keys().map(String::as_str).collect();
                let (has, given) = (symbols.join(", "), given.join(", "));
                refuse(kernel, format!("{file}: its sizes are [{has}], and a choice is for [{given}]"))
            })?;
            match Way::named(way, &anywhere) {
                Some(way) if here.contains(&way.kind) => told.push((n, class(&sizes), way)),
                Some(_) => {}
                None => {
                    let others: Vec<_> =
                        anywhere.iter().map(|&kind| format!("`{}`", Way { kind, parts: None })).collect();
                    let others = others.join("; ");
                    return Err(refuse(kernel, format!("{file}: it has no way `{way}`, but {others}")));
                }
            }
        }
        Ok(Choices { ways, told, identity })
    }

    /// The way for these sizes. What a tuning says is passed over where sums are too short for it.
    pub(crate) fn at(&self, kernel: &Kernel, sizes: &[usize], tuning: &Tuning) -> Chosen {
        let extents = kernel.extents(sizes);
        if !self.told.is_empty() {
            let class = class(sizes);
            let told =
                self.told.iter().find(|(_, of, way)| *of == class && self.ways.admits(way.kind, &extents));
            if let Some((n, _, way)) = told {
                self.take(*n, tuning);
                return Chosen { way: *way, tuned: true };
            }
        }
        Chosen::by_rule(self.ways.choose(&extents))
    }

    /// All ways that a tuning names, which are taken so.
    pub(crate) fn told(&self, tuning: &Tuning) -> Vec<KernelKind> {
        let all = self.told.iter().map(|(n, _, way)| {
            self.take(*n, tuning);
            way.kind
        });
        all.collect()
    }

    /// Notes that a choice is taken.
    fn take(&self, n: usize, tuning: &Tuning) {
        if let Some(entry) = tuning.of.get(&self.identity).and_then(|all| all.get(n)) {
            entry.taken.store(true, Ordering::Relaxed);
        }
    }

    /// The ways that are worth trying at these sizes, that of the rules first.
    pub(crate) fn candidates(&self, extents: &[usize]) -> Vec<KernelKind> {
        let own = self.ways.choose(extents);
        let others =
            self.ways.all().into_iter().filter(|&kind| kind != own && self.ways.worth(kind, extents));
        [own].into_iter().chain(others).collect()
    }
}

/// The way of a kernel at these sizes on the device that a tuning is for.
///
/// # Errors
/// If the tuning names sizes or a way that the kernel does not have.
pub fn choose(
    kernel: &Kernel,
    target: Target,
    sizes: &[usize],
    tuning: &Tuning,
) -> Result<Chosen, DeviceError> {
    Ok(Choices::of(kernel, target, &tuning.machine, tuning)?.at(kernel, sizes, tuning))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRODUCT: &str = "axes a0=n0, a1=4096, a2=512\n  param p0: bf16[a1, a2]\n  param p1: bf16[a0, a2]\n\n  \
                           y: bf16[a0, a1] = contract p0, p1 over a2";

    fn kernel(kind: KernelKind, body: &str) -> Kernel {
        let text = format!("module m entry @f\n\nfunc @f {{\n  {body}\n  return y\n}}\n");
        let body = latentc_ir::parse("m.ir", &text).unwrap_or_else(|e| panic!("{e}")).functions.remove(0);
        Kernel { name: "f".to_owned(), kind, body }
    }

    fn told(kernel: &Kernel, up_to: &[(&str, usize)], way: &str) -> Tuning {
        let mut tuning = Tuning::new("my.json".to_owned(), Machine::HOPPER);
        let up_to = up_to.iter().map(|(name, n)| ((*name).to_owned(), *n)).collect();
        tuning.insert(identity(kernel, Target::Cuda), up_to, way.to_owned());
        tuning
    }

    #[test]
    fn a_way_is_known_by_its_text() {
        let kernel = kernel(KernelKind::Contract, PRODUCT);
        let kinds = Ways::of(&kernel, Target::Cuda, &Machine::HOPPER).all();
        assert!(kinds.len() > 12, "{kinds:?}");
        for &kind in &kinds {
            let way = Way { kind, parts: None };
            assert_eq!(Way::named(&way.to_string(), &kinds), Some(way));
        }
        let stream = [KernelKind::Stream, KernelKind::StreamMatrix { tall: 2, by: By::Planes }];
        for (kind, parts) in [(stream[0], None), (stream[1], Some(1)), (stream[1], Some(24))] {
            let way = Way { kind, parts };
            assert_eq!(Way::named(&way.to_string(), &stream), Some(way));
        }
        for text in [
            "",
            "stream, 0 parts",
            "stream, x parts",
            "stream, 2 parts, 2 parts",
            "few rows",
            "contract, 2 parts",
        ] {
            assert_eq!(Way::named(text, &[stream[0], KernelKind::Contract]), None, "{text}");
        }
    }

    #[test]
    fn a_choice_holds_for_sizes_of_its_class_and_no_others() {
        let kernel = kernel(KernelKind::Contract, PRODUCT);
        let tuning = told(&kernel, &[("n0", 64)], "few rows, 4");
        let few = Way { kind: KernelKind::Few { wide: 0, rows: 4 }, parts: None };
        for (n, is) in [(1, false), (32, false), (33, true), (64, true), (65, false)] {
            let chosen = choose(&kernel, Target::Cuda, &[n], &tuning).unwrap();
            assert_eq!((chosen.tuned, chosen.way == few), (is, is), "{n}: {chosen:?}");
        }
        assert_eq!((tuning.len(), tuning.taken()), (1, 1));
        // Other kernels are as they were.
        let other = self::kernel(KernelKind::Contract, &PRODUCT.replace("a2=512", "a2=256"));
        assert!(!choose(&other, Target::Cuda, &[64], &tuning).unwrap().tuned);
        // What another device has is passed over where it is not.
        let groups = told(&kernel, &[("n0", 64)], "matrix, 128 x 256, groups");
        let older = Machine { groups: false, ..Machine::HOPPER };
        assert!(
            Choices::of(&kernel, Target::Cuda, &Machine::HOPPER, &groups)
                .unwrap()
                .at(&kernel, &[64], &groups)
                .tuned
        );
        assert!(
            !Choices::of(&kernel, Target::Cuda, &older, &groups).unwrap().at(&kernel, &[64], &groups).tuned
        );
    }

    #[test]
    fn what_a_kernel_does_not_have_is_named() {
        let kernel = kernel(KernelKind::Contract, PRODUCT);
        let error = |up_to: &[(&str, usize)], way: &str| {
            choose(&kernel, Target::Cuda, &[64], &told(&kernel, up_to, way)).unwrap_err().to_string()
        };
        let text = error(&[("n0", 64)], "stream");
        assert!(
            text.contains("kernel f: my.json: it has no way `stream`, but `contract`; `few rows, 1`; "),
            "{text}"
        );
        let text = error(&[("n1", 64)], "contract");
        assert!(text.contains("its sizes are [n0], and a choice is for [n1]"), "{text}");
        let text = error(&[("n0", 64), ("n1", 2)], "contract");
        assert!(text.contains("its sizes are [n0], and a choice is for [n0, n1]"), "{text}");
    }

    #[test]
    fn a_device_with_fewer_multiprocessors_is_busy_with_fewer_tiles() {
        let kernel = kernel(KernelKind::Contract, &PRODUCT.replace("a2=512", "a2=8192"));
        let small = Machine { multiprocessors: 16, ..Machine::HOPPER };
        let of = |machine| Ways::of(&kernel, Target::Cuda, machine).choose(&kernel.extents(&[96]));
        let parts = |kind| match kind {
            KernelKind::Matrix { parts, .. } => parts,
            other => panic!("{other}"),
        };
        assert!(parts(of(&small)) < parts(of(&Machine::HOPPER)));
    }
}
