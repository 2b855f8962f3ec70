//! Where the temporaries of a program lie: one piece of memory in which each has a place for as long as it lives.
//!
//! A plan is made for a whole run at given sizes. Calls are followed, so that a value lives from the launch that first writes it
//! to the one that last touches it, whichever routines these are in. Places are given to the largest values first (or in
//! another order, if that wastes less), each the lowest where nothing lies that lives at the same time.
//!
//! A result may take the place of an operand that dies with it, if the kernel reads of it, for each element that it makes, the very
//! element at the same index and nothing else: see [`in_place`].

mod account;
mod in_place;

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use latentc_ir::{DType, Size};
use serde::Serialize;

use crate::program::{Buffer, BufferId, Program, Role, Step};

pub use account::Account;
pub use in_place::{in_place, may_replace};

/// What a plan must know of a device's memory.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Places begin at multiples of so many bytes; at least 1.
    pub align: u64,
    /// The most bytes that one allocation has. Places do not cross from one to the next.
    pub page: u64,
    /// Bytes of an element of a temporary.
    pub bytes: fn(DType) -> u64,
    /// Bytes of one that is [kept](crate::device::Device::keep) from run to run.
    pub kept: fn(DType) -> u64,
    /// Whether results may take the places of operands.
    pub in_place: bool,
}

impl Layout {
    /// What of an allocation can be used: places end at multiples of `align` as well.
    fn whole_page(&self) -> u64 {
        (self.page / self.align * self.align).max(self.align)
    }
}

/// Where a temporary lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which allocation it is in.
    pub page: usize,
    /// Its first byte there.
    pub offset: u64,
    /// Its length.
    pub bytes: u64,
}

impl Place {
    /// Whether the two share a byte.
    pub fn meets(self, other: Place) -> bool {
        let before = |a: Place, b: Place| a.offset < b.offset + b.bytes;
        self.page == other.page && before(self, other) && before(other, self)
    }
}

/// The places of all temporaries of one run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Bytes of each allocation; one, unless it would be too large.
    pub pages: Vec<u64>,
    /// The most bytes that are alive at one moment: no plan takes less.
    pub bound: u64,
    /// For each call in order of execution, the entry's being the first, where its buffers lie.
    frames: Vec<Vec<Option<Place>>>,
}

/// What a plan comes to, for people and files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// The sizes that it was made for.
    pub sizes: BTreeMap<String, u64>,
    /// Bytes of all temporaries together.
    pub bytes: u64,
    /// The most bytes that are alive at one moment.
    pub bound: u64,
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// A size that was not given.
    #[error("@{routine}: `{buffer}` has the size `{size}`, which nothing gives")]
    Unbound {
        /// The routine.
        routine: String,
        /// The buffer.
        buffer: String,
        /// The symbol.
        size: String,
    },
    /// A value that no allocation can hold.
    #[error(
        "@{routine}: `{buffer}` has {bytes} bytes, where one allocation has {most} at most; read fewer tokens at once"
    )]
    Large {
        /// The routine.
        routine: String,
        /// The buffer.
        buffer: String,
        /// Its length.
        bytes: u64,
        /// The limit.
        most: u64,
    },
    /// A step calls a routine that is not there.
    #[error("there is no routine @{0}")]
    Missing(String),
}

impl Plan {
    /// Plans a run of a program at these sizes.
    ///
    /// # Errors
    /// See [`PlanError`].
    pub fn new(program: &Program, sizes: &BTreeMap<String, u64>, layout: &Layout) -> Result<Plan, PlanError> {
        Plan::make(program, sizes, layout, false)
    }

    /// The same for a caller that has memory for what the entry returns: those places have no bytes.
    ///
    /// # Errors
    /// See [`PlanError`].
    pub fn without_results(
        program: &Program,
        sizes: &BTreeMap<String, u64>,
        layout: &Layout,
    ) -> Result<Plan, PlanError> {
        Plan::make(program, sizes, layout, true)
    }

    fn make(
        program: &Program,
        sizes: &BTreeMap<String, u64>,
        layout: &Layout,
        elsewhere: bool,
    ) -> Result<Plan, PlanError> {
        let Lives { lives, frames, end, .. } = Lives::of(program, sizes, layout, elsewhere)?;
        let bound = alive(&lives, end).into_iter().max().unwrap_or(0);
        let (places, pages) = place(&lives, bound, layout);
        let at = |v: &Option<usize>| v.map(|v| Place { bytes: lives[v].bytes, ..places[lives[v].root] });
        let frames = frames.iter().map(|frame| frame.iter().map(at).collect()).collect();
        Ok(Plan { pages, bound, frames })
    }

    /// Bytes of all allocations.
    pub fn bytes(&self) -> u64 {
        self.pages.iter().sum()
    }

    /// Where a buffer lies during the call with this number. Parameters have the caller's place; weights, caches, constants
    /// and what the entry is given have none.
    pub fn place(&self, call: usize, buffer: BufferId) -> Option<Place> {
        self.frames.get(call)?.get(buffer.0 as usize).copied().flatten()
    }

    /// Follows a run of the program that the plan is for, and looks at memory alone: whether each value is still there when it is
    /// read, and whether a result lies where an operand is only where it may.
    ///
    /// # Errors
    /// The launch and the value of which that is not true.
    pub fn replay(&self, program: &Program, layout: &Layout) -> Result<(), String> {
        let mut replay =
            Replay { plan: self, program, layout, calls: 0, launches: 0, memory: BTreeMap::new() };
        let results = replay.routine(&program.entry, BTreeMap::new())?;
        let entry = program.routine(&program.entry).ok_or("there is no entry")?;
        for (&id, written) in entry.results.iter().zip(results) {
            if let Some(place) = self.place(0, id) {
                replay.intact(place, written, &entry.buffer(id).name)?;
            }
        }
        Ok(())
    }
}

/// A temporary of the run.
struct Life {
    bytes: u64,
    /// The first and the last launch that touches it.
    start: usize,
    end: usize,
    /// The value whose place it has; its own number if it has one of its own.
    root: usize,
    /// Until when its place is taken, by itself or by what comes there after it.
    taken: usize,
}

impl Life {
    /// The moments at which it takes memory that nothing else takes. Where a value takes the place of another, both are alive, but it
    /// is there once. `n` is its number.
    fn present(&self, n: usize) -> RangeInclusive<usize> {
        let from = if self.root == n { self.start } else { self.start.saturating_add(1) };
        from..=self.end
    }
}

/// All temporaries of a run.
struct Lives {
    lives: Vec<Life>,
    /// The numbers of those that the entry returns.
    results: Vec<usize>,
    /// For each call, the numbers of its buffers.
    frames: Vec<Vec<Option<usize>>>,
    /// The last moment.
    end: usize,
}

impl Lives {
    /// `elsewhere` says that the caller has memory for what the entry returns, which then takes none.
    fn of(
        program: &Program,
        sizes: &BTreeMap<String, u64>,
        layout: &Layout,
        elsewhere: bool,
    ) -> Result<Lives, PlanError> {
        let mut walk = Walk {
            program,
            sizes,
            layout,
            replaceable: program.kernels.iter().map(|kernel| in_place(kernel, layout)).collect(),
            clock: 0,
            lives: Vec::new(),
            frames: Vec::new(),
            moves: Vec::new(),
        };
        let mut given = BTreeMap::new();
        if let Some(entry) = program.routine(&program.entry).filter(|_| elsewhere) {
            given.extend(entry.results.iter().map(|&id| (id, walk.life(0))));
        }
        walk.routine(&program.entry, given)?;
        let Walk { mut lives, frames, moves, clock, .. } = walk;
        // The caller reads what the entry returns.
        let mut results = Vec::new();
        if let (Some(entry), Some(frame)) = (program.routine(&program.entry), frames.first()) {
            results.extend(entry.results.iter().filter_map(|r| frame[r.0 as usize]));
        }
        results.iter().for_each(|&v| lives[v].end = clock + 1);
        Ok(Lives { lives: in_places(lives, &moves), results, frames, end: clock + 1 })
    }
}

/// Follows the steps of a run.
struct Walk<'a> {
    program: &'a Program,
    sizes: &'a BTreeMap<String, u64>,
    layout: &'a Layout,
    /// By kernel.
    replaceable: Vec<Vec<usize>>,
    clock: usize,
    lives: Vec<Life>,
    frames: Vec<Vec<Option<usize>>>,
    /// Results, and the operands whose places they may take if those die at that moment.
    moves: Vec<(usize, Vec<usize>)>,
}

impl Walk<'_> {
    /// Follows a call. `given` are the values of the caller's that its buffers are.
    fn routine(&mut self, name: &str, given: BTreeMap<BufferId, usize>) -> Result<(), PlanError> {
        let routine = self.program.routine(name).ok_or_else(|| PlanError::Missing(name.to_owned()))?;
        let number = self.frames.len();
        self.frames.push(Vec::new());
        let mut frame: Vec<Option<usize>> = vec![None; routine.buffers.len()];
        for (id, value) in given {
            frame[id.0 as usize] = Some(value);
        }
        for group in routine.groups() {
            // Launches that may run at the same time are one moment.
            self.clock += usize::from(matches!(group[0], Step::Launch { .. }));
            for step in group {
                for &id in step.outputs() {
                    let buffer = routine.buffer(id);
                    if frame[id.0 as usize].is_none() && buffer.role == Role::Temp {
                        frame[id.0 as usize] = Some(self.value(name, buffer)?);
                    }
                }
                let value = |id: &BufferId| frame[id.0 as usize];
                match step {
                    Step::Launch { kernel, inputs, .. } => {
                        for v in inputs.iter().chain(step.outputs()).filter_map(value) {
                            let life = &mut self.lives[v];
                            life.start = life.start.min(self.clock);
                            life.end = self.clock;
                        }
                        if let [out] = step.outputs()
                            && let Some(out) = value(out)
                        {
                            // What is passed twice may be read elsewhere under its other name, or by a launch at the same time.
                            let read = |v: usize| {
                                let all = group.iter().flat_map(Step::inputs);
                                all.filter(|i| value(i) == Some(v)).count()
                            };
                            let from = self.replaceable[*kernel].iter().filter_map(|&n| value(&inputs[n]));
                            self.moves.push((out, from.filter(|&v| read(v) == 1).collect()));
                        }
                    }
                    Step::Call { routine: callee, inputs, outputs, .. } => {
                        let of =
                            self.program.routine(callee).ok_or_else(|| PlanError::Missing(callee.clone()))?;
                        let params = of.params.iter().zip(inputs);
                        let given = params.chain(of.results.iter().zip(outputs));
                        let given = given.filter_map(|(own, id)| Some((*own, value(id)?))).collect();
                        self.routine(callee, given)?;
                    }
                }
            }
        }
        self.frames[number] = frame;
        Ok(())
    }

    fn value(&mut self, routine: &str, buffer: &Buffer) -> Result<usize, PlanError> {
        let mut bytes = (self.layout.bytes)(buffer.dtype);
        for size in &buffer.dims {
            let n = match size {
                Size::Fixed(n) => *n,
                Size::Sym(s) => *self.sizes.get(s).ok_or_else(|| PlanError::Unbound {
                    routine: routine.to_owned(),
                    buffer: buffer.name.clone(),
                    size: s.clone(),
                })?,
            };
            bytes = bytes.saturating_mul(n);
        }
        let most = self.layout.whole_page();
        if bytes > most {
            let (routine, buffer) = (routine.to_owned(), buffer.name.clone());
            return Err(PlanError::Large { routine, buffer, bytes, most });
        }
        Ok(self.life(bytes))
    }

    fn life(&mut self, bytes: u64) -> usize {
        let root = self.lives.len();
        self.lives.push(Life { bytes, start: usize::MAX, end: 0, root, taken: 0 });
        root
    }
}

/// Gives results the places of operands that die with them, where a kernel allows it.
fn in_places(mut lives: Vec<Life>, moves: &[(usize, Vec<usize>)]) -> Vec<Life> {
    lives.iter_mut().for_each(|l| l.taken = l.end);
    for (out, from) in moves {
        let (start, bytes) = (lives[*out].start, lives[*out].bytes);
        let dies =
            |v: &&usize| lives[**v].end == start && lives[**v].bytes == bytes && lives[**v].start < start;
        // A value has one place: what is written again later keeps the one it has.
        if lives[*out].root == *out
            && let Some(&v) = from.iter().find(dies)
        {
            let root = lives[v].root;
            lives[*out].root = root;
            lives[root].taken = lives[*out].end;
        }
    }
    lives
}

/// The bytes that are alive at each moment.
fn alive(lives: &[Life], end: usize) -> Vec<u64> {
    let mut at: Vec<u64> = vec![0; end + 1];
    for (n, life) in lives.iter().enumerate().filter(|(_, l)| l.start <= l.end) {
        life.present(n).for_each(|t| at[t] += life.bytes);
    }
    at
}

/// A place for each value that has one of its own, and the bytes of each allocation. No order of placing is the best for all programs,
/// so others are tried where the first wastes more than a hundredth of `bound`.
fn place(lives: &[Life], bound: u64, layout: &Layout) -> (Vec<Place>, Vec<u64>) {
    let own = |n: &usize| lives[*n].root == *n && lives[*n].start <= lives[*n].end;
    let all: Vec<usize> = (0..lives.len()).filter(own).collect();
    // Largest first; longest-lived first; as they come; from the last on.
    let orders: [&dyn Fn(&Life) -> u64; 4] =
        [&|_| 0, &|l| u64::MAX - (l.taken - l.start) as u64, &|l| l.start as u64, &|l| {
            u64::MAX - l.taken as u64
        }];
    let mut best: Option<(Vec<Place>, Vec<u64>)> = None;
    let total = |pages: &[u64]| pages.iter().sum::<u64>();
    for first in orders {
        let mut order = all.clone();
        order.sort_by_key(|&n| (first(&lives[n]), Reverse(lives[n].bytes), lives[n].start));
        let found = place_in(&order, lives, layout);
        if best.as_ref().is_none_or(|(_, pages)| total(&found.1) < total(pages)) {
            best = Some(found);
        }
        if best.as_ref().is_some_and(|(_, pages)| total(pages) <= bound + bound / 100) {
            break;
        }
    }
    best.unwrap_or_default()
}

/// The same in one order: each where nothing lies that has been placed and lives at the same time.
fn place_in(order: &[usize], lives: &[Life], layout: &Layout) -> (Vec<Place>, Vec<u64>) {
    let (align, page) = (layout.align, layout.whole_page());
    // Offsets count through all pages until the end.
    let mut offsets = vec![0u64; lives.len()];
    let mut placed: Vec<usize> = Vec::new();
    for &n in order {
        let life = &lives[n];
        let bytes = life.bytes.max(1);
        let meets = |&&m: &&usize| lives[m].start <= life.taken && life.start <= lives[m].taken;
        let mut taken: Vec<_> =
            placed.iter().filter(meets).map(|&m| (offsets[m], offsets[m] + lives[m].bytes.max(1))).collect();
        taken.sort_unstable();
        let fit = |at: u64| {
            let at = at.next_multiple_of(align);
            if at / page == (at + bytes - 1) / page { at } else { at.next_multiple_of(page) }
        };
        let mut at = 0;
        for (from, to) in taken {
            if at + bytes > from {
                at = fit(at.max(to));
            }
        }
        offsets[n] = at;
        placed.push(n);
    }
    let mut pages: Vec<u64> = Vec::new();
    let mut places = vec![Place { page: 0, offset: 0, bytes: 0 }; lives.len()];
    for n in placed {
        let (number, offset) = ((offsets[n] / page) as usize, offsets[n] % page);
        places[n] = Place { page: number, offset, bytes: lives[n].bytes };
        pages.resize(pages.len().max(number + 1), 0);
        pages[number] = pages[number].max((offset + lives[n].bytes).next_multiple_of(align));
    }
    (places, pages)
}

/// Memory as a plan's launches leave it.
struct Replay<'a> {
    plan: &'a Plan,
    program: &'a Program,
    layout: &'a Layout,
    calls: usize,
    launches: usize,
    /// What lies where: by page and first byte, the length and the launch that wrote it.
    memory: BTreeMap<(usize, u64), (u64, usize)>,
}

impl Replay<'_> {
    /// Follows a call. `written` says which launch wrote each parameter; what is returned says so of the results.
    fn routine(
        &mut self,
        name: &str,
        mut written: BTreeMap<BufferId, usize>,
    ) -> Result<Vec<Option<usize>>, String> {
        let routine = self.program.routine(name).ok_or_else(|| format!("there is no routine @{name}"))?;
        let (plan, call) = (self.plan, self.calls);
        self.calls += 1;
        let at = |id: &BufferId| plan.place(call, *id);
        for group in routine.groups() {
            if let Step::Call { routine: callee, inputs, outputs, .. } = &group[0] {
                let missing = || format!("there is no routine @{callee}");
                let params = &self.program.routine(callee).ok_or_else(missing)?.params;
                let given = params.iter().zip(inputs);
                let given = given.filter_map(|(p, id)| Some((*p, *written.get(id)?))).collect();
                let made = self.routine(callee, given)?;
                written.extend(outputs.iter().zip(made).filter_map(|(id, w)| Some((*id, w?))));
                continue;
            }
            let read: Vec<_> = group.iter().flat_map(Step::inputs).collect();
            let made: Vec<_> = group.iter().flat_map(Step::outputs).filter_map(at).collect();
            for step in group {
                let Step::Launch { kernel, inputs, .. } = step else { continue };
                self.launches += 1;
                let kernel = &self.program.kernels[*kernel];
                for (id, place) in inputs.iter().filter_map(|id| Some((id, at(id)?))) {
                    self.intact(place, written.get(id).copied(), &routine.buffer(*id).name)?;
                }
                let allowed = in_place(kernel, self.layout);
                for &id in step.outputs() {
                    let Some(out) = at(&id) else { continue };
                    // By all launches that may run at the same time.
                    let shared =
                        read.iter().filter(|id| at(id).is_some_and(|place| place.meets(out))).count();
                    let own = |n: &usize| at(&inputs[*n]) == Some(out);
                    let alone = made.iter().filter(|place| place.meets(out)).count() == 1;
                    let fine = match shared {
                        0 => true,
                        1 => allowed.iter().any(own),
                        _ => false,
                    };
                    if !(fine && (alone || out.bytes == 0)) {
                        let value = &routine.buffer(id).name;
                        return Err(format!(
                            "@{name}: {} writes `{value}` where something is read or written",
                            kernel.name
                        ));
                    }
                    written.insert(id, self.launches);
                    self.write(out);
                }
            }
        }
        Ok(routine.results.iter().map(|r| written.get(r).copied()).collect())
    }

    fn write(&mut self, place: Place) {
        let over: Vec<_> = self
            .memory
            .iter()
            .filter(|&(&(page, offset), &(bytes, _))| place.meets(Place { page, offset, bytes }))
            .map(|(&at, _)| at)
            .collect();
        for at in over {
            self.memory.remove(&at);
        }
        self.memory.insert((place.page, place.offset), (place.bytes, self.launches));
    }

    fn intact(&self, place: Place, written: Option<usize>, value: &str) -> Result<(), String> {
        let there = self.memory.get(&(place.page, place.offset)).map(|&(_, launch)| launch);
        if place.bytes == 0 || (written.is_some() && there == written) {
            return Ok(());
        }
        Err(format!(
            "launch {}: `{value}` was written by {written:?}, {there:?} is in its place",
            self.launches
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::{KernelKind, Routine, parsed};

    const LAYOUT: Layout =
        Layout { align: 4, page: 1 << 40, bytes: |d| d.bytes(), kept: |d| d.bytes(), in_place: true };

    /// `s = a + c` with a, b, c and at last y made of each other by products: b of a, c of b, y of s.
    fn chain() -> Program {
        let product = "  axes t, d=8, e=8\n  param x: f32[t, d=8]\n  param w: f32[e=8, d=8]\n\n  \
                       y: f32[t, e=8] = contract x, w over d\n";
        let sum =
            "  axes t, d=8\n  param x: f32[t, d=8]\n  param z: f32[t, d=8]\n\n  y: f32[t, d=8] = add x, z\n";
        let names = ["x", "w", "a", "b", "c", "s", "y"];
        let id = |name: &str| BufferId(names.iter().position(|n| *n == name).expect("a name") as u32);
        let role = |name: &str| match name {
            "x" => Role::Param,
            "w" => Role::Weight { index: 0 },
            _ => Role::Temp,
        };
        let dims = vec![Size::Sym("t".to_owned()), Size::Fixed(8)];
        let buffer =
            |n: &&str| Buffer { name: (*n).to_owned(), dtype: DType::F32, dims: dims.clone(), role: role(n) };
        let launch = |kernel, inputs: [&str; 2], output| Step::Launch {
            kernel,
            inputs: inputs.map(id).to_vec(),
            output: id(output),
            sizes: vec![Size::Sym("t".to_owned())],
            beside: false,
            origins: Vec::new(),
        };
        let routine = Routine {
            name: "f".to_owned(),
            buffers: names.iter().map(buffer).collect(),
            params: vec![id("x")],
            results: vec![id("y")],
            steps: vec![
                launch(0, ["x", "w"], "a"),
                launch(0, ["a", "w"], "b"),
                launch(0, ["b", "w"], "c"),
                launch(1, ["a", "c"], "s"),
                launch(0, ["s", "w"], "y"),
            ],
        };
        let kernels = vec![parsed(KernelKind::Contract, product), parsed(KernelKind::Map, sum)];
        Program { name: "m".to_owned(), kernels, routines: vec![routine], entry: "f".to_owned(), pool: None }
    }

    fn plan(program: &Program, layout: &Layout) -> Plan {
        let plan = Plan::new(program, &BTreeMap::from([("t".to_owned(), 10)]), layout).expect("it fits");
        plan.replay(program, layout).expect("values stay until they are read");
        plan
    }

    #[test]
    fn values_share_memory_when_they_do_not_live_together() {
        let program = chain();
        let with = plan(&program, &LAYOUT);
        let without = plan(&program, &Layout { in_place: false, ..LAYOUT });
        // Each value has 320 bytes. At the third product a, b and c live; the sum needs no more.
        for plan in [&with, &without] {
            assert_eq!((plan.bytes(), plan.bound), (960, 960));
        }
        let of = |plan: &Plan, n: u32| plan.place(0, BufferId(n)).expect("a temporary");
        let (a, c, s) = (2, 4, 5);
        assert_eq!(of(&with, s), of(&with, a));
        assert!(!of(&without, s).meets(of(&without, a)) && !of(&without, s).meets(of(&without, c)));
    }

    #[test]
    fn what_is_overwritten_too_early_is_found() {
        let program = chain();
        let mut wrong = plan(&program, &LAYOUT);
        wrong.frames[0][4] = wrong.frames[0][2];
        let why = wrong.replay(&program, &LAYOUT).expect_err("c lies where a is");
        assert_eq!(why, "launch 4: `a` was written by Some(1), Some(3) is in its place");
    }

    #[test]
    fn places_do_not_cross_pages() {
        let program = chain();
        let layout = Layout { page: 700, align: 256, ..LAYOUT };
        // Of 700 bytes 512 can be used, and a value of 320 has them for itself.
        assert_eq!(plan(&program, &layout).pages, [512, 512, 512]);
        let none = Plan::new(&program, &BTreeMap::new(), &layout).expect_err("t is not given").to_string();
        assert_eq!(none, "@f: `a` has the size `t`, which nothing gives");
        let long = BTreeMap::from([("t".to_owned(), 1000)]);
        let large = Plan::new(&program, &long, &layout).expect_err("too long").to_string();
        assert!(
            large.starts_with("@f: `a` has 32000 bytes, where one allocation has 512 at most"),
            "{large}"
        );
    }
}
