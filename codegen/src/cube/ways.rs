//! The ways to compute a kernel, and which of them is taken at a launch.
//!
//! A way is a kernel with the same body and another kind, so that whatever runs, prints or checks kernels does so with ways.

use latentc_ir::AxisId;

use crate::few::FewPlan;
use crate::program::{Kernel, KernelKind};

/// Rows that a product with few rows has at most.
const FEW: usize = 32;
/// The most rows that are multiplied with what was read once.
const ROWS: usize = 8;

/// The ways to compute one kernel.
#[derive(Clone, Debug)]
pub(crate) struct Ways {
    /// As it came.
    plain: KernelKind,
    /// For each side that can be the wide one: the axes of the rows, and of the columns.
    few: Vec<(u8, Vec<AxisId>, Vec<AxisId>)>,
}

impl Ways {
    /// Those of a kernel. A kernel that is one of the ways has no others.
    pub(crate) fn of(kernel: &Kernel) -> Ways {
        let side = |wide: u8| {
            let plan = FewPlan::of(&kernel.body, wide.into())?;
            Some((wide, plan.rows, plan.columns))
        };
        let few = match kernel.kind {
            KernelKind::Contract | KernelKind::Grouped => [0, 1].into_iter().filter_map(side).collect(),
            KernelKind::Map
            | KernelKind::Scatter
            | KernelKind::Stream
            | KernelKind::Tiles
            | KernelKind::Few { .. } => Vec::new(),
        };
        Ways { plain: kernel.kind, few }
    }

    /// The way for these extents: what has more columns is wide, as long as the rows are few.
    pub(crate) fn choose(&self, extents: &[usize]) -> KernelKind {
        let total = |axes: &[AxisId]| axes.iter().map(|a| extents[a.0 as usize]).product::<usize>();
        let few = self.few.iter().map(|(wide, rows, columns)| (*wide, total(rows), total(columns)));
        let few = few.filter(|(_, rows, _)| *rows <= FEW);
        match few.max_by_key(|&(wide, rows, columns)| (columns, std::cmp::Reverse(rows), wide)) {
            Some((wide, rows, _)) => {
                let rows = rows.clamp(1, ROWS).next_power_of_two() as u8;
                KernelKind::Few { wide, rows }
            }
            None => self.plain,
        }
    }

    /// All of them but the plain one.
    pub(crate) fn others(&self) -> Vec<KernelKind> {
        let each = |(wide, ..): &(u8, Vec<AxisId>, Vec<AxisId>)| {
            let wide = *wide;
            [1, 2, 4, 8].map(|rows| KernelKind::Few { wide, rows })
        };
        self.few.iter().flat_map(each).collect()
    }
}

/// A kernel computed that way.
pub(crate) fn way(kernel: &Kernel, kind: KernelKind) -> Kernel {
    let name = match kind {
        KernelKind::Few { wide, rows } if kernel.kind != kind => format!("{}_few{wide}{rows}", kernel.name),
        _ => kernel.name.clone(),
    };
    Kernel { name, kind, body: kernel.body.clone() }
}

/// The kernel in the way that devices take for these run-time sizes. To have another, launch that one of [`ways`], or the kernel as
/// one of [`KernelKind::Tiles`].
pub fn chosen(kernel: &Kernel, sizes: &[usize]) -> Kernel {
    way(kernel, Ways::of(kernel).choose(&kernel.extents(sizes)))
}

/// The ways to compute a kernel besides the plain one, each a kernel. Devices choose among them by the sizes of a launch.
pub fn ways(kernel: &Kernel) -> Vec<Kernel> {
    Ways::of(kernel).others().into_iter().map(|kind| way(kernel, kind)).collect()
}
