//! Tensors of the reference semantics: slow, exact, all in f64.
//!
//! An i32 or a bool is held as the f64 of the same value, which is exact, so that every op has one arm.

use std::fmt;

use crate::types::DType;

/// Elements in row-major order, each an f64 that stands for a value of the dtype.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// What the elements stand for; arithmetic does not look at it.
    pub dtype: DType,
    /// Extents, slowest first.
    pub shape: Vec<usize>,
    /// As many elements as the product of the extents.
    pub data: Vec<f64>,
}

impl Tensor {
    /// A tensor of these elements.
    ///
    /// # Errors
    /// The number of elements does not fit the shape.
    pub fn new(dtype: DType, shape: impl Into<Vec<usize>>, data: Vec<f64>) -> Result<Tensor, String> {
        let shape = shape.into();
        let wanted: usize = shape.iter().product();
        if wanted != data.len() {
            return Err(format!("the shape {shape:?} has {wanted} elements, {} given", data.len()));
        }
        Ok(Tensor { dtype, shape, data })
    }

    /// An f32 tensor.
    ///
    /// # Errors
    /// The number of elements does not fit the shape.
    pub fn from_f32(shape: impl Into<Vec<usize>>, data: &[f32]) -> Result<Tensor, String> {
        Tensor::new(DType::F32, shape, data.iter().map(|&x| f64::from(x)).collect())
    }

    /// An f64 tensor.
    ///
    /// # Errors
    /// The number of elements does not fit the shape.
    pub fn from_f64(shape: impl Into<Vec<usize>>, data: &[f64]) -> Result<Tensor, String> {
        Tensor::new(DType::F64, shape, data.to_vec())
    }

    /// An i32 tensor.
    ///
    /// # Errors
    /// The number of elements does not fit the shape, or one does not fit i32.
    pub fn from_i64(shape: impl Into<Vec<usize>>, data: &[i64]) -> Result<Tensor, String> {
        let exact = |&x: &i64| i32::try_from(x).map(f64::from).map_err(|_| format!("{x} does not fit i32"));
        Tensor::new(DType::I32, shape, data.iter().map(exact).collect::<Result<_, _>>()?)
    }

    /// One element without axes.
    pub fn scalar(dtype: DType, x: f64) -> Tensor {
        Tensor { dtype, shape: Vec::new(), data: vec![x] }
    }

    /// All zero.
    pub fn zeros(dtype: DType, shape: impl Into<Vec<usize>>) -> Tensor {
        let shape = shape.into();
        let n = shape.iter().product();
        Tensor { dtype, shape, data: vec![0.0; n] }
    }

    /// Floats uniform in [-1, 1), rounded to the dtype; integers 0 to 7; truth values.
    pub fn random(dtype: DType, shape: impl Into<Vec<usize>>, rng: &mut SplitMix) -> Tensor {
        let mut t = Tensor::zeros(dtype, shape);
        for x in &mut t.data {
            *x = match dtype {
                DType::F64 | DType::F32 | DType::Bf16 | DType::F16 => dtype.round(2.0 * rng.unit() - 1.0),
                DType::I32 => rng.below(8) as f64,
                DType::Bool => rng.below(2) as f64,
            };
        }
        t
    }

    /// The element at an index, or `None` outside the shape.
    pub fn at(&self, index: &[usize]) -> Option<f64> {
        if index.len() != self.shape.len() {
            return None;
        }
        let mut flat = 0;
        for (&i, &n) in index.iter().zip(&self.shape) {
            if i >= n {
                return None;
            }
            flat = flat * n + i;
        }
        self.data.get(flat).copied()
    }

    /// The nearest values of a dtype.
    pub fn rounded(&self, dtype: DType) -> Tensor {
        let data = self.data.iter().map(|&x| dtype.round(x)).collect();
        Tensor { dtype, shape: self.shape.clone(), data }
    }

    /// Whether every element `x` of this and `y` of the other satisfy `|x - y| <= abs + rel * |y|`. Equal infinities
    /// and two NaN agree; dtypes may differ.
    ///
    /// # Errors
    /// Shapes differ, or the worst of the elements that are too far apart.
    pub fn close_to(&self, other: &Tensor, abs: f64, rel: f64) -> Result<(), Mismatch> {
        if self.shape != other.shape {
            return Err(Mismatch::Shape(self.shape.clone(), other.shape.clone()));
        }
        let mut worst: Option<(f64, usize)> = None;
        let mut wrong = 0;
        for (n, (&x, &y)) in self.data.iter().zip(&other.data).enumerate() {
            if x == y || (x.is_nan() && y.is_nan()) {
                continue;
            }
            // How many times the tolerance the two are apart; a NaN or an infinity is infinitely far.
            let apart = (x - y).abs() / (abs + rel * y.abs());
            let apart = if apart.is_nan() || y.is_infinite() { f64::INFINITY } else { apart };
            if apart > 1.0 {
                wrong += 1;
                if worst.is_none_or(|(w, _)| apart > w) {
                    worst = Some((apart, n));
                }
            }
        }
        let Some((_, at)) = worst else { return Ok(()) };
        let mut index = vec![0; self.shape.len()];
        let mut rest = at;
        for (i, &n) in index.iter_mut().zip(&self.shape).rev() {
            (*i, rest) = (rest % n, rest / n);
        }
        let (left, right) = (self.data[at], other.data[at]);
        Err(Mismatch::Element { index, left, right, wrong, of: self.data.len() })
    }
}

/// How two tensors differ.
#[derive(Clone, Debug, PartialEq)]
pub enum Mismatch {
    /// Their shapes.
    Shape(Vec<usize>, Vec<usize>),
    /// Elements that are too far apart.
    Element {
        /// Where the worst is, in units of the tolerance.
        index: Vec<usize>,
        /// The first tensor's element there.
        left: f64,
        /// The second tensor's element there.
        right: f64,
        /// How many elements are too far apart.
        wrong: usize,
        /// How many elements there are.
        of: usize,
    },
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mismatch::Shape(x, y) => write!(f, "the shapes are {x:?} and {y:?}"),
            Mismatch::Element { index, left, right, wrong, of } => write!(
                f,
                "{wrong} of {of} elements differ, worst at {index:?}: {left:e} and {right:e}, apart by {:e}",
                (left - right).abs()
            ),
        }
    }
}

impl std::error::Error for Mismatch {}

/// A small deterministic generator (Steele, Lea and Flood, "Fast splittable pseudorandom number generators").
#[derive(Clone, Debug)]
pub struct SplitMix(
    /// The state; any seed will do.
    pub u64,
);

impl SplitMix {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        let next = self.nth(0);
        self.0 = self.0.wrapping_add(Self::STEP);
        next
    }

    /// What comes after `n` others, which need not be made first.
    pub fn nth(&self, n: u64) -> u64 {
        Self::mix(self.0.wrapping_add(n.wrapping_add(1).wrapping_mul(Self::STEP)))
    }

    /// Spreads each bit of a number over all of another; one to one.
    pub fn mix(mut z: u64) -> u64 {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// An integer from 0 to `n - 1`, or 0 if `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next_u64().checked_rem(n).unwrap_or(0)
    }
}
