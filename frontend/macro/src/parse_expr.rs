//! Tokens to syntax tree: expressions.

use proc_macro2::TokenStream;
use syn::parse::{Parse, ParseStream, Result};
use syn::punctuated::Punctuated;
use syn::{Error, Expr as RustExpr, Ident, Token, braced, bracketed, token};

use crate::parse::{at_word, list};

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
