//! Fresh weights: random where a model learns, one where it scales.
//!
//! Every element follows from the seed, its tensor's name and its place in it, so neither the order of the tensors nor the
//! number of threads matters: element i of a tensor is the cosine (even i) or sine (odd i) branch of a Box-Muller pair
//! (1958) made of the outputs 2p and 2p + 1, p = i / 2, of a SplitMix64 (Steele et al. 2014) that starts at
//! `mix(FNV-1a(name) + mix(seed))`.

use std::borrow::Cow;
use std::f64::consts::TAU;
use std::path::Path;

use half::{bf16, f16};
use latentc_ir::tensor::SplitMix;
use latentc_ir::{Inventory, StoredTensor};

use crate::checkpoint::{CheckpointError, DType, TensorSpec, write_checkpoint};

/// A shard holds so many bytes at most, as in published checkpoints.
pub(crate) const SHARD: usize = 5_000_000_000;

/// Elements that one thread makes at a time, a whole number of pairs.
const CHUNK: usize = 1 << 16;

/// What fresh weights are made of.
#[derive(Clone, Copy, Debug)]
pub struct Init {
    /// The same seed gives the same weights.
    pub seed: u64,
    /// The standard deviation of what is random.
    pub std: f64,
    /// The element type in the files, a float.
    pub dtype: DType,
}

/// Writes weights for all tensors of an inventory into `folder`, telling `progress` the bytes of each as it is made. Vectors are
/// scales and become one; all else is drawn from a normal distribution.
///
/// # Errors
/// If the files cannot be written, or the element type holds no weights.
pub fn init(
    folder: &Path,
    inventory: &Inventory,
    with: Init,
    mut progress: impl FnMut(u64),
) -> Result<(), CheckpointError> {
    let spec = |t: &StoredTensor| TensorSpec {
        name: t.name.clone(),
        dtype: with.dtype,
        shape: t.shape.iter().map(|&n| n as usize).collect(),
    };
    let specs: Vec<_> = inventory.tensors.iter().map(spec).collect();
    if let (Some(first), false) = (specs.first(), is_float(with.dtype)) {
        return Err(CheckpointError::Spec {
            file: folder.to_owned(),
            tensor: first.name.clone(),
            what: format!("{} holds no weights; choose a float", with.dtype),
        });
    }
    write_checkpoint(folder, &specs, SHARD, |spec| {
        let bytes = fresh(&spec.name, &spec.shape, with);
        progress(bytes.len() as u64);
        Ok(Cow::Owned(bytes))
    })
}

/// The bytes of one tensor's fresh weights. What holds no weights is zero.
pub fn fresh(name: &str, shape: &[usize], with: Init) -> Vec<u8> {
    let mut bytes = vec![0; shape.iter().product::<usize>() * with.dtype.bytes()];
    if shape.len() == 1 {
        encode(with.dtype, &mut bytes, |_| 1.0);
    } else {
        random(name, with, &mut bytes);
    }
    bytes
}

/// Fills a tensor on all threads of the machine.
fn random(name: &str, with: Init, bytes: &mut [u8]) {
    let start = start(name, with.seed);
    let chunk_bytes = CHUNK * with.dtype.bytes();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let chunks = bytes.len().div_ceil(chunk_bytes);
    let each = chunks.div_ceil(threads).max(1) * chunk_bytes;
    std::thread::scope(|scope| {
        for (n, part) in bytes.chunks_mut(each).enumerate() {
            scope.spawn(move || {
                for (m, chunk) in part.chunks_mut(chunk_bytes).enumerate() {
                    let first = (n * (each / chunk_bytes) + m) * CHUNK;
                    encode(with.dtype, chunk, |i| with.std * normal(start, (first + i) as u64));
                }
            });
        }
    });
}

/// Writes elements one after the other.
pub(crate) fn encode(dtype: DType, bytes: &mut [u8], element: impl Fn(usize) -> f64) {
    match dtype {
        DType::BF16 => {
            for (i, out) in bytes.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                *out = bf16::from_f64(element(i)).to_le_bytes();
            }
        }
        DType::F16 => {
            for (i, out) in bytes.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                *out = f16::from_f64(element(i)).to_le_bytes();
            }
        }
        DType::F64 => {
            for (i, out) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                *out = element(i).to_le_bytes();
            }
        }
        DType::F32 => {
            for (i, out) in bytes.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                *out = (element(i) as f32).to_le_bytes();
            }
        }
        // Refused above.
        DType::I64 | DType::I32 | DType::U8 | DType::Bool => {}
    }
}

fn is_float(dtype: DType) -> bool {
    match dtype {
        DType::F64 | DType::F32 | DType::F16 | DType::BF16 => true,
        DType::I64 | DType::I32 | DType::U8 | DType::Bool => false,
    }
}

/// Where a tensor's generator starts.
fn start(name: &str, seed: u64) -> u64 {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for byte in name.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    SplitMix::mix(hash.wrapping_add(SplitMix::mix(seed)))
}

/// Element `i` of a standard normal sequence.
pub(crate) fn normal(start: u64, i: u64) -> f64 {
    let pair = i / 2;
    // From the upper 53 bits: (0, 1], whose logarithm is finite, and [0, 1).
    let unit = 1.0 / (1u64 << 53) as f64;
    let random = SplitMix(start);
    let radius = ((random.nth(2 * pair) >> 11) + 1) as f64 * unit;
    let angle = (random.nth(2 * pair + 1) >> 11) as f64 * unit;
    let radius = (-2.0 * radius.ln()).sqrt();
    radius * if i.is_multiple_of(2) { (TAU * angle).cos() } else { (TAU * angle).sin() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WITH: Init = Init { seed: 7, std: 0.02, dtype: DType::F32 };

    fn floats(name: &str, with: Init, elements: usize) -> Vec<f64> {
        let mut bytes = vec![0; elements * 4];
        random(name, with, &mut bytes);
        bytes.as_chunks::<4>().0.iter().map(|c| f64::from(f32::from_le_bytes(*c))).collect()
    }

    #[test]
    fn it_is_normal() {
        let n = 1_000_000;
        let x = floats("a", WITH, n);
        let moment = |k: i32| x.iter().map(|x| (x / WITH.std).powi(k)).sum::<f64>() / n as f64;
        // Five standard errors of each moment.
        let bound = |variance: f64| 5.0 * (variance / n as f64).sqrt();
        assert!(moment(1).abs() < bound(1.0), "mean {}", moment(1));
        assert!((moment(2) - 1.0).abs() < bound(2.0), "variance {}", moment(2));
        assert!(moment(3).abs() < bound(15.0), "third moment {}", moment(3));
        assert!((moment(4) - 3.0).abs() < bound(96.0), "fourth moment {}", moment(4));
        let neighbours = x.windows(2).map(|w| w[0] * w[1]).sum::<f64>() / (WITH.std * WITH.std * n as f64);
        assert!(neighbours.abs() < bound(1.0), "neighbours correlate by {neighbours}");
    }

    #[test]
    fn an_element_follows_from_seed_name_and_place() {
        let long = floats("a", WITH, 3 * CHUNK + 5);
        assert_eq!(floats("a", WITH, 17), long[..17]);
        let one = |i: usize| f64::from((WITH.std * normal(start("a", 7), i as u64)) as f32);
        for i in [0, 1, CHUNK - 1, CHUNK, 3 * CHUNK + 4] {
            assert_eq!(long[i], one(i));
        }
        assert_ne!(floats("b", WITH, 4), long[..4]);
        assert_ne!(floats("a", Init { seed: 8, ..WITH }, 4), long[..4]);
    }
}
