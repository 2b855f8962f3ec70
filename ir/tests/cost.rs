//! What each op costs, in the notation of the cost model.

use latentc_ir::{check, cost};

/// Each line of the body and what it costs: operations, bytes read, bytes written.
const CASES: &[(&str, &str)] = &[
    ("q: bf16[b, t, n=128] = contract W, x over d", "256 b d t | 256 d + 2 b d t | 256 b t"),
    ("y: f32[n=128] = contract W over d", "128 d | 256 d | 512"),
    ("y: f32[b, t] = contract W, x, x over n, d", "512 b d t | 256 d + 2 b d t | 4 b t"),
    ("y: bf16[b, t, d] = silu x", "b d t | 2 b d t | 2 b d t"),
    ("y: f32[b, t, d] = cast x", "0 | 2 b d t | 4 b d t"),
    ("y: bf16[b, d] = reduce_max x over t", "b d t | 2 b d t | 2 b d"),
    ("y: bf16[b, s, d] = past x from t to s", "0 | 0 | 0"),
    ("y: f32[b, t, d] = softmax x over d", "5 b d t + 3 b t | 2 b d t | 4 b d t"),
    ("y: f32[b, t, d] = rms_norm x over d eps 1e-6", "3 b d t + 3 b t | 2 b d t | 4 b d t"),
    ("y: f32[b, t, n=128] = gather E, ids along w", "0 | 4 b t + 512 b t | 512 b t"),
    ("y: bool[b, t, w=9] = top_k g over w k 2", "18 b t | 36 b t | 9 b t"),
    ("y: bf16[b, s, d] = append C, x, ids from t to s", "0 | 2 b d t + 4 b t | 2 b d t"),
];

#[test]
fn each_op_has_its_cost() {
    for (line, expected) in CASES {
        let text = format!(
            "module c entry @main\n\nfunc @main {{\n  axes b, t, s like t, d, n=128, w=9\n  \
             param x: bf16[b, t, d]\n  param ids: i32[b, t]\n  param g: f32[b, t, w=9]\n  \
             weight W: bf16[n=128, d] = \"w\"[n, d]\n  weight E: f32[w=9, n=128] = \"e\"[w, n]\n  \
             cache C: bf16[b, s, d]\n\n  {line}\n  return {}\n}}\n",
            line.split(':').next().unwrap()
        );
        let m = latentc_ir::parse("cost.ir", &text).unwrap_or_else(|e| panic!("{}", e.render()));
        let c = cost(&m, "main").unwrap().total;
        let poly = |p: &latentc_ir::Poly| p.to_string();
        let normal = |t: &str| t.parse::<latentc_ir::Poly>().unwrap().to_string();
        let expected: Vec<_> = expected.split(" | ").map(normal).collect();
        assert_eq!([poly(&c.flops), poly(&c.bytes_read), poly(&c.bytes_written)], expected[..], "{line}");
    }
}

#[test]
fn a_call_costs_what_it_runs() {
    let text = "module c entry @main\n\nfunc @f {\n  axes t\n  param x: f32[t]\n\n  y: f32[t] = exp x\n  return y\n}\n\n\
                func @main {\n  axes t\n  param x: f32[t]\n\n  y: f32[t] = call @f(x) under \"a\"\n  \
                z: f32[t] = call @f(y) under \"b\"\n  u: f32[t] = add z, x\n  return u\n}\n";
    let m = check("cost.ir", text).unwrap();
    let c = cost(&m, "main").unwrap();
    let flops: Vec<_> = c.insts.iter().map(|c| c.flops.to_string()).collect();
    assert_eq!(flops, ["t", "t", "t"]);
    assert_eq!(c.total.flops.to_string(), "3 t");
    assert_eq!(c.total.bytes_read.to_string(), "16 t");
    assert_eq!(cost(&m, "g").unwrap_err(), "@g: there is no such function");
}
