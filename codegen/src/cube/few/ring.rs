//! What is wide, on its way past the registers.
//!
//! A unit begins to copy the packs that it will multiply into places of its own in shared memory (`cp.async`), some rounds before it
//! multiplies them. Nobody else reads what it has copied, so it waits for its own copies and for no other unit. Registers that need not hold
//! what is on its way are there for more cubes, and for those of the grid behind, which begin to copy before this one is done.

use super::tiling::rings;
use super::wide::Part;
use super::{Few, UNITS};
use crate::cube::emit::{Emit, Pack, Shared, Val};

/// Where packs on their way lie: for each part of each product, its array and how many of a unit's elements lie in that before its own, some
/// rounds of some packs.
pub(super) struct Ring {
    memory: Vec<Vec<(Shared, u32)>>,
}

impl Ring {
    /// Room for as many as the tiling says.
    pub(super) fn new(e: &mut Emit, few: &Few<'_>) -> Ring {
        let parts = || few.wides.iter().flatten().map(|(part, _)| *part);
        let mut rings: Vec<_> =
            rings(parts()).into_iter().map(|(elem, _)| (elem, e.common(elem), 0)).collect();
        let mut place = |elem, width: u32| {
            let (_, memory, before) = rings.iter_mut().find(|(of, ..)| *of == elem).expect("one for each");
            let found = (*memory, *before);
            *before += few.t.slots() * width;
            found
        };
        let of =
            |own: &Vec<_>| own.iter().map(|(part, _): &(Part, _)| place(part.elem, part.width)).collect();
        Ring { memory: few.wides.iter().map(of).collect() }
    }
}

impl Few<'_> {
    /// Begins to copy what a round reads into a slot of the ring.
    pub(super) fn copy(&self, e: &mut Emit, (ring, slot): (&Ring, Val), packs: &[(usize, Val)]) {
        let mut places = self.places(e, (ring, slot)).into_iter();
        for &(p, pack) in packs {
            for ((part, buf), (memory, place)) in self.wides[p].iter().zip(places.by_ref()) {
                let (at, width) = (part.at(e, pack), e.u32(part.width));
                let (from, to) = (e.mul(at, width), e.mul(place, width));
                e.copy_whole_ahead(*buf, from, memory, to, part.width);
            }
        }
    }

    /// What this unit has copied into a slot: packs in the order of a round.
    pub(super) fn copied(&self, e: &mut Emit, (ring, slot): (&Ring, Val)) -> Vec<Pack> {
        let widths = self.in_round().map(|(_, part, _)| part.width);
        let places = self.places(e, (ring, slot)).into_iter().zip(widths);
        places.map(|((memory, at), width)| e.load_pack(memory, at, width, true)).collect()
    }

    /// The parts of a round's packs, in its order: each with its product and number there, and with the number of the pack among those that
    /// the product has in a round.
    fn in_round(&self) -> impl Iterator<Item = ((usize, usize), Part, u32)> {
        let t = &self.t;
        (0..t.packs() * t.unroll).flat_map(move |n| {
            let (step, in_step) = (n / t.packs(), n % t.packs());
            let (p, column) = ((in_step / t.each) as usize, in_step % t.each);
            let parts = self.wides[p].iter().enumerate();
            parts.map(move |(part, (of, _))| ((p, part), *of, step * t.each + column))
        })
    }

    /// Their places, in accesses: units lie side by side, so that they meet in no bank.
    fn places(&self, e: &mut Emit, (ring, slot): (&Ring, Val)) -> Vec<(Shared, Val)> {
        let (unit, units, of_slot) = (e.unit(), e.u32(UNITS), e.u32(self.t.unroll * self.t.each));
        let first = e.mul(slot, of_slot);
        self.in_round()
            .map(|((p, part), of, number)| {
                let (memory, before) = ring.memory[p][part];
                let number = e.u32(number);
                let number = e.add(first, number);
                let skipped = e.mul(number, units);
                let before = e.u32(before * UNITS / of.width);
                let at = e.add(before, skipped);
                (memory, e.add(at, unit))
            })
            .collect()
    }
}
