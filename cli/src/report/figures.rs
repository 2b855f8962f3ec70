//! The arithmetic of a report. It knows graphs and rates, no model.

use std::collections::BTreeMap;

use anyhow::{anyhow, bail};
use latentc_ir::census::Count;
use latentc_ir::{Symbols, Work};
use latentc_passes::{Codes, Graph, Machine};
use serde::Serialize;

/// How weights are held in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Format {
    pub(super) name: &'static str,
    /// Of an element; `None` where programs say what is held, codes and scales.
    bits: Option<u64>,
}

const BF16: Format = Format { name: "bf16", bits: Some(16) };
const FP8: Format = Format { name: "fp8", bits: Some(8) };

/// What caches are held in, by name: as they are computed, or as the pass `quantise` makes them.
pub(super) type CacheName = &'static str;

/// The widest first.
pub(super) const CACHES: [(CacheName, Option<Codes>); 4] =
    [("bf16", None), ("fp8", Some(Codes::Fp8)), ("int8", Some(Codes::Int8)), ("int6", Some(Codes::Int6))];

/// Formats of weights and caches that throughput is predicted for. The first is also what prompts and tokens are predicted for.
pub(super) type Served = [(Format, CacheName); 2];

/// As they are published, and as the paper served; or, if weights are held in a form of that name, in that.
pub(super) fn served(weights: Option<&'static str>) -> Served {
    match weights {
        None => [(BF16, "bf16"), (FP8, "int6")],
        Some(name) => ["bf16", "int6"].map(|cache| (Format { name, bits: None }, cache)),
    }
}

/// What a model's graphs say.
#[derive(Serialize)]
pub(super) struct Figures {
    pub(super) model: String,
    /// The longest context that it was made for.
    pub(super) positions: u64,
    pub(super) parameters: Count,
    /// Bytes of all weights, as they were asked to be held.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) weight_bytes: Option<u64>,
    pub(super) cache: Cache,
    pub(super) training: Training,
    pub(super) prefill: Vec<Point>,
    pub(super) decode: Vec<Point>,
    pub(super) throughput: Vec<Throughput>,
}

/// What is kept of a token.
#[derive(Serialize)]
pub(super) struct Cache {
    pub(super) elements: u64,
    /// In each of [`CACHES`], scales included.
    pub(super) bytes: Vec<(&'static str, u64)>,
}

#[derive(Serialize)]
pub(super) struct Training {
    pub(super) length: u64,
    /// Operations of contractions, for each token.
    pub(super) forward: f64,
    /// Three times as many: a contraction has two more of its size in the backward pass.
    pub(super) all: f64,
}

/// One run on a machine.
#[derive(Serialize)]
pub(super) struct Point {
    pub(super) batch: u64,
    pub(super) context: u64,
    pub(super) flops: f64,
    /// Weights and caches through memory.
    pub(super) bytes: f64,
    /// Weights and caches in memory.
    pub(super) resident: f64,
    /// Whether they fit.
    pub(super) fits: bool,
    pub(super) bound: Bound,
    pub(super) seconds: f64,
    /// Tokens read, or made, in a second.
    pub(super) tokens_per_second: f64,
}

/// What a run waits for.
#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Bound {
    Compute,
    Memory,
}

/// Generation with as many sequences at once as memory holds.
#[derive(Serialize)]
pub(super) struct Throughput {
    pub(super) weights: &'static str,
    pub(super) cache: &'static str,
    pub(super) context: u64,
    /// `None` if there is no room for the weights and one sequence.
    pub(super) at: Option<Point>,
}

/// Equal machines that share all work and all memory evenly.
pub(super) struct Node {
    pub(super) machine: Machine,
    pub(super) devices: u64,
}

pub(super) struct Program {
    pub(super) work: Work,
    pub(super) symbols: Symbols,
}

/// A model's graphs.
pub(super) struct Programs {
    pub(super) count: Count,
    /// Bytes of all weights, as programs hold them.
    pub(super) weight_bytes: u64,
    pub(super) served: Served,
    pub(super) train: Program,
    pub(super) prefill: Program,
    /// For each of [`CACHES`].
    pub(super) decode: Vec<(CacheName, Program)>,
}

impl Programs {
    /// Those of the first are the elements: codes are no elements.
    pub(super) fn cache(&self) -> Cache {
        let bytes = self.decode.iter().map(|(name, program)| (*name, program.work.cached_bytes())).collect();
        Cache { elements: self.decode.first().map_or(0, |(_, program)| program.work.cached()), bytes }
    }

    fn decode(&self, cache: CacheName) -> anyhow::Result<&Program> {
        let found = self.decode.iter().find(|(name, _)| *name == cache);
        found
            .map(|(_, program)| program)
            .ok_or_else(|| anyhow!("decode was not compiled for caches in {cache}"))
    }

    /// A sequence of that length, by token.
    pub(super) fn training(&self, length: u64) -> anyhow::Result<Training> {
        let sizes = self.train.symbols.bind(1, length, length);
        let forward = flops(&self.train, &sizes)? / length as f64;
        Ok(Training { length, forward, all: 3.0 * forward })
    }

    /// A graph's runs at these sizes, weights and caches in the first formats. Prefill reads prompts as long as the context, decode
    /// one token behind it.
    pub(super) fn points(
        &self,
        graph: Graph,
        node: &Node,
        batches: &[u64],
        contexts: &[u64],
    ) -> anyhow::Result<Vec<Point>> {
        let sizes = contexts.iter().flat_map(|&context| batches.iter().map(move |&batch| (batch, context)));
        sizes.map(|(batch, context)| self.point(graph, node, self.served[0], batch, context)).collect()
    }

    fn point(
        &self,
        graph: Graph,
        node: &Node,
        (weights, cache): (Format, CacheName),
        batch: u64,
        context: u64,
    ) -> anyhow::Result<Point> {
        let (program, new) = match graph {
            Graph::Train => (&self.train, context),
            Graph::Gradient => {
                bail!("no figures of the gradient yet; those of its forward half are of `train`")
            }
            Graph::Prefill => (&self.prefill, context),
            Graph::Decode => (self.decode(cache)?, 1),
        };
        let sizes = program.symbols.bind(batch, new, context);
        let flops = flops(program, &sizes)?;
        let read = match weights.bits {
            Some(bits) => program.work.weights_read(&sizes).map(|elements| elements * bits as f64 / 8.0),
            None => program.work.weight_bytes_read(&sizes),
        };
        let mut bytes = read.map_err(|e| anyhow!(e))?;
        for (cached, times) in &program.work.caches {
            let tokens = (&cached.read + &cached.written).eval(&sizes).map_err(|e| anyhow!(e))?;
            bytes += tokens as f64 * (cached.bytes * times) as f64;
        }
        let kept = batch as f64 * context as f64 * self.decode(cache)?.work.cached_bytes() as f64;
        let resident = self.weight_bytes(weights) + kept;
        let by_compute = flops / node.flops();
        let by_memory = bytes / node.bandwidth();
        let seconds = by_compute.max(by_memory);
        Ok(Point {
            batch,
            context,
            flops,
            bytes,
            resident,
            fits: resident <= node.memory(),
            bound: if by_compute > by_memory { Bound::Compute } else { Bound::Memory },
            seconds,
            tokens_per_second: batch as f64 * new as f64 / seconds,
        })
    }

    fn weight_bytes(&self, format: Format) -> f64 {
        match format.bits {
            Some(bits) => self.count.total as f64 * bits as f64 / 8.0,
            None => self.weight_bytes as f64,
        }
    }

    /// The most tokens a second at each context: with more sequences at once a step does not get shorter by sequence, so
    /// memory is the limit.
    pub(super) fn throughput(&self, node: &Node, contexts: &[u64]) -> anyhow::Result<Vec<Throughput>> {
        let cases =
            self.served.iter().flat_map(|&formats| contexts.iter().map(move |&context| (formats, context)));
        let case = |((weights, cache), context): ((Format, CacheName), u64)| {
            let left = node.memory() - self.weight_bytes(weights);
            let sequences = left / (context as f64 * self.decode(cache)?.work.cached_bytes() as f64);
            let at = if sequences >= 1.0 {
                Some(self.point(Graph::Decode, node, (weights, cache), sequences as u64, context)?)
            } else {
                None
            };
            Ok(Throughput { weights: weights.name, cache, context, at })
        };
        cases.map(case).collect()
    }
}

impl Figures {
    /// Bytes of a token in caches of that name.
    pub(super) fn token_bytes(&self, cache: CacheName) -> u64 {
        self.cache.bytes.iter().find(|(name, _)| *name == cache).map_or(0, |(_, bytes)| *bytes)
    }

    /// Generation in these formats at that context.
    pub(super) fn served(&self, (weights, cache): (Format, CacheName), context: u64) -> Option<&Point> {
        let same = |t: &&Throughput| (t.weights, t.cache, t.context) == (weights.name, cache, context);
        self.throughput.iter().find(same).and_then(|t| t.at.as_ref())
    }
}

impl Node {
    fn flops(&self) -> f64 {
        self.machine.flops * self.devices as f64
    }

    fn bandwidth(&self) -> f64 {
        self.machine.bandwidth * self.devices as f64
    }

    fn memory(&self) -> f64 {
        self.machine.memory * self.devices as f64
    }
}

fn flops(program: &Program, sizes: &BTreeMap<String, u64>) -> anyhow::Result<f64> {
    Ok(program.work.flops.eval(sizes).map_err(|e| anyhow!(e))? as f64)
}
