//! Products that four planes multiply together, with both operands in shared memory: `wgmma` (PTX ISA, "Asynchronous Warpgroup Level
//! Matrix Multiply-Accumulate Instructions"), which devices of compute capability 9.0 have and no others.
//!
//! A group of four planes multiplies 64 rows, 8 to 256 columns and 16 numbers of depth at a time. Of the sums, its planes have 16 rows
//! each, and a unit of them what it has of `mma`, for each 8 columns ("Matrix Fragments for wgmma.mma_async.m64nNk16"). Operands
//! are named by descriptors ("Matrix Descriptor Format"): where they begin, how far it is from eight runs to the next eight, and from 64
//! numbers that lie behind one another to the next 64. Runs of 64 numbers have their eight packs turned round, by the bits 7 to
//! 9 of their addresses ("Swizzling Modes", 128 bytes), as [`feed`](super::feed) lays them out.
//!
//! What is multiplied is there after a while: sums may not be touched before `wgmma.wait_group`, and what the instruction reads
//! not be written over. It reads through another proxy than units write ("Async Proxy"), which `fence.proxy.async` lets see what they wrote.
//!
//! A cube has several stages. While its groups multiply one, the copies of a later one are begun, in the place of the one before: all
//! groups are done with that when they meet.
//!
//! A left operand may be in registers instead, as that of `mma` is. Nor may these be written before what multiplies them was waited for.
//!
//! CubeCL 0.10 has no name for any of this: see [`expand`].

use std::fmt::Write;

use super::bulk;
use super::emit::{Array, Emit, GROUPS, Shared, Val};
use super::feed::{self, Feed, SPAN, Staged, TURNED_BYTES};
use super::fragment::{Factor, PACK};
use super::matrix::Part;
use super::sums::Sums;
use super::tiles::steps;

/// Rows that a group of planes multiplies at a time.
pub(super) const ROWS: u32 = 64;

/// The groups of planes of a cube.
pub(super) struct Groups<'p> {
    factor: Factor,
    sums: &'p Sums<'p>,
    left: &'p Staged,
    right: &'p [Staged],
    stages: u32,
    /// Where the group's rows begin in a stage.
    rows: Val,
}

impl<'p> Groups<'p> {
    /// For so many stages of both operands.
    pub(super) fn new(
        e: &mut Emit,
        factor: Factor,
        sums: &'p Sums<'p>,
        (left, right): (&'p Staged, &'p [Staged]),
        stages: u32,
    ) -> Groups<'p> {
        let (four, size) = (e.u32(4), e.u32(ROWS * sums.tile.high() * left.layout.depth));
        let number = e.div(sums.plane.number, four);
        let rows = e.mul(number, size);
        Groups { factor, sums, left, right, stages, rows }
    }

    /// Adds up the depth of a part. `bases` is where each operand begins.
    pub(super) fn multiply(&self, e: &mut Emit, feed: &Feed<'_>, bases: &[Val], part: Part) {
        let (all, of_stage) = (self.stages, self.left.layout.depth);
        // As many are on their way while one is multiplied and the groups are still at another.
        let ahead = all - 2;
        for n in 0..ahead {
            let (more, stage) = (e.u32(n * of_stage), e.u32(n));
            let k0 = e.add(part.first, more);
            feed.copy(e, bases, k0, stage);
            let read = feed.read(e, bases, k0);
            feed.keep(e, stage, &read);
        }
        let [zero, first_free] = [0, ahead].map(|n| e.u32(n));
        let [step, ahead_by] = [1, ahead].map(|n| e.u32(n * of_stage));
        let (here, free) = (e.var(zero), e.var(first_free));
        e.for_step(part.first, part.end, step, |e, k0| {
            let (stage, next) = (e.get(here), e.get(free));
            e.await_groups_but(ahead - 1);
            show_written(e);
            // This stage is there, and all groups are done with the one before the last.
            e.sync();
            let k = e.add(k0, ahead_by);
            let read = feed.read(e, bases, k);
            fence(e);
            self.add(e, stage);
            commit(e);
            feed.copy(e, bases, k, next);
            await_but(e, 1, &[], &[]);
            feed.keep(e, next, &read);
            for (var, now) in [(here, stage), (free, next)] {
                let behind = feed::behind(e, now, all);
                e.set(var, behind);
            }
        });
        let sums: Vec<_> = self.sums.all.iter().flatten().flatten().copied().collect();
        await_but(e, 0, &sums, &[]);
    }

    /// Begins to add the products of a stage.
    pub(super) fn add(&self, e: &mut Emit, stage: Val) {
        let pieces = [self.left.pieces.len(), self.right[0].pieces.len()];
        let left_first = self.left.first(e, stage);
        let left_first = e.add(left_first, self.rows);
        let right_first = self.right[0].first(e, stage);
        for step in steps(self.left.layout.depth, pieces) {
            for (sums, right) in self.sums.all.iter().zip(self.right) {
                let right = Operand::of(right, step.pieces[1], (right_first, 0, step.k));
                for (m, sums) in sums.iter().enumerate() {
                    let line = ROWS * m as u32;
                    let left = Operand::of(self.left, step.pieces[0], (left_first, line, step.k));
                    add(e, self.factor, sums, Left::Shared(left), right, true);
                }
            }
        }
    }
}

/// A matrix in shared memory: where it begins, and how it lies.
#[derive(Clone, Copy)]
pub(super) struct Operand {
    memory: Shared,
    /// Where it begins: so many numbers behind one that others begin at as well. That is made part of a descriptor once for all of them.
    first: Val,
    behind: u32,
    /// Whether numbers of one depth lie behind one another, not those of one line.
    across: bool,
    /// Bytes from 64 numbers that lie behind one another to the next, where an operand has several of them.
    lead: u32,
}

impl Operand {
    /// A piece of what is staged, from a line and a depth on, which are numbers of times 64 and 16 if the lines lie along the depth and
    /// the other way round if not; it begins somewhere.
    pub(super) fn of(of: &Staged, piece: usize, (first, line, k): (Val, u32, u32)) -> Operand {
        let layout = of.layout;
        let (run, number) = if layout.along { (line, k) } else { (k, line) };
        let behind = number / SPAN * layout.runs() * SPAN + run * SPAN + number % SPAN;
        // Of those along the depth, there are no more than 64.
        let lead = if layout.along { 16 } else { 2 * SPAN * layout.runs() };
        Operand { memory: of.pieces[piece], first, behind, across: !layout.along, lead }
    }

    /// What lies along a depth, from one of its lines on, as an operand of which the lines are the depth.
    pub(super) fn turned(of: &Staged, (first, k): (Val, u32)) -> Operand {
        debug_assert!(of.layout.along, "its lines are runs");
        let turned = Operand::of(of, 0, (first, k, 0));
        Operand { across: true, lead: 2 * SPAN * of.layout.runs(), ..turned }
    }

    /// What an instruction's word says of it.
    fn word(self) -> String {
        format!("{} {} {}", u32::from(self.across), self.lead, self.behind)
    }
}

/// Where the left operand of a product is.
#[derive(Clone, Copy)]
pub(super) enum Left {
    Shared(Operand),
    /// A unit has of it what it has of that of `mma`.
    Registers(Array),
}

/// Begins to add a product of 16 numbers of depth, of 16 bits each, to sums, or to put it in their place.
pub(super) fn add(e: &mut Emit, factor: Factor, sums: &[Array], left: Left, right: Operand, adds: bool) {
    let (factor, adds) = (factor.named(), u32::from(adds));
    let of_right = right.word();
    let right = (right.memory, right.first);
    match left {
        Left::Shared(left) => {
            let word = format!("mma {factor} {adds} {} {of_right}", left.word());
            e.of_groups(&word, sums, &[(left.memory, left.first), right]);
        }
        Left::Registers(left) => {
            let registers: Vec<_> = sums.iter().copied().chain([left]).collect();
            e.of_groups(&format!("mma-left {factor} {adds} {of_right}"), &registers, &[right]);
        }
    }
}

/// From here on, products see what has been written to registers.
pub(super) fn fence(e: &mut Emit) {
    e.of_groups("fence", &[], &[]);
}

/// From here on, products see what this unit has written to shared memory.
pub(super) fn show_written(e: &mut Emit) {
    e.of_groups("proxy", &[], &[]);
}

/// Makes a group of the products that were begun since the last one.
pub(super) fn commit(e: &mut Emit) {
    e.of_groups("commit", &[], &[]);
}

/// Waits for all groups of products but so many, the last ones: with these sums, and left operands in registers.
pub(super) fn await_but(e: &mut Emit, last: u32, sums: &[Array], left: &[Array]) {
    let registers: Vec<_> = sums.iter().chain(left).copied().collect();
    e.of_groups(&format!("wait {last} {}", sums.len()), &registers, &[]);
}

/// Instructions in place of what [`Emit::of_groups`] left in a text, one in a line: a word and numbers, then registers of four
/// numbers each, then places in shared memory.
pub(super) fn expand(text: &str) -> String {
    let mark = format!("printf(\"{GROUPS}");
    let mut parts = text.split(&mark);
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (call, rest) = part.split_once(");\n").unwrap_or((part, ""));
        let (words, arguments) = call.split_once('"').unwrap_or((call, ""));
        let words: Vec<_> = words.split(' ').collect();
        let arguments: Vec<_> = arguments.split(',').map(str::trim).filter(|a| !a.is_empty()).collect();
        instruction(&mut text, &words, &arguments);
        text.push('\n');
        text += rest;
    }
    text
}

/// The operands that registers of four numbers are: sums, and those of a left operand.
fn registers(names: &[&str], left: bool) -> Vec<String> {
    let one = |name: &str, n: usize| match left {
        false => format!("\"+f\"({name}[{n}])"),
        true => format!("\"+r\"(reinterpret_cast<uint32&>({name}[{n}]))"),
    };
    names.iter().flat_map(|name| (0..4).map(move |n| one(name, n))).collect()
}

fn instruction(text: &mut String, words: &[&str], arguments: &[&str]) {
    if let Some(instruction) = bulk::instruction(words, arguments) {
        *text += &instruction;
        return;
    }
    let done = match (words, arguments) {
        (["fence"], _) => write!(text, "asm volatile(\"wgmma.fence.sync.aligned;\" ::: \"memory\");"),
        (["commit"], _) => write!(text, "asm volatile(\"wgmma.commit_group.sync.aligned;\" ::: \"memory\");"),
        (["proxy"], _) => write!(text, "asm volatile(\"fence.proxy.async.shared::cta;\" ::: \"memory\");"),
        (["meet", units], [barrier]) => write!(
            text,
            "asm volatile(\"bar.sync %0, %1;\" :: \"r\"({barrier}), \"n\"({units}) : \"memory\");"
        ),
        (["come-by", units], [barrier]) => write!(
            text,
            "asm volatile(\"bar.arrive %0, %1;\" :: \"r\"({barrier}), \"n\"({units}) : \"memory\");"
        ),
        (["ex2"], [x]) => write!(text, "asm(\"ex2.approx.ftz.f32 %0, %0;\" : \"+f\"({x}));"),
        (["wait", last, sums], _) => {
            let (sums, left) = arguments.split_at(sums.parse().unwrap_or(0).min(arguments.len()));
            let all = [registers(sums, false), registers(left, true)].concat();
            write!(
                text,
                "asm volatile(\"wgmma.wait_group.sync.aligned %{};\" : {} : \"n\"({last}) : \"memory\");",
                all.len(),
                all.join(", ")
            )
        }
        (
            [
                "mma",
                factor,
                adds,
                across_left,
                lead_left,
                behind_left,
                across_right,
                lead_right,
                behind_right,
            ],
            [sums @ .., left, first_left, right, first_right],
        ) => {
            let left = [descriptor((left, first_left), lead_left, behind_left)];
            let right = descriptor((right, first_right), lead_right, behind_right);
            product(text, factor, sums, (&left, right), adds, &[across_left, across_right])
        }
        (
            ["mma-left", factor, adds, across_right, lead_right, behind_right],
            [sums @ .., left, right, first_right],
        ) => {
            let left = [0, 1, 2, 3].map(|n| register(left, n));
            let right = descriptor((right, first_right), lead_right, behind_right);
            product(text, factor, sums, (&left, right), adds, &[across_right])
        }
        (["mma-tf32"], [sums, left, right]) => {
            let sum = |way: &'static str| (0..4).map(move |n| format!("\"{way}\"({sums}[{n}])"));
            let factors = (0..4).map(|n| register(left, n)).chain((0..2).map(|n| register(right, n)));
            let [before, after]: [Vec<_>; 2] = [sum("=f").collect(), factors.chain(sum("f")).collect()];
            write!(
                text,
                "asm volatile(\"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {{%0, %1, %2, %3}}, \
                 {{%4, %5, %6, %7}}, {{%8, %9}}, {{%10, %11, %12, %13}};\" : {} : {});",
                before.join(", "),
                after.join(", ")
            )
        }
        // Nothing else is left there; the compiler says so if it is.
        _ => write!(text, "#error \"{}\"", words.join(" ")),
    };
    debug_assert!(done.is_ok(), "a text can be written");
}

/// The operand that two numbers in a register are.
fn register(name: &str, n: usize) -> String {
    format!("\"r\"(reinterpret_cast<uint32&>({name}[{n}]))")
}

/// A product that is added to sums. The left of its operands are four registers or what describes it; which of those that are described lie
/// across is said where they may.
fn product(
    text: &mut String,
    factor: &str,
    sums: &[&str],
    (left, right): (&[String], String),
    adds: &str,
    across: &[&str],
) -> std::fmt::Result {
    let (depth, across) = if factor == "tf32" { (8, &[][..]) } else { (16, across) };
    let sums = registers(sums, false);
    let names = |from: usize, many: usize| (from..from + many).map(|n| format!("%{n}")).collect::<Vec<_>>();
    let [all, of_right] = [sums.len(), sums.len() + left.len()];
    let named = names(all, left.len()).join(", ");
    let named = if left.len() > 1 { format!("{{{named}}}") } else { named };
    let number = |n: &&str| format!("\"n\"({n})");
    let operands: Vec<_> =
        left.iter().cloned().chain([right, number(&adds)]).chain(across.iter().map(number)).collect();
    let ones = names(of_right + 2, across.len());
    write!(
        text,
        "asm volatile(\"{{.reg .pred p; setp.ne.b32 p, %{}, 0; \
         wgmma.mma_async.sync.aligned.m64n{}k{depth}.f32.{factor}.{factor} {{{}}}, {named}, %{of_right}, p, {};}}\" \
         : {} : {});",
        of_right + 1,
        2 * sums.len(),
        names(0, all).join(", "),
        [vec!["1".to_owned(), "1".to_owned()], ones].concat().join(", "),
        sums.join(", "),
        operands.join(", "),
    )
}

/// The operand that describes a matrix in shared memory: its address and the distances in units of 16 bytes, and how packs are turned. What
/// many of a kernel's have in common is a term of its own, so that compilers make it once: an address is below 2^18, so no sum carries.
fn descriptor((memory, first): (&str, &str), lead: &str, behind: &str) -> String {
    let [lead, behind] = [lead, behind].map(|n| n.parse::<u32>().unwrap_or_default());
    let (low, high) = (((lead / 16) << 16) | (behind / PACK), (TURNED_BYTES as u32 / 16) | (1 << 30));
    format!(
        "\"l\"(((unsigned long long){high:#x}u << 32) | \
         ((uint32)__cvta_generic_to_shared({memory}) / 16u + {first} / {PACK}u + {low:#x}u))"
    )
}
