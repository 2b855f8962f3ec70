//! The verifier's rules on how weights are stored.

use crate::graph::{Factor, Function, Stored, Weight};
use crate::types::{AxisId, Size};

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

    /// The names between braces in the tensor's name: `mlp.{e}.weight` has `e`.
    ///
    /// # Errors
    /// A brace without its partner.
    pub fn numbered_by(&self) -> Result<Vec<&str>, String> {
        let mut names = Vec::new();
        let mut rest = self.tensor.as_str();
        while let Some(at) = rest.find(['{', '}']) {
            let named = rest[at..].strip_prefix('{').and_then(|inner| inner.split_once('}'));
            match named {
                Some((name, after)) if !name.contains('{') => {
                    names.push(name);
                    rest = after;
                }
                _ => return Err(format!("the tensor name \"{}\" has an unpaired brace", self.tensor)),
            }
        }
        Ok(names)
    }
}

/// The rules that a weight breaks; all numbers are in range.
pub(crate) fn check_weight(f: &Function, weight: &Weight) -> Vec<String> {
    let mut broken = Vec::new();
    let own = &f.ty(weight.value).axes;
    let name = |a: AxisId| &f.axis(a).name;
    let mut placed: Vec<AxisId> = Vec::new();

    match weight.stored.numbered_by() {
        Err(message) => broken.push(message),
        Ok(names) => {
            for n in names {
                match f.axis_named(n).filter(|a| own.contains(a)) {
                    Some(a) => placed.push(a),
                    None => broken.push(format!("the tensor name has `{{{n}}}`, the weight no such axis")),
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
