//! Programs of one definition for different numbers of new tokens, and which of them is for which.
//!
//! What   a choice that turns on a run-time size  =>  a program for each side of it, and a guard on each
//! Why    a short prompt multiplies with the latents as decode does, a long one makes keys and values first: where one order
//!        of products ends and the other begins, `reassociate` says ([`Crossing`](crate::Crossing))
//! Cost   two orders cost the same where they cross, and about the same around it: crossings that lie close together are one

use std::fmt;

use latentc_ir::Module;
use serde::Serialize;

use crate::{Context, Graph, Pass, PassError, Remark, Wanted, run};

/// Crossings at sizes that differ by less than this factor share a guard.
const CLOSE: f64 = 1.5;

/// For which sizes a program is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Guard {
    /// The symbol of the size.
    pub size: String,
    /// It is for larger ones than this.
    pub above: u64,
    /// And for none larger than this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub up_to: Option<u64>,
}

impl Guard {
    /// What passes are told that make the program: its largest size stands for all of them.
    pub fn context(guard: Option<&Guard>, wanted: impl Into<Wanted>) -> Context {
        Context { tokens: guard.and_then(|g| g.up_to), ..Context::new(wanted) }
    }

    /// Whether the program is for this size.
    pub fn admits(&self, size: u64) -> bool {
        size > self.above && self.up_to.is_none_or(|most| size <= most)
    }
}

impl fmt::Display for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Guard { size, above, up_to } = self;
        match (above, up_to) {
            (0, Some(most)) => write!(f, "{size} <= {most}"),
            (_, Some(most)) => write!(f, "{above} < {size} <= {most}"),
            (_, None) => write!(f, "{size} > {above}"),
        }
    }
}

/// A graph of a definition for some sizes.
#[derive(Clone, Debug)]
pub struct Variant {
    /// For which, unless it is for all.
    pub guard: Option<Guard>,
    /// The module after each pass.
    pub stages: Vec<(&'static str, Module)>,
    /// What the passes did and why.
    pub remarks: Vec<Remark>,
}

/// The graph of a definition, once for each range of sizes that wants it otherwise; the one for the largest sizes is the
/// last. Only the prefill graph is run at different sizes: decode reads one token, and training whole sequences.
///
/// # Errors
/// See [`Pass::apply`].
pub fn variants(
    definition: &Module,
    wanted: impl Into<Wanted>,
    passes: &[Pass],
) -> Result<Vec<Variant>, PassError> {
    let wanted = wanted.into();
    let made = |guard: Option<Guard>| -> Result<Variant, PassError> {
        let mut cx = Guard::context(guard.as_ref(), wanted);
        let stages = run(definition, &mut cx, passes)?;
        Ok(Variant { guard, stages, remarks: cx.remarks })
    };
    let mut largest = made(None)?;
    let Some((size, ends)) = ends(&largest.remarks).filter(|_| wanted.graph == Graph::Prefill) else {
        return Ok(vec![largest]);
    };
    let mut variants: Vec<Variant> = Vec::new();
    let mut above = 0;
    let same = |a: &Variant, b: &Variant| a.stages.last().map(|s| &s.1) == b.stages.last().map(|s| &s.1);
    for end in ends {
        let guard = Guard { size: size.clone(), above, up_to: Some(end) };
        let next = made(Some(guard))?;
        match variants.last_mut() {
            Some(Variant { guard: Some(guard), stages, .. })
                if stages.last().map(|s| &s.1) == next.stages.last().map(|s| &s.1) =>
            {
                guard.up_to = Some(end);
            }
            _ => variants.push(next),
        }
        above = end;
    }
    // The last may have come out as the one for the largest sizes.
    while variants.last().is_some_and(|v| same(v, &largest)) {
        variants.pop();
    }
    let above = variants.last().and_then(|v| v.guard.as_ref()?.up_to);
    largest.guard = above.map(|above| Guard { size, above, up_to: None });
    variants.push(largest);
    Ok(variants)
}

/// The size that choices turn on, and where, ascending.
fn ends(remarks: &[Remark]) -> Option<(String, Vec<u64>)> {
    let crossings: Vec<_> = remarks.iter().filter_map(|r| r.crossing.as_ref()).collect();
    let size = crossings.first()?.size.clone();
    let mut ends: Vec<u64> = crossings.iter().filter(|c| c.size == size).map(|c| c.at).collect();
    ends.sort_unstable();
    ends.dedup_by(|next, kept| (*next as f64) < *kept as f64 * CLOSE);
    Some((size, ends))
}
