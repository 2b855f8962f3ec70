//! Steps of training where the state lies in a device's memory, against the same on the host, and exactly as they would go on.

use std::sync::Arc;

use latentc_codegen::cube::WgpuDevice;
use latentc_codegen::device::{Data, Device};
use latentc_codegen::host::Host;
use latentc_ir::Module;
use latentc_ir::tensor::SplitMix;
use latentc_passes::{Graph, pipeline};
use latentc_runtime::compiled::compile;
use latentc_runtime::engine::Engine;
use latentc_runtime::gradient::{Gatherer, Rows};
use latentc_runtime::optimizer::{AdamW, State};
use latentc_runtime::train::{Step, Trainer};

/// A network that learns vectors of tokens from those of the tokens before: few kernels, weights of two dtypes, parts of one tensor
/// and a function that becomes a part of its caller, where stored tensors have longer names.
const TEXT: &str = r#"module m entry @loss

func @net {
  axes b, t, d=8, f=6, g=6
  param x: f32[b, t, d=8]
  weight U: bf16[f=6, d=8] = "in.weight"[(f | g), d]
  weight G: bf16[g=6, d=8] = "in.weight"[(f | g), d]
  weight V: bf16[d=8, f=6] = "out.weight"[d, f]

  u: f32[b, t, f=6] = contract U, x over d
  w: f32[b, t, g=6] = contract G, x over d
  h: f32[b, t, f=6] = tanh u
  i.g: f32[b, t, g=6] = sigmoid w
  i: f32[b, t, f=6] = rename i.g from g to f
  z: f32[b, t, f=6] = mul h, i
  y: f32[b, t, d=8] = contract V, z over f
  return y
}

func @loss {
  axes b, t, v=32, d=8
  param tok: i32[b, t]
  param target: i32[b, t]
  param weight: f32[b, t]
  weight E: f32[v=32, d=8] = "embed.weight"[v, d]
  weight T: f32[v=32, d=8] = "targets.weight"[v, d]

  x: f32[b, t, d=8] = gather E, tok along v
  want: f32[b, t, d=8] = gather T, target along v
  y: f32[b, t, d=8] = call @net(x) under "net"
  off: f32[b, t, d=8] = sub y, want
  square: f32[b, t, d=8] = mul off, off
  l: f32 = contract square, weight over b, t, d
  return l
}
"#;

/// The network, with weights as they are in it or all in f32.
fn definition(narrow: bool) -> Module {
    let text = if narrow { TEXT.to_owned() } else { TEXT.replace("bf16", "f32") };
    latentc_ir::check("m.ir", &text).unwrap_or_else(|e| panic!("{}", e.render()))
}

/// A training from a state, or from weights that are always the same.
fn trainer<D: Device>(device: D, narrow: bool, state: Option<State>) -> Trainer<D> {
    let definition = definition(narrow);
    let mut engine = Engine::new(device);
    let compiled = compile(&definition, Graph::Gradient, &pipeline()).expect("it compiles");
    // The trainer brings them.
    let none = &mut |device: &mut D, _: &str, f: &latentc_ir::Function, w: &latentc_ir::Weight| {
        let (dtype, len) =
            (f.ty(w.value).dtype, w.stored.layout(f, f.ty(w.value)).expect("a layout").elements);
        Ok(Some(device.upload(dtype, Data::F32(vec![f32::NAN; len as usize]))?))
    };
    engine.add_made(&compiled, none).expect("there is room");
    let places = Gatherer::new(&definition).expect("its weights fit").places().clone();
    let fresh = || {
        let (mut rng, mut p) = (SplitMix(5), vec![0.0; places.len()]);
        for t in places.tensors() {
            p[t.range.clone()].fill_with(|| rng.below(1 << 20) as f32 / (1 << 19) as f32 - 1.0);
        }
        State::new(p)
    };
    Trainer::new(engine, &definition, state.unwrap_or_else(fresh)).expect("it fits")
}

/// Texts of two lengths, others at each step.
fn texts(step: i32) -> [Rows; 2] {
    let text = |first: i32, len: i32| (0..len).map(|n| (first + 7 * n) % 32).collect::<Vec<_>>();
    [Rows::of(&[text(step, 9)]), Rows::of(&[text(step + 3, 6), text(step + 11, 6)])]
}

fn steps<D: Device>(trainer: &mut Trainer<D>, steps: std::ops::Range<i32>) -> Vec<Step> {
    let with = AdamW { rate: 1e-2, most: 0.5, ..AdamW::default() };
    let step = |n| trainer.step(&texts(n), &with, || false).expect("it runs").expect("nobody stops it");
    steps.map(step).collect()
}

fn close(got: &[f32], want: &[f32], what: &str) {
    let off = got.iter().zip(want).map(|(got, want)| (got - want).abs()).fold(0.0, f32::max);
    let most = want.iter().map(|x| x.abs()).fold(0.0, f32::max);
    assert!(
        got.len() == want.len() && off <= 1e-3 * most,
        "{what} is off by {off}, where {most} is the most"
    );
}

/// What three steps make of a state, and what they tell, against the same of another training.
fn agree<A: Device, B: Device>(a: &mut Trainer<A>, b: &mut Trainer<B>) {
    let (told, want) = (steps(a, 0..3), steps(b, 0..3));
    let (state, wanted) = (a.state().expect("it is there"), b.state().expect("it is there"));
    assert_eq!((state.steps, wanted.steps), (3, 3));
    close(&state.p, &wanted.p, "p");
    close(&state.m, &wanted.m, "m");
    close(&state.v, &wanted.v, "v");
    for (got, want) in told.iter().zip(&want) {
        close(&[got.clipping.norm], &[want.clipping.norm], "the norm");
        close(&[got.results[0][0] as f32], &[want.results[0][0] as f32], "the loss");
    }
    assert!(told[2].results[0] != told[0].results[0] && told[0].clipping.coef < 1.0);
}

/// Two steps and a third are what a training makes that goes on from the state between them, bit by bit.
fn goes_on<D: Device>(device: impl Fn() -> D, narrow: bool) {
    let mut whole = trainer(device(), narrow, None);
    steps(&mut whole, 0..2);
    let mut again = trainer(device(), narrow, Some(whole.state().expect("it is there")));
    assert_eq!(steps(&mut again, 2..3), steps(&mut whole, 2..3));
    let (got, want) = (again.state().expect("it is there"), whole.state().expect("it is there"));
    let bits = |x: &Arc<Vec<f32>>| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert!(
        [(&got.p, &want.p), (&got.m, &want.m), (&got.v, &want.v)].iter().all(|(a, b)| bits(a) == bits(b))
    );
}

#[test]
fn a_state_on_a_device_is_that_of_the_host() {
    if let Err(e) = WgpuDevice::open() {
        return eprintln!("SKIPPED: a_state_on_a_device_is_that_of_the_host: {e}");
    }
    let device = || WgpuDevice::open().expect("it was there");
    for narrow in [true, false] {
        let mut there = trainer(device(), narrow, None);
        // What is narrow is shared with the host as it is stored; all else is in memory of the device there, too.
        let mut here = trainer(Host::new(), narrow, None);
        assert!(there.is_resident() && here.is_resident() != narrow);
        agree(&mut there, &mut here);
    }
    goes_on(device, true);
}

#[test]
fn a_training_on_the_host_goes_on_exactly() {
    goes_on(Host::new, true);
    goes_on(Host::new, false);
}
