//! Memory with random content, made where it lies: what a model of any size is measured with.
//!
//! One block of random numbers is sent to the device, and kernels repeat it. It is as long as no power of two, so that rows of a matrix
//! are different parts of it, and tokens go to different experts.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use latentc_codegen::device::{Data, Device, DeviceError, Floats, SharedFloats};
use latentc_ir::{DType, SplitMix};

use super::texts;
use crate::init::normal;

/// Elements of the block: a prime, times what is aligned on any device.
const BLOCK: usize = 256 * 4093;

/// Makes memory with random content.
pub(super) struct Maker<D: Device> {
    floats: Vec<f32>,
    words: Vec<i32>,
    /// The block on the device.
    blocks: BTreeMap<&'static str, D::Buffer>,
    /// Whether the device uses memory of the host as it lies.
    shares: bool,
    /// Elements of the block.
    block: usize,
}

impl<D: Device> fmt::Debug for Maker<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Maker").field("shares", &self.shares).finish_non_exhaustive()
    }
}

impl<D: Device> Maker<D> {
    /// Floats will be normal with this standard deviation, integers any words.
    pub(super) fn new(device: &mut D, seed: u64, std: f64) -> Maker<D> {
        Maker::repeating(device, seed, std, BLOCK)
    }

    fn repeating(device: &mut D, seed: u64, std: f64, block: usize) -> Maker<D> {
        let mut rng = SplitMix(seed);
        let words: Vec<i32> = (0..block).map(|_| rng.below(1 << 32) as u32 as i32).collect();
        let floats = (0..block as u64).map(|i| (std * normal(seed, i)) as f32).collect();
        let shares = device.share(Arc::new(vec![0.0f32])).is_some();
        Maker { floats, words, blocks: BTreeMap::new(), shares, block }
    }

    /// Whether the device uses memory of the host as it lies.
    pub(super) fn shares(&self) -> bool {
        self.shares
    }

    /// A weight: as it would lie in a file, where the device can use that.
    pub(super) fn weight(
        &mut self,
        device: &mut D,
        dtype: DType,
        len: usize,
    ) -> Result<D::Buffer, DeviceError> {
        if self.shares
            && let Some(own) = repeated(dtype, &self.floats, len)
            && let Some(buffer) = device.share(own)
        {
            return Ok(buffer);
        }
        self.filled(device, dtype, len)
    }

    /// The scales of a norm.
    pub(super) fn ones(&self, device: &mut D, dtype: DType, len: usize) -> Result<D::Buffer, DeviceError> {
        device.upload(dtype, Data::F32(vec![1.0; len]))
    }

    /// Memory that can be written to.
    pub(super) fn filled(
        &mut self,
        device: &mut D,
        dtype: DType,
        len: usize,
    ) -> Result<D::Buffer, DeviceError> {
        if self.shares || len <= self.block {
            return device.upload(dtype, self.data(dtype, len));
        }
        let arena = device.reserve(len as u64 * (device.layout().bytes)(dtype))?;
        self.fill(device, &arena, dtype, len)?;
        // SAFETY: nothing else lies in this arena.
        unsafe { device.part(&arena, 0, dtype, len) }
    }

    /// Memory that is kept from run to run.
    pub(super) fn kept(
        &mut self,
        device: &mut D,
        dtype: DType,
        len: usize,
    ) -> Result<D::Buffer, DeviceError> {
        if !self.shares {
            return self.filled(device, dtype, len);
        }
        let from = device.upload(dtype, self.data(dtype, len))?;
        let mut kept = device.keep(dtype, len)?;
        device.launch(&texts::copy(dtype), &[Some(&from)], &mut kept, &[len])?;
        Ok(kept)
    }

    fn data(&self, dtype: DType, len: usize) -> Data {
        if dtype.is_float() {
            Data::F32(self.floats.iter().copied().cycle().take(len).collect())
        } else if dtype == DType::Bool {
            Data::I32(self.words.iter().map(|w| w & 1).cycle().take(len).collect())
        } else {
            Data::I32(self.words.iter().copied().cycle().take(len).collect())
        }
    }

    /// Writes the block over and over.
    fn fill(
        &mut self,
        device: &mut D,
        arena: &D::Arena,
        dtype: DType,
        len: usize,
    ) -> Result<(), DeviceError> {
        if !self.blocks.contains_key(dtype.name()) {
            let made = device.upload(dtype, self.data(dtype, self.block))?;
            self.blocks.insert(dtype.name(), made);
        }
        let block = [self.blocks.get(dtype.name())];
        let (rows, rest) = (len / self.block, len % self.block);
        let offset = (rows * self.block) as u64 * (device.layout().bytes)(dtype);
        if rows > 0 {
            // SAFETY: the kernel reads the block only, which lies elsewhere.
            let mut whole = unsafe { device.part(arena, 0, dtype, rows * self.block)? };
            device.launch(&texts::fill(dtype, self.block), &block, &mut whole, &[rows])?;
        }
        if rest > 0 {
            // SAFETY: as above.
            let mut end = unsafe { device.part(arena, offset, dtype, rest)? };
            device.launch(&texts::copy(dtype), &block, &mut end, &[rest])?;
        }
        Ok(())
    }
}

/// A block over and over, as floats of the host's; `None` for what is none.
fn repeated(dtype: DType, block: &[f32], len: usize) -> Option<Arc<dyn SharedFloats>> {
    fn repeat<T: Copy>(block: &[T], len: usize) -> Vec<T> {
        let mut all = Vec::with_capacity(len);
        while all.len() < len {
            all.extend_from_slice(&block[..block.len().min(len - all.len())]);
        }
        all
    }
    Some(match dtype {
        DType::F32 => Arc::new(repeat(block, len)),
        DType::Bf16 => Arc::new(repeat(&block.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>(), len)),
        DType::F16 => Arc::new(repeat(&block.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>(), len)),
        DType::F64 | DType::I32 | DType::Bool => return None,
    })
}

/// A part of those.
#[derive(Debug)]
struct Slice {
    all: Arc<dyn SharedFloats>,
    range: Range<usize>,
}

impl SharedFloats for Slice {
    fn piece(&self, n: usize) -> Floats<'_> {
        self.all.piece(n).part(self.range.clone())
    }
}

/// Memory beyond the device's cache, of which the launches that are measured read one part after the other: by the time that a part
/// comes again, no cache has it.
pub(super) struct Pool<D: Device> {
    place: Place<D>,
    /// Its length.
    bytes: u64,
    align: u64,
    of: fn(DType) -> u64,
    cursor: u64,
}

enum Place<D: Device> {
    /// One for each dtype that was wanted.
    Host(BTreeMap<&'static str, Arc<dyn SharedFloats>>),
    Arena(D::Arena),
}

impl<D: Device> Pool<D> {
    /// So many bytes, or as many as one allocation has.
    pub(super) fn new(
        device: &mut D,
        maker: &mut Maker<D>,
        dtype: DType,
        bytes: u64,
    ) -> Result<Pool<D>, DeviceError> {
        let layout = device.layout();
        let (align, of) = (layout.align.max(64), layout.bytes);
        if maker.shares() {
            return Ok(Pool {
                place: Place::Host(BTreeMap::new()),
                bytes,
                align,
                of: DType::bytes,
                cursor: 0,
            });
        }
        let bytes = bytes.min(layout.page / align * align);
        let arena = device.reserve(bytes)?;
        maker.fill(device, &arena, dtype, (bytes / of(dtype)) as usize)?;
        Ok(Pool { place: Place::Arena(arena), bytes, align, of, cursor: 0 })
    }

    /// The next part with so many elements, of which `touched` bytes will be read; `None` if it is too large, or no float. What
    /// is not kept between runs is wide on hosts.
    pub(super) fn take(
        &mut self,
        device: &mut D,
        maker: &Maker<D>,
        (dtype, wide): (DType, bool),
        len: usize,
        touched: u64,
    ) -> Result<Option<D::Buffer>, DeviceError> {
        let host = matches!(self.place, Place::Host(_));
        if dtype == DType::Bool || host && !dtype.is_float() {
            return Ok(None);
        }
        let dtype = if host && wide { DType::F32 } else { dtype };
        let each = (self.of)(dtype);
        let need = (len as u64 * each).next_multiple_of(self.align);
        if need == 0 || need > self.bytes {
            return Ok(None);
        }
        if self.cursor + need > self.bytes {
            self.cursor = 0;
        }
        let start = self.cursor;
        self.cursor += touched.clamp(1, need).next_multiple_of(self.align);
        match &mut self.place {
            Place::Host(all) => {
                let elements = (self.bytes / each) as usize;
                if !all.contains_key(dtype.name()) {
                    let Some(own) = repeated(dtype, &maker.floats, elements) else { return Ok(None) };
                    all.insert(dtype.name(), own);
                }
                let all = Arc::clone(&all[dtype.name()]);
                let start = (start / each) as usize;
                Ok(device.share(Arc::new(Slice { all, range: start..start + len })))
            }
            // SAFETY: no launch writes to the pool once it is filled.
            Place::Arena(arena) => unsafe { device.part(arena, start, dtype, len).map(Some) },
        }
    }
}

#[cfg(test)]
mod tests {
    use latentc_codegen::cube::WgpuDevice;
    use latentc_codegen::device::DeviceError;
    use latentc_codegen::emulate::Emulator;
    use latentc_codegen::host::Host;

    use super::*;

    /// What is made repeats a block, at any length and dtype, whole and in parts of a pool.
    fn repeats<D: Device>(opened: Result<D, DeviceError>) {
        let mut device = match opened {
            Ok(device) => device,
            Err(DeviceError::Absent(what, why)) => return eprintln!("SKIPPED: {what}: {why}"),
            Err(e) => panic!("{e}"),
        };
        let block = 256 * 3;
        let mut maker = Maker::repeating(&mut device, 3, 0.5, block);
        let rounded = |dtype: DType, x: f32| match dtype {
            DType::Bf16 => bf16::from_f32(x).to_f32(),
            DType::F16 => f16::from_f32(x).to_f32(),
            DType::F64 | DType::F32 | DType::I32 | DType::Bool => x,
        };
        // Not every device rounds.
        let near = |a: &[f32], b: &mut dyn Iterator<Item = f32>| {
            assert!(
                a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-2),
                "other numbers than those of the block"
            );
        };
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            for len in [5, block, 2 * block, 4 * block + 17] {
                let made = [
                    maker.weight(&mut device, dtype, len),
                    maker.filled(&mut device, dtype, len),
                    maker.kept(&mut device, dtype, len),
                ];
                for buffer in made.map(Result::unwrap) {
                    let Data::F32(got) = device.read(&buffer, len).unwrap() else { panic!("floats") };
                    assert_eq!(got.len(), len);
                    let want = maker.floats.clone();
                    near(&got, &mut want.iter().cycle().map(|&x| rounded(dtype, x)));
                }
            }
            let bytes = 8192;
            let mut pool = Pool::new(&mut device, &mut maker, dtype, bytes).unwrap();
            let first =
                pool.take(&mut device, &maker, (dtype, false), 100, 64).unwrap().expect("there is room");
            let second =
                pool.take(&mut device, &maker, (dtype, false), 100, 64).unwrap().expect("there is room");
            let read = |device: &mut D, buffer| match device.read(&buffer, 100).unwrap() {
                Data::F32(x) => x,
                Data::I32(_) => panic!("floats"),
            };
            let (first, second) = (read(&mut device, first), read(&mut device, second));
            assert_ne!(first, second);
            near(&first, &mut maker.floats.iter().map(|&x| rounded(dtype, x)));
            assert!(pool.take(&mut device, &maker, (dtype, false), 8193, 64).unwrap().is_none());
            // All of it is given out, over and over.
            for _ in 0..500 {
                assert!(pool.take(&mut device, &maker, (dtype, false), 700, 700).unwrap().is_some());
            }
        }
        let Data::I32(words) = maker
            .filled(&mut device, DType::I32, 2 * block)
            .and_then(|b| device.read(&b, 2 * block))
            .unwrap()
        else {
            panic!("integers")
        };
        assert_eq!(words[..block], words[block..]);
        device.wait().unwrap();
    }

    #[test]
    fn what_is_made_repeats_a_block() {
        repeats(Ok(Host::new()));
        repeats(WgpuDevice::open());
    }

    #[test]
    fn what_is_made_repeats_a_block_in_cuda_text() {
        repeats(Emulator::open(1));
    }
}
