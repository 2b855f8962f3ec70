//! A text that uses all of the format, and prints back as it stands.

use latentc_ir::{Module, Op, Origin, check, parse};

const ALL_FORMS: &str = r#"module toy.prefill entry @model

func @attend source "models/src/toy.rs" {
  axes b, t, s=t like t, i=7, c=4, n=3, v=3, r=2, "odd name"=1, z="9 z"
  param k: bf16[b, t, n=3]
  param "h 1": bf16[b, t, c=4]
  weight W: bf16[i=7, n=3, c=4] = "kv.weight"[i * (n | v), c]
  weight E: f32[r=2, c=4] = "experts.{r}"[c, 1]
  weight g: f32 = "scale"

  q: bf16[b, t, n=3] = contract W, "h 1" over i, c        @41:9 (41)
  k_s: bf16[b, s, n=3] = past k from t to s               @41:9 (41) @42:1 by trace
  p: f32[b, t, s] = contract q, k_s over n                @"models/src/other.rs":3:5 ("46 a")
  m: f32[b, t, s] = softmax p over s                      by "a pass"
  o: bf16[b, t, n=3] = contract m, k_s over s
  return o, m
}

func @model {
  axes b, t, s=t like t, d=4, c=2, e=2, n=3, v=3, i=7, r=4, "odd name"=1, a_long_name=10,
       another_long_name=11, the_longest_name_of_all=12
  param x: bf16[b, t, d=4]
  param k: bf16[b, t, n=3]

  one: f32["odd name"=1] = const [1.0]
  tiny: f64 = const -1e-300
  freq: f32[c=2] = const [1.0, inf]
  pos: i32[b, t] = position of t
  y: f32[b, t, d=4] = rope x, pos, freq over d pairs interleaved
  z: f32[b, t, c=2, e=2] = split y axis d into c, e
  w: f32[b, t, d=4] = merge z axes c, e into d
  j: bf16[b, t, i=7] = concat x, k axes d, n into i
  l: bf16[b, t, v=3] = slice j axis i into v start 4
  return: f32[b, t, d=4] = rms_norm w over d eps 1e-6
  u: bf16[b, t, n=3], att: f32[b, t, s] = call @attend(k, x) under "layers.0"
  u.1: bf16[b, t, n=3], by: f32[b, t, s] = call @attend(u, x)
  return u.1, return
}
"#;

#[test]
fn all_forms_print_back_as_they_stand() {
    let module = check("all.ir", ALL_FORMS).unwrap_or_else(|e| panic!("{}", e.render()));
    assert_eq!(module.to_string(), ALL_FORMS);
    assert_eq!(Module::from_json(&module.to_json()), Ok(module));
}

#[test]
fn white_space_and_comments_say_nothing() {
    let module = parse("all.ir", ALL_FORMS).unwrap();
    let wild: String = ALL_FORMS
        .lines()
        .map(|line| {
            format!("\t{}  // a comment, perhaps \"quoted\"\r\n\n", line.trim().replace(", ", " ,\n  "))
        })
        .collect();
    assert_eq!(parse("wild.ir", &wild), Ok(module));
}

#[test]
fn a_module_prints_like_its_canonical_form() {
    let mut module = parse("all.ir", ALL_FORMS).unwrap();
    let f = &mut module.functions[0];
    let k = f.params[0];
    let late = f.add_param("late", f.ty(k).clone());
    assert_ne!(module.canonical(), module);
    assert_eq!(module.canonical().functions[0].params[2].0, 2);
    assert_eq!(parse("late.ir", &module.to_string()), Ok(module.canonical()));
    assert_eq!(module.functions[0].value(late).name, "late");
}

/// A layer, and a model whose body follows.
const LAYER: &str = r#"module toy entry @model

func @layer {
  axes t
  param x: f32[t]
  param pos: i32[t]
  weight g: f32 = "g"

  y: f32[t] = mul x, g
  return y
}

func @model {
  axes t
  param x: f32[t]

  pos: i32[t] = position of t
"#;

/// What the format makes of a body that is written call by call, or folded at will.
fn reprinted(body: &str) -> String {
    let module = check("toy.ir", &format!("{LAYER}{body}  return x\n}}\n"))
        .unwrap_or_else(|e| panic!("{}", e.render()));
    let text = module.to_string();
    assert_eq!(parse("toy.ir", &text), Ok(module));
    text.strip_prefix(LAYER).unwrap().strip_suffix("  return x\n}\n").unwrap().to_owned()
}

#[test]
fn a_chain_of_calls_is_one_line() {
    let calls = r#"  x.1: f32[t] = call @layer(x, pos) under "layers.0"
  x.2: f32[t] = call @layer(x.1, pos) under "layers.1"
  x.3: f32[t] = call @layer(x.2, pos) under "layers.2"
"#;
    let line = r#"  x.1 to x.3: f32[t] = call @layer(x, pos) under "layers.0" to "layers.2"
"#;
    assert_eq!(reprinted(calls), line);
    assert_eq!(reprinted(line), line);

    // Numbers of any size anywhere in a scope, names in quotes, and what the first call starts from is free.
    let others = r#"  y: f32[t] = neg x
  "the x.9" to "the x.12": f32[t] = call @layer(y, pos) under "1.l 99\"8" to "1.l 102\"8"         @3:4 (7) by "a pass"
  x.0 to x.10: f32[t] = call @layer("the x.11", pos) under "0" to "10"                            @3:4 (7) by "a pass"
"#;
    assert_eq!(reprinted(others), others);
}

#[test]
fn what_is_folded_is_what_was_meant() {
    let text = format!(
        "{LAYER}  x.9 to x.11: f32[t] = call @layer(x, pos) under \"9.a\" to \"11.a\"  @5:6 by p\n  return x.10\n}}\n"
    );
    let f = check("toy.ir", &text).unwrap_or_else(|e| panic!("{}", e.render())).functions.remove(1);
    let v = |name: &str| f.value_named(name).unwrap();
    let calls: Vec<_> =
        f.body[1..].iter().map(|i| (i.op.clone(), i.args.clone(), i.results.clone())).collect();
    let call = |scope: &str| Op::Call { callee: "layer".to_owned(), scope: scope.to_owned() };
    assert_eq!(
        calls,
        [
            (call("9.a"), vec![v("x"), v("pos")], vec![v("x.9")]),
            (call("10.a"), vec![v("x.9"), v("pos")], vec![v("x.10")]),
            (call("11.a"), vec![v("x.10"), v("pos")], vec![v("x.11")]),
        ]
    );
    let origin = Origin { file: String::new(), line: 5, col: 6, tag: None };
    assert!(f.body[1..].iter().all(|i| i.origins == [origin.clone()] && i.by.as_deref() == Some("p")));
    assert_eq!(f.results, [v("x.10")]);
}

/// Each text is three calls or more that differ from a chain in one way.
#[test]
fn what_is_no_chain_stays_as_it_stands() {
    let bodies = [
        // Two calls are two lines.
        r#"  x.1: f32[t] = call @layer(x, pos) under "0"
  x.2: f32[t] = call @layer(x.1, pos) under "1"
"#,
        // The names.
        r#"  y: f32[t] = call @layer(x, pos) under "0"
  y.1: f32[t] = call @layer(y, pos) under "1"
  y.2: f32[t] = call @layer(y.1, pos) under "2"
  y.4: f32[t] = call @layer(y.2, pos) under "3"
  z.5: f32[t] = call @layer(y.4, pos) under "4"
  y.06: f32[t] = call @layer(z.5, pos) under "5"
  y.07: f32[t] = call @layer(y.06, pos) under "6"
  y.08: f32[t] = call @layer(y.07, pos) under "7"
"#,
        // The scopes.
        r#"  y.1: f32[t] = call @layer(x, pos) under "0"
  y.2: f32[t] = call @layer(y.1, pos) under "1"
  y.3: f32[t] = call @layer(y.2, pos) under "3"
  y.4: f32[t] = call @layer(y.3, pos) under "3"
  y.5: f32[t] = call @layer(y.4, pos) under "2"
  y.6: f32[t] = call @layer(y.5, pos) under "3.1.1"
  y.7: f32[t] = call @layer(y.6, pos) under "3.1.2"
  y.8: f32[t] = call @layer(y.7, pos) under "3.2.2"
  y.9: f32[t] = call @layer(y.8, pos) under "3.3.3"
  y.10: f32[t] = call @layer(y.9, pos)
  y.11: f32[t] = call @layer(y.10, pos)
  y.12: f32[t] = call @layer(y.11, pos)
  y.13: f32[t] = call @layer(y.12, pos) under "01"
  y.14: f32[t] = call @layer(y.13, pos) under "02"
  y.15: f32[t] = call @layer(y.14, pos) under "03"
"#,
        // The arguments.
        r#"  pos.1: i32[t] = add pos, pos
  y.1: f32[t] = call @layer(x, pos) under "0"
  y.2: f32[t] = call @layer(y.1, pos) under "1"
  y.3: f32[t] = call @layer(y.1, pos) under "2"
  y.4: f32[t] = call @layer(y.3, pos) under "3"
  y.5: f32[t] = call @layer(y.4, pos.1) under "4"
"#,
        // Where they come from.
        r#"  y.1: f32[t] = call @layer(x, pos) under "0"     @1:2
  y.2: f32[t] = call @layer(y.1, pos) under "1"   @1:2
  y.3: f32[t] = call @layer(y.2, pos) under "2"   @1:3
  y.4: f32[t] = call @layer(y.3, pos) under "3"   @1:3 by p
  y.5: f32[t] = call @layer(y.4, pos) under "4"   by p
"#,
        // Something else between them.
        r#"  y.1: f32[t] = call @layer(x, pos) under "0"
  y.2: f32[t] = call @layer(y.1, pos) under "1"
  z: f32[t] = neg y.2
  y.3: f32[t] = call @layer(y.2, pos) under "2"
"#,
    ];
    for body in bodies {
        assert_eq!(reprinted(body), body);
    }
}

#[test]
fn chains_differ_in_callee_and_argument() {
    let text = r#"module toy entry @h

func @f {
  axes t
  param a: f32[t]
  param b: f32[t]

  y: f32[t] = add a, b
  return y
}

func @g {
  axes t
  param a: f32[t]
  param b: f32[t]

  y: f32[t] = mul a, b
  return y
}

func @h {
  axes t
  param x: f32[t]

  y.1 to y.3: f32[t] = call @f(x, x) under "0" to "2"
  y.4 to y.7: f32[t] = call @g(y.3, x) under "3" to "6"
  z.1: f32[t] = call @g(x, y.7) under "0"
  z.2: f32[t] = call @g(x, z.1) under "1"
  z.3: f32[t] = call @g(x, z.2) under "2"
  w.1: f32[t] = call @g(z.3, z.3) under "0"
  w.2: f32[t] = call @g(w.1, w.1) under "1"
  w.3: f32[t] = call @g(w.2, w.2) under "2"
  return w.3
}
"#;
    let module = check("h.ir", text).unwrap_or_else(|e| panic!("{}", e.render()));
    assert_eq!(module.to_string(), text);
}

/// A text folds so many calls and no more, since the parser would not read it.
#[test]
fn the_printer_keeps_to_the_limit() {
    let calls = |from: usize, to: usize| -> String {
        (from..to).map(|n| format!("  x.{}: f32 = call @f(x.{n}) under \"{n}\"\n", n + 1)).collect()
    };
    let text = |long: String| {
        format!(
            "module m entry @g\n\nfunc @f {{\n  param x.0: f32\n\n  x.1 to x.6000: f32 = call @e(x.0) under \"0\" to \"5999\"\n  return x.6000\n}}\n\nfunc @g {{\n  param x.0: f32\n\n{long}  return x.4003\n}}\n"
        )
    };
    let module = parse("m.ir", &text(calls(0, 4003))).unwrap_or_else(|e| panic!("{}", e.render()));
    let folded = "  x.1 to x.4000: f32 = call @f(x.0) under \"0\" to \"3999\"\n".to_owned();
    let printed = module.to_string();
    assert!(printed == text(folded + &calls(4000, 4003)), "{} lines", printed.lines().count());
    assert!(parse("m.ir", &printed) == Ok(module));
}
