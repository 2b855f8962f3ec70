//! A text that uses all of the format, and prints back as it stands.

use latentc_ir::{Module, check, parse};

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
