//! What training changes, in the device's memory: it is read back only when somebody asks for it.
//!
//! Each weight with a gradient has whole rows of [`COLUMNS`] in a *part*: parameters, gradient and moments lie in buffers that are as long
//! as the part, in the order of the weights' own elements. A run writes gradients to their places, a step is a few launches for a
//! part however many weights it has, and the weights that programs read are windows of what it made. A CPU takes so much of a part at a time
//! as its caches hold, and writes what changes where it was.

use std::ops::Range;
use std::sync::Arc;

use half::bf16;
use latentc_codegen::device::{Data, Device};
use latentc_ir::{DType, Layout, scoped};

use super::{Step, Told, TrainError};
use crate::engine::{Engine, Given, Resident, RunError, Wanted};
use crate::gradient::{Gatherer, Rows};
use crate::load::LoadError;
use crate::optimizer::{AdamW, Optimizer, State, numbers, program};
use crate::places::{COLUMNS, zeros};

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
    /// The sum of several runs' gradients, once there were several in a step.
    sum: Option<B>,
}

impl<B> Part<B> {
    /// The gradient of a step, of several runs or of one.
    fn gradient(&self, several: bool) -> &B {
        self.sum.as_ref().filter(|_| several).unwrap_or(&self.g)
    }
}

struct Home {
    part: usize,
    range: Range<usize>,
}

impl<B> Memory<B> {
    /// Brings a state to the device; of what is brought nothing is left in `state`. `None` if some element of a stored tensor belongs to no
    /// weight or to two, if programs want weights in another order, or in 16 bits of a device that holds these only where they are shared with
    /// it: then the state stays as it is.
    ///
    /// # Errors
    /// If the device has no room.
    pub(super) fn new<D: Device<Buffer = B>>(
        engine: &mut Engine<D>,
        gatherer: &Gatherer,
        state: &mut State,
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
        let shared: Arc<Vec<bf16>> = Arc::default();
        if !dtypes.is_empty() && engine.device_mut().share(shared).is_some() {
            return Ok(None);
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
        // One array after the other, so that none of them is there twice for longer than it takes.
        let mut upload = |array: Option<&mut Arc<Vec<f32>>>| {
            let array = array.map(std::mem::take);
            let part = |(n, &len): (usize, &usize)| {
                let mut data = zeros(len);
                let here = homes.iter().zip(weights).filter(|(home, _)| home.part == n);
                for (home, (layout, starts)) in here {
                    let Some(from) = &array else { continue };
                    let to = &mut data[home.range.clone()];
                    each_span(layout, starts, |w, s| to[w].copy_from_slice(&from[s]));
                }
                engine.device_mut().upload(DType::F32, Data::F32(data)).map_err(RunError::from)
            };
            lens.iter().enumerate().map(part).collect::<Result<Vec<_>, _>>()
        };
        let (p, m) = (upload(Some(&mut state.p))?, upload(Some(&mut state.m))?);
        let (v, g) = (upload(Some(&mut state.v))?, upload(None)?);
        let arrays = p.into_iter().zip(m).zip(v).zip(g);
        let part = |(&len, (((p, m), v), g))| Part { len, p, m, v, g, sum: None };
        let parts = lens.iter().zip(arrays).map(part).collect();
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
        let several = texts.len() > 1;
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
            for part in self.parts.iter_mut().filter(|_| several) {
                let sum = match part.sum.take() {
                    Some(sum) => sum,
                    None => engine
                        .device_mut()
                        .upload(DType::F32, Data::F32(zeros(part.len)))
                        .map_err(RunError::from)?,
                };
                let factors = [if n == 0 { 0.0 } else { 1.0 }, share];
                part.sum = remake(engine, self.sum, &[&sum, &part.g], part.len, &factors, &[0])?.pop();
            }
        }
        let mut norms = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            let gradient = whole(engine, part.gradient(several), part.len)?;
            norms.push(optimizer.of_part(engine, gradient, with.most)?.norm);
        }
        let clipping = optimizer.of_norms(engine, norms, with.most)?;
        let step = told.checked(clipping, self.steps + 1).inspect_err(|_| {
            // The next sum would begin with nothing times what is no number.
            self.parts.iter_mut().for_each(|part| part.sum = None);
        })?;
        self.steps += 1;
        let numbers = numbers(with, self.steps, clipping.coef);
        for part in &mut self.parts {
            let arrays = [&part.p, part.gradient(several), &part.m, &part.v];
            let made = remake(engine, optimizer.adamw(), &arrays, part.len, &numbers, &[0, 2, 3])?;
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

/// Runs a program on arrays of so many elements, in rows, and on numbers behind them. Returns the arrays that its results take the place of,
/// which are `changed`: themselves, if the program may write there and it is best done by few elements at a time; else others.
fn remake<D: Device>(
    engine: &mut Engine<D>,
    program: Given,
    arrays: &[&D::Buffer],
    len: usize,
    numbers: &[f64],
    changed: &[usize],
) -> Result<Vec<D::Buffer>, RunError> {
    let near = engine.device().near().filter(|_| engine.may_replace(program, changed));
    let numbers = Arc::new(numbers.iter().map(|&x| x as f32).collect::<Vec<_>>());
    let mut made = Vec::with_capacity(changed.len());
    for start in (0..len).step_by(near.unwrap_or(len).max(1)) {
        let range = start..len.min(start + near.unwrap_or(len));
        let mut args = Vec::with_capacity(arrays.len() + numbers.len());
        for array in arrays {
            args.push(window(engine, array, range.clone(), COLUMNS)?);
        }
        for n in 0..numbers.len() {
            args.push(engine.lend(&numbers, n..n + 1, Vec::new())?);
        }
        let mut places = Vec::with_capacity(changed.len());
        for &n in changed.iter().filter(|_| near.is_some()) {
            places.push(Some(window(engine, arrays[n], range.clone(), COLUMNS)?.buffer));
        }
        let mut place = |n: usize| places.get_mut(n).and_then(Option::take);
        made = engine.run_given_into(program, args, &mut place)?;
    }
    let whole = |(result, &n): (Resident<D::Buffer>, &usize)| match near {
        Some(_) => Ok(window(engine, arrays[n], 0..len, COLUMNS)?.buffer),
        None => Ok(result.buffer),
    };
    made.into_iter().zip(changed).map(whole).collect()
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
