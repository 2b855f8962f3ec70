//! What the macro says of text that is no equation block, and that it finds its way about one that is.

use crate::emit;
use crate::parse::{Block, Stmt};
use crate::parse_expr::Expr;

/// The statements of a function with this body.
fn parse(body: &str) -> Result<Vec<Stmt>, String> {
    let text = format!("fn f(rank: usize)(x[t,d]) -> y[t,d] {{\n{body}\n}}");
    let block: Block = syn::parse_str(&text).map_err(|e| {
        let at = e.span().start();
        format!("{}:{}: {e}", at.line - 1, at.column + 1)
    })?;
    emit::block(&block);
    Ok(block.0.into_iter().flat_map(|f| f.body).collect())
}

fn error(body: &str) -> String {
    parse(body).err().unwrap_or_else(|| "no error".to_owned())
}

#[test]
fn statements() {
    let body = "
        axes { each b; t; s like t; d = rank * 2 }
        weights { W[d] = \"experts.{e}.w\"[i * (n | v), d]; }
        cache k[t,r]: f32 = {2.0 * 3.0} * rope[r at t; &freqs, 1](x[t,(g,j)])  @\"B.1\";
        cache[t] = x[tok[t], d] <= 1 && !(a[t] == b[t]) @41;
        (a[t], b[t]) = call module::f(cfg)(x[t], y[t]) in format!(\"l.{l}\");
        c[t] = call {trunk}(x[t]);
        e[t] = call f(x[t]);
        state module::f(cfg, 1);
        y[t,(g,j) as e] = x[t,g] - -j;
        if let Some(p) = rank { y[t] = x[t]; } else if rank { } else { for (l, m) in 0..3 { let z = l; } }
    ";
    let kinds: Vec<_> = parse(body)
        .unwrap()
        .iter()
        .map(|s| match s {
            Stmt::Axes(a) => format!("axes {}", a.len()),
            Stmt::Weights(w) => format!("weights {}", w.len()),
            Stmt::Equation { cached, target, tag, .. } => format!("{} {cached} {tag:?}", target.name),
            Stmt::Call { targets, args, .. } => format!("call {} {}", targets.len(), args.len()),
            Stmt::State(_) => "state".to_owned(),
            Stmt::If { .. } => "if".to_owned(),
            Stmt::For { .. } => "for".to_owned(),
            Stmt::Rust(_) => "rust".to_owned(),
        })
        .collect();
    let want = [
        "axes 4",
        "weights 1",
        "k true Some(\"B.1\")",
        "cache false Some(\"41\")",
        "call 2 2",
        "call 1 1",
        "call 1 1",
        "state",
        "y false None",
        "if",
    ];
    assert_eq!(kinds, want);
}

/// An expression with all its parentheses.
fn shown(e: &Expr) -> String {
    match e {
        Expr::Number { .. } => "#".to_owned(),
        Expr::Use { name, .. } => name.to_string(),
        Expr::Prefix { op, value, .. } => format!("{op}({})", shown(value)),
        Expr::Infix { op, left, right, .. } => format!("{op}({}, {})", shown(left), shown(right)),
        Expr::Apply { name, args, .. } => {
            format!("{name}({})", args.iter().map(shown).collect::<Vec<_>>().join(", "))
        }
    }
}

#[test]
fn precedence() {
    for (text, want) in [
        ("a - b - c", "sub(sub(a, b), c)"),
        ("a + b * c / d", "add(a, div(mul(b, c), d))"),
        ("-a * b", "mul(neg(a), b)"),
        ("a * (b + c)", "mul(a, add(b, c))"),
        ("a < b + 1 && c || d", "or(and(lt(a, add(b, #)), c), d)"),
        ("f[t](a) >= g(b, c)", "ge(f(a), g(b, c))"),
    ] {
        assert_eq!(shown(&syn::parse_str(text).unwrap()), want, "{text}");
    }
}

#[test]
fn errors() {
    for (body, want) in [
        ("y[t] = x[t]", "2:1: unexpected end of input, expected `;` after an equation"),
        ("y[t] x[t];", "1:6: expected `=` after what the equation defines"),
        ("y[t] = ;", "1:8: expected a value such as `x[t,d]`, a number, `{rust}` or `f[d](…)`"),
        ("y[t] = x[t] *;", "1:14: expected a value such as `x[t,d]`, a number, `{rust}` or `f[d](…)`"),
        ("y[t] = top[e; 2] + 1;", "1:13: `top[…; …]` is a function: `(` and its operand must follow"),
        ("y[t] = (x[t] y[t]);", "1:14: expected an operator or `)`"),
        ("(y[t], z[t]) = x[t];", "1:1: an equation defines one value; only a `call` defines several"),
        ("axis { t }", "1:1: expected `axes` or `weights`, found `axis`"),
        ("weights { W[d] = w[d]; }", "1:18: expected the tensor's name as a string"),
        ("weights { W[d] = \"w\"[(a + b)]; }", "1:25: parts of a stored dimension are separated by `|`"),
        ("axes { t d }", "1:10: expected `;` after a declaration"),
        ("y[t] = x[t] @;", "1:14: expected the equation's number after `@`, such as `@41`"),
        ("cache y[t] = call f(x[t]);", "1:7: `cache` stands before an equation, not before a call"),
        ("7;", "1:1: expected an equation such as `y[t,d] = W[d,c] * x[t,c];`"),
        ("y[t] = {1 2};", "1:11: braces hold one Rust expression"),
    ] {
        assert_eq!(error(body), want, "{body}");
    }
    let headless = syn::parse_str::<Block>("fn f(x[t]) { }").err().map(|e| e.to_string());
    assert_eq!(
        headless.as_deref(),
        Some("expected `->` and what the function computes, such as `-> u[t,d]`")
    );
}
