//! What caches are held in.

use clap::ValueEnum;
use latentc_passes::quantise::GROUP;
use latentc_passes::{CacheForm, Codes, Graph, Wanted, page};

/// The form of what is kept of each token.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct CacheArgs {
    /// What caches are held in; as they are computed if not given. Logits change by the rounding: docs/cache-formats.md.
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

impl CacheArgs {
    /// The form that was asked for.
    pub(crate) fn form(self) -> Option<CacheForm> {
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
        let Some(codes) = self.cache.and_then(|codes| codes.to_possible_value()) else {
            return String::new();
        };
        let group = if self.cache_group == GROUP {
            String::new()
        } else {
            format!(" --cache-group {}", self.cache_group)
        };
        let wide = if self.cache_rotated_wide { " --cache-rotated-wide" } else { "" };
        format!(" --cache {}{group}{wide}", codes.get_name())
    }

    /// A graph with caches in that form.
    pub(crate) fn of(self, graph: impl Into<Graph>) -> Wanted {
        Wanted { graph: graph.into(), cache: self.form(), page: self.cache_page }
    }
}
