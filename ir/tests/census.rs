//! Parameter counts of the published models, from graphs of their shapes, and what the sparsity analysis sees.

use std::fmt::Write;

use latentc_ir::{
    Caches, Census, DType, Interpreter, Module, Precision, SplitMix, Tensor, Tensors, census, check,
};

/// The sizes of a DeepSeek-V2: `groups` is how many expert groups there are and how many a token keeps.
struct Shape {
    vocab: u64,
    hidden: u64,
    heads: u64,
    q_rank: Option<u64>,
    kv_rank: u64,
    nope: u64,
    rope: u64,
    dense: u64,
    expert: u64,
    experts: u64,
    shared: u64,
    k: u64,
    groups: Option<(u64, u64)>,
    layers: (u64, u64),
}

const V2: Shape = Shape {
    vocab: 102_400,
    hidden: 5120,
    heads: 128,
    q_rank: Some(1536),
    kv_rank: 512,
    nope: 128,
    rope: 64,
    dense: 12_288,
    expert: 1536,
    experts: 160,
    shared: 2,
    k: 6,
    groups: Some((8, 3)),
    layers: (1, 59),
};

const LITE: Shape = Shape {
    hidden: 2048,
    heads: 16,
    q_rank: None,
    dense: 10_944,
    expert: 1408,
    experts: 64,
    groups: None,
    layers: (1, 26),
    ..V2
};

/// A model of these shapes: positions and masks are left out, what reads the weights is not.
fn model(s: &Shape) -> Module {
    let mut text = String::from("module v2 entry @model\n");
    let d = s.hidden;
    let (i, n, r, c) = (s.heads, s.nope, s.rope, s.kv_rank);
    let (p, q_in) = (s.q_rank.unwrap_or(d), if s.q_rank.is_some() { "c_Q" } else { "x" });
    let qd = if s.q_rank.is_some() { "p" } else { "d" };
    let mut attention = |name: &str, rest: &str, axes: &str, weights: &str| {
        let (low_weights, low) = match s.q_rank {
            Some(p) => (
                format!(
                    "  weight W_DQ: bf16[p={p}, d={d}] = \"q_a.weight\"[p, d]\n  \
                     weight g_Q: bf16[p={p}] = \"q_a_norm.weight\"[p]\n"
                ),
                format!(
                    "  n_Q: bf16[t, p={p}] = contract W_DQ, x over d\n  \
                     m_Q: bf16[t, p={p}] = rms_norm n_Q over p eps 1e-6\n  \
                     c_Q: bf16[t, p={p}] = mul m_Q, g_Q\n"
                ),
            ),
            None => (String::new(), String::new()),
        };
        write!(
            text,
            r#"
func @{name} {{
  axes t, s=t like t, d={d}, i={i}, n={n}, v={n}, r={r}, c={c}, p={p}{axes}
  param h: bf16[t, d={d}]
  weight g1: bf16[d={d}] = "norm1.weight"[d]
  weight g2: bf16[d={d}] = "norm2.weight"[d]
{low_weights}  weight W_Q: bf16[i={i}, n={n}, {qd}={p}] = "q_b.weight"[i * (n | r), {qd}]
  weight W_QR: bf16[i={i}, r={r}, {qd}={p}] = "q_b.weight"[i * (n | r), {qd}]
  weight W_DKV: bf16[c={c}, d={d}] = "kv_a.weight"[(c | r), d]
  weight W_KR: bf16[r={r}, d={d}] = "kv_a.weight"[(c | r), d]
  weight g_KV: bf16[c={c}] = "kv_a_norm.weight"[c]
  weight W_UK: bf16[i={i}, n={n}, c={c}] = "kv_b.weight"[i * (n | v), c]
  weight W_UV: bf16[i={i}, v={n}, c={c}] = "kv_b.weight"[i * (n | v), c]
  weight W_O: bf16[d={d}, i={i}, v={n}] = "o.weight"[d, i * v]
{weights}
  n1: bf16[t, d={d}] = rms_norm h over d eps 1e-6
  x: bf16[t, d={d}] = mul n1, g1
{low}  q_C: bf16[t, i={i}, n={n}] = contract W_Q, {q_in} over {qd}
  q_R: bf16[t, i={i}, r={r}] = contract W_QR, {q_in} over {qd}
  n_KV: bf16[t, c={c}] = contract W_DKV, x over d
  m_KV: bf16[t, c={c}] = rms_norm n_KV over c eps 1e-6
  c_KV: bf16[t, c={c}] = mul m_KV, g_KV
  k_R: bf16[t, r={r}] = contract W_KR, x over d
  k_C: bf16[t, i={i}, n={n}] = contract W_UK, c_KV over c
  v_C: bf16[t, i={i}, v={n}] = contract W_UV, c_KV over c
  k_Cs: bf16[s, i={i}, n={n}] = past k_C from t to s
  k_Rs: bf16[s, r={r}] = past k_R from t to s
  v_Cs: bf16[s, i={i}, v={n}] = past v_C from t to s
  a_C: f32[t, i={i}, s] = contract q_C, k_Cs over n
  a_R: f32[t, i={i}, s] = contract q_R, k_Rs over r
  a: f32[t, i={i}, s] = add a_C, a_R
  P: f32[t, i={i}, s] = softmax a over s
  o: bf16[t, i={i}, v={n}] = contract P, v_Cs over s
  o_d: bf16[t, d={d}] = contract W_O, o over i, v
  h1: bf16[t, d={d}] = add h, o_d
  n2: bf16[t, d={d}] = rms_norm h1 over d eps 1e-6
  u: bf16[t, d={d}] = mul n2, g2
{rest}  y: bf16[t, d={d}] = add h1, m
  return y
}}
"#
        )
        .unwrap();
    };
    let mlp = |f: u64, out: &str| {
        format!(
            "  y1: bf16[t, f={f}] = contract W_1, u over d\n  y3: bf16[t, f={f}] = contract W_3, u over d\n  \
             a1: bf16[t, f={f}] = silu y1\n  z: bf16[t, f={f}] = mul a1, y3\n  \
             {out}: bf16[t, d={d}] = contract W_2, z over f\n"
        )
    };
    let mlp_weights = |f: u64, name: &str| {
        format!(
            "  weight W_1: bf16[f={f}, d={d}] = \"{name}gate.weight\"[f, d]\n  \
             weight W_2: bf16[d={d}, f={f}] = \"{name}down.weight\"[d, f]\n  \
             weight W_3: bf16[f={f}, d={d}] = \"{name}up.weight\"[f, d]\n"
        )
    };
    let f = s.dense;
    attention("dense", &mlp(f, "m"), &format!(", f={f}"), &mlp_weights(f, "mlp."));

    let (e, f, k, w) = (s.experts, s.expert * s.shared, s.k, s.expert);
    let mut routed = mlp(f, "shared");
    write!(
        routed,
        "  l: f32[t, e={e}] = contract W_G, u over d\n  a_e: f32[t, e={e}] = softmax l over e\n  none: f32 = const 0.0\n"
    )
    .unwrap();
    let mut scores = "a_e";
    let mut axes = format!(", f={f}, e={e}, w={w}");
    if let Some((g, keep)) = s.groups {
        let j = e / g;
        write!(axes, ", g={g}, j={j}").unwrap();
        write!(
            routed,
            "  a_gj: f32[t, g={g}, j={j}] = split a_e axis e into g, j\n  \
             a_g: f32[t, g={g}] = reduce_max a_gj over j\n  in_g: bool[t, g={g}] = top_k a_g over g k {keep}\n  \
             k_gj: f32[t, g={g}, j={j}] = select in_g, a_gj, none\n  \
             kept: f32[t, e={e}] = merge k_gj axes g, j into e\n"
        )
        .unwrap();
        scores = "kept";
    }
    write!(
        routed,
        "  in_e: bool[t, e={e}] = top_k {scores} over e k {k}\n  g_e: f32[t, e={e}] = select in_e, {scores}, none\n  \
         e1: bf16[t, e={e}, w={w}] = contract W_E1, u over d\n  e3: bf16[t, e={e}, w={w}] = contract W_E3, u over d\n  \
         ea: bf16[t, e={e}, w={w}] = silu e1\n  z_e: bf16[t, e={e}, w={w}] = mul ea, e3\n  \
         routed: bf16[t, d={d}] = contract g_e, W_E2, z_e over e, w\n  m: bf16[t, d={d}] = add shared, routed\n"
    )
    .unwrap();
    let mut weights = mlp_weights(f, "mlp.shared.");
    write!(
        weights,
        "  weight W_G: bf16[e={e}, d={d}] = \"mlp.router.weight\"[e, d]\n  \
         weight W_E1: bf16[e={e}, w={w}, d={d}] = \"mlp.experts.{{e}}.gate.weight\"[w, d]\n  \
         weight W_E2: bf16[e={e}, d={d}, w={w}] = \"mlp.experts.{{e}}.down.weight\"[d, w]\n  \
         weight W_E3: bf16[e={e}, w={w}, d={d}] = \"mlp.experts.{{e}}.up.weight\"[w, d]\n"
    )
    .unwrap();
    attention("moe", &routed, &axes, &weights);

    let x = s.vocab;
    write!(
        text,
        "\nfunc @model {{\n  axes t, d={d}, x={x}\n  param ids: i32[t]\n  \
         weight E: bf16[x={x}, d={d}] = \"embed.weight\"[x, d]\n  weight H: bf16[x={x}, d={d}] = \"head.weight\"[x, d]\n  \
         weight g: bf16[d={d}] = \"norm.weight\"[d]\n\n  h0: bf16[t, d={d}] = gather E, ids along x\n"
    )
    .unwrap();
    let all = s.layers.0 + s.layers.1;
    for l in 0..all {
        let name = if l < s.layers.0 { "dense" } else { "moe" };
        let below = l + 1;
        writeln!(text, "  h{below}: bf16[t, d={d}] = call @{name}(h{l}) under \"layers.{l}\"").unwrap();
    }
    write!(
        text,
        "  n: bf16[t, d={d}] = rms_norm h{all} over d eps 1e-6\n  y: bf16[t, d={d}] = mul n, g\n  \
         logits: f32[t, x={x}] = contract H, y over d\n  return logits\n}}\n"
    )
    .unwrap();
    check("v2.ir", &text).unwrap_or_else(|e| panic!("{}", e.render()))
}

fn count(m: &Module) -> Census {
    let c = census(m).unwrap();
    assert_eq!(c.count.total, m.inventory().unwrap().elements());
    c
}

#[test]
fn deepseek_v2_has_235_7_billion_parameters_and_21_4_active() {
    let c = count(&model(&V2));
    assert_eq!(c.count.total, 235_741_434_880);
    assert_eq!(c.count.active, 21_375_800_320);
    assert_eq!(c.count.looked_up, 102_400 * 5120);
    // Of a routed expert a token reads 6/160: the rest of the layer is dense.
    let layer = c.under("layers.7");
    assert_eq!(layer.total - layer.active, 154 * 3 * 5120 * 1536);
    assert_eq!(c.under(""), c.count);
    let shown = "\
function  scopes       parameters           active
@model         1       1048581120       1048581120
@dense         1        337981440        337981440
@moe          59     234354872320      19989237760
all           61     235741434880      21375800320
";
    assert_eq!(c.to_string(), shown);
}

#[test]
fn lite_has_15_7_billion_parameters() {
    let c = count(&model(&LITE));
    assert_eq!(c.count.total, 15_706_484_224);
    assert_eq!(c.count.active, 2_661_150_208);
}

#[test]
fn a_tied_table_counts_once() {
    let m = model(&Shape { layers: (1, 0), ..LITE });
    let tied = check("tied.ir", &m.to_string().replace("head.weight", "embed.weight")).unwrap();
    let (apart, tied) = (count(&m).count, count(&tied).count);
    assert_eq!(apart.total - tied.total, 102_400 * 2048);
    assert_eq!(apart.active - tied.active, 102_400 * 2048);
    // The head reads all of it.
    assert_eq!(tied.looked_up, 0);
}

#[test]
fn what_is_not_only_behind_the_gate_is_active() {
    let dense = |from: &str, to: &str| {
        let text = model(&Shape { layers: (0, 1), ..LITE }).to_string();
        assert!(text.contains(from), "{text}");
        let m = check("case.ir", &text.replace(from, to)).unwrap_or_else(|e| panic!("{}", e.render()));
        let c = count(&m).count;
        let expert = 3 * 2048 * 1408;
        (c.total - c.active) * 3 / expert
    };
    // In thirds of an expert's parameters: 58 of 64 are not active.
    assert_eq!(dense("select in_e, a_e, none", "select in_e, a_e, none"), 3 * 58);
    // A product with the mask is a gate as well.
    let mask = "cast in_e\n  g_e: f32[t, e=64] = mul m_e, a_e";
    assert_eq!(
        dense("g_e: f32[t, e=64] = select in_e, a_e, none", &format!("m_e: f32[t, e=64] = {mask}")),
        3 * 58
    );
    // What is not chosen counts where the gate is not zero.
    assert_eq!(dense("select in_e, a_e, none", "select in_e, a_e, a_e"), 0);
    // Whatever an expert computes, the gate multiplies it.
    assert_eq!(dense("ea: bf16[t, e=64, w=1408] = silu e1", "ea: bf16[t, e=64, w=1408] = exp e1"), 3 * 58);
    // A second use without a gate needs all of it.
    let both = "  spy: bf16[t, d=2048] = contract W_E2, z_e over e, w\n  routed.1: bf16[t, d=2048] = add routed, spy\n";
    let text = "  m: bf16[t, d=2048] = add shared, routed\n";
    let with_spy = format!("{both}{}", text.replace(", routed", ", routed.1"));
    assert_eq!(dense(text, &with_spy), 0);
}

/// A model of the same kind that the interpreter runs, and random weights for it.
fn small() -> (Module, Tensors) {
    let m = model(&Shape {
        vocab: 128,
        hidden: 48,
        heads: 4,
        q_rank: Some(24),
        kv_rank: 16,
        nope: 8,
        rope: 4,
        dense: 64,
        expert: 24,
        experts: 12,
        shared: 2,
        k: 3,
        groups: Some((4, 2)),
        layers: (1, 2),
    });
    let mut rng = SplitMix(1);
    let mut weights = Tensors::new();
    for t in m.inventory().unwrap().tensors {
        let shape: Vec<_> = t.shape.iter().map(|&n| n as usize).collect();
        weights.insert(t.name, Tensor::random(DType::F64, shape, &mut rng));
    }
    (m, weights)
}

fn logits(m: &Module, ids: &[i64], weights: &mut Tensors) -> Tensor {
    let ids = Tensor::from_i64([ids.len()], ids).unwrap();
    Interpreter::new(m, Precision::Exact).run(&[ids], weights, &mut Caches::new()).unwrap().remove(0)
}

#[test]
fn a_token_reads_as_many_experts_as_are_counted() {
    let (m, weights) = small();
    let expected = logits(&m, &[17], &mut weights.clone());
    let matters = |e: &usize| {
        let mut changed = weights.clone();
        let expert = changed.get_mut(&format!("layers.2.mlp.experts.{e}.down.weight")).unwrap();
        expert.data.iter_mut().for_each(|x| *x += 1.0);
        logits(&m, &[17], &mut changed) != expected
    };
    assert_eq!((0..12).filter(matters).count(), 3);
    let layer = count(&m).under("layers.2");
    assert_eq!(layer.total - layer.active, (12 - 3) * 3 * 48 * 24);
}

#[test]
fn a_small_model_runs_in_no_time() {
    let (m, mut weights) = small();
    let ids: Vec<i64> = (0..100).collect();
    let start = std::time::Instant::now();
    let y = logits(&m, &ids, &mut weights);
    assert!(y.data.iter().all(|x| x.is_finite()));
    // It takes a thirtieth of a second; a loop nest over all axes of the experts would take minutes.
    assert!(start.elapsed().as_secs_f64() < 5.0, "{:?}", start.elapsed());
}
