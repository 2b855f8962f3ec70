//! The order of products at the sizes of the published models: which is chosen, what it costs, and where another
//! would be the faster.

use latentc_ir::{
    AxisId, Binary, Caches, DType, Factor, Function, Held, Interpreter, Module, Op, Precision, Size,
    SplitMix, Stored, Tensor, Type, ValueId, Weight, check, cost,
};
use latentc_passes::{Context, Graph, Kind, Remark, Unit, pipeline};

/// The module after the pass, and what the pass said.
fn ordered(text: &str, graph: Graph) -> (Module, Vec<Remark>) {
    let module = check("test.ir", text).unwrap_or_else(|e| panic!("{}", e.render()));
    let mut cx = Context::new(graph);
    let pass = pipeline().into_iter().find(|p| p.name == "reassociate").expect("a pass of the pipeline");
    let after = pass.apply(&module, &mut cx).expect("it always applies");
    latentc_ir::verify(&after).expect("what it leaves verifies");
    (after, cx.remarks)
}

/// Latent attention as it stands when the cache has been placed, with `i` heads and queries of a `q`.
fn latent(graph: Graph, i: u64, q: &str) -> String {
    let (past, cached) = if graph == Graph::Train { ("s=t like t", "b, s") } else { ("s like t", "s, b") };
    format!(
        r#"module latent entry @mla
func @mla source "mla.rs" {{
  axes b, t, {past}, d=5120, i={i}, n=128, r=64, v=128, c=512, {q}
  param c_Q: bf16[b, t, {q}]
  param q_R: bf16[b, t, i={i}, r=64]
  param c_KV.s: bf16[{cached}, c=512]
  param k_R.s: bf16[{cached}, r=64]
  param mask: f32[b, t, s]
  weight W_UK: bf16[i={i}, n=128, c=512] = "kv_b_proj.weight"[i * (n | v), c]
  weight W_UV: bf16[i={i}, v=128, c=512] = "kv_b_proj.weight"[i * (n | v), c]
  weight W_O: bf16[d=5120, i={i}, v=128] = "o_proj.weight"[d, i * v]
  weight W_UQ: bf16[i={i}, n=128, {q}] = "q_b_proj.weight"[i * n, p]
  q_C: bf16[b, t, i={i}, n=128] = contract W_UQ, c_Q over p      @43:1 (38)
  k_C.s: bf16[b, s, i={i}, n=128] = contract W_UK, c_KV.s over c @54:1 (42)
  z_C: f32[b, t, i={i}, s] = contract q_C, k_C.s over n          @57:1 (46)
  z_R: f32[b, t, i={i}, s] = contract q_R, k_R.s over r          @57:1 (46)
  z: f32[b, t, i={i}, s] = add z_C, z_R                          @57:1 (46)
  scale: f32 = const 0.1147                                      @57:1 (46)
  z.1: f32[b, t, i={i}, s] = mul z, scale                        @57:1 (46)
  z.2: f32[b, t, i={i}, s] = add z.1, mask                       @57:1 (46)
  P: bf16[b, t, i={i}, s] = softmax z.2 over s                   @57:1 (46)
  v_C.s: bf16[b, s, i={i}, v=128] = contract W_UV, c_KV.s over c @56:1 (45)
  o: bf16[b, t, i={i}, v=128] = contract P, v_C.s over s         @59:1 (46)
  u: bf16[b, t, d=5120] = contract W_O, o over i, v              @60:1 (47)
  return u
}}
"#
    )
}

fn v2(graph: Graph) -> String {
    latent(graph, 128, "p=1536")
}

fn made_by(m: &Module, value: &str) -> String {
    let f: &Function = m.entry().expect("an entry");
    let id = f.value_named(value).unwrap_or_else(|| panic!("no `{value}` in\n{m}"));
    let inst = f.body.iter().find(|i| i.results.contains(&id)).expect("a result");
    latentc_ir::print::show_inst(f, inst)
}

fn flops(m: &Module) -> String {
    cost(m, &m.entry).expect("an entry").total.flops.to_string()
}

fn candidates(r: &Remark) -> Vec<&str> {
    r.candidates.iter().map(|c| c.what.as_str()).collect()
}

#[test]
fn decode_meets_the_weights_first() {
    for (i, q) in [(128, "p=1536"), (16, "p=2048")] {
        let (m, remarks) = ordered(&latent(Graph::Decode, i, q), Graph::Decode);
        assert!(m.entry().unwrap().value_named("k_C.s").is_none(), "keys are not rebuilt\n{m}");
        assert!(m.entry().unwrap().value_named("v_C.s").is_none(), "nor are values\n{m}");
        let query = format!("q_C.W_UK: f32[b, t, i={i}, c=512] = contract q_C, W_UK over n");
        assert!(made_by(&m, "q_C.W_UK").starts_with(&query), "{m}");
        let output = format!("o: bf16[b, t, i={i}, v=128] = contract P.c_KV.s, W_UV over c");
        assert!(made_by(&m, "o").starts_with(&output), "{m}");
        let [z, o] = &remarks[..] else { panic!("two choices, not {remarks:?}") };
        assert_eq!(candidates(z), ["(q_C W_UK) c_KV.s", "q_C (W_UK c_KV.s)", "(q_C c_KV.s) W_UK"]);
        assert_eq!(candidates(o), ["(P c_KV.s) W_UV", "P (W_UV c_KV.s)", "(P W_UV) c_KV.s"]);
        assert!(z.candidates[0].weight < z.candidates[1].weight);
        assert!(z.candidates.iter().all(|c| c.unit == Unit::Seconds));
        assert_eq!((z.kind, o.kind), (Kind::Applied, Kind::Applied));
    }
}

#[test]
fn training_and_long_prefill_rebuild_keys_and_values() {
    for graph in [Graph::Train, Graph::Prefill] {
        let text = v2(graph);
        let (m, remarks) = ordered(&text, graph);
        assert_eq!(m, check("test.ir", &text).unwrap(), "{}", graph.name());
        let [z, o] = &remarks[..] else { panic!("two choices, not {remarks:?}") };
        assert_eq!((z.kind, o.kind), (Kind::Missed, Kind::Missed));
        assert_eq!(candidates(z)[..2], ["q_C (W_UK c_KV.s)", "(q_C W_UK) c_KV.s"]);
        assert_eq!(candidates(o)[..2], ["P (W_UV c_KV.s)", "(P c_KV.s) W_UV"]);
        assert_eq!(z.crossing.is_some(), graph == Graph::Prefill, "training has no other graph to run");
    }
}

/// What appendix C's absorption is worth, and how far: a token's arithmetic no longer holds 2 · 2^23 operations for each
/// token before it, at the price of longer dots.
#[test]
fn what_it_costs_and_where_it_ends() {
    let (before, _) = ordered(&v2(Graph::Prefill), Graph::Prefill);
    let (after, remarks) = ordered(&v2(Graph::Decode), Graph::Decode);
    assert_eq!(flops(&before), "82944 b s t + 33554432 b s + 218104192 b t");
    assert_eq!(flops(&after), "279552 b s t + 251658624 b t");
    let crossing = |r: &Remark| {
        let c = r.crossing.clone().expect("it depends on the number of new tokens");
        (c.size, c.at, c.by_operations)
    };
    assert_eq!(crossing(&remarks[0]), ("t".to_owned(), 176, Some(163)));
    assert_eq!(crossing(&remarks[1]), ("t".to_owned(), 176, Some(163)));
    assert_eq!(
        remarks[0].message,
        "`(q_C W_UK) c_KV.s`: the fewest seconds of a run on h800 at b = 32, s = 4096, t = 1; beyond t = 176 (163 if \
         only operations counted), `q_C (W_UK c_KV.s)` would be faster"
    );
}

fn chain(d: u64, c: u64, author: &str) -> String {
    format!(
        r#"module chain entry @f
func @f source "chain.rs" {{
  axes b, t, d={d}, e={c}, f={c}, g={d}
  param x: bf16[b, t, d={d}]
  weight A: bf16[g={d}, f={c}] = "a.weight"[g, f]
  weight B: bf16[f={c}, e={c}] = "b.weight"[f, e]
  weight C: bf16[e={c}, d={d}] = "c.weight"[e, d]
  {author}
  return y
}}
"#
    )
}

const FROM_THE_LEFT: &str = "M: bf16[g={d}, e={c}] = contract A, B over f
  N: bf16[g={d}, d={d}] = contract M, C over e
  y: bf16[b, t, g={d}] = contract N, x over d";

/// Three projections through a waist: the tokens go through one by one, however it was written.
#[test]
fn a_chain_of_three_projections_starts_at_the_tokens() {
    for graph in Graph::ALL {
        let text = FROM_THE_LEFT.replace("{d}", "4096").replace("{c}", "256");
        let (m, remarks) = ordered(&chain(4096, 256, &text), graph);
        let names: Vec<_> = m.entry().unwrap().body.iter().map(|i| i.args.len()).collect();
        assert_eq!(names, [2, 2, 2]);
        let best = candidates(&remarks[0])[0];
        assert!(["A (B (C x))", "(A B) (C x)"].contains(&best), "{best}");
    }
}

/// Two wide matrices with a narrow product are better multiplied before the run, which nothing can do yet.
#[test]
fn folding_weights_is_weighed_and_said() {
    let text = r#"module fold entry @f
func @f source "fold.rs" {
  axes b, t, d=2048, e=65536, g=2048
  param x: bf16[b, t, d=2048]
  weight A: bf16[g=2048, e=65536] = "a.weight"[g, e]
  weight B: bf16[e=65536, d=2048] = "b.weight"[e, d]
  h: bf16[b, t, e=65536] = contract B, x over d  @1:1
  y: bf16[b, t, g=2048] = contract A, h over e    @2:1
  return y
}
"#;
    let (m, remarks) = ordered(text, Graph::Decode);
    assert_eq!(m, check("test.ir", text).unwrap(), "it stays as it is");
    assert!(remarks[0].message.contains("`[A B] x` would take"), "{}", remarks[0].message);
    let (_, remarks) = ordered(text, Graph::Train);
    assert!(remarks.iter().all(|r| !r.message.contains('[')), "weights change in training");
}

#[test]
fn attention_without_latents_has_nothing_to_choose() {
    let text = v2(Graph::Decode)
        .replace("weight W_UK: bf16[i=128, n=128, c=512] = \"kv_b_proj.weight\"[i * (n | v), c]\n", "")
        .replace("weight W_UV: bf16[i=128, v=128, c=512] = \"kv_b_proj.weight\"[i * (n | v), c]\n", "")
        .replace("c_KV.s: bf16[s, b, c=512]", "k_C.s: bf16[s, b, i=128, n=128]")
        .replace(
            "k_R.s: bf16[s, b, r=64]",
            "k_R.s: bf16[s, b, r=64]\n  param v_C.s: bf16[s, b, i=128, v=128]",
        );
    let lines = text.lines().filter(|l| !l.contains("contract W_UK") && !l.contains("contract W_UV"));
    let text = lines.collect::<Vec<_>>().join("\n").replace(", c=512, p", ", p");
    for graph in [Graph::Decode, Graph::Prefill] {
        let (m, remarks) = ordered(&text, graph);
        assert_eq!(m, check("test.ir", &text).unwrap(), "{}", graph.name());
        assert!(remarks.is_empty(), "{remarks:?}");
    }
}

/// Products of more operands than all orders are tried for.
#[test]
fn many_operands_are_ordered_greedily() {
    let n = 40;
    let axes: Vec<_> = (0..=n).map(|k| format!("a{k}={}", 2 + k % 3)).collect();
    let size = |k: usize| format!("a{k}={}", 2 + k % 3);
    let weights: Vec<_> = (0..n)
        .map(|k| format!("weight W{k}: f32[{}, {}] = \"w{k}\"[a{k}, a{}]", size(k), size(k + 1), k + 1))
        .collect();
    let names: Vec<_> = (0..n).map(|k| format!("W{k}")).collect();
    let text = format!(
        "module m entry @f\nfunc @f {{\n  axes {}\n  {}\n  y: f32[{}, {}] = contract {} over {}\n  return y\n}}\n",
        axes.join(", "),
        weights.join("\n  "),
        size(0),
        size(n),
        names.join(", "),
        (1..n).map(|k| format!("a{k}")).collect::<Vec<_>>().join(", ")
    );
    let (m, _) = ordered(&text, Graph::Decode);
    assert_eq!(m.entry().unwrap().body.len(), n - 1);
    assert!(m.entry().unwrap().body.iter().all(|i| i.args.len() == 2));
}

/// A tree of products over few axes, so that sums inside and outside often call them by the same letters.
struct Grow {
    f: Function,
    rng: SplitMix,
}

impl Grow {
    fn module(seed: u64) -> Module {
        let mut f = Function::new("f");
        let mut rng = SplitMix(seed);
        let sizes = [Size::Sym("t".into()), Size::Sym("b".into()), 2.into(), 2.into(), 3.into(), 3.into()];
        for (name, size) in ["t", "b", "k", "l", "m", "n"].into_iter().zip(sizes) {
            f.add_axis(name, size, None);
        }
        let mut types = Vec::new();
        for _ in 0..7 {
            let mut axes: Vec<_> = (0..6).map(AxisId).collect();
            axes.retain(|_| rng.below(2) == 0);
            if rng.below(2) == 0 {
                axes.reverse();
            }
            types.push(Type::new([DType::F32, DType::Bf16][rng.below(2) as usize], axes));
        }
        for (n, ty) in types.iter().take(4).enumerate() {
            f.add_param(&format!("x{n}"), ty.clone());
        }
        for (n, ty) in types.iter_mut().skip(4).enumerate() {
            ty.axes.retain(|a| a.0 > 1);
            let dims = ty.axes.iter().map(|&a| vec![Factor::Axis(a)]).collect();
            f.add_weight(
                &format!("W{n}"),
                ty.clone(),
                Stored { tensor: format!("w{n}"), dims, held: Held::Elements },
            );
        }
        let mut grow = Grow { f, rng };
        let root = grow.tree(3);
        let root = grow.contract(vec![root]);
        grow.f.results.push(root);
        Module { name: "grown".into(), functions: vec![grow.f], entry: "f".into() }
    }

    fn below(&mut self, n: usize) -> usize {
        self.rng.below(n as u64) as usize
    }

    fn tree(&mut self, depth: usize) -> ValueId {
        let kind = self.below(8);
        if depth == 0 || kind == 0 {
            return ValueId(self.below(7) as u32);
        }
        match kind {
            1 | 2 => {
                let (x, y) = (self.tree(depth - 1), self.tree(depth - 1));
                let mut axes = self.f.ty(x).axes.clone();
                axes.extend(self.f.ty(y).axes.iter().filter(|a| !self.f.ty(x).has(**a)));
                self.f.push(Op::Binary(Binary::Mul), &[x, y], &[("", Type::new(DType::F32, axes))])[0]
            }
            3 => {
                let x = self.tree(depth - 1);
                let ty = self.f.ty(x).clone();
                let pairs = [(2, 3), (3, 2), (4, 5), (5, 4)].map(|(a, b)| (AxisId(a), AxisId(b)));
                let Some(&(from, to)) = pairs.iter().find(|(a, b)| ty.has(*a) && !ty.has(*b)) else {
                    return x;
                };
                let axes: Vec<_> = ty.axes.iter().map(|&a| if a == from { to } else { a }).collect();
                self.f.push(Op::Rename { from, to }, &[x], &[("", Type::new(ty.dtype, axes))])[0]
            }
            _ => {
                let args = (0..1 + self.below(3)).map(|_| self.tree(depth - 1)).collect();
                self.contract(args)
            }
        }
    }

    fn contract(&mut self, args: Vec<ValueId>) -> ValueId {
        let mut axes = Vec::new();
        for a in args.iter().flat_map(|&v| self.f.ty(v).axes.clone()) {
            if !axes.contains(&a) {
                axes.push(a);
            }
        }
        axes.retain(|_| self.rng.below(3) > 0);
        let dtype = [DType::F32, DType::Bf16][self.below(2)];
        self.f.push(Op::Contract, &args, &[("", Type::new(dtype, axes))])[0]
    }
}

fn results(m: &Module, seed: u64) -> Vec<Tensor> {
    let size = |s: &Size| s.fixed().unwrap_or(if *s == Size::Sym("t".into()) { 2 } else { 3 }) as usize;
    let f = m.entry().expect("an entry");
    let shape = |v: ValueId| f.ty(v).axes.iter().map(|&a| size(&f.axis(a).size)).collect::<Vec<_>>();
    let mut rng = SplitMix(seed);
    let args: Vec<_> = f.params.iter().map(|&p| Tensor::random(f.ty(p).dtype, shape(p), &mut rng)).collect();
    let mut weights = |_: &str, f: &Function, w: &Weight| -> Result<Tensor, String> {
        let shape: Vec<_> = f.ty(w.value).axes.iter().map(|&a| size(&f.axis(a).size)).collect();
        Ok(Tensor::random(DType::F32, shape, &mut SplitMix(w.stored.tensor.len() as u64)))
    };
    let interp = Interpreter::new(m, Precision::Exact).with_size("t", 2).with_size("b", 3);
    interp.run(&args, &mut weights, &mut Caches::new()).expect("it runs")
}

#[test]
fn trees_of_products_keep_their_meaning() {
    let mut changed = 0;
    for seed in 0..600 {
        let module = Grow::module(seed);
        latentc_ir::verify(&module).unwrap_or_else(|e| panic!("{}\n{module}", e[0]));
        let graph = Graph::ALL[seed as usize % Graph::ALL.len()];
        let (after, _) = ordered(&module.to_string(), graph);
        changed += usize::from(after != module);
        let f = after.entry().unwrap();
        for inst in f.body.iter().filter(|i| i.op == Op::Contract) {
            let summed = f.summed(&inst.args, f.ty(inst.result()));
            assert_eq!(inst.args.len(), 2, "{after}");
            assert!(!summed.is_empty(), "{after}");
            assert!(summed.iter().all(|&a| inst.args.iter().all(|&v| f.ty(v).has(a))), "{after}");
        }
        for (want, got) in results(&module, seed).iter().zip(results(&after, seed)) {
            let scale = want.data.iter().fold(1.0f64, |m, x| m.max(x.abs()));
            got.close_to(want, 1e-11 * scale, 1e-11).unwrap_or_else(|e| panic!("{e}\n{module}\n{after}"));
        }
        let (again, _) = ordered(&module.to_string(), graph);
        assert_eq!(again, after);
    }
    assert!(changed > 200, "{changed}");
}
