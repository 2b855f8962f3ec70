//! Continuing a text, token by token.

use latentc_codegen::device::Device;
use latentc_ir::tensor::SplitMix;
use latentc_passes::Graph;

use crate::engine::{Engine, RunError};
use crate::session::{Session, Tokens};

/// How the next token is chosen.
#[derive(Clone, Debug)]
pub struct Sampler {
    /// 0 takes the likeliest; higher flattens the distribution.
    pub temperature: f64,
    /// Only the likeliest tokens that together have this probability are drawn from (arXiv 1904.09751).
    pub top_p: f64,
    random: SplitMix,
}

impl Sampler {
    /// Always the likeliest token.
    pub fn greedy() -> Sampler {
        Sampler::new(0.0, 1.0, 0)
    }

    /// Draws with a temperature from the likeliest tokens; the same seed gives the same text.
    pub fn new(temperature: f64, top_p: f64, seed: u64) -> Sampler {
        Sampler { temperature, top_p, random: SplitMix(seed) }
    }

    /// The next token's id. Of equally likely ones, greedy takes the first.
    pub fn choose(&mut self, logits: &[f32]) -> i32 {
        let best = likeliest(logits);
        if self.temperature <= 0.0 {
            return best as i32;
        }
        let top = f64::from(logits[best]);
        let mut odds: Vec<(usize, f64)> =
            logits.iter().map(|&x| ((f64::from(x) - top) / self.temperature).exp()).enumerate().collect();
        odds.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let total: f64 = odds.iter().map(|o| o.1).sum();
        let mut kept = 0.0;
        let enough = odds.iter().position(|o| {
            kept += o.1;
            kept >= self.top_p * total
        });
        odds.truncate(enough.map_or(odds.len(), |n| n + 1));
        let mut at = self.random.unit() * odds.iter().map(|o| o.1).sum::<f64>();
        for (id, odd) in &odds {
            at -= odd;
            if at < 0.0 {
                return *id as i32;
            }
        }
        odds.last().map_or(best as i32, |o| o.0 as i32)
    }
}

/// The index of the largest, the first of equal ones. A token waits for it, so it is found by many lanes at once.
fn likeliest(logits: &[f32]) -> usize {
    const LANES: usize = 16;
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (chunks, rest) = logits.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        lanes = std::array::from_fn(|n| larger(lanes[n], chunk[n]));
    }
    let largest = lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger);
    logits.iter().position(|&x| x == largest).unwrap_or(0)
}

/// Continues a prompt by up to `steps` tokens, telling each to `emit`, which may end the text by returning false.
///
/// # Errors
/// If the prompt is empty or has a token outside of the vocabulary, or the device fails.
pub fn generate<D: Device>(
    engine: &mut Engine<D>,
    prompt: &[i32],
    steps: usize,
    sampler: &mut Sampler,
    mut emit: impl FnMut(i32) -> bool,
) -> Result<Vec<i32>, RunError> {
    if prompt.is_empty() {
        return Err(RunError::Argument(
            "the prompt is empty; a text begins with at least one token".to_owned(),
        ));
    }
    let mut session = Session::new(engine, 1, prompt.len() + steps)?;
    let mut made = Vec::new();
    let mut next =
        Tokens { ids: prompt.to_vec(), positions: (0..prompt.len() as i32).collect(), len: prompt.len() };
    let mut graph = Graph::Prefill;
    while made.len() < steps {
        let logits = session.read(graph, &next, &[next.len as i32 - 1], 1)?;
        let id = sampler.choose(logits.row(0, 0));
        made.push(id);
        if !emit(id) {
            break;
        }
        let position = (prompt.len() + made.len()) as i32 - 1;
        next = Tokens { ids: vec![id], positions: vec![position], len: 1 };
        graph = Graph::Decode;
    }
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_the_largest_is_the_likeliest() {
        let mut random = SplitMix(3);
        for len in [1, 15, 16, 17, 100] {
            // Few values, so that many are equal.
            let logits: Vec<f32> = (0..len).map(|_| (4.0 * random.unit()) as i32 as f32 - 9.0).collect();
            let first = (0..len).find(|&n| logits.iter().all(|x| *x <= logits[n])).unwrap();
            assert_eq!(likeliest(&logits), first, "{logits:?}");
        }
        assert_eq!(likeliest(&[f32::NEG_INFINITY; 40]), 0);
        assert_eq!(likeliest(&[f32::NAN, 1.0, f32::NAN, 2.0]), 3);
        assert_eq!(likeliest(&[f32::NAN; 20]), 0);
    }
}
