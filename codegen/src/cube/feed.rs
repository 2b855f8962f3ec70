//! How tiles of operands come into shared memory.
//!
//! An operand has some stages there, each with a tile's rows (or columns) by some numbers of depth. Where it is stored as it is multiplied, it
//! is copied past the registers, in packs of 16 bytes: a copy is begun several stages before it is wanted. Where it is wider, what is read
//! stays in registers while the stage at hand is multiplied, and is split into numbers of 16 bits that add up to it. What lies beyond an edge
//! is 0 either way. Depth is told in numbers of 16 bits, of which a [`Factor`] may be two.

use super::contract::Offsets;
use super::emit::{Bits, Buf, Cmp, Elem, Emit, Pack, Shared, Val};
use super::fragment::{Factor, PACK, keep_split, read_stored};
use super::matrix::Part;

/// How a tile of an operand lies in a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Rows or columns.
    pub(super) lines: u32,
    /// Numbers of depth.
    pub(super) depth: u32,
    /// Whether the numbers of a row lie behind one another; if not, those of a depth do.
    pub(super) along: bool,
    /// Whether a run is cut into pieces of [`SPAN`] numbers. The first pieces of all runs lie behind one another, then the second ones.
    pub(super) cut: bool,
}

/// The stage behind one of so many: the first behind the last.
pub(super) fn behind(e: &mut Emit, stage: Val, stages: u32) -> Val {
    let [zero, one, all] = [0, 1, stages].map(|n| e.u32(n));
    let next = e.add(stage, one);
    let over = e.cmp(Cmp::Eq, next, all);
    e.select(over, zero, next)
}

/// The numbers that are turned round together: eight packs.
pub(super) const SPAN: u32 = 8 * PACK;

impl Layout {
    /// The numbers that lie behind one another.
    fn run(self) -> u32 {
        if self.along { self.depth } else { self.lines }
    }

    /// Whether eight packs that lie behind one another are turned round in each run, so that those of eight runs meet in no bank, with no
    /// room between runs.
    fn turned(self) -> bool {
        self.run().is_multiple_of(SPAN)
    }

    /// From one run to the next. Where packs are not turned, those of eight runs meet in no bank because of this.
    pub(super) fn pitch(self) -> u32 {
        match (self.cut, self.turned()) {
            (true, _) => SPAN,
            (false, true) => self.run(),
            (false, false) => self.run() + PACK,
        }
    }

    /// How many runs there are.
    pub(super) fn runs(self) -> u32 {
        if self.along { self.lines } else { self.depth }
    }

    /// Elements of a stage.
    pub(super) fn elements(self) -> u32 {
        self.runs() * if self.cut { self.run() } else { self.pitch() }
    }

    /// How many packs each of so many units brings in.
    fn packs(self, units: u32) -> u32 {
        debug_assert!(self.shared_out(units), "{self:?} among {units} units");
        self.lines * self.depth / PACK / units
    }

    /// Whether each of so many units brings in as many packs as all others.
    pub(super) fn shared_out(self, units: u32) -> bool {
        (self.lines * self.depth / PACK).is_multiple_of(units)
    }

    /// Of a pack, by its number: its row, its depth, and where it lies in a stage.
    fn pack(self, e: &mut Emit, number: Val) -> (Val, Val, Val) {
        let (pack, of_run) = (e.u32(PACK), e.u32(self.run() / PACK));
        let (outer, inner) = (e.div(number, of_run), e.rem(number, of_run));
        let inner = e.mul(inner, pack);
        let place = self.place(e, outer, inner);
        if self.along { (outer, inner, place) } else { (inner, outer, place) }
    }

    /// Where a pack lies that is in a run at a place.
    pub(super) fn place(self, e: &mut Emit, run: Val, at: Val) -> Val {
        let pitch = e.u32(self.pitch());
        let mut start = e.mul(run, pitch);
        let mut at = at;
        if self.cut && self.run() > SPAN {
            let (span, size) = (e.u32(SPAN), e.u32(self.runs() * SPAN));
            let piece = e.div(at, span);
            let before = e.mul(piece, size);
            start = e.add(before, start);
            at = e.rem(at, span);
        }
        let at = self.turn(e, run, at);
        e.add(start, at)
    }

    /// The place in a run where what would be at another one lies.
    pub(super) fn turn(self, e: &mut Emit, run: Val, at: Val) -> Val {
        if !self.turned() {
            return at;
        }
        let (eight, pack) = (e.u32(8), e.u32(PACK));
        let turn = e.rem(run, eight);
        let turn = e.mul(turn, pack);
        e.bits(Bits::Xor, at, turn)
    }
}

/// Eight runs of [`SPAN`] numbers, which are turned round by 0 to 7 packs.
pub(super) const TURNED_BYTES: usize = 1024;

/// An operand in shared memory.
pub(super) struct Staged {
    pub(super) layout: Layout,
    /// The stages of each number of 16 bits that stands for one of the operand.
    pub(super) pieces: Vec<Shared>,
}

impl Staged {
    /// Room for so many stages.
    pub(super) fn new(e: &mut Emit, elem: Elem, layout: Layout, pieces: u32, stages: u32) -> Staged {
        let elements = (stages * layout.elements()) as usize;
        // Groups of planes turn packs round by the bits of their addresses.
        let memory = |e: &mut Emit| match layout.cut {
            true => e.shared_at(elem, elements, TURNED_BYTES),
            false => e.shared(elem, elements),
        };
        Staged { layout, pieces: (0..pieces).map(|_| memory(e)).collect() }
    }

    /// Where a stage begins.
    pub(super) fn first(&self, e: &mut Emit, stage: Val) -> Val {
        let size = e.u32(self.layout.elements());
        e.mul(stage, size)
    }
}

/// A pack that this unit brings in each time.
struct Load {
    buf: Buf,
    /// How it is stored.
    elem: Elem,
    /// Its operand.
    operand: usize,
    /// Where it lies in memory but for the depth, whether its row exists, its depth in a stage, and its place there.
    start: Val,
    exists: Val,
    depth: Val,
    place: Val,
}

/// What has been read ahead, by load.
pub(super) type Read = Vec<Option<Vec<Pack>>>;

/// All that is brought in.
pub(super) struct Feed<'s> {
    factor: Factor,
    operands: Vec<&'s Staged>,
    /// Where a depth lies in each operand.
    steps: Vec<Offsets>,
    loads: Vec<Load>,
    /// All depth, what is brought of it, and whether that fills stages.
    depth: Val,
    part: Part,
    whole: bool,
    /// The number of this unit among those that bring.
    unit: Val,
}

impl<'s> Feed<'s> {
    /// Of operands with this depth, and a part of it, brought by units with numbers from 0 on, of which this is one.
    pub(super) fn new(factor: Factor, (depth, part): (Val, Part), unit: Val) -> Feed<'s> {
        let (operands, steps, loads) = (Vec::new(), Vec::new(), Vec::new());
        Feed { factor, operands, steps, loads, depth, part, whole: true, unit }
    }

    /// Adds an operand. `line` says where a row or column of the tile begins in its memory, and whether it exists; packs across lie in
    /// eight neighbours.
    pub(super) fn add(
        &mut self,
        e: &mut Emit,
        units: u32,
        (buf, elem): (Buf, Elem),
        (staged, steps): (&'s Staged, Offsets),
        mut line: impl FnMut(&mut Emit, Val) -> (Val, Val),
    ) {
        for n in 0..staged.layout.packs(units) {
            let first = e.u32(n * units);
            let number = e.add(self.unit, first);
            let (row, depth, place) = staged.layout.pack(e, number);
            let (start, exists) = line(e, row);
            let operand = self.operands.len();
            self.loads.push(Load { buf, elem, operand, start, exists, depth, place });
        }
        let fills = |depth: u64| depth.is_multiple_of(staged.layout.depth.into());
        self.whole &= self.depth.known().is_some_and(fills);
        self.operands.push(staged);
        self.steps.push(steps);
    }

    /// Whether an operand is copied past the registers.
    fn copies(&self, load: &Load) -> bool {
        load.elem == self.factor.stored() && self.operands[load.operand].pieces.len() == 1
    }

    /// Whether a load reads something from this depth on, and where that lies.
    fn at(&self, e: &mut Emit, load: &Load, base: Val, k0: Val) -> (Val, Val) {
        let k = e.add(k0, load.depth);
        let deep = e.lt(k, self.part.end);
        let inside = if self.whole { load.exists } else { e.and(load.exists, deep) };
        let halves = e.u32(self.factor.halves());
        let number = e.div(k, halves);
        let step = self.steps[load.operand].at(e, number);
        let at = e.add(base, load.start);
        (inside, e.add(at, step))
    }

    /// Begins to copy what lies from a depth on into a stage; `bases` is where each operand begins.
    pub(super) fn copy(&self, e: &mut Emit, bases: &[Val], k0: Val, stage: Val) {
        let some = e.lt(k0, self.part.end);
        e.if_(some, |e| {
            let firsts: Vec<_> = self.operands.iter().map(|staged| staged.first(e, stage)).collect();
            for load in self.loads.iter().filter(|l| self.copies(l)) {
                let (inside, at) = self.at(e, load, bases[load.operand], k0);
                let place = e.add(firsts[load.operand], load.place);
                e.copy_ahead(inside, load.buf, at, self.operands[load.operand].pieces[0], place);
            }
        });
        e.group_copies();
    }

    /// Reads what lies from a depth on and is not copied. It wants to be [kept](Feed::keep).
    pub(super) fn read(&self, e: &mut Emit, bases: &[Val], k0: Val) -> Read {
        let mut all = Vec::new();
        for load in &self.loads {
            if self.copies(load) {
                all.push(None);
                continue;
            }
            let (mut inside, at) = self.at(e, load, bases[load.operand], k0);
            if self.whole {
                let some = e.lt(k0, self.part.end);
                inside = e.and(inside, some);
            }
            all.push(Some(read_stored(e, (load.buf, load.elem), inside, |_| at)));
        }
        all
    }

    /// Puts what was read into a stage.
    pub(super) fn keep(&self, e: &mut Emit, stage: Val, read: &Read) {
        for (load, read) in self.loads.iter().zip(read) {
            let Some(read) = read else { continue };
            let staged = self.operands[load.operand];
            let first = staged.first(e, stage);
            let place = e.add(first, load.place);
            keep_split(e, self.factor.elem(), read, &staged.pieces, place);
        }
    }
}
