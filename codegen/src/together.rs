//! Launches side by side.
//!
//! Where decode reads weights for one token, most kernels are over before the next could be launched, and many do not wait for one
//! another: queries and latents of the same input, a router and the experts that all tokens go to. Such launches follow one another
//! in the list and are marked ([`Step::Launch::beside`](crate::program::Step)): none of them reads what another writes, so a device
//! may run them in one grid, or one after the other. A device that knows the extents may still say no.
//!
//! What takes much longer than a launch gains nothing, and streams are shared out over the device already: these stand alone. They go
//! behind all that reads what they may write over, so that the largest values of a program, as logits and their gradient, have one place.
//!
//! Launches side by side take as long as the longest of them, about. So one that nobody waits for yet is put off to where something
//! takes longer anyhow: the shared experts' last product stands beside the experts that were chosen, not beside the choice.

use std::collections::BTreeSet;

use latentc_ir::Size;
use latentc_passes::{Kind, Machine, Remark, Sizes};

use crate::memory::{Layout, in_place};
use crate::program::{BufferId, Kernel, KernelKind, Routine, Step};
use crate::traffic::Traffic;

/// As remarks and `latentc explain` call this.
pub const NAME: &str = "together";

/// How many launches would fit into the time of one that is not worth joining to another.
const LONG: f64 = 32.0;

/// Puts launches that do not wait for one another side by side, as early as what they read is there, if a routine then has fewer
/// grids. Calls are not passed. Says what stands beside what.
pub(crate) fn together(
    routine: &mut Routine,
    kernels: &[Kernel],
    sizes: &Sizes,
    machine: &Machine,
) -> Vec<Remark> {
    // Where launches are longest, it matters least what stands beside what.
    let sizes = &sizes.least();
    let mut steps = Vec::with_capacity(routine.steps.len());
    for part in routine.steps.chunk_by(|a, b| is_launch(a) && is_launch(b)) {
        let short: Vec<_> = part.iter().map(|step| short(step, kernels, sizes, machine)).collect();
        let groups = groups(part, (&short, machine.launch), &|step| over(step, kernels));
        if groups.len() == part.len() {
            steps.extend_from_slice(part);
            continue;
        }
        for group in groups {
            for (n, &of) in group.iter().enumerate() {
                let mut step = part[of].clone();
                if let Step::Launch { beside, .. } = &mut step {
                    *beside = n > 0;
                }
                steps.push(step);
            }
        }
    }
    routine.steps = steps;
    routine.groups().filter_map(|group| remark(routine, group)).collect()
}

/// What a group of launches is, if it is more than one.
fn remark(routine: &Routine, group: &[Step]) -> Option<Remark> {
    let name = |step: &Step| Some(routine.buffer(*step.outputs().first()?).name.clone());
    let (Step::Launch { origins, .. }, others) = group.split_first()? else { return None };
    let names: Vec<_> = others.iter().filter_map(name).map(|n| format!("`{n}`")).collect();
    (!names.is_empty()).then_some(Remark {
        kind: Kind::Applied,
        pass: NAME,
        function: routine.name.clone(),
        value: name(&group[0])?,
        origins: origins.clone(),
        message: format!("is one launch with {}: none waits for another", names.join(", ")),
        candidates: Vec::new(),
        crossing: None,
    })
}

fn is_launch(step: &Step) -> bool {
    matches!(step, Step::Launch { .. })
}

/// The seconds that a launch takes at these sizes, if it may stand beside others.
fn short(step: &Step, kernels: &[Kernel], sizes: &Sizes, machine: &Machine) -> Option<f64> {
    let Step::Launch { kernel, sizes: own, .. } = step else { return None };
    let kernel = &kernels[*kernel];
    let own: Vec<_> = own
        .iter()
        .map(|size| match size {
            Size::Fixed(n) => *n,
            Size::Sym(s) => sizes.symbol(s),
        })
        .collect();
    let traffic = Traffic::of_launch(kernel, &own).ok()?;
    let seconds = machine.seconds(traffic.flops, traffic.bytes());
    (kernel.kind != KernelKind::Stream && seconds < LONG * machine.launch).then_some(seconds)
}

/// What the result of a launch may be written over, on whichever device.
fn over(step: &Step, kernels: &[Kernel]) -> Vec<BufferId> {
    const ANY: Layout = Layout { align: 1, page: u64::MAX, bytes: |_| 4, kept: |_| 4, in_place: true };
    let Step::Launch { kernel, inputs, .. } = step else { return Vec::new() };
    in_place(&kernels[*kernel], &ANY).into_iter().map(|n| inputs[n]).collect()
}

/// An order of launches in which all that are short and ready go at once, but for those that are put off. What stands alone goes first, so
/// that more is ready after it, but behind what reads what its result may be written `over`. The short ones come with their times, and all
/// with that of a launch.
fn groups(
    part: &[Step],
    (short, launch): (&[Option<f64>], f64),
    over: &dyn Fn(&Step) -> Vec<BufferId>,
) -> Vec<Vec<usize>> {
    let waits_for = |n: usize| {
        let over = if short[n].is_some() { Vec::new() } else { over(&part[n]) };
        let reads = |m: usize| part[m].inputs().iter().any(|id| over.contains(id));
        (0..n).filter(|&m| waits(&part[n], &part[m]) || reads(m)).collect()
    };
    let after: Vec<Vec<usize>> = (0..part.len()).map(waits_for).collect();
    let mut done = BTreeSet::new();
    let mut groups = Vec::new();
    while done.len() < part.len() {
        let ready = |n: &usize| !done.contains(n) && after[*n].iter().all(|m| done.contains(m));
        let ready: Vec<_> = (0..part.len()).filter(ready).collect();
        let group = match ready.iter().find(|&&n| short[n].is_none()) {
            Some(&alone) => vec![alone],
            None => ready,
        };
        done.extend(group.iter().copied());
        groups.push(group);
    }
    while put_off(&mut groups, &after, (short, launch)) {}
    groups.retain(|group| !group.is_empty());
    groups
}

/// Moves the launch that gains most by it to a later group, if any does.
fn put_off(groups: &mut [Vec<usize>], after: &[Vec<usize>], (short, launch): (&[Option<f64>], f64)) -> bool {
    let time = |group: &[usize], less: Option<usize>, more: Option<usize>| {
        let own = group.iter().copied().filter(|&n| Some(n) != less).chain(more);
        own.filter_map(|n| short[n]).reduce(f64::max).map_or(0.0, |longest| launch + longest)
    };
    let mut best: Option<(f64, usize, usize, usize)> = None;
    for (from, group) in groups.iter().enumerate() {
        for &n in group.iter().filter(|&&n| short[n].is_some()) {
            let less = time(group, None, None) - time(group, Some(n), None);
            let waiting = |group: &Vec<usize>| group.iter().any(|&m| after[m].contains(&n));
            let later = groups.iter().enumerate().skip(from + 1).take_while(|(_, group)| !waiting(group));
            for (to, group) in later.filter(|(_, g)| !g.is_empty() && g.iter().all(|&m| short[m].is_some())) {
                let gain = less - (time(group, None, Some(n)) - time(group, None, None));
                if gain > 0.0 && best.is_none_or(|(most, ..)| gain > most) {
                    best = Some((gain, n, from, to));
                }
            }
        }
    }
    let Some((_, n, from, to)) = best else { return false };
    groups[from].retain(|&m| m != n);
    // Its cubes come first: where not all fit on the device at once, those of the longer one begin as these end, not all at the end.
    groups[to].insert(0, n);
    true
}

/// Whether a step must come after one before it: it reads what that one writes, or writes what that one touches.
fn waits(step: &Step, before: &Step) -> bool {
    let touches = |step: &Step, ids: &[BufferId]| {
        let mut own = step.inputs().iter().chain(step.outputs());
        own.any(|id| ids.contains(id))
    };
    touches(step, before.outputs()) || touches(before, step.outputs())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The time of a launch that may stand beside others.
    const SHORT: Option<f64> = Some(1.0);

    /// A launch that reads these buffers and writes that one.
    fn launch(inputs: &[u32], output: u32) -> Step {
        Step::Launch {
            kernel: 0,
            inputs: inputs.iter().map(|&n| BufferId(n)).collect(),
            output: BufferId(output),
            sizes: Vec::new(),
            beside: false,
            origins: Vec::new(),
        }
    }

    #[test]
    fn what_does_not_wait_goes_at_once() {
        // Two products of 0, what is made of each, and what is made of both.
        let part = [launch(&[0], 1), launch(&[1], 2), launch(&[0], 3), launch(&[3], 4), launch(&[2, 4], 5)];
        let none = |_: &Step| Vec::new();
        assert_eq!(groups(&part, (&[SHORT; 5], 1.0), &none), [vec![0, 2], vec![1, 3], vec![4]]);
        // A long one goes as soon as it can, and the rest is not kept waiting for it alone.
        let long = [SHORT, None, SHORT, SHORT, SHORT];
        assert_eq!(groups(&part, (&long, 1.0), &none), [vec![0, 2], vec![1], vec![3], vec![4]]);
    }

    #[test]
    fn what_is_written_over_waits_for_its_readers() {
        // The second reads 1, the third appends to it.
        let part = [launch(&[0], 1), launch(&[1], 2), launch(&[1, 0], 1), launch(&[1], 3)];
        assert_eq!(groups(&part, (&[SHORT; 4], 1.0), &|_| Vec::new()), [[0], [1], [2], [3]]);
        // Of 1 the second makes something short, and the third, which is long, what may lie where 1 does.
        let part = [launch(&[0], 1), launch(&[1], 2), launch(&[1], 3)];
        let long = [SHORT, SHORT, None];
        assert_eq!(groups(&part, (&long, 1.0), &|_| Vec::new()), [[0], [2], [1]]);
        assert_eq!(groups(&part, (&long, 1.0), &|_| vec![BufferId(1)]), [[0], [1], [2]]);
    }

    #[test]
    fn what_nobody_waits_for_is_put_off_to_what_takes_longer() {
        // 1 and 2 are made of 0, 3 of 1, and 4 of 2 and 3.
        let part = [launch(&[0], 1), launch(&[0], 2), launch(&[1], 3), launch(&[2, 3], 4)];
        let grouped = |times: [f64; 4]| groups(&part, (&times.map(Some), 1.0), &|_| Vec::new());
        assert_eq!(grouped([1.0, 2.0, 3.0, 1.0]), [vec![0], vec![1, 2], vec![3]]);
        // Where it is no longer than what it stands beside, nothing is gained, and less than nothing where the others are shorter.
        assert_eq!(grouped([2.0, 2.0, 3.0, 1.0]), [vec![0, 1], vec![2], vec![3]]);
        assert_eq!(grouped([2.0, 4.0, 1.0, 1.0]), [vec![0, 1], vec![2], vec![3]]);
        // Where the longer one stands alone, nothing stands beside it.
        let alone = [Some(1.0), Some(2.0), None, Some(1.0)];
        let none = |_: &Step| Vec::new();
        assert_eq!(groups(&part, (&alone, 1.0), &none), [vec![0, 1], vec![2], vec![3]]);
    }
}
