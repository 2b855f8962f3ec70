//! What caches and weights are held in, and what gradients are returned in.

use clap::ValueEnum;
use latentc_passes::quantise::GROUP;
use latentc_passes::{CacheForm, Codes, Gradients, Graph, Wanted, WeightForm, encode, page};

/// The form of what is kept of each token, and of what is read for each.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct HeldArgs {
    /// What caches are held in; as they are computed if not given. Logits change by the rounding: docs/narrow-formats.md.
    #[arg(long, value_enum, value_name = "FORMAT")]
    cache: Option<CodesArg>,
    /// The most elements of a token that share a scale.
    #[arg(long, value_name = "N", default_value_t = GROUP, requires = "cache",
          value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    cache_group: u64,
    /// Leave what is rotated by its position as it is computed.
    #[arg(long, requires = "cache")]
    cache_rotated_wide: bool,
    /// Keep caches in pages of so many positions, a power of two such as 64, that sequences take from a pool as they grow.
    #[arg(long, value_name = "POSITIONS", value_parser = page)]
    cache_page: Option<u64>,
    #[command(flatten)]
    weights: WeightArgs,
}

/// The form of what any graph keeps, reads or returns.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct FormArgs {
    #[command(flatten)]
    held: HeldArgs,
    /// What the gradient graph returns gradients of weights in.
    #[arg(long, value_enum, value_name = "FORM", default_value_t)]
    gradients: GradientsArg,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum GradientsArg {
    /// f32, as they are summed: what `train` uses.
    #[default]
    Sums,
    /// The dtype of their weight, rounded once: what PyTorch and burn have.
    Weights,
}

/// The form of what is read for each token.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct WeightArgs {
    /// What weights of products are held in; as they are stored if not given. Logits change by the rounding: docs/narrow-formats.md.
    #[arg(long, value_enum, value_name = "FORMAT")]
    weights: Option<WeightsArg>,
    /// The most elements of a weight that share a scale.
    #[arg(long, value_name = "N", default_value_t = encode::GROUP, requires = "weights",
          value_parser = clap::value_parser!(u64).range(4..=1 << 20))]
    weight_group: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum WeightsArg {
    /// Integers of 8 bits, with scales.
    Int8,
}

fn page(text: &str) -> Result<u64, String> {
    let page = text.parse().map_err(|_| format!("`{text}` is no number of positions, such as 64"))?;
    page::fits(page).map(|()| page)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum CodesArg {
    /// bfloat16.
    Bf16,
    /// Floats of 8 bits (e4m3), with scales.
    Fp8,
    /// Integers of 8 bits, with scales.
    Int8,
    /// Integers of 6 bits, with scales.
    Int6,
}

impl HeldArgs {
    /// The form of caches that was asked for.
    fn form(self) -> Option<CacheForm> {
        let codes = match self.cache? {
            CodesArg::Bf16 => Codes::Bf16,
            CodesArg::Fp8 => Codes::Fp8,
            CodesArg::Int8 => Codes::Int8,
            CodesArg::Int6 => Codes::Int6,
        };
        Some(CacheForm { codes, group: self.cache_group, rotated_wide: self.cache_rotated_wide })
    }

    /// As it is asked for on a command line.
    pub(crate) fn words(self) -> String {
        let mut words = String::new();
        if let Some(codes) = self.cache.and_then(|codes| codes.to_possible_value()) {
            words += &format!(" --cache {}", codes.get_name());
            if self.cache_group != GROUP {
                words += &format!(" --cache-group {}", self.cache_group);
            }
            if self.cache_rotated_wide {
                words += " --cache-rotated-wide";
            }
        }
        if let Some(codes) = self.weights.name() {
            words += &format!(" --weights {codes}");
            if self.weights.weight_group != encode::GROUP {
                words += &format!(" --weight-group {}", self.weights.weight_group);
            }
        }
        words
    }

    /// A graph with caches and weights in that form.
    pub(crate) fn of(self, graph: impl Into<Graph>) -> Wanted {
        let (cache, page, weights) = (self.form(), self.cache_page, self.weights.form());
        Wanted { cache, page, weights, ..graph.into().into() }
    }
}

impl FormArgs {
    /// As it is asked for on a command line.
    pub(crate) fn words(self) -> String {
        let gradients = match self.gradients {
            GradientsArg::Sums => "",
            GradientsArg::Weights => " --gradients weights",
        };
        self.held.words() + gradients
    }

    /// A graph with all it keeps, reads and returns in that form.
    pub(crate) fn of(self, graph: impl Into<Graph>) -> Wanted {
        let gradients = match self.gradients {
            GradientsArg::Sums => Gradients::Sums,
            GradientsArg::Weights => Gradients::Weights,
        };
        Wanted { gradients, ..self.held.of(graph) }
    }
}

impl WeightArgs {
    /// The form of weights that was asked for.
    pub(crate) fn form(self) -> Option<WeightForm> {
        self.weights.map(|WeightsArg::Int8| WeightForm { group: self.weight_group })
    }

    /// Its name.
    pub(crate) fn name(self) -> Option<&'static str> {
        self.weights.map(|WeightsArg::Int8| "int8")
    }
}
