//! What is wide, on its way past the registers.
//!
//! A unit begins to copy the packs that it will multiply into places of its own in shared memory (`cp.async`), some rounds before it
//! multiplies them. Nobody else reads what it has copied, so it waits for its own copies and for no other unit. Registers that need not hold
//! what is on its way are there for more cubes, and for those of the grid behind, which begin to copy before this one is done.

use latentc_ir::Function;

use super::tiling::elem_of;
use super::{Few, Table, UNITS};
use crate::cube::emit::{Emit, Pack, Shared, Val};

/// Where packs on their way lie: for each product, some rounds of some packs of all units.
pub(super) struct Ring {
    memory: Vec<Shared>,
}

impl Ring {
    /// Room for as many as the tiling says.
    pub(super) fn new(e: &mut Emit, few: &Few<'_>, body: &Function) -> Ring {
        let tables = few.plan.products.iter().map(|p| elem_of(body, p.table, few.target));
        Ring { memory: tables.map(|elem| e.common(elem)).collect() }
    }
}

impl Few<'_> {
    /// Begins to copy what a round reads into a slot of the ring.
    pub(super) fn copy(
        &self,
        e: &mut Emit,
        (ring, slot): (&Ring, Val),
        tables: &[Table],
        packs: &[(usize, Val)],
    ) {
        for (&(p, at), place) in packs.iter().zip(self.places(e, slot, packs.len())) {
            let pack = e.u32(self.t.pack);
            let (from, to) = (e.mul(at, pack), e.mul(place, pack));
            e.copy_whole_ahead(tables[p].buf, from, ring.memory[p], to);
        }
    }

    /// What this unit has copied into a slot: packs in the order of a round.
    pub(super) fn copied(&self, e: &mut Emit, (ring, slot): (&Ring, Val)) -> Vec<Pack> {
        let of_step = self.t.packs() as usize;
        let places = self.places(e, slot, of_step * self.t.unroll as usize);
        let each = self.t.each as usize;
        let packs = places.into_iter().enumerate();
        packs.map(|(n, at)| e.load_pack(ring.memory[n % of_step / each], at, self.t.pack, true)).collect()
    }

    /// The places of a round's packs in the memory of their products: units lie side by side, so that they meet in no bank.
    fn places(&self, e: &mut Emit, slot: Val, packs: usize) -> Vec<Val> {
        let t = &self.t;
        let (unit, units, of_slot) = (e.unit(), e.u32(UNITS), e.u32(t.unroll * t.each));
        let first = e.mul(slot, of_slot);
        (0..packs as u32)
            .map(|n| {
                let (step, column) = (n / t.packs(), n % t.each);
                let number = e.u32(step * t.each + column);
                let number = e.add(first, number);
                let before = e.mul(number, units);
                e.add(before, unit)
            })
            .collect()
    }
}
