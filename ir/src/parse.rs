//! Text in: the inverse of [`print`](mod@crate::print).
//!
//! A text is read line by line and nothing nests, so its depth and size are no danger, and the calls that it may fold
//! are counted. A line with an error is reported and skipped. The parser checks what is between the words and the
//! axis table (names, shown sizes, the axes that a contraction sums); whether the result is a program is for
//! [`verify`](crate::verify()), and [`check`] asks both.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use crate::chain;
use crate::cursor::{Cursor, Parsed, Reported};
use crate::diag::{Diagnostic, ParseError, did_you_mean};
use crate::graph::{Factor, Function, Held, Module, Stored, Value, ValueId, Weight};
use crate::lex::{Kind, tokens};
use crate::print::Name;
use crate::types::{Axis, AxisId, DType, Size, Type};
use crate::verify::{Place, verify};

/// The module that a text says, verified or not.
///
/// # Errors
/// What is wrong with the text; one error a line, and not more than a screenful.
pub fn parse(file: &str, text: &str) -> Result<Module, ParseError> {
    parse_with_places(file, text).map(|(module, _)| module)
}

/// The module that a text says, verified.
///
/// # Errors
/// What is wrong with the text or, if nothing is, with the module, at the line that breaks a rule.
pub fn check(file: &str, text: &str) -> Result<Module, ParseError> {
    let (module, places) = parse_with_places(file, text)?;
    match verify(&module) {
        Ok(()) => Ok(module),
        Err(broken) => {
            let mut errors: Vec<_> =
                broken.iter().map(|e| Diagnostic::new(places.of(e.place), e.what())).collect();
            errors.sort_by_key(|e| e.span.start);
            // What is wrong with one call of a chain is wrong with most, and a line is corrected once.
            errors
                .dedup_by(|next, e| next.span.start == e.span.start && places.chains.contains(&e.span.start));
            Err(ParseError { file: file.to_owned(), text: text.to_owned(), errors })
        }
    }
}

fn parse_with_places(file: &str, text: &str) -> Result<(Module, Places), ParseError> {
    let failed = |errors| ParseError { file: file.to_owned(), text: text.to_owned(), errors };
    let tokens = tokens(text).map_err(|mut errors| {
        errors.truncate(20);
        failed(errors)
    })?;
    let mut parser =
        Parser { at: Cursor::new(text, tokens), places: Places::default(), foldable: chain::MOST };
    let module = parser.module();
    if parser.at.errors.is_empty() { Ok((module, parser.places)) } else { Err(failed(parser.at.errors)) }
}

/// Where each part of a module stands in its text.
#[derive(Default)]
struct Places {
    header: Range<usize>,
    functions: Vec<FunctionPlaces>,
    /// The starts of lines that are chains.
    chains: HashSet<usize>,
}

#[derive(Default)]
struct FunctionPlaces {
    header: Range<usize>,
    axes: Vec<Range<usize>>,
    values: Vec<Range<usize>>,
    insts: Vec<Range<usize>>,
    results: Range<usize>,
}

impl Places {
    fn of(&self, place: Place) -> Range<usize> {
        let function = |f: usize| self.functions.get(f);
        let found = match place {
            Place::Module => None,
            Place::Function(f) => function(f).map(|p| &p.header),
            Place::Axis(f, a) => function(f).and_then(|p| p.axes.get(a)),
            Place::Value(f, v) => function(f).and_then(|p| p.values.get(v)),
            Place::Inst(f, n) => function(f).and_then(|p| p.insts.get(n)),
            Place::Return(f) => function(f).map(|p| &p.results),
        };
        found.unwrap_or(&self.header).clone()
    }
}

/// The parts of a function, in the order in which they are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Nothing,
    Axes,
    Params,
    Weights,
    Caches,
    Body,
    Return,
}

/// The words that start a line of a function.
const PARTS: [(&str, Part); 5] = [
    ("axes", Part::Axes),
    ("param", Part::Params),
    ("weight", Part::Weights),
    ("cache", Part::Caches),
    ("return", Part::Return),
];

/// A function so far.
pub(crate) struct Draft {
    pub(crate) f: Function,
    places: FunctionPlaces,
    part: Part,
    axes: HashMap<String, AxisId>,
    values: HashMap<String, ValueId>,
    /// Unknown values so far, by number of the error: what is found further down gets a better message.
    unknown: Vec<(usize, String)>,
    /// The axis table was not understood; what depends on it is not worth reporting.
    axes_unknown: bool,
}

/// A value that a line names, where it does, and its type.
pub(crate) type Named = (String, Range<usize>, Parsed<Type>);

pub(crate) struct Parser<'t> {
    pub(crate) at: Cursor<'t>,
    places: Places,
    /// How many more calls the text may fold.
    pub(crate) foldable: usize,
}

impl Parser<'_> {
    // --- modules ------------------------------------------------------------------------------------

    fn module(&mut self) -> Module {
        let mut module = Module { name: String::new(), functions: Vec::new(), entry: String::new() };
        self.at.skip_breaks();
        self.places.header = self.at.span();
        if self.header(&mut module).is_err() {
            self.skip_to_function();
        }
        loop {
            self.at.skip_breaks();
            if self.at.kind(0) == Kind::End {
                return module;
            }
            if self.at.sees("func") {
                let f = self.function();
                module.functions.push(f);
            } else {
                let error = self.at.unexpected("`func`");
                self.at.note(error);
                self.skip_to_function();
            }
        }
    }

    fn header(&mut self, module: &mut Module) -> Parsed<()> {
        self.at.keyword("module")?;
        module.name = self.at.name("the module's name")?.0;
        self.at.keyword("entry")?;
        module.entry = self.function_name()?;
        self.at.end_of_line()
    }

    fn skip_to_function(&mut self) {
        while self.at.kind(0) != Kind::End && !self.at.sees("func") {
            self.at.skip_line();
        }
    }

    pub(crate) fn function_name(&mut self) -> Parsed<String> {
        if !self.at.eat('@') {
            let error = self.at.unexpected("`@` and a function's name");
            return self.at.fail(error);
        }
        Ok(self.at.name("a function's name")?.0)
    }

    // --- functions ----------------------------------------------------------------------------------

    fn function(&mut self) -> Function {
        let start = self.at.span().start;
        let mut d = Draft {
            f: Function::new(""),
            places: FunctionPlaces::default(),
            part: Part::Nothing,
            axes: HashMap::new(),
            values: HashMap::new(),
            unknown: Vec::new(),
            axes_unknown: false,
        };
        if self.function_header(&mut d.f).is_err() {
            self.at.skip_line();
        }
        d.places.header = self.at.since(start);

        loop {
            self.at.skip_breaks();
            let closed = self.at.eat('}');
            let next = self.at.sees("func") && self.at.kind(1) == Kind::Mark('@');
            if closed || next || self.at.kind(0) == Kind::End {
                if !closed {
                    let error = self.at.unexpected("`}`");
                    self.at.note(error);
                } else if d.part != Part::Return {
                    let message = format!("@{} has no `return`", Name(&d.f.name));
                    self.at.note(Diagnostic::new(d.places.header.clone(), message));
                }
                break;
            }
            if self.line(&mut d).is_err() {
                self.at.skip_line();
            }
        }
        if self.at.end_of_line().is_err() {
            self.at.skip_line();
        }
        self.explain_unknown(&d);
        self.places.functions.push(d.places);
        d.f
    }

    fn function_header(&mut self, f: &mut Function) -> Parsed<()> {
        self.at.keyword("func")?;
        f.name = self.function_name()?;
        if self.at.eat_word("source") {
            f.source = self.at.string("the source file in quotes")?;
        }
        self.at.mark('{')
    }

    fn line(&mut self, d: &mut Draft) -> Parsed<()> {
        let word = self.at.word();
        // A value may be called `param`; then a colon follows.
        let keyword = PARTS.iter().find(|(k, _)| self.at.sees(k) && self.at.kind(1) != Kind::Mark(':'));
        let part = keyword.map_or(Part::Body, |(_, part)| *part);
        let again = part == d.part && matches!(part, Part::Axes | Part::Return);
        if part < d.part || again {
            let message = match d.part {
                _ if again => format!("a second `{word}`"),
                Part::Return => "nothing follows `return`".to_owned(),
                Part::Nothing | Part::Axes | Part::Params | Part::Weights | Part::Caches | Part::Body => {
                    format!("`{word}` comes too late")
                }
            };
            let error = Diagnostic::new(self.at.span(), message)
                .note("a function lists its axes, params, weights, caches, instructions and `return`, in this order");
            return self.at.fail(error);
        }
        // A line that names no value is more likely a misspelt keyword than the start of the body.
        if part != Part::Body || self.at.kind(1) == Kind::Mark(':') || self.at.sees_after("to") {
            d.part = part;
        }
        let start = self.at.span().start;
        match part {
            Part::Nothing => Ok(()),
            Part::Axes => {
                self.at.keyword("axes")?;
                let table = self.axis_table(d);
                d.axes_unknown = table.is_err();
                table
            }
            Part::Params => {
                self.at.keyword("param")?;
                let v = self.declared(d)?;
                d.f.params.push(v);
                self.at.end_of_line()
            }
            Part::Weights => {
                self.at.keyword("weight")?;
                let value = self.declared(d)?;
                self.at.mark('=')?;
                let stored = self.stored(d)?;
                d.f.weights.push(Weight { value, stored });
                self.at.end_of_line()
            }
            Part::Caches => {
                self.at.keyword("cache")?;
                let v = self.declared(d)?;
                d.f.caches.push(v);
                self.at.end_of_line()
            }
            Part::Body => {
                let insts = self.instructions(d)?;
                if insts.len() > 1 {
                    self.places.chains.insert(start);
                }
                for inst in insts {
                    d.f.body.push(inst);
                    d.places.insts.push(self.at.since(start));
                }
                self.at.end_of_line()
            }
            Part::Return => {
                self.at.keyword("return")?;
                d.f.results = self.operands(d)?;
                d.places.results = self.at.since(start);
                self.at.end_of_line()
            }
        }
    }

    // --- axes and types -----------------------------------------------------------------------------

    fn axis_table(&mut self, d: &mut Draft) -> Parsed<()> {
        let mut likes = Vec::new();
        loop {
            let (name, span) = self.at.name("an axis")?;
            let id = AxisId(d.f.axes.len() as u32);
            if let Some(first) = d.axes.get(&name) {
                let first = d.places.axes[first.0 as usize].clone();
                let error =
                    Diagnostic::new(span, format!("a second axis `{name}`")).related(first, "the first");
                return self.at.fail(error);
            }
            let size = if self.at.eat('=') { self.size()? } else { Size::Sym(name.clone()) };
            if self.at.eat_word("like") {
                likes.push((id, self.at.name("the axis that it is like")?));
            }
            d.axes.insert(name.clone(), id);
            d.f.axes.push(Axis { name, size, like: None });
            d.places.axes.push(span);
            if !self.at.eat(',') {
                break;
            }
        }
        for (id, (name, span)) in likes {
            let like = self.look_up_axis(d, &name, span)?;
            d.f.axes[id.0 as usize].like = Some(like);
        }
        self.at.end_of_line()
    }

    fn size(&mut self) -> Parsed<Size> {
        if self.at.kind(0) == Kind::Number {
            return Ok(Size::Fixed(self.at.natural("a size", u64::MAX)?));
        }
        Ok(Size::Sym(self.at.name("a size, which is a natural number or a name")?.0))
    }

    fn look_up_axis(&mut self, d: &Draft, name: &str, span: Range<usize>) -> Parsed<AxisId> {
        if let Some(id) = d.axes.get(name) {
            return Ok(*id);
        }
        if d.axes_unknown {
            return Err(Reported);
        }
        let mut error = Diagnostic::new(span, format!("unknown axis `{name}`"));
        error.notes.extend(did_you_mean(name, d.f.axes.iter().map(|a| a.name.as_str())));
        self.at.fail(error)
    }

    pub(crate) fn axis(&mut self, d: &Draft) -> Parsed<AxisId> {
        let (name, span) = self.at.name("an axis")?;
        self.look_up_axis(d, &name, span)
    }

    pub(crate) fn axes(&mut self, d: &Draft) -> Parsed<Vec<AxisId>> {
        self.listed(|p| p.axis(d))
    }

    /// One item or more, with commas between them.
    pub(crate) fn listed<T>(&mut self, mut item: impl FnMut(&mut Self) -> Parsed<T>) -> Parsed<Vec<T>> {
        let mut items = vec![item(self)?];
        while self.at.eat(',') {
            items.push(item(self)?);
        }
        Ok(items)
    }

    fn ty(&mut self, d: &Draft) -> Parsed<Type> {
        let (word, span) = self.at.ident("a type")?;
        let Some(dtype) = DType::from_name(word) else {
            let names = DType::ALL.map(DType::name);
            let error = Diagnostic::new(span, format!("unknown dtype `{word}`"))
                .note(format!("the dtypes are {}", names.join(", ")));
            return self.at.fail(error);
        };
        let mut axes = Vec::new();
        if self.at.eat('[') {
            axes = self.listed(|p| p.shown_axis(d))?;
            self.at.mark(']')?;
        }
        Ok(Type { dtype, axes })
    }

    /// An axis of a type, whose size, if shown, is that of the table.
    fn shown_axis(&mut self, d: &Draft) -> Parsed<AxisId> {
        let start = self.at.span().start;
        let id = self.axis(d)?;
        if self.at.eat('=') {
            let shown = self.size()?;
            let axis = d.f.axis(id);
            if axis.size != shown {
                let message =
                    format!("axis `{}` has size {shown} here, {} in the table", axis.name, axis.size);
                let error = Diagnostic::new(self.at.since(start), message)
                    .related(d.places.axes[id.0 as usize].clone(), format!("size {}", axis.size));
                return self.at.fail(error);
            }
        }
        Ok(id)
    }

    // --- values -------------------------------------------------------------------------------------

    /// `name: type`, not yet defined. The name comes back even if the type is wrong, so that its uses are not errors.
    pub(crate) fn typed(&mut self, d: &Draft) -> Parsed<Named> {
        let (name, span) = self.at.name("a value's name")?;
        if !self.at.eat(':') {
            let mut error = self.at.unexpected("`:` and a type");
            let keywords = PARTS.iter().map(|(k, _)| *k);
            error.notes.extend(did_you_mean(&name, keywords).filter(|_| d.f.value_named(&name).is_none()));
            return self.at.fail(error);
        }
        let ty = self.ty(d);
        Ok((name, span, ty))
    }

    /// Adds the values that a line defines; of names that are taken, the first is an error.
    pub(crate) fn define(&mut self, d: &mut Draft, named: Vec<Named>) -> Vec<ValueId> {
        let mut second = None;
        let mut ids = Vec::with_capacity(named.len());
        for (name, span, ty) in named {
            let id = ValueId(d.f.values.len() as u32);
            if let Some(first) = d.values.insert(name.clone(), id) {
                let first = d.places.values[first.0 as usize].clone();
                let message = format!("a second value `{name}`");
                second.get_or_insert(Diagnostic::new(span.clone(), message).related(first, "the first"));
            }
            d.f.values.push(Value { name, ty: ty.unwrap_or(Type::scalar(DType::F32)) });
            d.places.values.push(span);
            ids.push(id);
        }
        if let Some(error) = second {
            self.at.note(error);
        }
        ids
    }

    fn declared(&mut self, d: &mut Draft) -> Parsed<ValueId> {
        let named = self.typed(d)?;
        let known = named.2.is_ok();
        let ids = self.define(d, vec![named]);
        if known { Ok(ids[0]) } else { Err(Reported) }
    }

    pub(crate) fn operand(&mut self, d: &mut Draft) -> Parsed<ValueId> {
        let (name, span) = self.at.name("a value")?;
        if let Some(id) = d.values.get(&name) {
            return Ok(*id);
        }
        let mut error = Diagnostic::new(span, format!("unknown value `{name}`"));
        error.notes.extend(did_you_mean(&name, d.f.values.iter().map(|v| v.name.as_str())));
        d.unknown.push((self.at.errors.len(), name));
        self.at.fail(error)
    }

    pub(crate) fn operands(&mut self, d: &mut Draft) -> Parsed<Vec<ValueId>> {
        self.listed(|p| p.operand(d))
    }

    /// Says of unknown values that are defined after their use where they are.
    fn explain_unknown(&mut self, d: &Draft) {
        for (n, name) in &d.unknown {
            if let (Some(error), Some(v)) = (self.at.errors.get_mut(*n), d.values.get(name)) {
                error.message = format!("`{name}` is used before its definition");
                error.related = vec![(d.places.values[v.0 as usize].clone(), "defined here".to_owned())];
                error.notes.clear();
            }
        }
    }

    // --- weights ------------------------------------------------------------------------------------

    fn stored(&mut self, d: &Draft) -> Parsed<Stored> {
        let held = match () {
            () if self.at.eat_word("codes") => Held::Codes,
            () if self.at.eat_word("scales") => Held::Scales,
            () => Held::Elements,
        };
        let tensor = self.at.string("the name of the stored tensor in quotes")?;
        let mut dims = Vec::new();
        if self.at.eat('[') {
            dims = self.listed(|p| p.stored_dim(d))?;
            self.at.mark(']')?;
        }
        Ok(Stored { tensor, dims, held })
    }

    /// `i * (n | v)`, or `1` for a dimension without factors.
    fn stored_dim(&mut self, d: &Draft) -> Parsed<Vec<Factor>> {
        if self.at.kind(0) == Kind::Number && self.at.word() == "1" {
            self.at.natural("1", 1)?;
            return Ok(Vec::new());
        }
        let mut factors = Vec::new();
        loop {
            factors.push(if self.at.eat('(') {
                let mut parts = vec![self.axis(d)?];
                while self.at.eat('|') {
                    parts.push(self.axis(d)?);
                }
                self.at.mark(')')?;
                Factor::Parts(parts)
            } else {
                Factor::Axis(self.axis(d)?)
            });
            if !self.at.eat('*') {
                return Ok(factors);
            }
        }
    }
}
