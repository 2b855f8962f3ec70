//! Every stored tensor that a program reads, in the order in which it reads them.

use std::collections::{BTreeMap, BTreeSet};

use crate::graph::{Function, Module, ValueId};
use crate::interp::scoped;
use crate::ops::Op;
use crate::stored::{Layout, Part};
use crate::types::DType;

/// The stored tensors of a program: what loading expects of a checkpoint, and what initialisation makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inventory {
    /// In the order in which the program first uses them.
    pub tensors: Vec<StoredTensor>,
}

/// A tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// Its full name, scopes included.
    pub name: String,
    /// Its extents, slowest first.
    pub shape: Vec<u64>,
    /// The element type of the weights that read it.
    pub dtype: DType,
    /// The weights that read it.
    pub uses: Vec<Use>,
    /// Elements that no weight reads; a sign that a model forgot a part.
    pub unread: u64,
}

/// A weight that reads a stored tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Use {
    /// The scope of the call.
    pub scope: String,
    /// The function that has the weight.
    pub function: String,
    /// The weight.
    pub weight: ValueId,
    /// What it reads of the tensor; empty if it reads all of it.
    pub part: Vec<Part>,
}

impl StoredTensor {
    /// The product of its extents.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

impl Inventory {
    /// Elements of all tensors: the program's parameter count.
    pub fn elements(&self) -> u64 {
        self.tensors.iter().map(StoredTensor::elements).sum()
    }

    /// The tensor of that full name.
    pub fn tensor(&self, name: &str) -> Option<&StoredTensor> {
        self.tensors.iter().find(|t| t.name == name)
    }
}

/// A weight of a function and where its elements lie.
pub(crate) struct Placed {
    pub(crate) value: ValueId,
    /// Of its elements.
    pub(crate) dtype: DType,
    pub(crate) layout: Layout,
}

impl Module {
    /// The stored tensors that the entry function and all that it calls read, in the order of first use.
    ///
    /// # Errors
    /// A layout that makes no sense, a call of no function, or two weights that disagree on a tensor's
    /// shape or dtype.
    pub fn inventory(&self) -> Result<Inventory, String> {
        let mut found = Inventory { tensors: Vec::new() };
        let mut index: BTreeMap<String, usize> = BTreeMap::new();
        self.walk_weights(|scope, f, placed| {
            let dtype = placed.dtype;
            let weight = &f.value(placed.value).name;
            for piece in &placed.layout.pieces {
                let name = scoped(scope, &piece.tensor);
                let at = *index.entry(name.clone()).or_insert(found.tensors.len());
                if at == found.tensors.len() {
                    let shape = placed.layout.shape.clone();
                    found.tensors.push(StoredTensor { name, shape, dtype, uses: Vec::new(), unread: 0 });
                }
                let tensor = &mut found.tensors[at];
                if (&tensor.shape, tensor.dtype) != (&placed.layout.shape, dtype) {
                    return Err(format!(
                        "@{}: {weight}: \"{}\" is {dtype}{:?} here and {}{:?} elsewhere",
                        f.name, tensor.name, placed.layout.shape, tensor.dtype, tensor.shape
                    ));
                }
                let (scope, function) = (scope.to_owned(), f.name.clone());
                let part = placed.layout.part.clone();
                tensor.uses.push(Use { scope, function, weight: placed.value, part });
            }
            Ok(())
        })?;
        for tensor in &mut found.tensors {
            tensor.unread = unread(tensor);
        }
        Ok(found)
    }

    /// Bytes of all weights as programs hold them: of those that are coded, codes and scales. What several weights read of one tensor
    /// counts once.
    ///
    /// # Errors
    /// A layout that makes no sense, or a call of no function.
    pub fn weight_bytes(&self) -> Result<u64, String> {
        let (mut seen, mut bytes) = (BTreeSet::new(), 0);
        self.walk_weights(|scope, f, placed| {
            let ty = f.ty(placed.value);
            let Some(weight) = f.weights.iter().find(|w| w.value == placed.value) else { return Ok(()) };
            let stored = &weight.stored;
            if seen.insert((scoped(scope, &stored.tensor), placed.layout.part.clone(), stored.held)) {
                let sizes = ty.axes.iter().filter_map(|&a| f.axis(a).size.fixed());
                bytes += sizes.product::<u64>() * ty.dtype.bytes();
            }
            Ok(())
        })?;
        Ok(bytes)
    }

    /// Visits every weight of every call in the order of first use, once for each scope.
    pub(crate) fn walk_weights(
        &self,
        mut visit: impl FnMut(&str, &Function, &Placed) -> Result<(), String>,
    ) -> Result<(), String> {
        let mut layouts = BTreeMap::new();
        for f in &self.functions {
            let mut placed = Vec::new();
            for w in &f.weights {
                let ty = f.ty(w.value);
                let (layout, dtype) = (w.stored.layout(f, ty)?, w.stored.elements(ty).dtype);
                placed.push(Placed { value: w.value, dtype, layout });
            }
            layouts.insert(f.name.as_str(), placed);
        }
        let mut done = BTreeSet::new();
        self.walk_calls(&self.entry, "", &layouts, &mut done, &mut visit)
    }

    fn walk_calls<'m>(
        &'m self,
        name: &str,
        scope: &str,
        layouts: &BTreeMap<&'m str, Vec<Placed>>,
        done: &mut BTreeSet<(String, String)>,
        visit: &mut impl FnMut(&str, &Function, &Placed) -> Result<(), String>,
    ) -> Result<(), String> {
        let f = self.function(name).ok_or_else(|| format!("@{name}: there is no such function"))?;
        // Called twice under one scope, a function has its weights twice but stores them once.
        if !done.insert((name.to_owned(), scope.to_owned())) {
            return Ok(());
        }
        let weights = layouts.get(name).map_or(&[][..], |w| &w[..]);
        let mut left: Vec<&Placed> = weights.iter().collect();
        for inst in &f.body {
            for a in &inst.args {
                if let Some(n) = left.iter().position(|w| w.value == *a) {
                    visit(scope, f, left.remove(n))?;
                }
            }
            if let Op::Call { callee, scope: below } = &inst.op {
                self.walk_calls(callee, &scoped(scope, below), layouts, done, visit)?;
            }
        }
        left.into_iter().try_for_each(|w| visit(scope, f, w))
    }
}

/// The elements of the tensor that lie in no use's part: the parts cut it into cells, of which each is read or not.
/// Weights that cut a dimension into factors in different ways are taken to cut independently.
fn unread(tensor: &StoredTensor) -> u64 {
    if tensor.uses.iter().any(|u| u.part.is_empty()) {
        return 0;
    }
    // Where each factor is cut, by the factor.
    let mut cuts: BTreeMap<(usize, u64, u64), BTreeSet<u64>> = BTreeMap::new();
    for p in tensor.uses.iter().flat_map(|u| &u.part) {
        let at = cuts.entry((p.dim, p.stride, p.extent)).or_default();
        at.extend([0, p.start, p.end, p.extent]);
    }
    let mut cells = vec![(Vec::new(), 1)];
    for (factor, at) in &cuts {
        let at: Vec<u64> = at.iter().copied().collect();
        let spans: Vec<_> = at.windows(2).map(|w| (w[0], w[1] - w[0])).collect();
        cells = cells
            .iter()
            .flat_map(|(cell, volume)| {
                spans.iter().map(move |(first, len)| {
                    let mut cell: Vec<_> = Clone::clone(cell);
                    cell.push((*factor, *first));
                    (cell, volume * len)
                })
            })
            .collect();
    }
    let reads = |u: &Use, cell: &[((usize, u64, u64), u64)]| {
        let within = |p: &Part| {
            let factor = (p.dim, p.stride, p.extent);
            cell.iter().any(|(of, first)| *of == factor && (p.start..p.end).contains(first))
        };
        u.part.iter().all(within)
    };
    let missed = cells.iter().filter(|(cell, _)| !tensor.uses.iter().any(|u| reads(u, cell)));
    let missed: u64 = missed.map(|(_, volume)| volume).sum();
    let per_cell = tensor.elements() / cuts.keys().map(|k| k.2).product::<u64>().max(1);
    missed * per_cell
}
