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
//! CubeCL 0.10 has no name for any of this: see [`expand`].

use std::fmt::Write;

use super::emit::{Array, Cmp, Elem, Emit, GROUPS, Shared, Val};
use super::feed::{Feed, SPAN, Staged, TURNED_BYTES};
use super::sums::Sums;
use super::tiles::steps;

/// Rows that a group of planes multiplies at a time.
pub(super) const ROWS: u32 = 64;

/// The groups of planes of a cube.
pub(super) struct Groups<'p> {
    elem: Elem,
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
        elem: Elem,
        sums: &'p Sums<'p>,
        (left, right): (&'p Staged, &'p [Staged]),
        stages: u32,
    ) -> Groups<'p> {
        let (four, size) = (e.u32(4), e.u32(ROWS * sums.tile.high() * left.layout.depth));
        let number = e.div(sums.plane.number, four);
        let rows = e.mul(number, size);
        Groups { elem, sums, left, right, stages, rows }
    }

    /// Adds up all depth. `bases` is where each operand begins.
    pub(super) fn multiply(&self, e: &mut Emit, feed: &Feed<'_>, bases: &[Val], depth: Val) {
        let (all, of_stage) = (self.stages, self.left.layout.depth);
        // As many are on their way while one is multiplied and the groups are still at another.
        let ahead = all - 2;
        for n in 0..ahead {
            let (k0, stage) = (e.u32(n * of_stage), e.u32(n));
            feed.copy(e, bases, k0, stage);
            let read = feed.read(e, bases, k0);
            feed.keep(e, stage, &read);
        }
        let [zero, one, first_free, stages] = [0, 1, ahead, all].map(|n| e.u32(n));
        let [step, ahead_by] = [1, ahead].map(|n| e.u32(n * of_stage));
        let (here, free) = (e.var(zero), e.var(first_free));
        e.for_step(zero, depth, step, |e, k0| {
            let (stage, next) = (e.get(here), e.get(free));
            e.await_groups_but(ahead - 1);
            e.of_groups("proxy", &[], &[]);
            // This stage is there, and all groups are done with the one before the last.
            e.sync();
            let k = e.add(k0, ahead_by);
            let read = feed.read(e, bases, k);
            e.of_groups("fence", &[], &[]);
            self.add(e, stage);
            e.of_groups("commit", &[], &[]);
            feed.copy(e, bases, k, next);
            e.of_groups("wait 1", &[], &[]);
            feed.keep(e, next, &read);
            for (var, now) in [(here, stage), (free, next)] {
                let behind = e.add(now, one);
                let over = e.cmp(Cmp::Eq, behind, stages);
                let behind = e.select(over, zero, behind);
                e.set(var, behind);
            }
        });
        let sums: Vec<_> = self.sums.all.iter().flatten().flatten().copied().collect();
        e.of_groups("wait 0", &sums, &[]);
    }

    /// Begins to add the products of a stage.
    fn add(&self, e: &mut Emit, stage: Val) {
        let pieces = [self.left.pieces.len(), self.right[0].pieces.len()];
        let left_first = self.left.first(e, stage);
        let left_first = e.add(left_first, self.rows);
        let right_first = self.right[0].first(e, stage);
        for step in steps(self.left.layout.depth, pieces) {
            for (sums, right) in self.sums.all.iter().zip(self.right) {
                let to = place(e, right, step.pieces[1], (right_first, 0, step.k));
                for (m, sums) in sums.iter().enumerate() {
                    let from = place(e, self.left, step.pieces[0], (left_first, ROWS * m as u32, step.k));
                    self.product(e, sums, from, to);
                }
            }
        }
    }

    /// Begins to add one product.
    fn product(&self, e: &mut Emit, sums: &[Array], left: (Shared, Val), right: (Shared, Val)) {
        let elem = if self.elem == Elem::F16 { "f16" } else { "bf16" };
        let [of_left, of_right] = [self.left, &self.right[0]].map(|staged| {
            let layout = staged.layout;
            // From 64 numbers that lie behind one another to the next: of those along the depth, there are no more.
            let lead = if layout.along { 16 } else { 2 * SPAN * layout.runs() };
            format!("{} {lead}", u32::from(!layout.along))
        });
        e.of_groups(&format!("mma {elem} {of_left} {of_right}"), sums, &[left, right]);
    }
}

/// A piece of an operand, from a line and a depth on, where a stage begins somewhere.
fn place(e: &mut Emit, of: &Staged, piece: usize, (first, line, k): (Val, u32, u32)) -> (Shared, Val) {
    let layout = of.layout;
    let behind = if layout.along { line * SPAN + k } else { line * layout.depth + k * SPAN };
    let behind = e.u32(behind);
    (of.pieces[piece], e.add(first, behind))
}

/// Instructions in place of what [`Emit::of_groups`] left in a text, one in a line: a word and numbers, then registers of four
/// sums each, then two places in shared memory.
pub(super) fn expand(text: &str) -> String {
    let mark = format!("printf(\"{GROUPS}");
    let mut parts = text.split(&mark);
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (call, rest) = part.split_once(");\n").unwrap_or((part, ""));
        let (words, arguments) = call.split_once('"').unwrap_or((call, ""));
        let words: Vec<_> = words.split(' ').collect();
        let arguments: Vec<_> = arguments.split(',').map(str::trim).filter(|a| !a.is_empty()).collect();
        let (places, registers): (Vec<_>, Vec<_>) =
            if words[0] == "mma" { split_places(&arguments) } else { (Vec::new(), arguments) };
        instruction(&mut text, &words, &registers, &places);
        text.push('\n');
        text += rest;
    }
    text
}

/// The two places that stand last, and what stands before them.
fn split_places<'a>(arguments: &[&'a str]) -> (Vec<&'a str>, Vec<&'a str>) {
    let (registers, places) = arguments.split_at(arguments.len().saturating_sub(4));
    (places.to_vec(), registers.to_vec())
}

fn instruction(text: &mut String, words: &[&str], registers: &[&str], places: &[&str]) {
    let sums: Vec<_> =
        registers.iter().flat_map(|r| (0..4).map(move |n| format!("\"+f\"({r}[{n}])"))).collect();
    let (count, sums) = (sums.len(), sums.join(", "));
    let done = match (words, places) {
        (["fence"], _) => write!(text, "asm volatile(\"wgmma.fence.sync.aligned;\" ::: \"memory\");"),
        (["commit"], _) => write!(text, "asm volatile(\"wgmma.commit_group.sync.aligned;\" ::: \"memory\");"),
        (["proxy"], _) => write!(text, "asm volatile(\"fence.proxy.async.shared::cta;\" ::: \"memory\");"),
        (["wait", left], _) => write!(
            text,
            "asm volatile(\"wgmma.wait_group.sync.aligned %{count};\" : {sums} : \"n\"({left}) : \"memory\");"
        ),
        (
            ["mma", elem, across_left, lead_left, across_right, lead_right],
            [left, at_left, right, at_right],
        ) => {
            let list: Vec<_> = (0..count).map(|n| format!("%{n}")).collect();
            let [a, b, add, ta, tb] = [0, 1, 2, 3, 4].map(|n| format!("%{}", count + n));
            write!(
                text,
                "asm volatile(\"{{.reg .pred p; setp.ne.b32 p, {add}, 0; \
                 wgmma.mma_async.sync.aligned.m64n{}k16.f32.{elem}.{elem} {{{}}}, {a}, {b}, p, 1, 1, {ta}, {tb};}}\" \
                 : {sums} : {}, {}, \"n\"(1), \"n\"({across_left}), \"n\"({across_right}));",
                2 * count,
                list.join(", "),
                descriptor(left, at_left, lead_left),
                descriptor(right, at_right, lead_right),
            )
        }
        // Nothing else is left there; the compiler says so if it is.
        _ => write!(text, "#error \"{}\"", words.join(" ")),
    };
    debug_assert!(done.is_ok(), "a text can be written");
}

/// The operand that describes a matrix in shared memory: its address, the distances in units of 16 bytes, and how packs are turned.
fn descriptor(memory: &str, at: &str, lead: &str) -> String {
    let lead = lead.parse::<u64>().unwrap_or_default() / 16;
    let constant = (lead << 16) | ((TURNED_BYTES as u64 / 16) << 32) | (1 << 62);
    format!("\"l\"((unsigned long long)(__cvta_generic_to_shared({memory} + {at}) >> 4) | {constant:#x}ull)")
}
