//! Between stored tensors and the weights that are parts of them, on the device.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ops::Range;

use burn::tensor::{Shape, Slice};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use latentc_ir::Layout;
use latentc_ir::interp::scoped;

use crate::backend::CubeclBackend;

/// How a weight lies in its stored tensors, as shapes, slices and orders of axes.
pub(crate) struct Parts {
    names: Vec<String>,
    /// Where each tensor's first element is in the weight.
    starts: Vec<u64>,
    stored: Vec<usize>,
    /// A stored tensor with an axis for each factor of which the weight has a part, and what it has of each axis.
    view: Vec<usize>,
    slices: Vec<Range<usize>>,
    /// The axes of the part in the stored order.
    axes: Vec<usize>,
    /// For each axis of the part, its place among those of the weight.
    order: Vec<usize>,
    /// Axes of the weight that number tensors, slowest first: place and extent.
    numbering: Vec<(usize, usize)>,
    /// Extents of the weight, those of numbering axes included.
    weight: Vec<usize>,
    /// Whether a tensor's part is one piece of the weight.
    together: bool,
}

impl Parts {
    /// Of a weight under a scope.
    pub(crate) fn of(scope: &str, layout: &Layout) -> Parts {
        let (mut view, mut slices) = (Vec::new(), Vec::new());
        for (dim, &size) in layout.shape.iter().enumerate() {
            let mut above = size as usize;
            let mut inner = Vec::new();
            // Stride by stride, from the fastest factor up.
            let mut stride = 1;
            for part in layout.part.iter().filter(|p| p.dim == dim) {
                let below = (part.stride / stride) as usize;
                inner.push((below, 0..below));
                inner.push((part.extent as usize, part.start as usize..part.end as usize));
                above /= below * part.extent as usize;
                stride = part.stride * part.extent;
            }
            inner.push((above, 0..above));
            for (extent, slice) in inner.into_iter().rev() {
                view.push(extent);
                slices.push(slice);
            }
        }
        // Axes of the weight are told apart by how far they advance in it.
        let steps = layout.steps().iter().map(|s| (s.weight, s.extent as usize));
        let numbers = layout.pieces.first().map_or(0, |p| p.index.len());
        let number = |n: usize| {
            let extent = layout.pieces.iter().map(|p| p.index[n] as usize + 1).max().unwrap_or(1);
            let only = |p: &&latentc_ir::Piece| (0..numbers).all(|m| p.index[m] == u64::from(m == n));
            (layout.pieces.iter().find(only).map_or(0, |p| p.start), extent)
        };
        let numbers: Vec<_> = (0..numbers).map(number).filter(|&(_, extent)| extent > 1).collect();
        let mut all: Vec<(u64, usize)> = steps.clone().chain(numbers.iter().copied()).collect();
        all.sort_by_key(|&(stride, _)| Reverse(stride));
        let place = |stride: u64| all.iter().position(|a| a.0 == stride).unwrap_or(0);
        let slowest = layout.steps().iter().map(|s| s.weight).max().unwrap_or(0);
        Parts {
            names: layout.pieces.iter().map(|p| scoped(scope, &p.tensor)).collect(),
            starts: layout.pieces.iter().map(|p| p.start).collect(),
            stored: layout.shape.iter().map(|&n| n as usize).collect(),
            view,
            slices,
            axes: steps.clone().map(|(_, extent)| extent).collect(),
            order: steps.map(|(stride, _)| place(stride)).collect(),
            numbering: numbers.iter().map(|&(stride, extent)| (place(stride), extent)).collect(),
            weight: all.iter().map(|&(_, extent)| extent).collect(),
            together: numbers.iter().all(|&(stride, _)| stride > slowest),
        }
    }

    /// The stored tensors, the last of the numbering axes running fastest.
    pub(crate) fn names(&self) -> &[String] {
        &self.names
    }

    fn whole(&self) -> bool {
        self.view.iter().zip(&self.slices).all(|(&n, slice)| *slice == (0..n))
    }

    /// The axes of the part in the order of the weight: extents, and which axis of the part each is.
    fn turned(&self) -> (Vec<usize>, Vec<usize>) {
        let mut axes: Vec<usize> = (0..self.axes.len()).collect();
        axes.sort_by_key(|&n| self.order[n]);
        (axes.iter().map(|&n| self.axes[n]).collect(), axes)
    }

    /// The weight, its elements one after another, from its stored tensors in the order of [`Parts::names`].
    pub(crate) fn gather<B: CubeclBackend>(
        &self,
        stored: Vec<CubeTensor<B::Runtime>>,
    ) -> CubeTensor<B::Runtime> {
        let (_, axes) = self.turned();
        let mut extents: Vec<usize> = self.weight.clone();
        self.numbering.iter().for_each(|&(place, _)| extents[place] = 1);
        let part = |tensor: CubeTensor<B::Runtime>| {
            let mut part = tensor;
            if !self.whole() {
                part = B::float_reshape(part, Shape::from(self.view.clone()));
                part = B::float_slice(part, &slices(&self.slices));
            }
            part = B::float_reshape(into_contiguous(part), shape(&self.axes));
            part = into_contiguous(B::float_permute(part, &permutation(&axes)));
            B::float_reshape(part, shape(&extents))
        };
        let mut pieces: Vec<_> = stored.into_iter().map(part).collect();
        for &(place, extent) in self.numbering.iter().rev() {
            let mut rest = pieces.into_iter();
            let mut stacked = Vec::new();
            loop {
                let row: Vec<_> = rest.by_ref().take(extent).collect();
                if row.is_empty() {
                    break;
                }
                stacked.push(B::float_cat(row, place));
            }
            pieces = stacked;
        }
        into_contiguous(pieces.remove(0))
    }

    /// Adds a gradient of the weight to those of its stored tensors.
    pub(crate) fn scatter<B: CubeclBackend>(
        &self,
        gradient: CubeTensor<B::Runtime>,
        sums: &mut BTreeMap<String, CubeTensor<B::Runtime>>,
    ) {
        let gradient = B::float_reshape(gradient, shape(&self.weight));
        let (extents, axes) = self.turned();
        let mut back = vec![0; axes.len()];
        axes.iter().enumerate().for_each(|(to, &from)| back[from] = to);
        for (n, name) in self.names.iter().enumerate() {
            let part = B::float_reshape(self.piece::<B>(&gradient, n), shape(&extents));
            let part = into_contiguous(B::float_permute(part, &permutation(&back)));
            let part = if self.whole() {
                B::float_reshape(part, Shape::from(self.stored.clone()))
            } else {
                let zeros = B::float_zeros(Shape::from(self.view.clone()), &part.device, part.dtype.into());
                let kept: Vec<usize> = self.slices.iter().map(Range::len).collect();
                let part = B::float_reshape(part, Shape::from(kept));
                let padded = B::float_slice_assign(zeros, &slices(&self.slices), part);
                B::float_reshape(padded, Shape::from(self.stored.clone()))
            };
            let sum = match sums.remove(name) {
                Some(sum) => B::float_add(sum, part),
                None => part,
            };
            sums.insert(name.clone(), sum);
        }
    }

    /// What of the weight belongs to a stored tensor: where that is one piece at a place that the device can address, without a copy.
    fn piece<B: CubeclBackend>(&self, weight: &CubeTensor<B::Runtime>, n: usize) -> CubeTensor<B::Runtime> {
        if self.numbering.is_empty() {
            return weight.clone();
        }
        let (start, all) = (self.starts[n] * weight.elem_size() as u64, weight.handle.size_in_used());
        let bytes = (self.axes.iter().product::<usize>() * weight.elem_size()) as u64;
        if self.together && start.is_multiple_of(weight.client.properties().memory.alignment) {
            let beyond = all - start - bytes;
            let handle = weight.handle.clone().offset_start(start).offset_end(beyond);
            let (client, device) = (weight.client.clone(), weight.device.clone());
            return CubeTensor::new_contiguous(client, device, shape(&self.axes), handle, weight.dtype);
        }
        let mut ranges: Vec<_> = self.weight.iter().map(|&extent| 0..extent).collect();
        let mut rest = n;
        for &(place, extent) in self.numbering.iter().rev() {
            ranges[place] = rest % extent..rest % extent + 1;
            rest /= extent;
        }
        into_contiguous(B::float_slice(weight.clone(), &slices(&ranges)))
    }
}

/// burn's tensors have at least one axis.
fn shape(extents: &[usize]) -> Shape {
    Shape::from(if extents.is_empty() { vec![1] } else { extents.to_vec() })
}

fn permutation(axes: &[usize]) -> Vec<usize> {
    if axes.is_empty() { vec![0] } else { axes.to_vec() }
}

fn slices(ranges: &[Range<usize>]) -> Vec<Slice> {
    ranges.iter().map(|r| Slice::new(r.start as isize, Some(r.end as isize), 1)).collect()
}

#[cfg(all(test, feature = "wgpu"))]
mod tests {
    use burn::backend::Wgpu;
    use burn::tensor::ops::FloatTensorOps;
    use burn::tensor::{Tensor, TensorData};

    use super::*;
    use crate::weight::float;

    /// Turned round, a part and the other one turned round, stacks whose number runs slowest, between others and out of order, and
    /// one whose tensors begin where a device can address them.
    const TEXT: &str = r#"module m entry @f

func @f {
  axes t, d=2, e=3, f=4, g=2, i=3, n=2, v=5, c=3, a=8, b=8
  param x: f32[t, d=2]
  weight A: f32[d=2, e=3] = "a"[e, d]
  weight B: f32[i=3, n=2, c=3] = "b"[i * (n | v), c]
  weight C: f32[v=5, c=3, i=3] = "b"[i * (n | v), c]
  weight D: f32[e=3, f=4, d=2] = "d.{e}.w"[f, d]
  weight E: f32[f=4, e=3, d=2] = "d.{e}.w"[f, d]
  weight F: f32[g=2, d=2, e=3] = "f.{e}.{g}"[d]
  weight G: f32[e=3, a=8, b=8] = "g.{e}"[a, b]
  weight H: f32[e=3, i=3, v=5] = "h.{e}"[(n | v), i]

  return x
}
"#;

    #[test]
    fn weights_are_what_their_layouts_say() {
        let Ok(device) = crate::wgpu_device() else {
            return eprintln!("SKIPPED: weights_are_what_their_layouts_say: no wgpu");
        };
        let tensor = |data: &[f32], shape: &[usize]| {
            let data = TensorData::new(data.to_vec(), [data.len()]);
            let flat = Tensor::<Wgpu, 1>::from_data(data, &device).into_primitive().tensor();
            <Wgpu as FloatTensorOps<Wgpu>>::float_reshape(flat, Shape::from(shape.to_vec()))
        };
        let read = |tensor: CubeTensor<_>| {
            let len: usize = tensor.meta.shape().iter().product();
            let flat = <Wgpu as FloatTensorOps<Wgpu>>::float_reshape(tensor, Shape::from(vec![len]));
            float::<Wgpu, 1>(flat).into_data().to_vec::<f32>().expect("they are f32")
        };
        let module = latentc_ir::parse("m.ir", TEXT).unwrap_or_else(|e| panic!("{}", e.render()));
        let f = &module.functions[0];
        assert_eq!(f.weights.len(), 8);
        for weight in &f.weights {
            let name = &f.value(weight.value).name;
            let layout = weight.stored.layout(f, f.ty(weight.value)).expect("it is sound");
            let parts = Parts::of("s", &layout);
            let shape: Vec<usize> = layout.shape.iter().map(|&n| n as usize).collect();
            let len = layout.stored_elements() as usize;
            let stored = |p: usize| (0..len).map(|n| (p * len + n) as f32).collect::<Vec<_>>();

            let mut want = vec![0.0; layout.elements as usize];
            for (p, piece) in layout.pieces.iter().enumerate() {
                layout.load(piece, 1, &stored(p), &mut want).expect("it fits");
            }
            let given = (0..layout.pieces.len()).map(|p| tensor(&stored(p), &shape));
            assert_eq!(read(parts.gather::<Wgpu>(given.collect())), want, "{name}");

            let gradient: Vec<f32> = (0..want.len()).map(|n| n as f32 + 0.5).collect();
            let mut sums = BTreeMap::new();
            for times in [1.0, 2.0] {
                parts.scatter::<Wgpu>(tensor(&gradient, &[gradient.len()]), &mut sums);
                for (p, piece) in layout.pieces.iter().enumerate() {
                    let mut want = vec![0.0; len];
                    layout.save(piece, 1, &gradient, &mut want).expect("it fits");
                    want.iter_mut().for_each(|x| *x *= times);
                    let sum = &sums[&parts.names()[p]];
                    assert_eq!(
                        (sum.meta.shape().to_vec(), read(sum.clone())),
                        (shape.clone(), want),
                        "{name}"
                    );
                }
            }
        }
    }
}
