//! How weights lie in the tensors of a checkpoint, and which tensors a whole program reads.
//!
//! A [`Layout`] says where each element of a weight is stored. All its offsets count elements, so that the same plan
//! copies f64 of the interpreter and raw bytes of a memory-mapped file, in both directions.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::graph::{Factor, Function, Stored, Weight};
use crate::interp::{WeightSource, scoped};
use crate::tensor::Tensor;
use crate::types::{AxisId, DType, Size, Type};

/// Where the elements of a weight are stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The shape of each stored tensor.
    pub shape: Vec<u64>,
    /// Elements of the weight.
    pub elements: u64,
    /// The tensors that hold it, the last of the numbering axes running fastest.
    pub pieces: Vec<Piece>,
    /// The part of each tensor that belongs to the weight, for those factors of which it has only a part.
    pub part: Vec<Part>,
    /// The offset of the weight's first element in each tensor.
    start: u64,
    /// How a tensor's part of the weight is walked, slowest in the tensor first.
    steps: Vec<Step>,
}

/// One stored tensor of a weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The tensor's name below the scope.
    pub tensor: String,
    /// The index of each axis that numbers tensors, in the order in which the name has them.
    pub index: Vec<u64>,
    /// The offset in the weight of the first element that the tensor holds.
    pub start: u64,
}

/// The part of a stored dimension that a weight has of `(n | v)`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Part {
    /// Which dimension.
    pub dim: usize,
    /// How many indices of the dimension one index of the factor spans.
    pub stride: u64,
    /// The extent of the factor, all its parts together.
    pub extent: u64,
    /// The first index of the weight's part of it.
    pub start: u64,
    /// The index after the last.
    pub end: u64,
}

/// A loop in which weight and tensor advance together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// How often.
    pub extent: u64,
    /// By how many elements of the weight.
    pub weight: u64,
    /// By how many of the stored tensor.
    pub stored: u64,
}

/// A span that is contiguous in the weight as well as in the stored tensor; all in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Its offset in the weight.
    pub weight: u64,
    /// Its offset in the stored tensor.
    pub stored: u64,
    /// Its length.
    pub len: u64,
}

impl Stored {
    /// The axes that number tensors, in the order in which the name has them: `mlp.{e}.weight` has the axis `e`.
    ///
    /// # Errors
    /// A brace without its partner, or braces around what is no axis of the function.
    pub fn numbered_by(&self, f: &Function) -> Result<Vec<AxisId>, String> {
        let mut axes = Vec::new();
        let mut rest = self.tensor.as_str();
        while let Some(at) = rest.find(['{', '}']) {
            let named = rest[at..].strip_prefix('{').and_then(|inner| inner.split_once('}'));
            let Some((name, after)) = named.filter(|(name, _)| !name.contains('{')) else {
                return Err("the tensor name has an unpaired brace".to_owned());
            };
            let axis = f.axis_named(name);
            axes.push(axis.ok_or_else(|| format!("the tensor name has `{{{name}}}`, which is no axis"))?);
            rest = after;
        }
        Ok(axes)
    }

    /// Where the elements that a weight of type `ty` is, or is made of, lie.
    ///
    /// # Errors
    /// An axis that is not of fixed size, not one of the weight's, or there twice or never; naming it.
    pub fn layout(&self, f: &Function, ty: &Type) -> Result<Layout, String> {
        let ty = &self.elements(ty);
        let wrong = |what: String| format!("@{}: \"{}\": {what}", f.name, self.tensor);
        let name = |a: AxisId| &f.axis(a).name;
        let extent = |a: AxisId| match &f.axis(a).size {
            Size::Fixed(n) => Ok(*n),
            Size::Sym(s) => Err(wrong(format!("axis `{}` has the run-time size {s}", name(a)))),
        };
        let extents: Vec<u64> = ty.axes.iter().map(|&a| extent(a)).collect::<Result<_, _>>()?;
        let product = |of: &[u64]| of.iter().try_fold(1u64, |n, &x| n.checked_mul(x));
        let elements = product(&extents).ok_or_else(|| wrong("more elements than u64 counts".to_owned()))?;
        let stride = |a: AxisId| ty.position(a).map(|n| extents[n + 1..].iter().product::<u64>());

        let numbering = self.numbered_by(f).map_err(wrong)?;
        let mut seen = numbering.clone();
        let mut shape = Vec::new();
        let mut part = Vec::new();
        let mut walked: Vec<(AxisId, u64)> = Vec::new();
        let mut start = 0;
        // From the fastest factor to the slowest, so that each knows how far apart its neighbours lie.
        let mut below = 1u64;
        for (dim, factors) in self.dims.iter().enumerate().rev() {
            let mut size = 1u64;
            for factor in factors.iter().rev() {
                let whole = match factor {
                    Factor::Axis(a) => {
                        walked.push((*a, below));
                        seen.push(*a);
                        extent(*a)?
                    }
                    Factor::Parts(axes) => {
                        let of_weight: Vec<_> = axes.iter().filter(|&&a| ty.has(a)).collect();
                        let [&own] = of_weight[..] else {
                            let parts: Vec<_> = axes.iter().map(|&a| name(a).as_str()).collect();
                            let parts = parts.join(" | ");
                            return Err(wrong(format!("the weight has {} of ({parts})", of_weight.len())));
                        };
                        walked.push((own, below));
                        seen.push(own);
                        let mut whole = 0u64;
                        for &a in axes {
                            if a == own {
                                start += whole * below;
                                let end = whole + extent(a)?;
                                part.push(Part { dim, stride: size, extent: 0, start: whole, end });
                            }
                            whole = whole.saturating_add(extent(a)?);
                        }
                        if let Some(p) = part.last_mut() {
                            p.extent = whole;
                        }
                        whole
                    }
                };
                let next = (size.checked_mul(whole), below.checked_mul(whole));
                let (Some(s), Some(b)) = next else {
                    return Err(wrong("more elements than u64 counts".to_owned()));
                };
                (size, below) = (s, b);
            }
            shape.push(size);
        }
        shape.reverse();
        part.sort();
        for (n, &a) in seen.iter().enumerate() {
            if !ty.has(a) {
                return Err(wrong(format!("the weight has no axis `{}`", name(a))));
            }
            if seen[..n].contains(&a) {
                return Err(wrong(format!("axis `{}` is there twice", name(a))));
            }
        }
        if let Some(&a) = ty.axes.iter().find(|a| !seen.contains(a)) {
            return Err(wrong(format!("axis `{}` of the weight is not stored", name(a))));
        }

        let mut steps: Vec<Step> = Vec::new();
        for &(a, stored) in walked.iter().rev() {
            let step = Step { extent: extent(a)?, weight: stride(a).unwrap_or(0), stored };
            // Two loops that advance both sides as one longer loop would are that loop.
            match steps.last_mut() {
                Some(s) if s.weight == step.weight * step.extent && s.stored == step.stored * step.extent => {
                    *s = Step { extent: s.extent * step.extent, ..step };
                }
                _ if step.extent == 1 => {}
                _ => steps.push(step),
            }
        }

        let mut pieces = vec![Piece { tensor: self.tensor.clone(), index: Vec::new(), start: 0 }];
        for &a in &numbering {
            let (n, weight) = (extent(a)?, stride(a).unwrap_or(0));
            let letter = format!("{{{}}}", name(a));
            pieces = pieces
                .iter()
                .flat_map(|p| {
                    (0..n).map(|i| Piece {
                        tensor: p.tensor.replacen(&letter, &i.to_string(), 1),
                        index: [&p.index[..], &[i]].concat(),
                        start: p.start + i * weight,
                    })
                })
                .collect();
        }
        Ok(Layout { shape, elements, pieces, part, start, steps })
    }
}

impl Layout {
    /// Elements of each stored tensor.
    pub fn stored_elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Whether the weight is one whole stored tensor in the same order, so that its bytes can be used where they are.
    pub fn is_identity(&self) -> bool {
        self.pieces.len() == 1 && self.is_stack()
    }

    /// Whether the weight is its stored tensors one after another, each whole and in the same order.
    pub fn is_stack(&self) -> bool {
        let each = self.stored_elements();
        let contiguous = match self.steps[..] {
            [] => true,
            [s] => s.weight == 1 && s.stored == 1,
            _ => false,
        };
        let in_order = (0..).zip(&self.pieces).all(|(n, p)| p.start == n * each);
        contiguous && in_order && self.elements == each * self.pieces.len() as u64
    }

    /// The nest of loops that walks a piece, slowest in the stored tensor first. None has an extent of 1, and two that are one on both
    /// sides are one here.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// The spans of a piece, ascending in the stored tensor. As long as the two orders allow; single elements where
    /// the fastest stored axis is not the weight's fastest.
    pub fn spans(&self, piece: &Piece) -> impl Iterator<Item = Span> + use<> {
        let (outer, len) = match self.steps.split_last() {
            Some((s, outer)) if s.weight == 1 && s.stored == 1 => (outer.to_vec(), s.extent),
            _ => (self.steps.clone(), 1),
        };
        let count = if len == 0 { 0 } else { outer.iter().map(|s| s.extent).product::<u64>() };
        let mut index = vec![0; outer.len()];
        let mut next = Span { weight: piece.start, stored: self.start, len };
        (0..count).map(move |_| {
            let span = next;
            for (i, s) in index.iter_mut().zip(&outer).rev() {
                *i += 1;
                next.weight += s.weight;
                next.stored += s.stored;
                if *i < s.extent {
                    break;
                }
                *i = 0;
                next.weight -= s.weight * s.extent;
                next.stored -= s.stored * s.extent;
            }
            span
        })
    }

    /// Copies a stored tensor's part into the weight. An element is `unit` consecutive `T`s: 1 for slices of
    /// elements, the dtype's bytes for slices of bytes.
    ///
    /// # Errors
    /// A slice of another length than the layout says.
    pub fn load<T: Copy>(
        &self,
        piece: &Piece,
        unit: usize,
        stored: &[T],
        weight: &mut [T],
    ) -> Result<(), String> {
        self.fits(piece, unit, stored.len(), weight.len())?;
        for s in self.spans(piece) {
            let (w, t) = s.ranges(unit);
            weight[w].copy_from_slice(&stored[t]);
        }
        Ok(())
    }

    /// Copies the weight into its part of a stored tensor: the inverse of [`Layout::load`].
    ///
    /// # Errors
    /// A slice of another length than the layout says.
    pub fn save<T: Copy>(
        &self,
        piece: &Piece,
        unit: usize,
        weight: &[T],
        stored: &mut [T],
    ) -> Result<(), String> {
        self.fits(piece, unit, stored.len(), weight.len())?;
        for s in self.spans(piece) {
            let (w, t) = s.ranges(unit);
            stored[t].copy_from_slice(&weight[w]);
        }
        Ok(())
    }

    fn fits(&self, piece: &Piece, unit: usize, stored: usize, weight: usize) -> Result<(), String> {
        let wanted = (self.stored_elements() as usize * unit, self.elements as usize * unit);
        if (stored, weight) == wanted {
            return Ok(());
        }
        Err(format!(
            "\"{}\": lengths {stored} stored and {weight} in the weight, the layout has {} and {}",
            piece.tensor, wanted.0, wanted.1
        ))
    }
}

impl Span {
    fn ranges(&self, unit: usize) -> (Range<usize>, Range<usize>) {
        let range = |at: u64| at as usize * unit..(at + self.len) as usize * unit;
        (range(self.weight), range(self.stored))
    }
}

/// Stored tensors by full name: a checkpoint that the interpreter can read.
pub type Tensors = BTreeMap<String, Tensor>;

impl WeightSource for Tensors {
    fn weight(&mut self, scope: &str, f: &Function, w: &Weight) -> Result<Tensor, String> {
        w.read(f, DType::F32, |layout, piece, elements| {
            let name = scoped(scope, &piece.tensor);
            let stored = self.get(&name).ok_or_else(|| format!("the checkpoint has no \"{name}\""))?;
            if !stored.shape.iter().map(|&n| n as u64).eq(layout.shape.iter().copied()) {
                return Err(format!("\"{name}\" has shape {:?}, not {:?}", stored.shape, layout.shape));
            }
            layout.load(piece, 1, &stored.data, elements)
        })
    }
}

impl Weight {
    /// What the weight holds, for the interpreter. `load` brings the elements of a piece to their places; scales are of dtype `scale`.
    ///
    /// # Errors
    /// Those of `load`; a layout that makes no sense.
    pub fn read(
        &self,
        f: &Function,
        scale: DType,
        mut load: impl FnMut(&Layout, &Piece, &mut [f64]) -> Result<(), String>,
    ) -> Result<Tensor, String> {
        let ty = f.ty(self.value);
        let layout = self.stored.layout(f, ty)?;
        let mut data = vec![0.0; layout.elements as usize];
        for piece in &layout.pieces {
            load(&layout, piece, &mut data)?;
        }
        if let Some(coding) = self.stored.coding(f, ty)? {
            data = coding.of(&data, scale);
        }
        let shape = ty.axes.iter().filter_map(|&a| f.axis(a).size.fixed()).map(|n| n as usize);
        Ok(Tensor { dtype: ty.dtype, shape: shape.collect(), data })
    }
}
