//! The equation block `spec!`, described in the documentation of `latentc-frontend`.
//!
//! The macro knows what an equation looks like, not what it means: `parse.rs` makes a syntax tree of the
//! tokens, `emit.rs` writes the builder calls that make the same tree at run time, each name with its place. Which axes
//! exist, what is summed and which functions there are is known to the tracer alone.

mod emit;
mod parse;
mod parse_expr;
#[cfg(test)]
mod tests;

/// Model functions, written as equations. See the documentation of `latentc-frontend` for the language.
#[proc_macro]
pub fn spec(tokens: proc_macro::TokenStream) -> proc_macro::TokenStream {
    match syn::parse::<parse::Block>(tokens) {
        Ok(block) => emit::block(&block).into(),
        Err(error) => error.to_compile_error().into(),
    }
}
