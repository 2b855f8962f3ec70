//! Text out: the inverse of [`parse`](crate::parse()).
//!
//! One value a line, everything typed, and nothing that depends on how values are numbered: a module and its
//! [canonical](crate::Module::canonical) form print alike. Printing never fails; what is out of
//! range in a module that does not verify shows as `?` and its number.

use std::fmt;

use crate::graph::{Factor, Function, Inst, Module, Origin, Stored, ValueId};
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
        for function in &self.functions {
            write!(f, "\n{function}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Function {
    /// The text format.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "func @{}", Name(&self.name))?;
        if !self.source.is_empty() {
            write!(f, " source {}", quote(&self.source))?;
        }
        writeln!(f, " {{")?;

        if !self.axes.is_empty() {
            writeln!(f, "{}", axis_table(&self.axes))?;
        }
        for &v in &self.params {
            writeln!(f, "  param {}", typed(self, v))?;
        }
        for w in &self.weights {
            writeln!(f, "  weight {} = {}", typed(self, w.value), stored(self, &w.stored))?;
        }
        for &v in &self.caches {
            writeln!(f, "  cache {}", typed(self, v))?;
        }
        if !(self.axes.is_empty()
            && self.params.is_empty()
            && self.weights.is_empty()
            && self.caches.is_empty())
        {
            writeln!(f)?;
        }

        let lines: Vec<_> =
            self.body.iter().map(|inst| (show_inst(self, inst), provenance(self, inst))).collect();
        let column = provenance_column(&lines);
        for (line, from) in &lines {
            if from.is_empty() {
                writeln!(f, "  {line}")?;
            } else {
                let gap = column.saturating_sub(line.chars().count()).max(2);
                writeln!(f, "  {line}{:gap$}{from}", "")?;
            }
        }
        writeln!(f, "  return {}", list(&self.results, |v| value(self, *v)))?;
        writeln!(f, "}}")
    }
}

/// An instruction as the text format writes it, without where it comes from: `y: f32[t] = add a, b`.
pub fn show_inst(f: &Function, inst: &Inst) -> String {
    let results = list(&inst.results, |v| typed(f, *v));
    let args = list(&inst.args, |v| value(f, *v));
    let mut line = format!("{results} = {}", inst.op.mnemonic());
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
        | Op::Rename { .. }
        | Op::Broadcast { .. }
        | Op::Split { .. }
        | Op::Merge { .. }
        | Op::Slice { .. }
        | Op::Concat { .. }
        | Op::Gather { .. }
        | Op::TopK { .. }
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
    let tensor = quote(&stored.tensor);
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
