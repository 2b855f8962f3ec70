//! Passes are checked against what they were given: those of the pipeline on all models, and wrong ones, which are caught with
//! the smallest program that shows it.

use latentc_ir::{Binary, DType, Module, Op, Unary, check};
use latentc_models::config::ModelConfig;
use latentc_models::{Goal, trace};
use latentc_passes::validate::{DifferenceKind, Failure, Numbers, Verdict, compare, validate};
use latentc_passes::{Context, Graph, Pass, Pool, Wanted, Without, pipeline, run};

/// The module after each pass.
fn stages(name: &str, graph: Graph) -> Vec<(&'static str, Module)> {
    let config = ModelConfig::bundled(name).expect("a bundled model");
    let goal = if graph.serves() { Goal::Logits } else { Goal::Loss };
    let traced = trace(&config, goal, DType::Bf16).unwrap_or_else(|e| panic!("{}", e.render()));
    run(&traced.module, &mut Context::new(graph), &pipeline()).expect("every model compiles")
}

#[test]
fn every_pass_is_right_on_the_bundled_models() {
    for name in ModelConfig::bundled_names() {
        for graph in Graph::ALL {
            let stages = stages(name, graph);
            for (pass, two) in pipeline().iter().zip(stages.windows(2)) {
                let unknown = validate(pass, &Context::new(graph), &two[0].1, &two[1].1)
                    .unwrap_or_else(|e| panic!("{name}: {e}"));
                assert_eq!(unknown, None, "{name}, {}: {}", graph.name(), pass.name);
            }
        }
    }
}

#[test]
fn caches_in_pages_hold_what_they_held() {
    for name in ModelConfig::bundled_names() {
        for graph in [Graph::Prefill, Graph::Decode] {
            let wanted = Wanted { page: Some(2), ..graph.into() };
            let config = ModelConfig::bundled(name).expect("a bundled model");
            let traced =
                trace(&config, Goal::Logits, DType::Bf16).unwrap_or_else(|e| panic!("{}", e.render()));
            let mut cx = Context::new(wanted);
            let stages = run(&traced.module, &mut cx, &pipeline()).expect("every model compiles");
            for (pass, two) in pipeline().iter().zip(stages.windows(2)) {
                if !["page", "simplify", "inline"].contains(&pass.name) {
                    continue;
                }
                let unknown =
                    validate(pass, &cx, &two[0].1, &two[1].1).unwrap_or_else(|e| panic!("{name}: {e}"));
                assert_eq!(unknown, None, "{name}, {}: {}", graph.name(), pass.name);
            }
            // Those behind it leave it as it can be known again.
            let pool = Pool::of(&stages[stages.len() - 1].1).expect("there are pools");
            let (slots, pages) = ("slots".to_owned(), "pages".to_owned());
            assert_eq!(pool, Pool { page: 2, slots, pages, past: Some("s".to_owned()) }, "{name}");
        }
    }
}

/// A pass that rewrites single instructions.
fn wrong(run: fn(&Module, &mut Context) -> Result<Module, latentc_passes::PassError>) -> Pass {
    Pass { name: "wrong", law: "none", without: Without::Nothing, run, rounds: None }
}

fn each_op(module: &Module, rewrite: impl Fn(&latentc_ir::Function, &mut latentc_ir::Inst)) -> Module {
    let mut out = module.clone();
    for (f, old) in out.functions.iter_mut().zip(&module.functions) {
        f.body.iter_mut().for_each(|inst| rewrite(old, inst));
    }
    out
}

/// The failure of a pass on a stage of DeepSeek-V2, once more from its own text.
fn caught(pass: Pass, graph: Graph, stage: &str) -> Failure {
    let stages = stages("deepseek-v2", graph);
    let (_, module) = stages.iter().find(|(name, _)| *name == stage).expect("a stage");
    let after = pass.apply(module, &mut Context::new(graph)).expect("it verifies");
    let failure = validate(&pass, &Context::new(graph), module, &after).expect_err("it is wrong");
    let again = check("failure.ir", &failure.module.to_string()).unwrap_or_else(|e| panic!("{}", e.render()));
    assert_eq!(again, failure.module, "what is printed is what failed");
    let after = pass.apply(&again, &mut Context::new(graph)).expect("it still verifies");
    validate(&pass, &Context::new(graph), &again, &after).expect_err("it is still wrong");
    *failure
}

#[test]
fn a_wrong_pass_is_caught_with_the_smallest_program() {
    let pass = wrong(|m, _| {
        Ok(each_op(m, |_, i| {
            if i.op == Op::Unary(Unary::Silu) {
                i.op = Op::Unary(Unary::Sigmoid);
            }
        }))
    });
    let failure = caught(pass, Graph::Decode, "expand");
    let f = failure.module.entry().expect("an entry");
    assert_eq!(failure.module.functions.len(), 1);
    assert_eq!((f.body.len(), f.params.len(), f.weights.len(), f.caches.len()), (1, 1, 0, 0), "{failure}");
    assert_eq!(f.body[0].op, Op::Unary(Unary::Silu));
    assert!(f.axes.iter().all(|a| a.size.fixed().is_none_or(|n| n == 1)), "{failure}");
    assert_eq!(failure.difference.kind, DifferenceKind::Number);
    let text = failure.to_string();
    assert!(text.starts_with("the pass `wrong` changes what a decode graph computes: `"), "{text}");
    assert!(
        text.contains("\n// latentc opt FILE --graph decode --passes wrong --validate\nmodule "),
        "{text}"
    );
}

#[test]
fn what_is_wrong_in_the_second_step_only_is_caught() {
    // What came before is forgotten: every token is written where the first one was.
    let pass = wrong(|m, _| {
        let mut out = each_op(m, |_, _| {});
        for f in &mut out.functions {
            while let Some(at) = f
                .body
                .iter()
                .position(|i| matches!(i.op, Op::Append { .. }) && i.by.as_deref() != Some("wrong"))
            {
                f.body[at].by = Some("wrong".to_owned());
                let pos = f.body[at].args[2];
                let ty = f.ty(pos).clone();
                let zero = f.push(Op::Binary(Binary::Sub), &[pos, pos], &[("", ty)])[0];
                f.body[at].args[2] = zero;
                f.body[at..].rotate_right(1);
            }
        }
        Ok(out.canonical())
    });
    let failure = caught(pass, Graph::Decode, "derive");
    let f = failure.module.entry().expect("an entry");
    assert!(f.body.len() <= 2, "{failure}");
    assert!(f.body.iter().any(|i| matches!(i.op, Op::Append { .. })), "{failure}");
}

#[test]
fn what_is_wrong_at_large_sizes_only_is_caught_at_these() {
    let pass = wrong(|m, _| {
        Ok(each_op(m, |f, i| {
            let large =
                i.results.iter().flat_map(|&r| &f.ty(r).axes).any(|&a| f.axis(a).size.fixed() > Some(4000));
            if large && i.op == Op::Binary(Binary::Add) {
                i.op = Op::Binary(Binary::Mul);
            }
        }))
    });
    let failure = caught(pass, Graph::Prefill, "trace");
    let f = failure.module.entry().expect("an entry");
    assert_eq!(f.body.len(), 1, "{failure}");
    assert!(f.axes.iter().any(|a| a.size.fixed() > Some(4000)), "{failure}");
}

#[test]
fn what_cannot_be_compared_is_said() {
    let text = "module m entry @f\n\nfunc @f {\n  axes d=3, e=2\n  param x: f32[d=3]\n  j: i32[e=2] = const [7, 8]\n  \
                y: f32[e=2] = gather x, j along d\n  return y\n}\n";
    let m = check("m.ir", text).unwrap_or_else(|e| panic!("{}", e.render()));
    let Verdict::Unknown(why) = compare(&m, &m, 1, Numbers::Reals) else { panic!("nothing can be compared") };
    assert!(why.starts_with("the program itself fails: @f: y: "), "{why}");

    let text = "module m entry @f\n\nfunc @f {\n  axes d=3\n  param x: f32[d=3]\n  least: f32 = const -inf\n  \
                y: f32[d=3] = mul x, least\n  z: f32[d=3] = neg y\n  return z\n}\n";
    let m = check("m.ir", text).unwrap_or_else(|e| panic!("{}", e.render()));
    let other = each_op(&m, |_, i| {
        if matches!(i.op, Op::Unary(_)) {
            i.op = Op::Cast;
        }
    });
    assert!(matches!(compare(&m, &other, 1, Numbers::Reals), Verdict::Unknown(_)));
    assert!(matches!(compare(&m, &other, 1, Numbers::Grid), Verdict::Differs(_)));
}
