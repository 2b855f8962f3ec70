//! What the gradient of a loss takes: rows of logits are as long as a vocabulary.

use latentc_codegen::cube::Target;
use latentc_codegen::host::LAYOUT;
use latentc_codegen::memory::Plan;
use latentc_codegen::program::{Program, Step};
use latentc_codegen::schedule::schedule;
use latentc_ir::Module;
use latentc_passes::{Context, Graph};

/// The mean cross entropy of a linear model, as a model's head has it.
const TEXT: &str = r#"module m entry @loss

func @loss {
  axes b, t, v=4096, d=64
  param x: f32[b, t, d=64]
  param target: i32[b, t]
  param weight: f32[b, t]
  weight W: f32[v=4096, d=64] = "w"[v, d]

  place: i32[t] = position of t
  r: f32[t] = cast place
  h: f32[b, t, d=64] = mul x, r
  y: f32[b, t, v=4096] = contract W, h over d
  m: f32[b, t] = reduce_max y over v
  z: f32[b, t, v=4096] = sub y, m
  e: f32[b, t, v=4096] = exp z
  sum: f32[b, t] = reduce_sum e over v
  log: f32[b, t] = log sum
  lse: f32[b, t] = add log, m
  at: f32[b, t] = gather y, target along v
  nll: f32[b, t] = sub lse, at
  all: f32 = contract weight, nll over b, t
  n: f32 = contract weight over b, t
  loss: f32 = div all, n
  return loss
}
"#;

fn gradient() -> Program {
    let mut module: Module = latentc_ir::check("m.ir", TEXT).unwrap_or_else(|e| panic!("{}", e.render()));
    let mut cx = Context::new(Graph::Gradient);
    for pass in latentc_passes::pipeline() {
        module = pass.apply(&module, &mut cx).expect("passes apply");
    }
    schedule(&module, &cx).expect("every op has a kernel")
}

/// A sum over all of a batch has one row: with it in the kernel of every logit, one processor would walk them all.
#[test]
fn what_all_rows_divide_by_is_there_before() {
    let program = gradient();
    let routine = program.routine("loss").unwrap();
    let wide = |step: &&Step| step.outputs().iter().any(|&b| routine.buffer(b).name.starts_with("y.grad"));
    let steps: Vec<_> = routine.steps.iter().filter(wide).collect();
    let [Step::Launch { kernel, .. }] = steps[..] else { panic!("one launch makes it:\n{program}") };
    let body = &program.kernels[*kernel].body;
    let rows = latentc_codegen::map::MapPlan::of(body).rows;
    assert!(rows.is_none_or(|rows| rows.len() == 2), "a row is that of a token:\n{body}");
}

/// Logits are the largest values by far: their gradient comes to lie where they are.
#[test]
fn logits_and_their_gradient_have_one_place() {
    let program = gradient();
    let sizes = [("b", 2), ("t", 4096)].map(|(s, n)| (s.to_owned(), n)).into();
    for layout in [Target::Cuda.layout(), LAYOUT] {
        let plan = Plan::new(&program, &sizes, &layout).expect("there is a plan");
        let logits = 2 * 4096 * 4096 * 4;
        assert!(
            plan.bytes() > logits && plan.bytes() < logits + logits / 4,
            "{} of {logits}:\n{program}",
            plan.bytes()
        );
    }
}
