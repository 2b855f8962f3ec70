//! What papers say of their models, to be shown beside what the graphs say. Nothing is computed from it.

use serde::Serialize;

/// What a paper says of its model beside an older one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Published {
    /// Where it says so.
    pub paper: &'static str,
    /// The share of the older one's cache that is saved.
    pub cache_saving: f64,
    /// GPU hours for a trillion tokens of training: the model's and the older one's.
    pub gpu_hours: [f64; 2],
    /// The machine of those hours.
    pub machine: &'static str,
    /// The share of them that is saved.
    pub training_saving: f64,
    /// How many times the older one's maximum generation throughput it has, on eight of these machines.
    pub throughput_ratio: f64,
    /// Tokens a second that it generates there, at least.
    pub throughput: f64,
    /// How it was served for that.
    pub served: &'static str,
}

/// What was published of a bundled model beside another one.
pub fn published(model: &str, beside: &str) -> Option<Published> {
    // Abstract and section 3.2.3.
    (model == "deepseek-v2" && beside == "deepseek-67b").then_some(Published {
        paper: "arXiv 2405.04434",
        cache_saving: 0.933,
        gpu_hours: [172.8e3, 300.6e3],
        machine: "h800",
        training_saving: 0.425,
        throughput_ratio: 5.76,
        throughput: 50e3,
        served: "weights in fp8, cache in 6 bits on average",
    })
}
