//! Text out: the inverse of [`parse`](crate::parse()).
//!
//! One instruction a line, but for a chain of equal calls, which is one line; everything typed, and nothing that
//! depends on how values are numbered: a module and its [canonical](crate::Module::canonical) form print alike.
//! Printing never fails; what is out of range in a module that does not verify shows as `?` and its number.

use std::fmt;

use crate::chain;
use crate::graph::{Factor, Function, Held, Inst, Module, Origin, Stored, ValueId};
use crate::infer::show_type;
use crate::lex::{is_ident, quote};
use crate::ops::{Attr, Op, Real};
use crate::types::{Axis, AxisId, Size, Type};

/// Lists longer than this go on in the next line.
const WIDTH: usize = 110;

/// A name, in quotes where the format needs them.
pub(crate) struct Name<'a>(pub(crate) &'a str);

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if is_ident(self.0) { f.write_str(self.0) } else { f.write_str(&quote(self.0)) }
    }
}

impl fmt::Display for Module {
    /// The text format.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "module {} entry @{}", Name(&self.name), Name(&self.entry))?;
        let mut foldable = chain::MOST;
        for function in &self.functions {
            writeln!(f)?;
            write_function(function, f, &mut foldable)?;
        }
        Ok(())
    }
}

impl fmt::Display for Function {
    /// The text format.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_function(self, f, &mut { chain::MOST })
    }
}

/// The text of a function in which at most so many calls may fold; those that do are taken off the number.
fn write_function(f: &Function, out: &mut fmt::Formatter<'_>, foldable: &mut usize) -> fmt::Result {
    write!(out, "func @{}", Name(&f.name))?;
    if !f.source.is_empty() {
        write!(out, " source {}", quote(&f.source))?;
    }
    writeln!(out, " {{")?;

    if !f.axes.is_empty() {
        writeln!(out, "{}", axis_table(&f.axes))?;
    }
    for &v in &f.params {
        writeln!(out, "  param {}", typed(f, v))?;
    }
    for w in &f.weights {
        writeln!(out, "  weight {} = {}", typed(f, w.value), stored(f, &w.stored))?;
    }
    for &v in &f.caches {
        writeln!(out, "  cache {}", typed(f, v))?;
    }
    if !(f.axes.is_empty() && f.params.is_empty() && f.weights.is_empty() && f.caches.is_empty()) {
        writeln!(out)?;
    }

    let mut lines = Vec::new();
    let mut rest = &f.body[..];
    while let Some(first) = rest.first() {
        let (here, below) = rest.split_at(chain::length(f, rest, *foldable));
        let line = match here {
            [first, .., last] => {
                *foldable -= here.len();
                show_chain(f, first, last)
            }
            _ => show_inst(f, first),
        };
        lines.push((line, provenance(f, first)));
        rest = below;
    }
    let column = provenance_column(&lines);
    for (line, from) in &lines {
        if from.is_empty() {
            writeln!(out, "  {line}")?;
        } else {
            let gap = column.saturating_sub(line.chars().count()).max(2);
            writeln!(out, "  {line}{:gap$}{from}", "")?;
        }
    }
    writeln!(out, "  return {}", list(&f.results, |v| value(f, *v)))?;
    writeln!(out, "}}")
}

/// An instruction as the text format writes it, without where it comes from: `y: f32[t] = add a, b`.
pub fn show_inst(f: &Function, inst: &Inst) -> String {
    format!("{} = {}", list(&inst.results, |v| typed(f, *v)), operation(f, inst))
}

/// `x.1 to x.59: f32[t] = call @layer(x) under "layers.1" to "layers.59"`: the first call, and how far it counts.
fn show_chain(f: &Function, first: &Inst, last: &Inst) -> String {
    let (name, to) = (value(f, first.result()), typed(f, last.result()));
    let scope = if let Op::Call { scope, .. } = &last.op { quote(scope) } else { String::new() };
    format!("{name} to {to} = {} to {scope}", operation(f, first))
}

/// What stands on the right of the `=`.
fn operation(f: &Function, inst: &Inst) -> String {
    let args = list(&inst.args, |v| value(f, *v));
    let mut line = inst.op.mnemonic().to_owned();
    match &inst.op {
        Op::Const(numbers) => {
            let scalar = inst.results.first().and_then(|v| ty(f, *v)).is_some_and(|t| t.axes.is_empty());
            match numbers[..] {
                [x] if scalar => line += &format!(" {x}"),
                _ => line += &format!(" [{}]", list(numbers, Real::to_string)),
            }
        }
        Op::Call { callee, scope } => {
            line += &format!(" @{}({args})", Name(callee));
            if !scope.is_empty() {
                line += &format!(" under {}", quote(scope));
            }
        }
        Op::Contract => {
            line += &format!(" {args}");
            let known = inst.args.iter().all(|v| ty(f, *v).is_some());
            if let Some(result) = inst.results.first().and_then(|v| ty(f, *v)).filter(|_| known) {
                let summed = f.summed(&inst.args, result);
                if !summed.is_empty() {
                    line += &format!(" over {}", list(&summed, |a| axis(f, *a)));
                }
            }
        }
        Op::Position { .. }
        | Op::Unary(_)
        | Op::Binary(_)
        | Op::Select
        | Op::Cast
        | Op::Reduce { .. }
        | Op::Pack { .. }
        | Op::Unpack { .. }
        | Op::Rename { .. }
        | Op::Broadcast { .. }
        | Op::Split { .. }
        | Op::Merge { .. }
        | Op::Slice { .. }
        | Op::Concat { .. }
        | Op::Gather { .. }
        | Op::TopK { .. }
        | Op::TopIndices { .. }
        | Op::ScatterAdd { .. }
        | Op::Past { .. }
        | Op::Append { .. }
        | Op::Rope { .. }
        | Op::Softmax { .. }
        | Op::RmsNorm { .. } => {
            if !args.is_empty() {
                line += &format!(" {args}");
            }
            for ((keyword, _), attr) in inst.op.row().attrs.iter().zip(inst.op.attrs()) {
                line += &format!(" {keyword} {}", attribute(f, &attr));
            }
        }
    }
    line
}

fn attribute(f: &Function, attr: &Attr) -> String {
    match attr {
        Attr::Axis(a) => axis(f, *a),
        Attr::Axes(axes) => list(axes, |a| axis(f, *a)),
        Attr::Int(n) => n.to_string(),
        Attr::Real(x) => x.to_string(),
        Attr::Word(word) => word.clone(),
        Attr::Text(text) => quote(text),
    }
}

/// `@41:9 (41) by reassociate`.
fn provenance(f: &Function, inst: &Inst) -> String {
    let mut parts: Vec<_> = inst.origins.iter().map(|o| origin(o, &f.source)).collect();
    if let Some(pass) = &inst.by {
        parts.push(format!("by {}", Name(pass)));
    }
    parts.join(" ")
}

/// `@41:9 (41)`, or `@"file":41:9 (41)` if it lies in another file than the function.
fn origin(origin: &Origin, source: &str) -> String {
    let mut text = "@".to_owned();
    if origin.file != source {
        text += &format!("{}:", quote(&origin.file));
    }
    text += &format!("{}:{}", origin.line, origin.col);
    if let Some(tag) = &origin.tag {
        let plain = !tag.is_empty() && tag.len() < 10 && tag.bytes().all(|b| b.is_ascii_digit());
        text += &if plain { format!(" ({tag})") } else { format!(" ({})", Name(tag)) };
    }
    text
}

/// Where provenance starts: past most lines, and on a multiple of 8 so that a small change moves it seldom.
fn provenance_column(lines: &[(String, String)]) -> usize {
    let widths = lines.iter().filter(|(_, from)| !from.is_empty()).map(|(line, _)| line.chars().count());
    let longest = widths.filter(|&w| w + 2 < WIDTH - 20).max().unwrap_or(0);
    (longest + 2).next_multiple_of(8)
}

fn axis_table(axes: &[Axis]) -> String {
    let mut text = "  axes".to_owned();
    let mut width = text.len();
    for (n, a) in axes.iter().enumerate() {
        let mut row = Name(&a.name).to_string();
        match &a.size {
            Size::Fixed(size) => row += &format!("={size}"),
            Size::Sym(symbol) if *symbol != a.name => row += &format!("={}", Name(symbol)),
            Size::Sym(_) => {}
        }
        if let Some(like) = a.like {
            row += " like ";
            row += &axes
                .get(like.0 as usize)
                .map_or_else(|| format!("?{}", like.0), |l| Name(&l.name).to_string());
        }
        if n + 1 < axes.len() {
            row.push(',');
        }
        if n > 0 && width + 1 + row.chars().count() > WIDTH {
            text += "\n      ";
            width = 6;
        }
        width += 1 + row.chars().count();
        text.push(' ');
        text += &row;
    }
    text
}

/// `"mlp.{e}.weight"[i * (n | v), c]`.
fn stored(f: &Function, stored: &Stored) -> String {
    let held = match stored.held {
        Held::Elements => "",
        Held::Codes => "codes ",
        Held::Scales => "scales ",
    };
    let tensor = held.to_owned() + &quote(&stored.tensor);
    if stored.dims.is_empty() {
        return tensor;
    }
    let dims = list(&stored.dims, |factors| {
        if factors.is_empty() {
            return "1".to_owned();
        }
        let factors: Vec<_> = factors
            .iter()
            .map(|factor| match factor {
                Factor::Axis(a) => axis(f, *a),
                Factor::Parts(parts) => {
                    let parts: Vec<_> = parts.iter().map(|a| axis(f, *a)).collect();
                    format!("({})", parts.join(" | "))
                }
            })
            .collect();
        factors.join(" * ")
    });
    format!("{tensor}[{dims}]")
}

fn list<T>(items: &[T], show: impl Fn(&T) -> String) -> String {
    items.iter().map(show).collect::<Vec<_>>().join(", ")
}

fn ty(f: &Function, v: ValueId) -> Option<&Type> {
    f.values.get(v.0 as usize).map(|value| &value.ty)
}

fn value(f: &Function, v: ValueId) -> String {
    f.values.get(v.0 as usize).map_or_else(|| format!("?{}", v.0), |value| Name(&value.name).to_string())
}

fn typed(f: &Function, v: ValueId) -> String {
    match ty(f, v) {
        Some(ty) => format!("{}: {}", value(f, v), show_type(ty, &f.axes)),
        None => value(f, v),
    }
}

fn axis(f: &Function, a: AxisId) -> String {
    f.axes.get(a.0 as usize).map_or_else(|| format!("?{}", a.0), |axis| Name(&axis.name).to_string())
}
