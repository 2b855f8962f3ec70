//! The verifier's rules on how weights are stored.

use crate::graph::{Factor, Function, Held, Stored, Weight};
use crate::types::{AxisId, DType, Size};

/// Codes of 8 bits that a word has room for.
const CODES: u64 = 4;

impl Stored {
    /// The axes of all factors, with all parts.
    pub(crate) fn axes(&self) -> Vec<AxisId> {
        let mut axes = Vec::new();
        for factor in self.dims.iter().flatten() {
            match factor {
                Factor::Axis(a) => axes.push(*a),
                Factor::Parts(parts) => axes.extend(parts),
            }
        }
        axes
    }
}

/// The rules that a weight breaks; all numbers are in range.
pub(crate) fn check_weight(f: &Function, weight: &Weight) -> Vec<String> {
    let mut broken = Vec::new();
    let held = f.ty(weight.value);
    let own = &weight.stored.elements(held).axes;
    let missing = own.len() - held.axes.len();
    match weight.stored.held {
        Held::Elements => {}
        Held::Codes => {
            let fields = own.last().and_then(|&a| f.axis(a).size.fixed());
            if held.dtype != DType::I32 || held.axes.is_empty() || missing != 1 || fields > Some(CODES) {
                broken.push(format!(
                    "holds codes, so it is i32 and lacks one of the stored axes, along which up to {CODES} share a word"
                ));
            }
        }
        Held::Scales => {
            if held.dtype != DType::F32 || missing == 0 {
                broken.push(
                    "holds scales, so it is f32 and lacks a stored axis, along which elements share one"
                        .to_owned(),
                );
            }
        }
    }
    let name = |a: AxisId| &f.axis(a).name;
    let mut placed: Vec<AxisId> = Vec::new();

    match weight.stored.numbered_by(f) {
        // Which axes are stored is not known then.
        Err(message) => return vec![message],
        Ok(axes) => {
            for a in axes {
                if own.contains(&a) {
                    placed.push(a);
                } else {
                    broken.push(format!("the tensor name has `{{{}}}`, the weight no such axis", name(a)));
                }
            }
        }
    }
    for factor in weight.stored.dims.iter().flatten() {
        match factor {
            Factor::Axis(a) if own.contains(a) => placed.push(*a),
            Factor::Axis(a) => {
                broken.push(format!("is stored along `{}`, which is none of its axes", name(*a)))
            }
            Factor::Parts(parts) => {
                let mine: Vec<_> = parts.iter().copied().filter(|a| own.contains(a)).collect();
                let names: Vec<_> = parts.iter().map(|a| name(*a).as_str()).collect();
                let names = names.join(" | ");
                if parts.len() < 2 {
                    broken.push(format!("({names}) needs two parts at least"));
                }
                match mine[..] {
                    [a] => placed.push(a),
                    _ => broken.push(format!("has {} axes of ({names}), not one", mine.len())),
                }
            }
        }
    }
    for &a in own {
        let count = placed.iter().filter(|p| **p == a).count();
        if count != 1 {
            broken.push(format!("is stored with axis `{}` {count} times, not once", name(a)));
        }
    }
    let mut sized: Vec<AxisId> = own.clone();
    sized.extend(weight.stored.axes());
    for (n, a) in sized.iter().enumerate() {
        if let Size::Sym(size) = &f.axis(*a).size
            && !sized[..n].contains(a)
        {
            broken.push(format!("axis `{}` has the run-time size {size}, a weight's are fixed", name(*a)));
        }
    }
    broken
}
