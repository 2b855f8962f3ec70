//! Tokens to syntax tree: functions and statements.

use proc_macro2::TokenStream;
use syn::ext::IdentExt;
use syn::parse::{Parse, ParseStream, Result};
use syn::punctuated::Punctuated;
use syn::{
    Attribute, Error, Expr as RustExpr, Ident, LitStr, Pat, Token, Visibility, braced, bracketed, token,
};

use crate::parse_expr::{Expr, Index};

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
    State(RustExpr),
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

pub(crate) fn list<T>(input: ParseStream<'_>, one: fn(ParseStream<'_>) -> Result<T>) -> Result<Vec<T>> {
    Ok(Punctuated::<T, Token![,]>::parse_terminated_with(input, one)?.into_iter().collect())
}

/// Whether the next token is that word, which is an ordinary identifier to Rust.
pub(crate) fn at_word(input: ParseStream<'_>, word: &str) -> bool {
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
        // A value may be called `state`; the statement goes on with the name of a function.
        if at_word(input, "state") && input.peek2(Ident) {
            input.parse::<Ident>()?;
            let stated = input.parse()?;
            end(input, "what is stated")?;
            return Ok(Stmt::State(stated));
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
