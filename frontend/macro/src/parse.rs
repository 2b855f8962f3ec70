//! Tokens to syntax tree.

use proc_macro2::TokenStream;
use syn::ext::IdentExt;
use syn::parse::{Parse, ParseStream, Result};
use syn::punctuated::Punctuated;
use syn::{
    Attribute, Error, Expr as RustExpr, Ident, LitStr, Pat, Token, Visibility, braced, bracketed, token,
};

/// All that stands in one `spec!`.
pub(crate) struct Block(pub(crate) Vec<SpecFn>);

/// `pub fn name(rust parameters)(inputs) -> outputs { statements }`
pub(crate) struct SpecFn {
    pub(crate) attrs: Vec<Attribute>,
    pub(crate) vis: Visibility,
    pub(crate) name: Ident,
    pub(crate) params: TokenStream,
    pub(crate) inputs: Vec<Target>,
    pub(crate) outputs: Vec<Target>,
    pub(crate) body: Vec<Stmt>,
}

/// `name[indices]: dtype`, what an equation defines.
pub(crate) struct Target {
    pub(crate) name: Ident,
    pub(crate) indices: Vec<Index>,
    pub(crate) dtype: Option<Ident>,
}

pub(crate) enum Stmt {
    Axes(Vec<Axis>),
    Weights(Vec<Weight>),
    Equation {
        cached: bool,
        target: Target,
        value: Expr,
        tag: Option<String>,
    },
    Call {
        targets: Vec<Target>,
        callee: RustExpr,
        args: Vec<Expr>,
        scope: Option<RustExpr>,
        tag: Option<String>,
    },
    If {
        cond: RustExpr,
        then: Vec<Stmt>,
        otherwise: Option<Vec<Stmt>>,
    },
    For {
        pat: Pat,
        over: RustExpr,
        body: Vec<Stmt>,
    },
    Rust(syn::Stmt),
}

pub(crate) struct Axis {
    pub(crate) name: Ident,
    pub(crate) each: bool,
    pub(crate) like: Option<Ident>,
    pub(crate) size: Option<RustExpr>,
}

/// `W[i,n,c] = "tensor.{e}"[i * (n | v), c]`
pub(crate) struct Weight {
    pub(crate) target: Target,
    pub(crate) tensor: LitStr,
    pub(crate) dims: Vec<Vec<Vec<Ident>>>,
}

pub(crate) enum Index {
    Axis(Ident),
    Group { paren: token::Paren, parts: Vec<Ident>, whole: Option<Ident> },
    Value(Expr),
}

pub(crate) enum Along {
    Axis(Ident),
    UpTo(Ident, Ident),
    At(Ident, Ident),
}

pub(crate) enum Expr {
    /// A literal, or Rust in braces.
    Number {
        value: RustExpr,
        at: proc_macro2::Span,
    },
    Use {
        name: Ident,
        indices: Vec<Index>,
    },
    /// The builder's constructor of that name.
    Prefix {
        op: &'static str,
        at: proc_macro2::Span,
        value: Box<Expr>,
    },
    Infix {
        op: &'static str,
        at: proc_macro2::Span,
        left: Box<Expr>,
        right: Box<Expr>,
    },
    Apply {
        name: Ident,
        along: Vec<Along>,
        params: Vec<RustExpr>,
        args: Vec<Expr>,
    },
}

fn idents(input: ParseStream<'_>) -> Result<Vec<Ident>> {
    Ok(Punctuated::<Ident, Token![,]>::parse_terminated(input)?.into_iter().collect())
}

fn list<T>(input: ParseStream<'_>, one: fn(ParseStream<'_>) -> Result<T>) -> Result<Vec<T>> {
    Ok(Punctuated::<T, Token![,]>::parse_terminated_with(input, one)?.into_iter().collect())
}

/// Whether the next token is that word, which is an ordinary identifier to Rust.
fn at_word(input: ParseStream<'_>, word: &str) -> bool {
    input.fork().call(Ident::parse_any).is_ok_and(|i| i == word)
}

fn end(input: ParseStream<'_>, after: &str) -> Result<()> {
    if input.peek(Token![;]) {
        input.parse::<Token![;]>()?;
        return Ok(());
    }
    Err(input.error(format!("expected `;` after {after}")))
}

impl Parse for Block {
    fn parse(input: ParseStream<'_>) -> Result<Block> {
        let mut fns = Vec::new();
        while !input.is_empty() {
            fns.push(input.parse()?);
        }
        Ok(Block(fns))
    }
}

impl Parse for SpecFn {
    fn parse(input: ParseStream<'_>) -> Result<SpecFn> {
        let attrs = input.call(Attribute::parse_outer)?;
        let vis = input.parse()?;
        input.parse::<Token![fn]>()?;
        let name: Ident = input.parse()?;
        let first;
        syn::parenthesized!(first in input);
        // One list of parentheses is the inputs; of two, the first belongs to Rust.
        let (params, inputs) = if input.peek(token::Paren) {
            let second;
            syn::parenthesized!(second in input);
            (first.parse()?, list(&second, Target::parse)?)
        } else {
            (TokenStream::new(), list(&first, Target::parse)?)
        };
        if !input.peek(Token![->]) {
            return Err(input.error("expected `->` and what the function computes, such as `-> u[t,d]`"));
        }
        input.parse::<Token![->]>()?;
        let outputs = targets(input)?;
        Ok(SpecFn { attrs, vis, name, params, inputs, outputs, body: body(input)? })
    }
}

/// One target, or several in parentheses.
fn targets(input: ParseStream<'_>) -> Result<Vec<Target>> {
    if !input.peek(token::Paren) {
        return Ok(vec![input.parse()?]);
    }
    let content;
    syn::parenthesized!(content in input);
    list(&content, Target::parse)
}

impl Parse for Target {
    fn parse(input: ParseStream<'_>) -> Result<Target> {
        let name: Ident = input.parse()?;
        let indices = if input.peek(token::Bracket) {
            let content;
            bracketed!(content in input);
            list(&content, Index::parse)?
        } else {
            Vec::new()
        };
        let dtype = if input.peek(Token![:]) {
            input.parse::<Token![:]>()?;
            Some(input.parse()?)
        } else {
            None
        };
        Ok(Target { name, indices, dtype })
    }
}

fn body(input: ParseStream<'_>) -> Result<Vec<Stmt>> {
    let content;
    braced!(content in input);
    let mut stmts = Vec::new();
    while !content.is_empty() {
        stmts.push(content.parse()?);
    }
    Ok(stmts)
}

impl Parse for Stmt {
    fn parse(input: ParseStream<'_>) -> Result<Stmt> {
        if input.peek(Token![if]) {
            return conditional(input);
        }
        if input.peek(Token![for]) {
            input.parse::<Token![for]>()?;
            let pat = input.call(Pat::parse_single)?;
            input.parse::<Token![in]>()?;
            let over = input.call(RustExpr::parse_without_eager_brace)?;
            return Ok(Stmt::For { pat, over, body: body(input)? });
        }
        if input.peek(Token![let]) {
            return Ok(Stmt::Rust(input.parse()?));
        }
        if input.peek(Ident) && input.peek2(token::Brace) {
            let word: Ident = input.parse()?;
            let content;
            braced!(content in input);
            return match word.to_string().as_str() {
                "axes" => Ok(Stmt::Axes(items(&content)?)),
                "weights" => Ok(Stmt::Weights(items(&content)?)),
                _ => Err(Error::new(word.span(), format!("expected `axes` or `weights`, found `{word}`"))),
            };
        }
        equation(input)
    }
}

fn conditional(input: ParseStream<'_>) -> Result<Stmt> {
    input.parse::<Token![if]>()?;
    let cond = input.call(RustExpr::parse_without_eager_brace)?;
    let then = body(input)?;
    let otherwise = if input.peek(Token![else]) {
        input.parse::<Token![else]>()?;
        Some(if input.peek(Token![if]) { vec![conditional(input)?] } else { body(input)? })
    } else {
        None
    };
    Ok(Stmt::If { cond, then, otherwise })
}

fn equation(input: ParseStream<'_>) -> Result<Stmt> {
    // A value may be called `cache`; the assertion is followed by the name of one.
    let cached = at_word(input, "cache") && input.peek2(Ident);
    if cached {
        input.parse::<Ident>()?;
    }
    if !input.peek(Ident) && !input.peek(token::Paren) {
        return Err(input.error("expected an equation such as `y[t,d] = W[d,c] * x[t,c];`"));
    }
    let start = input.span();
    let mut targets = targets(input)?;
    if !input.peek(Token![=]) {
        return Err(input.error("expected `=` after what the equation defines"));
    }
    input.parse::<Token![=]>()?;
    if at_word(input, "call") {
        input.parse::<Ident>()?;
        let (callee, args) = callee(input)?;
        let scope = if input.peek(Token![in]) {
            input.parse::<Token![in]>()?;
            Some(input.parse()?)
        } else {
            None
        };
        let tag = tag(input)?;
        end(input, "a call")?;
        if cached {
            return Err(Error::new(start, "`cache` stands before an equation, not before a call"));
        }
        return Ok(Stmt::Call { targets, callee, args, scope, tag });
    }
    let target = match (targets.pop(), targets.is_empty()) {
        (Some(target), true) => target,
        _ => return Err(Error::new(start, "an equation defines one value; only a `call` defines several")),
    };
    let value = input.parse()?;
    let tag = tag(input)?;
    end(input, "an equation")?;
    Ok(Stmt::Equation { cached, target, value, tag })
}

/// `f(rust)(x[t])`, `f(x[t])`, or `{rust}(x[t])`, and what is passed.
fn callee(input: ParseStream<'_>) -> Result<(RustExpr, Vec<Expr>)> {
    let operands = |input: ParseStream<'_>| {
        let content;
        syn::parenthesized!(content in input);
        list(&content, Expr::parse)
    };
    if input.peek(token::Brace) {
        let content;
        braced!(content in input);
        return Ok((content.parse()?, operands(input)?));
    }
    let path: syn::ExprPath = input.parse()?;
    let first;
    let paren = syn::parenthesized!(first in input);
    let (args, operands) = if input.peek(token::Paren) {
        (Punctuated::parse_terminated(&first)?, operands(input)?)
    } else {
        (Punctuated::new(), list(&first, Expr::parse)?)
    };
    let func = Box::new(RustExpr::Path(path));
    Ok((RustExpr::Call(syn::ExprCall { attrs: Vec::new(), func, paren_token: paren, args }), operands))
}

/// `@41`, `@appendix` or `@"B.1"`.
fn tag(input: ParseStream<'_>) -> Result<Option<String>> {
    if !input.peek(Token![@]) {
        return Ok(None);
    }
    input.parse::<Token![@]>()?;
    if input.peek(LitStr) {
        return Ok(Some(input.parse::<LitStr>()?.value()));
    }
    if input.peek(syn::LitInt) {
        return Ok(Some(input.parse::<syn::LitInt>()?.to_string()));
    }
    if input.peek(Ident) {
        return Ok(Some(input.parse::<Ident>()?.to_string()));
    }
    Err(input.error("expected the equation's number after `@`, such as `@41`"))
}

/// Declarations, each closed by `;` but perhaps the last.
fn items<T: Parse>(input: ParseStream<'_>) -> Result<Vec<T>> {
    let mut items = Vec::new();
    while !input.is_empty() {
        items.push(input.parse()?);
        if !input.is_empty() {
            end(input, "a declaration")?;
        }
    }
    Ok(items)
}

impl Parse for Axis {
    fn parse(input: ParseStream<'_>) -> Result<Axis> {
        let each = at_word(input, "each") && input.peek2(Ident);
        if each {
            input.parse::<Ident>()?;
        }
        let name = input.parse()?;
        let mut axis = Axis { name, each, like: None, size: None };
        if at_word(input, "like") {
            input.parse::<Ident>()?;
            axis.like = Some(input.parse()?);
        } else if input.peek(Token![=]) {
            input.parse::<Token![=]>()?;
            axis.size = Some(input.parse()?);
        }
        Ok(axis)
    }
}

impl Parse for Weight {
    fn parse(input: ParseStream<'_>) -> Result<Weight> {
        let target = input.parse()?;
        input.parse::<Token![=]>()?;
        let tensor =
            input.parse().map_err(|e| Error::new(e.span(), "expected the tensor's name as a string"))?;
        let content;
        bracketed!(content in input);
        let dims = list(&content, |input| {
            Ok(Punctuated::<_, Token![*]>::parse_separated_nonempty_with(input, factor)?
                .into_iter()
                .collect())
        })?;
        Ok(Weight { target, tensor, dims })
    }
}

/// `i`, or `(n | v)`: parts one behind the other.
fn factor(input: ParseStream<'_>) -> Result<Vec<Ident>> {
    if !input.peek(token::Paren) {
        return Ok(vec![input.parse()?]);
    }
    let content;
    syn::parenthesized!(content in input);
    let parts = Punctuated::<Ident, Token![|]>::parse_separated_nonempty(&content)?;
    if !content.is_empty() {
        return Err(content.error("parts of a stored dimension are separated by `|`"));
    }
    Ok(parts.into_iter().collect())
}

impl Parse for Index {
    fn parse(input: ParseStream<'_>) -> Result<Index> {
        if input.peek(token::Paren) {
            let content;
            let paren = syn::parenthesized!(content in input);
            let parts = idents(&content)?;
            let whole = if input.peek(Token![as]) {
                input.parse::<Token![as]>()?;
                Some(input.parse()?)
            } else {
                None
            };
            return Ok(Index::Group { paren, parts, whole });
        }
        let ahead = input.fork();
        if ahead.parse::<Ident>().is_ok() && (ahead.is_empty() || ahead.peek(Token![,])) {
            return Ok(Index::Axis(input.parse()?));
        }
        Ok(Index::Value(input.parse()?))
    }
}

impl Parse for Along {
    fn parse(input: ParseStream<'_>) -> Result<Along> {
        let axis: Ident = input.parse()?;
        if input.peek(Token![<=]) {
            input.parse::<Token![<=]>()?;
            return Ok(Along::UpTo(axis, input.parse()?));
        }
        if at_word(input, "at") {
            input.parse::<Ident>()?;
            return Ok(Along::At(axis, input.parse()?));
        }
        Ok(Along::Axis(axis))
    }
}

/// How tightly an infix operator binds, and the builder's name for it. The same table as Rust's.
fn infix(input: ParseStream<'_>) -> Option<(u8, &'static str)> {
    Some(if input.peek(Token![||]) {
        (1, "or")
    } else if input.peek(Token![&&]) {
        (2, "and")
    } else if input.peek(Token![<=]) {
        (3, "le")
    } else if input.peek(Token![>=]) {
        (3, "ge")
    } else if input.peek(Token![==]) {
        (3, "eq")
    } else if input.peek(Token![<]) {
        (3, "lt")
    } else if input.peek(Token![>]) {
        (3, "gt")
    } else if input.peek(Token![+]) {
        (4, "add")
    } else if input.peek(Token![-]) {
        (4, "sub")
    } else if input.peek(Token![*]) {
        (5, "mul")
    } else if input.peek(Token![/]) {
        (5, "div")
    } else {
        return None;
    })
}

impl Parse for Expr {
    fn parse(input: ParseStream<'_>) -> Result<Expr> {
        climb(input, 1)
    }
}

fn climb(input: ParseStream<'_>, least: u8) -> Result<Expr> {
    let mut left = primary(input)?;
    while let Some((binds, op)) = infix(input).filter(|(binds, _)| *binds >= least) {
        let at = input.span();
        let operator: proc_macro2::Punct = input.parse()?;
        if matches!(op, "or" | "and" | "le" | "ge" | "eq") {
            input.parse::<proc_macro2::Punct>()?;
        }
        if input.is_empty() {
            return Err(Error::new(operator.span(), "expected an operand after this"));
        }
        let right = climb(input, binds + 1)?;
        left = Expr::Infix { op, at, left: Box::new(left), right: Box::new(right) };
    }
    Ok(left)
}

fn primary(input: ParseStream<'_>) -> Result<Expr> {
    let at = input.span();
    for (op, here) in [("neg", input.peek(Token![-])), ("not", input.peek(Token![!]))] {
        if here {
            input.parse::<proc_macro2::Punct>()?;
            return Ok(Expr::Prefix { op, at, value: Box::new(primary(input)?) });
        }
    }
    if input.peek(syn::Lit) {
        return Ok(Expr::Number { value: input.parse::<syn::ExprLit>()?.into(), at });
    }
    if input.peek(token::Brace) {
        let content;
        braced!(content in input);
        let value = content.parse()?;
        if !content.is_empty() {
            return Err(content.error("braces hold one Rust expression"));
        }
        return Ok(Expr::Number { value, at });
    }
    if input.peek(token::Paren) {
        let content;
        syn::parenthesized!(content in input);
        let value = content.parse()?;
        if !content.is_empty() {
            return Err(content.error("expected an operator or `)`"));
        }
        return Ok(value);
    }
    if !input.peek(Ident) {
        return Err(input.error("expected a value such as `x[t,d]`, a number, `{rust}` or `f[d](…)`"));
    }
    let name: Ident = input.parse()?;
    if input.peek(token::Paren) {
        return apply(name, Vec::new(), Vec::new(), input);
    }
    if !input.peek(token::Bracket) {
        return Ok(Expr::Use { name, indices: Vec::new() });
    }
    let content;
    bracketed!(content in input);
    if !input.peek(token::Paren) {
        if let Some(open) = past_semicolon(&content) {
            return Err(Error::new(
                open,
                format!("`{name}[…; …]` is a function: `(` and its operand must follow"),
            ));
        }
        return Ok(Expr::Use { name, indices: list(&content, Index::parse)? });
    }
    let mut along = vec![content.parse()?];
    while content.peek(Token![,]) {
        content.parse::<Token![,]>()?;
        along.push(content.parse()?);
    }
    let mut params = Vec::new();
    if content.peek(Token![;]) {
        content.parse::<Token![;]>()?;
        params = list(&content, RustExpr::parse)?;
    }
    if !content.is_empty() {
        return Err(content.error("expected `,`, `;` or `]`"));
    }
    apply(name, along, params, input)
}

fn apply(name: Ident, along: Vec<Along>, params: Vec<RustExpr>, input: ParseStream<'_>) -> Result<Expr> {
    let content;
    syn::parenthesized!(content in input);
    Ok(Expr::Apply { name, along, params, args: list(&content, Expr::parse)? })
}

/// Where a `;` stands among the tokens.
fn past_semicolon(input: ParseStream<'_>) -> Option<proc_macro2::Span> {
    let tokens: TokenStream = input.fork().parse().ok()?;
    tokens.into_iter().find_map(|t| match t {
        proc_macro2::TokenTree::Punct(p) if p.as_char() == ';' => Some(p.span()),
        proc_macro2::TokenTree::Punct(_)
        | proc_macro2::TokenTree::Group(_)
        | proc_macro2::TokenTree::Ident(_)
        | proc_macro2::TokenTree::Literal(_) => None,
    })
}
