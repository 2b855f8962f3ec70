//! JSON: the same data through serde, for tools that do not read the text format.

use crate::graph::Module;
use crate::verify::{VerifyError, verify};

/// Why a JSON text is no module.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JsonError {
    /// It is not JSON, or not of the right shape.
    #[error("line {line}, column {column}: {message}")]
    Shape {
        /// From 1.
        line: usize,
        /// From 1.
        column: usize,
        /// What is wrong there.
        message: String,
    },
    /// It says a module that breaks these rules.
    #[error("{}", .0.iter().map(VerifyError::to_string).collect::<Vec<_>>().join("\n"))]
    Broken(Vec<VerifyError>),
}

impl Module {
    /// The module as indented JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a module holds only lists, strings and finite numbers")
    }

    /// The verified module that a JSON text says.
    ///
    /// # Errors
    /// Where the text is no JSON of a module, or which rules the module breaks.
    pub fn from_json(text: &str) -> Result<Module, JsonError> {
        let module: Module = serde_json::from_str(text).map_err(|e| JsonError::Shape {
            line: e.line(),
            column: e.column(),
            // The place has its own fields.
            message: e.to_string().split(" at line ").next().unwrap_or_default().to_owned(),
        })?;
        verify(&module).map_err(JsonError::Broken)?;
        Ok(module)
    }
}
