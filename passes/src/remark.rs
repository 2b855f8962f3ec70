//! What a pass says about what it did: the text of `latentc explain`, and JSON for tools.

use std::collections::BTreeMap;
use std::fmt;

use latentc_ir::cost::Cost;
use latentc_ir::{Function, Inst, Origin};
use serde::Serialize;

/// What became of an opportunity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The law was applied.
    Applied,
    /// The law was weighed, and all stays as it is.
    Missed,
    /// Something that the author should look at.
    Warning,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Applied => "applied",
            Kind::Missed => "missed",
            Kind::Warning => "warning",
        })
    }
}

/// What a candidate's weight counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Time of a run.
    Seconds,
    /// Bytes that are kept of each token, and those that are read in the time that it takes to compute again what is not.
    BytesPerToken,
    /// Operations for each token.
    OperationsPerToken,
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Unit::Seconds => "s",
            Unit::BytesPerToken => "bytes a token",
            Unit::OperationsPerToken => "operations a token",
        })
    }
}

/// Why something was rewritten, or was not.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Remark {
    /// What became of it.
    pub kind: Kind,
    /// The pass.
    pub pass: &'static str,
    /// The function it was in.
    pub function: String,
    /// The value that it is about.
    pub value: String,
    /// The lines of the model that made the value.
    pub origins: Vec<Origin>,
    /// What was done, in a sentence.
    pub message: String,
    /// What was weighed, the choice first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub candidates: Vec<Candidate>,
    /// Where another choice would be the better one, if a run-time size decides that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crossing: Option<Crossing>,
}

/// A run-time size up to which one candidate is the best, and beyond which another.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Crossing {
    /// The symbol of the size.
    pub size: String,
    /// The last size at which the first is no worse.
    pub at: u64,
    /// The same if operations were all that counts: what memory hides today may matter once less is stored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by_operations: Option<u64>,
    /// The other sizes that this holds for.
    pub others: BTreeMap<String, u64>,
    /// The candidate up to there.
    pub below: String,
    /// The candidate beyond.
    pub above: String,
}

/// One way to do it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Candidate {
    /// Which, such as `(q W_UK) c_KV`.
    pub what: String,
    /// What one run of it takes, in the sizes of the function's axes.
    pub cost: Cost,
    /// What it comes to at the sizes that the choice was made for; the least is chosen.
    pub weight: f64,
    /// What the weight counts.
    pub unit: Unit,
}

impl Remark {
    /// A remark about the first result of an instruction.
    pub fn new(
        kind: Kind,
        pass: &'static str,
        f: &Function,
        inst: &Inst,
        message: impl Into<String>,
    ) -> Remark {
        Remark {
            kind,
            pass,
            function: f.name.clone(),
            value: inst.results.first().map_or_else(String::new, |&r| f.value(r).name.clone()),
            origins: inst.origins.clone(),
            message: message.into(),
            candidates: Vec::new(),
            crossing: None,
        }
    }

    /// The same with another candidate.
    #[must_use]
    pub fn candidate(mut self, what: impl Into<String>, cost: Cost, weight: f64, unit: Unit) -> Remark {
        self.candidates.push(Candidate { what: what.into(), cost, weight, unit });
        self
    }
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: @{} {}", self.kind, self.pass, self.function, self.value)?;
        for o in &self.origins {
            write!(f, " {}:{}:{}", o.file, o.line, o.col)?;
            if let Some(tag) = &o.tag {
                write!(f, " ({tag})")?;
            }
        }
        writeln!(f, "\n  {}", self.message)?;
        for (n, c) in self.candidates.iter().enumerate() {
            let mark = if n == 0 { '*' } else { ' ' };
            let bytes = &c.cost.bytes_read + &c.cost.bytes_written;
            writeln!(
                f,
                "  {mark} {}: {:.3e} {}; flops {}; bytes {bytes}",
                c.what, c.weight, c.unit, c.cost.flops
            )?;
        }
        Ok(())
    }
}
