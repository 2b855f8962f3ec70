//! Operands as copies by the device see them: dimensions, and a box of which a stage has one or some.

use latentc_ir::{AxisId, DType, Function, Pairs, Size, ValueId};

use super::COPIERS;
use crate::cube::CubeIr;
use crate::cube::epilogue::Epilogue;
use crate::cube::feed::{Layout, SPAN};
use crate::cube::fragment::Factor;
use crate::cube::matrix::{self, Tile};
use crate::cube::stream_matrix::MatrixPlan;
use crate::few::FewPlan;
use crate::program::{By, Kernel, KernelKind};

/// The most dimensions of a map.
const RANK: usize = 5;
/// What a dimension of an operand is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cube) enum Of {
    /// Rows, columns or positions of the tile.
    Lines,
    /// What is summed.
    Depth,
    /// An index that all of a tile has.
    Chosen,
}

/// An operand as copies see it: dimensions, the innermost first. Of each, a box has some numbers that lie behind one another.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Map {
    value: ValueId,
    /// Numbers of 16 bits that each number is: as such it is copied.
    halves: u32,
    pub(super) dims: Vec<(Of, Vec<AxisId>, u32)>,
    pub(super) layout: Layout,
}

/// A map at a launch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    /// The number of its buffer.
    pub(crate) buffer: usize,
    pub(crate) dtype: DType,
    /// Numbers of each dimension, bytes from one of them to the next (for the innermost, those of a number), and numbers that a box has.
    pub(crate) dims: Vec<(u64, u64, u32)>,
}

impl Map {
    /// Of an operand whose lines and depth have these axes, if its boxes are boxes in memory.
    pub(in crate::cube) fn of(
        body: &Function,
        value: ValueId,
        (lines, depth): (&[AxisId], &[AxisId]),
        layout: Layout,
    ) -> Option<Map> {
        let wide = |a: &AxisId| body.axis(*a).size != Size::Fixed(1);
        let memory: Vec<_> = body.ty(value).axes.iter().copied().filter(wide).collect();
        let of = |a: &AxisId| match (lines.contains(a), depth.contains(a)) {
            (true, _) => Of::Lines,
            (_, true) => Of::Depth,
            (false, false) => Of::Chosen,
        };
        let mut dims: Vec<(Of, Vec<AxisId>, u32)> = Vec::new();
        for axis in memory.iter().rev() {
            match dims.last_mut() {
                Some((last, axes, _)) if *last == of(axis) && *last != Of::Chosen => axes.insert(0, *axis),
                _ => dims.push((of(axis), vec![*axis], 1)),
            }
        }
        // All of them behind one another, in the order in which they are numbered.
        let whole = |which: Of, axes: &[AxisId]| {
            let wanted: Vec<_> = axes.iter().copied().filter(wide).collect();
            let found: Vec<_> =
                dims.iter().filter(|(of, ..)| *of == which).map(|(_, axes, _)| axes).collect();
            if wanted.is_empty() { found.is_empty() } else { found == [&wanted] }
        };
        let inner = if layout.along { Of::Depth } else { Of::Lines };
        let (innermost, ..) = dims.first()?;
        if *innermost != inner || dims.len() > RANK || !whole(Of::Lines, lines) || !whole(Of::Depth, depth) {
            return None;
        }
        for (n, (of, _, width)) in dims.iter_mut().enumerate() {
            *width = match of {
                _ if n == 0 => SPAN,
                Of::Lines => layout.lines,
                Of::Depth => layout.depth,
                Of::Chosen => 1,
            };
        }
        Some(Map { value, halves: 1, dims, layout })
    }

    /// Of numbers that are copied as so many of 16 bits each.
    fn in_halves(self, halves: u32) -> Map {
        Map { halves, ..self }
    }

    /// What it is where axes have these extents.
    fn seen(&self, body: &Function, extents: &[usize]) -> Option<Seen> {
        let total = |axes: &[AxisId]| axes.iter().map(|a| extents[a.0 as usize] as u64).product::<u64>();
        let mut read = body.params.iter().filter(|p| CubeIr::reads(body, **p));
        let buffer = read.position(|p| *p == self.value)?;
        let mut stride = 2;
        let dims = self.dims.iter().enumerate().map(|(n, (_, axes, width))| {
            let of_each = if n == 0 { self.halves.into() } else { 1 };
            let (numbers, bytes) = (of_each * total(axes), stride);
            stride *= numbers;
            // Nothing is asked for where there is none, but maps have some.
            (numbers.max(1), bytes.max(2), *width)
        });
        let dtype = body.ty(self.value).dtype;
        Some(Seen { buffer, dtype: if self.halves > 1 { DType::Bf16 } else { dtype }, dims: dims.collect() })
    }

    /// Bytes of all boxes of a stage.
    pub(super) fn bytes(&self) -> u32 {
        2 * self.layout.elements()
    }

    /// The boxes of a stage: for each, where it begins in the innermost dimension behind the first one, and in the stage.
    pub(super) fn boxes(&self) -> impl Iterator<Item = [u32; 2]> + use<> {
        let runs = self.layout.runs();
        (0..self.layout.elements() / (SPAN * runs)).map(move |n| [SPAN * n, SPAN * runs * n])
    }
}

/// How the operands of a product come.
#[derive(Clone, Debug)]
pub(in crate::cube) struct Brought {
    /// The narrow one in boxes, or else pack by pack by all units that copy, as where an index says which rows a tile has.
    pub(super) left: Option<Map>,
    /// The wide ones in boxes.
    pub(super) right: Vec<Map>,
}

impl Brought {
    /// `None` if the device cannot bring the wide operands.
    pub(in crate::cube) fn of(
        body: &Function,
        plan: &FewPlan,
        layouts: [Layout; 2],
        factor: Factor,
    ) -> Option<Brought> {
        let in_order =
            Epilogue::of(body).along(body, &plan.columns).is_none_or(|r| r.pairs == Pairs::Interleaved);
        let ([narrow, wide], operand) = (layouts, plan.products[0].narrow);
        let dtype = body.ty(operand).dtype;
        let stored = (dtype == DType::F32) == (factor == Factor::Tf32)
            && plan.products.iter().all(|p| p.elements.dtype == dtype);
        if !in_order || !stored || !narrow.shared_out(COPIERS) {
            return None;
        }
        let left = match matrix::index(plan) {
            None => Map::of(body, operand, (&plan.rows, &plan.inner), narrow),
            Some(_) => None,
        };
        let right = plan.products.iter().map(|p| p.table.elements());
        let right = right.map(|table| Map::of(body, table?, (&plan.columns, &plan.inner), wide));
        let halves = |map: Map| map.in_halves(factor.halves());
        Some(Brought {
            left: left.map(halves),
            right: right.map(|map| map.map(halves)).collect::<Option<_>>()?,
        })
    }

    /// All maps, in the order of a kernel's arguments.
    fn maps(&self) -> impl Iterator<Item = &Map> {
        self.left.iter().chain(&self.right)
    }
}

/// The maps of a launch of a kernel with these run-time sizes, in the order of its arguments; most kernels have none.
pub(crate) fn of_launch(kernel: &Kernel, sizes: &[usize]) -> Vec<Seen> {
    seen(&of_kernel(kernel), kernel, sizes)
}

/// The maps of a kernel at these run-time sizes.
pub(in crate::cube) fn seen(maps: &[Map], kernel: &Kernel, sizes: &[usize]) -> Vec<Seen> {
    if maps.is_empty() {
        return Vec::new();
    }
    let extents = kernel.extents(sizes);
    maps.iter().filter_map(|map| map.seen(&kernel.body, &extents)).collect()
}

/// The maps of a kernel, if the device brings operands of it.
pub(in crate::cube) fn of_kernel(kernel: &Kernel) -> Vec<Map> {
    let maps = match kernel.kind {
        KernelKind::Matrix { wide, by: By::Boxes, .. } => Tile::of(kernel.kind).and_then(|tile| {
            let brought = tile.brought(&kernel.body, &matrix::plan(&kernel.body, wide.into())?)?;
            Some(brought.maps().cloned().collect())
        }),
        KernelKind::StreamMatrix { tall, by: By::Boxes } => MatrixPlan::of(&kernel.body).and_then(|plan| {
            let boxes = plan.brought(plan.tiling(tall, By::Boxes)?)?;
            Some(boxes.maps().cloned().collect())
        }),
        _ => None,
    };
    maps.unwrap_or_default()
}

/// What a reader of a kernel's text is told of its maps: for each, the parameter, its axes by dimension and the boxes.
pub(in crate::cube) fn told(kernel: &Kernel) -> Vec<(ValueId, String)> {
    let body = &kernel.body;
    let told = |map: &Map| {
        let sizes = map.dims.iter().enumerate().map(|(n, (_, axes, _))| {
            let each = (n == 0 && map.halves > 1).then(|| map.halves.to_string());
            let sizes = each.into_iter().chain(axes.iter().map(|a| body.axis(*a).size.to_string()));
            sizes.collect::<Vec<_>>().join(" * ")
        });
        let boxes: Vec<_> = map.dims.iter().map(|(.., width)| width.to_string()).collect();
        (map.value, format!("[{}] by boxes of {}", sizes.collect::<Vec<_>>().join(", "), boxes.join(" x ")))
    };
    of_kernel(kernel).iter().map(told).collect()
}
