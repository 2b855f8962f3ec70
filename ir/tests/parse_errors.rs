//! What a reader sees of errors in a text: the whole reports, a few errors of a kind at a time.

use insta::assert_snapshot;
use latentc_ir::{check, parse};

/// What most texts here start with.
const START: &str = r#"module m entry @f
func @f {
  axes t, s=t like t, d=4, c=2
  param h: f32[t, d=4]
  weight g: f32[d=4] = "norm.weight"[d]
"#;

fn errors(text: &str) -> String {
    parse("m.ir", text).map_or_else(|e| e.render(), |m| format!("no error:\n{m}"))
}

/// The errors of a body that follows the start.
fn errors_of(body: &str) -> String {
    errors(&format!("{START}{body}"))
}

#[test]
fn unknown_value() {
    let text = r#"  x: f32[t, d=4] = mul h, gg
  y: f32[t, d=4] = neg x
  return z
}
"#;
    assert_snapshot!(errors_of(text), @r#"
    error: unknown value `gg`
      ┌─ m.ir:6:27
      │
    6 │   x: f32[t, d=4] = mul h, gg
      │                           ^^
      │
      = did you mean `g`?

    error: unknown value `z`
      ┌─ m.ir:8:10
      │
    8 │   return z
      │          ^
    "#);
}

#[test]
fn use_before_definition() {
    let text = r#"  x: f32[t, d=4] = neg y
  y: f32[t, d=4] = neg y
  return y
}
"#;
    assert_snapshot!(errors_of(text), @r#"
    error: `y` is used before its definition
      ┌─ m.ir:6:24
      │
    6 │   x: f32[t, d=4] = neg y
      │                        ^
    7 │   y: f32[t, d=4] = neg y
      │   - defined here

    error: `y` is used before its definition
      ┌─ m.ir:7:24
      │
    7 │   y: f32[t, d=4] = neg y
      │   -                    ^
      │   │
      │   defined here
    "#);
}

#[test]
fn unknown_axis() {
    let text = r#"  x: f32[t, e=4] = neg h
  y: f32[t] = reduce_sum x over dd
  return y
}
"#;
    assert_snapshot!(errors_of(text), @r#"
    error: unknown axis `e`
      ┌─ m.ir:6:13
      │
    6 │   x: f32[t, e=4] = neg h
      │             ^

    error: unknown axis `dd`
      ┌─ m.ir:7:33
      │
    7 │   y: f32[t] = reduce_sum x over dd
      │                                 ^^
      │
      = did you mean `d`?
    "#);
}

#[test]
fn size_differs_from_the_table() {
    let text = r#"  x: f32[t, d=5] = neg h
  return x
}
"#;
    assert_snapshot!(errors_of(text), @r#"
    error: axis `d` has size 5 here, 4 in the table
      ┌─ m.ir:6:13
      │
    3 │   axes t, s=t like t, d=4, c=2
      │                       - size 4
      ·
    6 │   x: f32[t, d=5] = neg h
      │             ^^^
    "#);
}

#[test]
fn unknown_op() {
    let text = r#"  x: f32[t, d=4] = softmx h over d
  return x
}
"#;
    assert_snapshot!(errors_of(text), @r#"
    error: unknown op `softmx`
      ┌─ m.ir:6:20
      │
    6 │   x: f32[t, d=4] = softmx h over d
      │                    ^^^^^^
      │
      = did you mean `softmax`?
    "#);
}

#[test]
fn wrong_attribute() {
    let text = r#"  x: f32[c=2] = slice g axis d start 1 into c
  y: f32[t, d=4] = rope h, h, g over d pairs odd
  return x
}
"#;
    assert_snapshot!(errors_of(text), @r#"
    error: expected `into`, found `start`
      ┌─ m.ir:6:32
      │
    6 │   x: f32[c=2] = slice g axis d start 1 into c
      │                                ^^^^^
      │
      = it is written `slice x axis AXIS into AXIS start INT`

    error: unknown word in `rope`
      ┌─ m.ir:7:46
      │
    7 │   y: f32[t, d=4] = rope h, h, g over d pairs odd
      │                                              ^^^
      │
      = the pairs are `interleaved` or `halves`
    "#);
}

#[test]
fn wrong_number_of_operands() {
    let text = r#"  x: f32[t, d=4] = mul h
  y: f32[t, d=4], z: f32 = neg h
  return x
}
"#;
    assert_snapshot!(errors_of(text), @r#"
    error: `mul` takes the operands (a, b), 1 given
      ┌─ m.ir:6:24
      │
    6 │   x: f32[t, d=4] = mul h
      │                        ^
      │
      = it is written `mul a, b`

    error: `neg` has one result, 2 are named
      ┌─ m.ir:7:28
      │
    7 │   y: f32[t, d=4], z: f32 = neg h
      │                            ^^^
    "#);
}

#[test]
fn sums_over_something_else() {
    let text = r#"  x: f32[t] = contract h, g over t
  return x
}
"#;
    assert_snapshot!(errors_of(text), @r#"
    error: by its types this sums over d, not over t
      ┌─ m.ir:6:29
      │
    6 │   x: f32[t] = contract h, g over t
      │                             ^^^^^^
      │
      = what the operands have and the result lacks is summed, and listed in order of appearance
    "#);
}

#[test]
fn duplicate_names() {
    let text = r#"  h: f32[t, d=4] = neg h
  return h
}
func @g {
  axes t, t
  param h: f32[t, d]
  return h
}
"#;
    assert_snapshot!(errors_of(text), @r#"
    error: a second value `h`
      ┌─ m.ir:6:3
      │
    4 │   param h: f32[t, d=4]
      │         - the first
    5 │   weight g: f32[d=4] = "norm.weight"[d]
    6 │   h: f32[t, d=4] = neg h
      │   ^

    error: a second axis `t`
       ┌─ m.ir:10:11
       │
    10 │   axes t, t
       │        -  ^
       │        │
       │        the first
    "#);
}

#[test]
fn unterminated_string() {
    let text = r#"  x: f32[t] = call @f(h) under "layers.0
  y: f32[t] = call @f(h) under "\q"
  return x
}
"#;
    assert_snapshot!(errors_of(text), @r#"
    error: unterminated string
      ┌─ m.ir:6:32
      │
    6 │   x: f32[t] = call @f(h) under "layers.0
      │                                ^^^^^^^^^
      │
      = a string ends on the line on which it starts

    error: unknown escape
      ┌─ m.ir:7:33
      │
    7 │   y: f32[t] = call @f(h) under "\q"
      │                                 ^
      │
      = the escapes are \" \\ \n \r \t and \u{…} with a hexadecimal number
    "#);
}

#[test]
fn numbers_too_large() {
    let text = r#"module m entry @f
func @f {
  axes d=18446744073709551616
  x: f32 = const 1e999
  return x   @4294967296:1
}
"#;
    assert_snapshot!(errors(text), @r#"
    error: a size of 18446744073709551616 is too large, the most is 18446744073709551615
      ┌─ m.ir:3:10
      │
    3 │   axes d=18446744073709551616
      │          ^^^^^^^^^^^^^^^^^^^^

    error: 1e999 is too large for an f64
      ┌─ m.ir:4:18
      │
    4 │   x: f32 = const 1e999
      │                  ^^^^^
      │
      = infinity is written `inf`

    error: expected the end of the line, found `@`
      ┌─ m.ir:5:14
      │
    5 │   return x   @4294967296:1
      │              ^
    "#);
}

#[test]
fn parts_out_of_order() {
    let text = r#"  axes e
  x: f32[t, d=4] = neg h
  cache K: f32[s]
  return x
  y: f32 = const 1.0
}
"#;
    assert_snapshot!(errors_of(text), @r#"
    error: `axes` comes too late
      ┌─ m.ir:6:3
      │
    6 │   axes e
      │   ^^^^
      │
      = a function lists its axes, params, weights, caches, instructions and `return`, in this order

    error: `cache` comes too late
      ┌─ m.ir:8:3
      │
    8 │   cache K: f32[s]
      │   ^^^^^
      │
      = a function lists its axes, params, weights, caches, instructions and `return`, in this order

    error: nothing follows `return`
       ┌─ m.ir:10:3
       │
    10 │   y: f32 = const 1.0
       │   ^
       │
       = a function lists its axes, params, weights, caches, instructions and `return`, in this order
    "#);
}

#[test]
fn nothing_returned() {
    let text = r#"module m entry @f
func @f {
  x: f32 = const 1.0
}
func @g {
  x: f32 = const 1.0
  return x
"#;
    assert_snapshot!(errors(text), @r#"
    error: @f has no `return`
      ┌─ m.ir:2:1
      │
    2 │ func @f {
      │ ^^^^^^^^^

    error: expected `}`, found the end of the file
      ┌─ m.ir:8:1
      │
    8 │
      │ ^
    "#);
}

#[test]
fn misspelt_keyword() {
    let text = r#"modul m entry @f
func @f {
  parm h: f32
  weight w: flaot = "w"
  return h w
}
"#;
    assert_snapshot!(errors(text), @r#"
    error: expected `module`, found `modul`
      ┌─ m.ir:1:1
      │
    1 │ modul m entry @f
      │ ^^^^^

    error: expected `:` and a type, found `h`
      ┌─ m.ir:3:8
      │
    3 │   parm h: f32
      │        ^
      │
      = did you mean `param`?

    error: unknown dtype `flaot`
      ┌─ m.ir:4:13
      │
    4 │   weight w: flaot = "w"
      │             ^^^^^
      │
      = the dtypes are f64, f32, bf16, f16, i32, bool

    error: unknown value `h`
      ┌─ m.ir:5:10
      │
    5 │   return h w
      │          ^
    "#);
}

/// What most chains here call, and the start of a function that does.
const CHAINS: &str = r#"module m entry @g
func @f {
  axes t
  param x: f32[t]
  y: f32[t] = neg x
  return y
}
func @g {
  axes t, d=2
  param x: f32[t]
"#;

fn errors_of_chains(body: &str) -> String {
    check("m.ir", &format!("{CHAINS}{body}  return x\n}}\n"))
        .map_or_else(|e| e.render(), |m| format!("no error:\n{m}"))
}

#[test]
fn chain_of_the_wrong_length() {
    assert_snapshot!(errors_of_chains(
        r#"  x.1 to x.9: f32[t] = call @f(x) under "l.1" to "l.8"
  y.1 to y.10001: f32[t] = call @f(x.7) under "l.1" to "l.10001"
"#), @r##"
    error: 8 scopes for 9 calls
       ┌─ m.ir:11:41
       │
    11 │   x.1 to x.9: f32[t] = call @f(x) under "l.1" to "l.8"
       │   ----------                            ^^^^^^^^^^^^^^
       │   │
       │   9 results

    error: a chain of 10001 calls
       ┌─ m.ir:12:3
       │
    12 │   y.1 to y.10001: f32[t] = call @f(x.7) under "l.1" to "l.10001"
       │   ^^^^^^^^^^^^^^
       │
       = the chains of a text have 10000 calls together at most
    "##);
}

#[test]
fn names_and_scopes_that_do_not_count_up() {
    assert_snapshot!(errors_of_chains(
        r#"  x to x.3: f32[t] = call @f(x) under "l.0" to "l.3"
  y.3 to y.1: f32[t] = call @f(x) under "l.0" to "l.3"
  z.1 to z.3: f32[t] = call @f(x) under "l.0.a.0" to "l.2.a.2"
  w.1 to w.3: f32[t] = call @f(x) under "l.0"
  v: f32[t] = call @f(x) under "l.0" to "l.1"
"#), @r##"
    error: `x` does not count up to `x.3`
       ┌─ m.ir:11:3
       │
    11 │   x to x.3: f32[t] = call @f(x) under "l.0" to "l.3"
       │   ^^^^^^^^
       │
       = it is written `x.1 to x.9: TYPE = call @f(x) under "l.0" to "l.8"`; one number counts up in names and scopes

    error: `y.3` does not count up to `y.1`
       ┌─ m.ir:12:3
       │
    12 │   y.3 to y.1: f32[t] = call @f(x) under "l.0" to "l.3"
       │   ^^^^^^^^^^
       │
       = it is written `x.1 to x.9: TYPE = call @f(x) under "l.0" to "l.8"`; one number counts up in names and scopes

    error: `l.0.a.0` does not count up to `l.2.a.2`
       ┌─ m.ir:13:41
       │
    13 │   z.1 to z.3: f32[t] = call @f(x) under "l.0.a.0" to "l.2.a.2"
       │                                         ^^^^^^^^^^^^^^^^^^^^^^
       │
       = it is written `x.1 to x.9: TYPE = call @f(x) under "l.0" to "l.8"`; one number counts up in names and scopes

    error: expected `to`, found the end of the line
       ┌─ m.ir:14:46
       │
    14 │     w.1 to w.3: f32[t] = call @f(x) under "l.0"
       │ ╭─────────────────────────────────────────────^
    15 │ │   v: f32[t] = call @f(x) under "l.0" to "l.1"
       │ ╰^

    error: more than one scope for one call
       ┌─ m.ir:15:38
       │
    15 │   v: f32[t] = call @f(x) under "l.0" to "l.1"
       │                                      ^^
       │
       = it is written `x.1 to x.9: TYPE = call @f(x) under "l.0" to "l.8"`; one number counts up in names and scopes
    "##);
}

#[test]
fn chain_of_no_calls() {
    assert_snapshot!(errors_of_chains(
        r#"  x.1 to x.3: f32[t] = neg x
  y.1 to y.3: f32[t] = call @f() under "l.0" to "l.2"
  z.1 to z.3: f32[t], y: f32[t] = call @f(x) under "l.0" to "l.2"
  v.1 to v.3: f32[d=3] = call @f(v.0) under "l.0" to "l.2"
  w.1 to w.3 = call @f(v.2) under "l.0" to "l.2"
  param.1 to param.3: f32[t] = call @f(x) under "l.0" to "l.2"
  param u: f32[t]
"#), @r##"
    error: expected `call`, found `neg`
       ┌─ m.ir:11:24
       │
    11 │   x.1 to x.3: f32[t] = neg x
       │   ----------           ^^^
       │   │
       │   results of a chain
       │
       = it is written `x.1 to x.9: TYPE = call @f(x) under "l.0" to "l.8"`; one number counts up in names and scopes

    error: @f has no argument to be chained
       ┌─ m.ir:12:29
       │
    12 │   y.1 to y.3: f32[t] = call @f() under "l.0" to "l.2"
       │                             ^^^^
       │
       = the first argument of a chain's calls is the result of the call before

    error: expected `=`, found `,`
       ┌─ m.ir:13:21
       │
    13 │   z.1 to z.3: f32[t], y: f32[t] = call @f(x) under "l.0" to "l.2"
       │                     ^

    error: axis `d` has size 3 here, 2 in the table
       ┌─ m.ir:14:19
       │
     9 │   axes t, d=2
       │           - size 2
       ·
    14 │   v.1 to v.3: f32[d=3] = call @f(v.0) under "l.0" to "l.2"
       │                   ^^^

    error: expected `:` and a type, found `=`
       ┌─ m.ir:15:14
       │
    15 │   w.1 to w.3 = call @f(v.2) under "l.0" to "l.2"
       │              ^

    error: `param` comes too late
       ┌─ m.ir:17:3
       │
    17 │   param u: f32[t]
       │   ^^^^^
       │
       = a function lists its axes, params, weights, caches, instructions and `return`, in this order
    "##);
}

#[test]
fn an_error_of_a_chain_is_told_once() {
    assert_snapshot!(errors_of_chains(
        r#"  x.1 to x.9: f32[t] = call @f(x) under "l.0" to "l.8"
  x.2 to x.8: f32[t] = call @f(x) under "l.0" to "l.6"
"#), @r##"
    error: a second value `x.2`
       ┌─ m.ir:12:3
       │
    11 │   x.1 to x.9: f32[t] = call @f(x) under "l.0" to "l.8"
       │   ---------- the first
    12 │   x.2 to x.8: f32[t] = call @f(x) under "l.0" to "l.6"
       │   ^^^^^^^^^^
    "##);
    assert_snapshot!(errors_of_chains(
        r#"  x.1 to x.9: f32[d=2] = call @f(x) under "l.0" to "l.8"
"#), @r##"
    error: x.1: x.1 is f32[d=2], y of @f is f32[t]; axes `d` differ in size: 2 and t
       ┌─ m.ir:11:3
       │
    11 │   x.1 to x.9: f32[d=2] = call @f(x) under "l.0" to "l.8"
       │   ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
    "##);
    assert_snapshot!(errors_of_chains(
        r#"  x.1 to x.9: f32[t] = call @g(x) under "l.0" to "l.8"
"#), @r##"
    error: x.1: calls @g, which is not defined above
       ┌─ m.ir:11:3
       │
    11 │   x.1 to x.9: f32[t] = call @g(x) under "l.0" to "l.8"
       │   ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
    "##);
}

#[test]
fn one_line_for_each_error_without_the_text() {
    let error = parse("m.ir", "module m entry @f\nfunc @f {\n  x: f32 = nag y\n  return z\n}\n").unwrap_err();
    assert_eq!(error.to_string(), "m.ir:3:12: unknown op `nag`\nm.ir:4:10: unknown value `z`");
    assert!(error.render_in_colour().contains("\u{1b}["));
}
