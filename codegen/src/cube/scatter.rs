//! Scatters through CubeCL: a unit has an index of all axes of the result but the one that is indexed, and adds the rows that
//! reach it in order, without atomics.
//!
//! It reads and writes the result again for every row, so a launch takes the time of its rows one after another; units side by side
//! are neighbours in memory. An index outside of the axis adds nothing.

use latentc_ir::{AxisId, Function, ValueId};

use super::emit::{Buf, Elem, Emit};
use super::expr::Exprs;
use crate::scatter::ScatterPlan;

/// Units of a cube.
pub(crate) const UNITS: u32 = 256;

/// The axes of the result that number the units.
pub(crate) fn units(body: &Function, plan: &ScatterPlan) -> Vec<AxisId> {
    body.ty(body.results[0]).axes.iter().copied().filter(|&a| a != plan.along).collect()
}

/// The kernel's instructions, over the buffers of factors and index, and the output.
pub(crate) fn emit(e: &mut Emit, x: &Exprs<'_>, plan: &ScatterPlan, values: &[Buf], index: Buf, output: Buf) {
    let body = x.body();
    let result = &body.ty(body.results[0]).axes;
    let units = units(body, plan);
    let summed: Vec<_> = plan.rows.iter().copied().filter(|a| !result.contains(a)).collect();
    let total = x.total(e, &units);
    let flat = e.unit_in_grid();
    let inside = e.lt(flat, total);
    e.if_(inside, |e| {
        let unit = x.split(e, flat, &units);
        let (none, one) = (e.u32(0), e.u32(1));
        let size = x.extent(plan.along);
        let here = |axes: &[AxisId], known: &[(&[AxisId], &[super::emit::Val])]| {
            let along =
                |a: &AxisId| known.iter().find_map(|(of, at)| of.iter().position(|k| k == a).map(|n| at[n]));
            axes.iter().filter_map(along).collect::<Vec<_>>()
        };
        e.for_step(none, size, one, |e, at| {
            let place = here(result, &[(&units, &unit), (&[plan.along], &[at])]);
            let address = x.join(e, &place, result);
            let zero = e.f32(0.0);
            e.store(output, address, zero);
        });
        let rows = x.total(e, &summed);
        e.for_step(none, rows, one, |e, row| {
            let row = x.split(e, row, &summed);
            let of = |e: &mut Emit, v: ValueId| {
                let axes = &body.ty(v).axes;
                let place = here(axes, &[(&units, &unit), (&summed, &row)]);
                x.join(e, &place, axes)
            };
            let address = of(e, plan.index);
            let at = e.load(index, address);
            // A negative index becomes a large one, so one comparison finds all that lie outside.
            let at = e.cast(at, Elem::U32);
            let inside = e.lt(at, size);
            e.if_(inside, |e| {
                let factors: Vec<_> = plan
                    .factors
                    .iter()
                    .zip(values)
                    .map(|(&x, &buffer)| {
                        let address = of(e, x);
                        let factor = e.load(buffer, address);
                        e.cast(factor, Elem::F32)
                    })
                    .collect();
                let term = factors[1..].iter().fold(factors[0], |product, &x| e.mul(product, x));
                let place = here(result, &[(&units, &unit), (&[plan.along], &[at])]);
                let address = x.join(e, &place, result);
                let sum = e.load(output, address);
                let sum = e.add(sum, term);
                e.store(output, address, sum);
            });
        });
    });
}
