//! What training changes, on a device that has memory of its own: it is read back only when somebody asks for it.
//!
//! Each weight with a gradient has whole rows of [`COLUMNS`] in a *part*: parameters, gradient and moments lie in buffers that are as long
//! as the part, in the order of the weights' own elements. A run writes gradients to their places, a step is a few launches for a
//! part however many weights it has, and the weights that programs read are windows of what it made.

use std::ops::Range;
use std::sync::Arc;

use latentc_codegen::device::{Data, Device};
use latentc_ir::{DType, Layout, scoped};

use super::{Step, Told, TrainError};
use crate::engine::{Engine, Given, Resident, RunError, Wanted};
use crate::gradient::{Gatherer, Rows};
use crate::load::LoadError;
use crate::optimizer::{AdamW, Optimizer, State, numbers, program, scalar};
use crate::places::COLUMNS;

/// Elements of a part, at most, unless one weight has more: while a step is made, all that it changes of one part is there twice.
const PART: usize = 1 << 26;

const SUM: &str = include_str!("../optimizer/sum.ir");

/// The state of a training on a device.
pub(super) struct Memory<B> {
    parts: Vec<Part<B>>,
    /// Where each weight lies, in the order of the gradients.
    homes: Vec<Home>,
    /// The weights that programs read: the number of the home, and by what the engine knows them.
    read: Vec<(usize, Wanted)>,
    /// Adds up gradients.
    sum: Given,
    /// What rounds parameters to a dtype.
    round: Vec<(DType, Given)>,
    steps: u32,
}

struct Part<B> {
    /// Elements, in whole rows.
    len: usize,
    p: B,
    m: B,
    v: B,
    /// The gradient of the last run.
    g: B,
}

struct Home {
    part: usize,
    range: Range<usize>,
}

impl<B> Memory<B> {
    /// Brings a state to the device. `None` if that has no memory of its own, or if some element of a stored tensor belongs to no weight
    /// or to two, or programs want weights in another order: then everything stays on the host.
    ///
    /// # Errors
    /// If the device has no room.
    pub(super) fn new<D: Device<Buffer = B>>(
        engine: &mut Engine<D>,
        gatherer: &Gatherer,
        state: &State,
    ) -> Result<Option<Memory<B>>, TrainError> {
        let probe = engine.device_mut().alloc(DType::F32, COLUMNS).map_err(RunError::from)?;
        if engine.window(&probe, 0..COLUMNS, COLUMNS).is_none() || !each_once(gatherer) {
            return Ok(None);
        }
        let weights = gatherer.weights();
        let known: Vec<_> = weights.iter().map(|(layout, starts)| (nameless(layout), &starts[..])).collect();
        let (mut read, mut dtypes) = (Vec::new(), Vec::new());
        for wanted in engine.all_wanted() {
            let Some(starts) = starts(gatherer, &wanted.scope, &wanted.layout) else { return Ok(None) };
            let wants = (nameless(&wanted.layout), &starts[..]);
            let home = known.iter().position(|known| *known == wants);
            let Some(home) = home else { return Ok(None) };
            if wanted.dtype != DType::F32 && !dtypes.contains(&wanted.dtype) {
                dtypes.push(wanted.dtype);
            }
            read.push((home, wanted));
        }
        let page = engine.device_mut().layout().page / DType::F32.bytes();
        let most = PART.min(usize::try_from(page).unwrap_or(PART));
        let (mut homes, mut lens): (Vec<Home>, Vec<usize>) = (Vec::new(), Vec::new());
        for (layout, _) in weights {
            let elements = layout.elements as usize;
            let rows = elements.next_multiple_of(COLUMNS);
            match lens.last_mut() {
                Some(len) if *len + rows <= most => *len += rows,
                _ => lens.push(rows),
            }
            let start = lens.last().map_or(0, |len| len - rows);
            homes.push(Home { part: lens.len().saturating_sub(1), range: start..start + elements });
        }
        let mut parts = Vec::with_capacity(lens.len());
        for (n, &len) in lens.iter().enumerate() {
            let mut upload = |array: Option<&[f32]>| {
                let mut data = vec![0.0; len];
                let here = homes.iter().zip(weights).filter(|(home, _)| home.part == n);
                for (home, (layout, starts)) in here.filter(|_| array.is_some()) {
                    let to = &mut data[home.range.clone()];
                    let from = array.unwrap_or_default();
                    each_span(layout, starts, |w, s| to[w].copy_from_slice(&from[s]));
                }
                engine.device_mut().upload(DType::F32, Data::F32(data)).map_err(RunError::from)
            };
            let [p, m, v] = [&state.p, &state.m, &state.v].map(|array| upload(Some(array)));
            parts.push(Part { len, p: p?, m: m?, v: v?, g: upload(None)? });
        }
        let sum = program(engine, "optimizer/sum.ir", SUM)?;
        let round = dtypes.into_iter().map(|dtype| Ok((dtype, program(engine, "round", &rounding(dtype))?)));
        let round = round.collect::<Result<_, LoadError>>()?;
        let mut memory = Memory { parts, homes, read, sum, round, steps: state.steps };
        memory.show(engine)?;
        Ok(Some(memory))
    }

    /// Parameters and moments as they are now, on the host.
    ///
    /// # Errors
    /// If the device failed in an earlier launch.
    pub(super) fn state<D: Device<Buffer = B>>(
        &self,
        engine: &mut Engine<D>,
        gatherer: &Gatherer,
    ) -> Result<State, RunError> {
        let mut state = State::new(vec![0.0; gatherer.places().len()]);
        state.steps = self.steps;
        for (n, part) in self.parts.iter().enumerate() {
            for (buffer, array) in [(&part.p, &mut state.p), (&part.m, &mut state.m), (&part.v, &mut state.v)]
            {
                let array = Arc::make_mut(array);
                engine.device_mut().show(buffer, part.len, &mut |floats| {
                    let here = self.homes.iter().zip(gatherer.weights()).filter(|(home, _)| home.part == n);
                    for (home, (layout, starts)) in here {
                        let from = &floats[home.range.clone()];
                        each_span(layout, starts, |w, s| array[s].copy_from_slice(&from[w]));
                    }
                })?;
            }
        }
        Ok(state)
    }

    /// Makes a step: see [`Trainer::step`](super::Trainer::step).
    pub(super) fn step<D: Device<Buffer = B>>(
        &mut self,
        engine: &mut Engine<D>,
        (gatherer, optimizer): (&Gatherer, &Optimizer),
        texts: &[Rows],
        with: &AdamW,
        stop: impl Fn() -> bool,
    ) -> Result<Option<Step>, TrainError> {
        let mut told = Told::new(texts);
        // What several texts add up to.
        let mut sums: Vec<Resident<B>> = Vec::new();
        for (n, rows) in texts.iter().enumerate() {
            if stop() {
                return Ok(None);
            }
            let (share, part) = told.shares(rows);
            let mut places = Vec::with_capacity(self.homes.len());
            for home in &self.homes {
                places.push(Some(self.window(engine, home)?.buffer));
            }
            told.add(gatherer.bring(engine, rows, part as f32, |w| places[w].take())?, share);
            if texts.len() > 1 {
                let [before, share] = [if n == 0 { 0.0 } else { 1.0 }, share];
                let mut next = Vec::with_capacity(self.parts.len());
                for (k, part) in self.parts.iter().enumerate() {
                    let sum = sums.get(k).map_or(&part.g, |sum| &sum.buffer);
                    let arrays = [whole(engine, sum, part.len)?, whole(engine, &part.g, part.len)?];
                    let factors = [scalar(engine, before)?, scalar(engine, share)?];
                    let args = arrays.into_iter().chain(factors).collect();
                    next.extend(engine.run_given(self.sum, args)?);
                }
                sums = next;
            }
        }
        let gradient = |n: usize, part: &Part<B>, engine: &mut Engine<D>| {
            whole(engine, sums.get(n).map_or(&part.g, |sum| &sum.buffer), part.len)
        };
        let mut norms = Vec::with_capacity(self.parts.len());
        for (n, part) in self.parts.iter().enumerate() {
            let gradient = gradient(n, part, engine)?;
            norms.push(optimizer.of_part(engine, gradient, with.most)?.norm);
        }
        let clipping = optimizer.of_norms(engine, norms, with.most)?;
        let step = told.checked(clipping, self.steps + 1)?;
        self.steps += 1;
        let mut scalars = Vec::new();
        for x in numbers(with, self.steps, clipping.coef) {
            scalars.push(scalar(engine, x)?.buffer);
        }
        for n in 0..self.parts.len() {
            let part = &self.parts[n];
            let mut args = vec![whole(engine, &part.p, part.len)?, gradient(n, part, engine)?];
            args.extend([whole(engine, &part.m, part.len)?, whole(engine, &part.v, part.len)?]);
            for x in &scalars {
                let x = window(engine, x, 0..1, 1)?;
                args.push(Resident { buffer: x.buffer, shape: Vec::new() });
            }
            let made = optimizer.of_arrays(engine, args)?.into_iter().map(|made| made.buffer);
            let part = &mut self.parts[n];
            for (to, made) in [&mut part.p, &mut part.m, &mut part.v].into_iter().zip(made) {
                *to = made;
            }
        }
        self.show(engine)?;
        Ok(Some(step))
    }

    /// Gives the programs the parameters as they are now.
    fn show<D: Device<Buffer = B>>(&mut self, engine: &mut Engine<D>) -> Result<(), RunError> {
        for (n, part) in self.parts.iter().enumerate() {
            let mut rounded = Vec::with_capacity(self.round.len());
            for (dtype, round) in &self.round {
                let wide = whole(engine, &part.p, part.len)?;
                let made = engine.run_given(*round, vec![wide])?.into_iter().next();
                rounded.extend(made.map(|made| (*dtype, made.buffer)));
            }
            for (home, wanted) in self.read.iter().filter(|(home, _)| self.homes[*home].part == n) {
                let narrow = rounded.iter().find(|(dtype, _)| *dtype == wanted.dtype);
                let from = narrow.map_or(&part.p, |(_, buffer)| buffer);
                let weight = window(engine, from, self.homes[*home].range.clone(), 1)?;
                engine.give(&wanted.key, Some(weight.buffer))?;
            }
        }
        Ok(())
    }

    /// The place of a weight's gradient.
    fn window<D: Device<Buffer = B>>(
        &self,
        engine: &mut Engine<D>,
        home: &Home,
    ) -> Result<Resident<B>, RunError> {
        window(engine, &self.parts[home.part].g, home.range.clone(), 1)
    }
}

fn whole<D: Device>(
    engine: &mut Engine<D>,
    buffer: &D::Buffer,
    len: usize,
) -> Result<Resident<D::Buffer>, RunError> {
    window(engine, buffer, 0..len, COLUMNS)
}

fn window<D: Device>(
    engine: &mut Engine<D>,
    buffer: &D::Buffer,
    range: Range<usize>,
    columns: usize,
) -> Result<Resident<D::Buffer>, RunError> {
    let none = || RunError::Argument(format!("the device has no window of elements {range:?} of a buffer"));
    engine.window(buffer, range.clone(), columns).ok_or_else(none)
}

/// A program that rounds parameters.
fn rounding(dtype: DType) -> String {
    format!(
        "module round entry @round\n\nfunc @round {{\n  axes r, c\n  param p: f32[r, c]\n\n  w: {dtype}[r, c] = cast p\n  return w\n}}\n"
    )
}

/// How a weight lies in its tensors, whatever these are called: their names are shorter below longer scopes.
fn nameless(layout: &Layout) -> Layout {
    let mut layout = layout.clone();
    layout.pieces.iter_mut().for_each(|piece| piece.tensor.clear());
    layout
}

/// Where the stored tensors of a weight begin.
fn starts(gatherer: &Gatherer, scope: &str, layout: &Layout) -> Option<Vec<usize>> {
    let start = |tensor: &str| Some(gatherer.places().tensor(&scoped(scope, tensor))?.range.start);
    layout.pieces.iter().map(|piece| start(&piece.tensor)).collect()
}

/// The elements of a weight that lie side by side, and where they do in the array of all tensors.
fn each_span(layout: &Layout, starts: &[usize], mut see: impl FnMut(Range<usize>, Range<usize>)) {
    for (piece, start) in layout.pieces.iter().zip(starts) {
        for span in layout.spans(piece) {
            let (w, s, len) = (span.weight as usize, start + span.stored as usize, span.len as usize);
            see(w..w + len, s..s + len);
        }
    }
}

/// Whether each element of each stored tensor belongs to one weight.
fn each_once(gatherer: &Gatherer) -> bool {
    let mut taken = vec![false; gatherer.places().len()];
    let mut alone = true;
    for (layout, starts) in gatherer.weights() {
        each_span(layout, starts, |_, stored| {
            for taken in &mut taken[stored] {
                alone &= !std::mem::replace(taken, true);
            }
        });
    }
    let all = |t: &crate::places::Placed| taken[t.range.clone()].iter().all(|t| *t);
    alone && gatherer.places().tensors().iter().all(all)
}
