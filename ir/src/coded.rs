//! Weights in 8 bits: what a weight is that holds codes or scales in place of the elements that are stored.
//!
//! The elements that a scale is for lie behind one another along the last axis of what is coded. With `m` the largest magnitude of such a
//! group
//!
//! ```text
//! scale = m / 127,   code = x / scale to the nearest whole number, halves up, counted from -127
//! ```
//!
//! so that `(code - 127) scale` is within `scale / 2` of `x`. Codes share the words of [`Op::Pack`](crate::Op::Pack). The arithmetic is that
//! of the pass that has caches kept so; a program reads both with the same ops.

use crate::graph::{Factor, Function, Held, Stored};
use crate::ops::Fields;
use crate::types::{AxisId, DType, Type};

/// What the largest magnitude of a group is coded as.
pub const MOST: f64 = 127.0;

/// What a scale is at least where it divides: a group of zeros has the scale 0.
pub const LEAST: f64 = 1e-35;

/// How elements that lie behind one another become what a weight holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Coding {
    held: Held,
    /// Elements that share a scale.
    group: usize,
    /// Codes of a word.
    fields: Fields,
}

impl Stored {
    /// The type of the elements that are stored for a weight of type `ty`: what it holds may have fewer axes.
    pub fn elements(&self, ty: &Type) -> Type {
        if self.held == Held::Elements {
            return ty.clone();
        }
        let mut axes = ty.axes.clone();
        let stored = self.dims.iter().flatten().filter_map(|factor| match factor {
            Factor::Axis(a) => Some(*a),
            // One of them is an axis of the weight.
            Factor::Parts(_) => None,
        });
        axes.extend(stored.filter(|a| !ty.has(*a)));
        Type::new(DType::F32, axes)
    }

    /// How a weight of type `ty` is made of its elements; `None` if it holds these themselves.
    ///
    /// # Errors
    /// An axis without a fixed size, or a group that holds nothing: the weight does not verify.
    pub fn coding(&self, f: &Function, ty: &Type) -> Result<Option<Coding>, String> {
        let size = |axes: &[AxisId]| {
            let sizes = axes.iter().map(|&a| f.axis(a).size.fixed().filter(|n| *n > 0));
            let size = sizes.product::<Option<u64>>().and_then(|n| usize::try_from(n).ok());
            size.ok_or_else(|| {
                format!("@{}: \"{}\" is coded along an axis of no fixed size", f.name, self.tensor)
            })
        };
        let elements = self.elements(ty);
        let missing = &elements.axes[ty.axes.len()..];
        let folded = size(missing)?;
        Ok(match self.held {
            Held::Elements => None,
            Held::Scales => Some(Coding { held: self.held, group: folded, fields: Fields(1) }),
            Held::Codes => {
                let words = size(&ty.axes[ty.axes.len().saturating_sub(1)..])?;
                Some(Coding { held: self.held, group: words * folded, fields: Fields(folded as u32) })
            }
        })
    }
}

impl Coding {
    /// Elements that share a scale: a whole number of these is coded at a time.
    pub fn group(&self) -> usize {
        self.group
    }

    /// Elements that become one of what is held.
    pub fn each(&self) -> usize {
        match self.held {
            Held::Elements => 1,
            Held::Codes => self.fields.0 as usize,
            Held::Scales => self.group,
        }
    }

    /// What is held of whole groups. Scales are of that dtype: codes are made with the scale as it is kept.
    pub fn of(&self, elements: &[f64], scale: DType) -> Vec<f64> {
        let groups = elements.chunks_exact(self.group);
        match self.held {
            Held::Elements => elements.to_vec(),
            Held::Scales => groups.map(|group| scale.round(scale_of(group))).collect(),
            Held::Codes => groups.flat_map(|group| self.words(group, scale.round(scale_of(group)))).collect(),
        }
    }

    fn words<'g>(&self, group: &'g [f64], scale: f64) -> impl Iterator<Item = f64> + use<'g> {
        let fields = self.fields;
        group.chunks_exact(fields.0 as usize).map(move |elements| {
            let pack = |word, (p, &x): (u32, &f64)| word | fields.pack(p, code(x, scale));
            f64::from((0..).zip(elements).fold(0, pack))
        })
    }
}

/// The scale of a group.
fn scale_of(group: &[f64]) -> f64 {
    group.iter().fold(f64::NEG_INFINITY, |most, x| most.max(x.abs())) * (1.0 / MOST)
}

/// The code of an element. What is cut off is no less than 0, so to cut it off is to round down.
fn code(x: f64, scale: f64) -> i32 {
    (x / scale.max(LEAST) + (MOST + 0.5)).clamp(0.0, 2.0 * MOST) as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_coded_reads_back_within_half_a_step() {
        let elements: Vec<f64> =
            (0..64).map(|n| f64::from((n * 37 % 101) - 50) / 7.0).chain([0.0; 16]).collect();
        let coding = |held, fields| Coding { held, group: 16, fields: Fields(fields) };
        let scales = coding(Held::Scales, 1).of(&elements, DType::F32);
        let words = coding(Held::Codes, 4).of(&elements, DType::F32);
        assert_eq!((scales.len(), words.len()), (5, 20));
        for (n, &x) in elements.iter().enumerate() {
            let code = Fields(4).unpack(n as u32 % 4, words[n / 4] as i32);
            let scale = scales[n / 16];
            let off = (f64::from(code - 127) * scale - x).abs();
            assert!((0..=254).contains(&code) && off <= scale / 2.0, "{x} is {code} of {scale}");
        }
        assert_eq!(scales[4], 0.0);
    }
}
