//! Syntax tree to builder calls.

use proc_macro2::{Span, TokenStream};
use quote::{format_ident, quote};
use syn::Ident;

use crate::parse::{Axis, Block, SpecFn, Stmt, Target, Weight};
use crate::parse_expr::{Along, Expr, Index};

/// The items of a whole block.
pub(crate) fn block(block: &Block) -> TokenStream {
    block.0.iter().map(function).collect()
}

fn function(f: &SpecFn) -> TokenStream {
    let SpecFn { attrs, vis, name, params, inputs, outputs, body } = f;
    let head_name = named(name);
    let inputs = inputs.iter().map(target);
    let outputs = outputs.iter().map(target);
    let body = stmts(body);
    quote! {
        #(#attrs)*
        #vis fn #name(#params)
            -> ::latentc_frontend::SpecFn<impl FnOnce(&mut ::latentc_frontend::Tracer)>
        {
            ::latentc_frontend::SpecFn::new(
                #head_name,
                vec![#(#inputs),*],
                vec![#(#outputs),*],
                move |__t: &mut ::latentc_frontend::Tracer| { #body },
            )
        }
    }
}

fn stmts(stmts: &[Stmt]) -> TokenStream {
    stmts.iter().map(stmt).collect()
}

fn stmt(s: &Stmt) -> TokenStream {
    match s {
        Stmt::Axes(axes) => axes.iter().map(axis).collect(),
        Stmt::Weights(weights) => weights.iter().map(weight).collect(),
        Stmt::Equation { cached, target: t, value, tag } => {
            let (t, value, tag) = (target(t), expr(value), option(tag.as_deref()));
            quote! { __t.equation(::latentc_frontend::expr::Equation {
                target: #t, value: #value, tag: #tag, cached: #cached,
            }); }
        }
        Stmt::Call { targets, callee, args, scope, tag } => {
            let (targets, args) = (targets.iter().map(target), args.iter().map(expr));
            let tag = option(tag.as_deref());
            let scope = match scope {
                Some(scope) => quote! { ::std::string::String::from(#scope) },
                None => quote! { ::std::string::String::new() },
            };
            quote! { __t.call(::latentc_frontend::expr::Call {
                targets: vec![#(#targets),*], args: vec![#(#args),*], scope: #scope, tag: #tag,
            }, #callee); }
        }
        Stmt::State(stated) => quote! { __t.state(#stated); },
        Stmt::If { cond, then, otherwise } => {
            let then = stmts(then);
            let otherwise = otherwise.as_ref().map(|o| {
                let o = stmts(o);
                quote! { else { #o } }
            });
            quote! { if #cond { #then } #otherwise }
        }
        Stmt::For { pat, over, body } => {
            let body = stmts(body);
            quote! { for #pat in #over { #body } }
        }
        Stmt::Rust(s) => quote! { #s },
    }
}

fn axis(a: &Axis) -> TokenStream {
    let name = named(&a.name);
    let each = a.each;
    let extent = match (&a.like, &a.size) {
        (Some(like), _) => {
            let like = named(like);
            quote! { ::latentc_frontend::expr::Extent::Like(#like) }
        }
        (None, Some(size)) => quote! { ::latentc_frontend::expr::Extent::from(#size) },
        (None, None) => quote! { ::latentc_frontend::expr::Extent::Runtime },
    };
    quote! { __t.axis(::latentc_frontend::expr::AxisDecl { name: #name, extent: #extent, each: #each }); }
}

fn weight(w: &Weight) -> TokenStream {
    let (t, tensor) = (target(&w.target), &w.tensor);
    let at = spot(w.tensor.span());
    let dims = w.dims.iter().map(|dim| {
        let factors = dim.iter().map(|parts| {
            let parts = parts.iter().map(named);
            quote! { vec![#(#parts),*] }
        });
        quote! { vec![#(#factors),*] }
    });
    quote! { __t.weight(::latentc_frontend::expr::WeightDecl {
        target: #t, tensor: ::latentc_frontend::expr::Name::at(#tensor, #at), dims: vec![#(#dims),*],
    }); }
}

fn target(t: &Target) -> TokenStream {
    let name = named(&t.name);
    let indices = t.indices.iter().map(index);
    let dtype = match &t.dtype {
        Some(d) => {
            let d = named(d);
            quote! { ::core::option::Option::Some(#d) }
        }
        None => quote! { ::core::option::Option::None },
    };
    quote! { ::latentc_frontend::expr::Target { name: #name, indices: vec![#(#indices),*], dtype: #dtype } }
}

fn index(i: &Index) -> TokenStream {
    match i {
        Index::Axis(a) => {
            let a = named(a);
            quote! { ::latentc_frontend::expr::Index::Axis(#a) }
        }
        Index::Group { paren, parts, whole } => {
            let at = spot(paren.span.open());
            let parts = parts.iter().map(named);
            let whole = match whole {
                Some(w) => {
                    let w = named(w);
                    quote! { ::core::option::Option::Some(#w) }
                }
                None => quote! { ::core::option::Option::None },
            };
            quote! { ::latentc_frontend::expr::Index::Group { parts: vec![#(#parts),*], whole: #whole, at: #at } }
        }
        Index::Value(e) => {
            let e = expr(e);
            quote! { ::latentc_frontend::expr::Index::Value(#e) }
        }
    }
}

fn along(a: &Along) -> TokenStream {
    match a {
        Along::Axis(a) => {
            let a = named(a);
            quote! { ::latentc_frontend::expr::Along::Axis(#a) }
        }
        Along::UpTo(a, b) => {
            let (a, b) = (named(a), named(b));
            quote! { ::latentc_frontend::expr::Along::UpTo(#a, #b) }
        }
        Along::At(a, b) => {
            let (a, b) = (named(a), named(b));
            quote! { ::latentc_frontend::expr::Along::At(#a, #b) }
        }
    }
}

fn expr(e: &Expr) -> TokenStream {
    match e {
        Expr::Number { value, at } => {
            let at = spot(*at);
            // Sizes and counts are integers, factors are f64: both are numbers to an equation.
            quote! { ::latentc_frontend::expr::number(#value, #at) }
        }
        Expr::Use { name, indices } => {
            let name = named(name);
            let indices = indices.iter().map(index);
            quote! { ::latentc_frontend::expr::Expr::Use { name: #name, indices: vec![#(#indices),*] } }
        }
        Expr::Prefix { op, at, value } => {
            let (op, at, value) = (format_ident!("{op}"), spot(*at), expr(value));
            quote! { ::latentc_frontend::expr::#op(#value, #at) }
        }
        Expr::Infix { op, at, left, right } => {
            let (op, at, left, right) = (format_ident!("{op}"), spot(*at), expr(left), expr(right));
            quote! { ::latentc_frontend::expr::#op(#left, #right, #at) }
        }
        Expr::Apply { name, along: axes, params, args } => {
            let name = named(name);
            let axes = axes.iter().map(along);
            let args = args.iter().map(expr);
            quote! { ::latentc_frontend::expr::Expr::Apply {
                function: #name,
                along: vec![#(#axes),*],
                params: vec![#(::latentc_frontend::expr::Param::from(#params)),*],
                args: vec![#(#args),*],
            } }
        }
    }
}

fn named(ident: &Ident) -> TokenStream {
    let text = ident.to_string();
    let at = spot(ident.span());
    quote! { ::latentc_frontend::expr::Name::at(#text, #at) }
}

/// The place of a token in the author's file.
fn spot(span: Span) -> TokenStream {
    let start = span.start();
    let (line, col) = (start.line as u32, start.column as u32 + 1);
    quote! { ::latentc_frontend::expr::Spot::new(::core::file!(), #line, #col) }
}

fn option(text: Option<&str>) -> TokenStream {
    match text {
        Some(text) => quote! { ::core::option::Option::Some(::std::string::String::from(#text)) },
        None => quote! { ::core::option::Option::None },
    }
}
