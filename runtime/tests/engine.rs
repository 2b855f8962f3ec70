//! Whole random programs, with weights, calls and caches, on the host and in the interpreter.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use latentc_codegen::cube::{Machine, Target, Tuning, identity};
use latentc_codegen::device::{Data, DeviceError};
use latentc_codegen::emulate::Emulator;
use latentc_codegen::host::Host;
use latentc_ir::interp::{Caches, Interpreter, Precision};
use latentc_ir::tensor::{SplitMix, Tensor};
use latentc_ir::{DType, Module, Size, Tensors};
use latentc_passes::{Graph, Wanted, WeightForm, pipeline};
use latentc_runtime::checkpoint::{self, Checkpoint, CheckpointError, TensorSpec, write_checkpoint};
use latentc_runtime::compiled::compile;
use latentc_runtime::engine::{Engine, RunError, Value};
use proptest::prelude::*;

/// Quarters of small integers: exact in f32, so that both sides compare and select alike.
fn random(dtype: DType, shape: Vec<usize>, rng: &mut SplitMix) -> Tensor {
    let data = (0..shape.iter().product())
        .map(|_: usize| match dtype {
            DType::Bool | DType::I32 => rng.below(2) as f64,
            DType::F64 | DType::F32 | DType::Bf16 | DType::F16 => rng.below(17) as f64 / 4.0 - 2.0,
        })
        .collect();
    Tensor { dtype, shape, data }
}

fn value(t: &Tensor) -> Value {
    if t.dtype.is_float() {
        Value::f32(t.data.iter().map(|&x| x as f32).collect(), &t.shape)
    } else {
        Value::i32(t.data.iter().map(|&x| x as i32).collect(), &t.shape)
    }
}

/// Whether two runs made the same bits, of which NaN has several.
fn same(a: &[Value], b: &[Value]) -> bool {
    let bits = |v: &Value| match &v.data {
        Data::F32(x) => x.iter().map(|x| if x.is_nan() { u32::MAX } else { x.to_bits() }).collect(),
        Data::I32(x) => x.iter().map(|x| x.cast_unsigned()).collect::<Vec<_>>(),
    };
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.shape == b.shape && bits(a) == bits(b))
}

fn check(module: &Module, wanted: impl Into<Wanted>, seed: u64) -> Result<(), TestCaseError> {
    let wanted = wanted.into();
    let graph = wanted.graph;
    let mut rng = SplitMix(seed);
    // A random definition may have no serving form, or weights that overlap in contradictory ways.
    let (Ok(compiled), Ok(inventory)) = (compile(module, wanted, &pipeline()), module.inventory()) else {
        return Ok(());
    };
    let mut weights = Tensors::new();
    for t in &inventory.tensors {
        let shape = t.shape.iter().map(|&n| n as usize).collect();
        weights.insert(t.name.clone(), random(t.dtype, shape, &mut rng));
    }
    if weights.values().any(|t| !t.dtype.is_float()) {
        return Ok(());
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let specs: Vec<_> = weights
        .iter()
        .map(|(name, t)| TensorSpec {
            name: name.clone(),
            dtype: checkpoint::DType::F32,
            shape: t.shape.clone(),
        })
        .collect();
    write_checkpoint::<CheckpointError>(folder.path(), &specs, usize::MAX, |spec| {
        let bytes =
            weights[&spec.name].data.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect::<Vec<_>>();
        Ok(Cow::Owned(bytes))
    })
    .expect("a temporary folder can be written");
    let checkpoint = Arc::new(Checkpoint::open(folder.path()).expect("just written"));
    let mut engine = Engine::new(Host::new());
    engine.add(&compiled, &checkpoint).map_err(|e| TestCaseError::fail(e.to_string()))?;

    let bound: BTreeMap<&str, usize> =
        [("b", 1 + rng.below(3) as usize), ("t", rng.below(5) as usize)].into();
    let size = |s: &Size| match s {
        Size::Fixed(n) => *n as usize,
        Size::Sym(s) => bound.get(s.as_str()).copied().unwrap_or(bound["t"]),
    };
    let entry = compiled.module().entry().expect("verified");
    let mut args = Vec::new();
    for &p in &entry.params {
        let shape: Vec<_> = entry.ty(p).axes.iter().map(|&a| size(&entry.axis(a).size)).collect();
        args.push(random(entry.ty(p).dtype, shape, &mut rng));
    }
    let mut interp = Interpreter::new(compiled.module(), Precision::Exact);
    for axis in compiled.module().functions.iter().flat_map(|f| &f.axes) {
        if let Size::Sym(s) = &axis.size {
            interp = interp.with_size(s, size(&axis.size));
        }
    }
    let want = interp.run(&args, &mut weights, &mut Caches::new());
    engine.reset(bound["b"], bound["t"]).expect("memory");
    let values: Vec<_> = args.iter().map(value).collect();
    let got = engine.run(graph, &values, bound["t"]);
    let (want, got) = match (want, got) {
        (Err(_), _) => return Ok(()),
        (Ok(want), Ok(got)) => (want, got),
        // Random functions may use a size that no argument of theirs has.
        (Ok(_), Err(RunError::Argument(why))) if why.starts_with("no argument has the size") => return Ok(()),
        (Ok(_), Err(e)) => {
            return Err(TestCaseError::fail(format!("{e}\n{}\n{}", compiled.module(), compiled.program)));
        }
    };
    // Memory holds what the first run left, and caches what it appended: the same again must come out.
    let again = engine.run(graph, &values, bound["t"]).map_err(|e| TestCaseError::fail(e.to_string()))?;
    prop_assert!(same(&again, &got), "a second run differs\n{}\n{}", compiled.module(), compiled.program);
    for (want, got) in want.iter().zip(&got) {
        prop_assert_eq!(&want.shape, &got.shape);
        let data = match &got.data {
            Data::F32(v) => v.iter().map(|&x| f64::from(x)).collect(),
            Data::I32(v) => v.iter().map(|&x| f64::from(x)).collect(),
        };
        let got = Tensor { dtype: want.dtype, shape: want.shape.clone(), data };
        let want = Tensor { data: want.data.iter().map(|&x| f64::from(x as f32)).collect(), ..want.clone() };
        let scale = want.data.iter().filter(|x| x.is_finite()).fold(1.0f64, |m, x| m.max(x.abs()));
        got.close_to(&want, 2e-4 * scale, 2e-4).map_err(|e| {
            TestCaseError::fail(format!("{e:?}\n{}\n{}", compiled.module(), compiled.program))
        })?;
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn programs_compute_what_their_graphs_say(
        module in latentc_ir::testing::arb_module(latentc_ir::verify::Stage::Traced),
        graph in prop::sample::select(Graph::ALL.to_vec()),
        seed: u64,
    ) {
        // What is differentiated has one result.
        let objective = latentc_ir::testing::objective(&module);
        check(if graph == Graph::Gradient { &objective } else { &module }, graph, seed)?;
    }
}

/// Weights that lie in files as they are read, in several tensors, as a part of one, and in another order; and one that is read by rows.
const CODED: &str = "module m entry @f

func @f {
  axes t, j=2, e=3, d=24, f=5, g=2, n=8, v=7
  param tok: i32[t]
  param chosen: i32[t, j=2]
  weight E: f32[v=7, d=24] = \"embed\"[v, d]
  weight W: f32[e=3, f=5, d=24] = \"experts.{e}\"[f, d]
  weight P: f32[f=5, d=24] = \"part\"[(g | f), d]
  weight T: f32[f=5, n=8] = \"turned\"[n, f]

  x: f32[t, d=24] = gather E, tok along v
  p: f32[t, f=5] = contract P, x over d
  w: f32[t, j=2, f=5, d=24] = gather W, chosen along e
  own: f32[t, j=2, f=5] = contract w, x over d
  q: f32[t, j=2, f=5] = mul own, p
  y: f32[t, j=2, n=8] = contract T, q over f
  return y, p
}
";

#[test]
fn codes_are_made_of_what_a_checkpoint_holds() {
    let module = latentc_ir::check("m.ir", CODED).unwrap_or_else(|e| panic!("{}", e.render()));
    let wanted = |group| Wanted { weights: Some(WeightForm { group }), ..Graph::Train.into() };
    let compiled = compile(&module, wanted(8), &pipeline()).expect("it compiles");
    assert_eq!(compiled.module().to_string().matches("= codes ").count(), 4, "{}", compiled.module());
    for (group, seed) in (4..20).zip(0..) {
        check(&module, wanted(group), seed).unwrap_or_else(|e| panic!("groups of {group}: {e}"));
    }
}

#[test]
fn what_a_tuning_asks_for_in_vain_is_said_before_weights_are_made() {
    let emulator = match Emulator::open(1) {
        Ok(emulator) => emulator,
        Err(DeviceError::Absent(_, why)) => return eprintln!("SKIPPED: a tuning on the emulator: {why}"),
        Err(e) => panic!("{e}"),
    };
    let text = "module m entry @f\n\nfunc @f {\n  axes t, i=64, d=64\n  param x: f32[t, d=64]\n  \
                weight w: f32[i=64, d=64] = \"w\"[i, d]\n\n  y: f32[t, i=64] = contract w, x over d\n  return y\n}\n";
    let module = latentc_ir::parse("m.ir", text).unwrap_or_else(|e| panic!("{e}"));
    let compiled = compile(&module, Graph::Train, &pipeline()).expect("it compiles");
    let [kernel] = &compiled.program.kernels[..] else { panic!("{}", compiled.program) };
    let mut tuning = Tuning::new("my.json".to_owned(), Machine::HOPPER);
    let up_to = kernel.size_symbols().iter().map(|s| ((*s).to_owned(), 64)).collect();
    tuning.insert(identity(kernel, Target::Cuda), up_to, "few rows, 3".to_owned());
    let mut engine = Engine::new(emulator.with_tuning(Arc::new(tuning)));
    let error = engine.add_made(&compiled, &mut |_, _, _, _| panic!("a weight is made")).unwrap_err();
    let said = error.to_string();
    let wanted = format!("kernel {}: my.json: it has no way `few rows, 3`, but `contract`; ", kernel.name);
    assert!(said.starts_with(&wanted), "{said}");
}
