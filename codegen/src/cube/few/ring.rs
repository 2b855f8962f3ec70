//! What is wide, on its way past the registers.
//!
//! A unit begins to copy the packs that it will multiply into places of its own in shared memory (`cp.async`), some rounds before it
//! multiplies them. Nobody else reads what it has copied, so it waits for its own copies and for no other unit. Registers that need not hold
//! what is on its way are there for more cubes, and for those of the grid behind, which begin to copy before this one is done.

use latentc_ir::Function;

use super::tiling::rings;
use super::{Few, Table, UNITS};
use crate::cube::emit::{Emit, Pack, Shared, Val};

/// Where packs on their way lie: for each product, its array and how many packs of a unit lie before its own, some rounds of some packs.
pub(super) struct Ring {
    memory: Vec<(Shared, u32)>,
}

impl Ring {
    /// Room for as many as the tiling says.
    pub(super) fn new(e: &mut Emit, few: &Few<'_>, body: &Function) -> Ring {
        let rings = rings(body, few.plan, few.target);
        let arrays: Vec<_> = rings.iter().map(|&(elem, _)| e.common(elem)).collect();
        let of = |p: usize| {
            let found = rings.iter().zip(&arrays).find_map(|((_, own), &array)| {
                let before = own.iter().position(|&n| n == p)?;
                Some((array, before as u32 * few.t.slots()))
            });
            found.expect("each product has its packs in one of them")
        };
        Ring { memory: (0..few.plan.products.len()).map(of).collect() }
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
        for (&(p, at), (memory, place)) in packs.iter().zip(self.places(e, (ring, slot), packs.len())) {
            let pack = e.u32(self.t.pack);
            let (from, to) = (e.mul(at, pack), e.mul(place, pack));
            e.copy_whole_ahead(tables[p].buf, from, memory, to);
        }
    }

    /// What this unit has copied into a slot: packs in the order of a round.
    pub(super) fn copied(&self, e: &mut Emit, (ring, slot): (&Ring, Val)) -> Vec<Pack> {
        let packs = (self.t.packs() * self.t.unroll) as usize;
        let places = self.places(e, (ring, slot), packs).into_iter();
        places.map(|(memory, at)| e.load_pack(memory, at, self.t.pack, true)).collect()
    }

    /// The places of a round's packs, in the order of the round: units lie side by side, so that they meet in no bank.
    fn places(&self, e: &mut Emit, (ring, slot): (&Ring, Val), packs: usize) -> Vec<(Shared, Val)> {
        let t = &self.t;
        let (unit, units, of_slot) = (e.unit(), e.u32(UNITS), e.u32(t.unroll * t.each));
        let first = e.mul(slot, of_slot);
        (0..packs as u32)
            .map(|n| {
                let (step, in_step) = (n / t.packs(), n % t.packs());
                let (p, column) = (in_step / t.each, in_step % t.each);
                let (memory, before) = ring.memory[p as usize];
                let number = e.u32(before + step * t.each + column);
                let number = e.add(first, number);
                let before = e.mul(number, units);
                (memory, e.add(before, unit))
            })
            .collect()
    }
}
