//! Instructions: the part of the parser that the op table drives.

use std::ops::Range;

use crate::chain::{self, Series};
use crate::cursor::{Parsed, Reported};
use crate::diag::{Diagnostic, did_you_mean};
use crate::graph::{Inst, Origin, ValueId};
use crate::lex::Kind;
use crate::ops::{Attr, AttrKind, OPS, Op, OpRow};
use crate::parse::{Draft, Named, Parser};
use crate::print::Name;
use crate::types::{AxisId, Type};

/// How a chain is written.
const CHAIN: &str = "it is written `x.1 to x.9: TYPE = call @f(x) under \"l.0\" to \"l.8\"`; \
    one number counts up in names and scopes";

impl Parser<'_> {
    /// `y: f32[t] = add a, b @41:9 (41) by reassociate`, which is one instruction, or a chain.
    pub(crate) fn instructions(&mut self, d: &mut Draft) -> Parsed<Vec<Inst>> {
        let mut named = Vec::new();
        let insts = if self.at.sees_after("to") {
            self.chain(d, &mut named)
        } else {
            let named_all = self.result_types(d, &mut named);
            named_all.and_then(|()| self.operation(d, &named)).map(|inst| vec![inst])
        };
        // The results are defined after the operands are read, since an instruction may not use itself, and even if
        // there was an error, since further errors about them would teach nothing.
        let results = self.define(d, named);
        let mut insts = insts?;
        match &mut insts[..] {
            [inst] => inst.results = results,
            calls => {
                for (n, inst) in calls.iter_mut().enumerate() {
                    inst.results = vec![results[n]];
                    if n > 0 {
                        inst.args[0] = results[n - 1];
                    }
                }
            }
        }
        Ok(insts)
    }

    fn result_types(&mut self, d: &Draft, named: &mut Vec<Named>) -> Parsed<()> {
        loop {
            let result = self.typed(d)?;
            let known = result.2.is_ok();
            named.push(result);
            if !known {
                return Err(Reported);
            }
            if !self.at.eat(',') {
                return self.at.mark('=');
            }
        }
    }

    // --- chains -------------------------------------------------------------------------------------

    /// `x.1 to x.9: f32[t] = call @f(x) under "l.0" to "l.8"`. The results stay empty, and all calls have the
    /// arguments of the first.
    fn chain(&mut self, d: &mut Draft, named: &mut Vec<Named>) -> Parsed<Vec<Inst>> {
        let names = self.chain_names(d, named)?;
        if !self.at.sees("call") {
            let error = self.at.unexpected("`call`").related(names, "results of a chain").note(CHAIN);
            return self.at.fail(error);
        }
        self.at.keyword("call")?;
        let start = self.at.span().start;
        let (callee, args) = self.callee(d)?;
        if args.is_empty() {
            let message = format!("@{} has no argument to be chained", Name(&callee));
            let error = Diagnostic::new(self.at.since(start), message)
                .note("the first argument of a chain's calls is the result of the call before");
            return self.at.fail(error);
        }
        self.at.keyword("under")?;
        let start = self.at.span().start;
        let first = self.at.string("a scope in quotes")?;
        self.at.keyword("to")?;
        let last = self.at.string("a scope in quotes")?;
        let span = self.at.since(start);
        let Some(scopes) = Series::of_scopes(&first, &last) else {
            let message = format!("`{first}` does not count up to `{last}`");
            return self.at.fail(Diagnostic::new(span, message).note(CHAIN));
        };
        if scopes.count() != named.len() {
            let message = format!("{} scopes for {} calls", scopes.count(), named.len());
            let error = Diagnostic::new(span, message).related(names, format!("{} results", named.len()));
            return self.at.fail(error);
        }
        let (origins, by) = self.provenance(d)?;
        let call = |scope| Inst {
            op: Op::Call { callee: callee.clone(), scope },
            args: args.clone(),
            results: Vec::new(),
            origins: origins.clone(),
            by: by.clone(),
        };
        Ok(scopes.texts().map(call).collect())
    }

    /// `x.1 to x.9: f32[t] =`, and where the names stand.
    fn chain_names(&mut self, d: &Draft, named: &mut Vec<Named>) -> Parsed<Range<usize>> {
        let (first, start) = self.at.name("a value's name")?;
        self.at.keyword("to")?;
        let (last, end, ty) = self.typed(d)?;
        let span = start.start..end.end;
        let ty = ty.ok();
        let value = |name| (name, span.clone(), ty.clone().ok_or(Reported));
        let error = match Series::of_names(&first, &last) {
            Some(names) if names.count() <= self.foldable => {
                self.foldable -= names.count();
                named.extend(names.texts().map(value));
                None
            }
            Some(names) => {
                let message = format!("a chain of {} calls", names.count());
                let rule = format!("the chains of a text have {} calls together at most", chain::MOST);
                Some(Diagnostic::new(span.clone(), message).note(rule))
            }
            None => {
                let message = format!("`{first}` does not count up to `{last}`");
                Some(Diagnostic::new(span.clone(), message).note(CHAIN))
            }
        };
        if let Some(error) = error {
            for name in [first, last] {
                // Of names that are taken nothing is said, since they will change.
                let known = d.f.value_named(&name).is_some() || named.iter().any(|(n, ..)| *n == name);
                named.extend((!known).then(|| value(name)));
            }
            return self.at.fail(error);
        }
        ty.ok_or(Reported)?;
        self.at.mark('=')?;
        Ok(span)
    }

    // --- ops ----------------------------------------------------------------------------------------

    /// Everything after the `=`; the results stay empty.
    fn operation(&mut self, d: &mut Draft, named: &[Named]) -> Parsed<Inst> {
        let start = self.at.span();
        let (mnemonic, span) = self.at.ident("an op")?;
        let Some(row) = OPS.iter().find(|row| row.mnemonic == mnemonic) else {
            let mut error = Diagnostic::new(span, format!("unknown op `{mnemonic}`"));
            error.notes.extend(did_you_mean(mnemonic, OPS.iter().map(|row| row.mnemonic)));
            return self.at.fail(error);
        };
        if named.len() != 1 && mnemonic != "call" {
            let message = format!("`{mnemonic}` has one result, {} are named", named.len());
            return self.at.fail(Diagnostic::new(start, message));
        }
        let (op, args) = match mnemonic {
            "const" => (self.constant()?, vec![]),
            "call" => self.call(d)?,
            "contract" => {
                let args = self.checked_operands(d, row)?;
                if let [(_, _, Ok(ty))] = named {
                    self.check_summed(d, &args, ty)?;
                }
                (Op::Contract, args)
            }
            _ => {
                let args = self.checked_operands(d, row)?;
                (self.attributes(d, row)?, args)
            }
        };
        let (origins, by) = self.provenance(d)?;
        Ok(Inst { op, args, results: Vec::new(), origins, by })
    }

    /// `1.0`, or a table `[1.0, 0.1]`.
    fn constant(&mut self) -> Parsed<Op> {
        if !self.at.eat('[') {
            return Ok(Op::Const(vec![self.at.real()?]));
        }
        let numbers = self.listed(|p| p.at.real())?;
        self.at.mark(']')?;
        Ok(Op::Const(numbers))
    }

    /// `@layer(x, y) under "layers.0"`.
    fn call(&mut self, d: &mut Draft) -> Parsed<(Op, Vec<ValueId>)> {
        let (callee, args) = self.callee(d)?;
        let mut scope = String::new();
        if self.at.eat_word("under") {
            scope = self.at.string("a scope in quotes")?;
            if self.at.sees("to") {
                let error = Diagnostic::new(self.at.span(), "more than one scope for one call").note(CHAIN);
                return self.at.fail(error);
            }
        }
        Ok((Op::Call { callee, scope }, args))
    }

    /// `@layer(x, y)`.
    fn callee(&mut self, d: &mut Draft) -> Parsed<(String, Vec<ValueId>)> {
        let callee = self.function_name()?;
        self.at.mark('(')?;
        let args = if self.at.kind(0) == Kind::Mark(')') { Vec::new() } else { self.operands(d)? };
        self.at.mark(')')?;
        Ok((callee, args))
    }

    fn checked_operands(&mut self, d: &mut Draft, row: &OpRow) -> Parsed<Vec<ValueId>> {
        if row.operands.is_empty() {
            return Ok(Vec::new());
        }
        let start = self.at.span().start;
        let args = self.operands(d)?;
        if row.arity().admits(args.len()) {
            return Ok(args);
        }
        let message = format!(
            "`{}` takes the operands ({}), {} given",
            row.mnemonic,
            row.operands.join(", "),
            args.len()
        );
        self.at.fail(
            Diagnostic::new(self.at.since(start), message).note(format!("it is written `{}`", row.usage())),
        )
    }

    /// `over` shows what follows from the types, for the reader; it must be right.
    fn check_summed(&mut self, d: &Draft, args: &[ValueId], result: &Type) -> Parsed<()> {
        let start = self.at.span().start;
        let shown = if self.at.eat_word("over") { self.axes(d)? } else { Vec::new() };
        let summed = d.f.summed(args, result);
        if shown == summed || !self.at.errors.is_empty() {
            return Ok(());
        }
        let names = |axes: &[AxisId]| -> String {
            axes.iter().map(|a| d.f.axis(*a).name.as_str()).collect::<Vec<_>>().join(", ")
        };
        let message = match (&shown[..], &summed[..]) {
            ([], _) => format!("by its types this sums over {}, `over` is missing", names(&summed)),
            (_, []) => format!("by its types this sums over nothing, not over {}", names(&shown)),
            _ => format!("by its types this sums over {}, not over {}", names(&summed), names(&shown)),
        };
        let span = if shown.is_empty() { self.at.span() } else { self.at.since(start) };
        let rule = "what the operands have and the result lacks is summed, and listed in order of appearance";
        self.at.fail(Diagnostic::new(span, message).note(rule))
    }

    fn attributes(&mut self, d: &Draft, row: &OpRow) -> Parsed<Op> {
        let mut attrs = Vec::with_capacity(row.attrs.len());
        let mut last = self.at.span();
        for &(keyword, kind) in row.attrs {
            if !self.at.eat_word(keyword) {
                let error = self
                    .at
                    .unexpected(&format!("`{keyword}`"))
                    .note(format!("it is written `{}`", row.usage()));
                return self.at.fail(error);
            }
            last = self.at.span();
            attrs.push(match kind {
                AttrKind::Axis => Attr::Axis(self.axis(d)?),
                AttrKind::Axes => Attr::Axes(self.axes(d)?),
                AttrKind::Int => Attr::Int(self.at.natural("a natural number", u64::MAX)?),
                AttrKind::Real => Attr::Real(self.at.real()?),
                AttrKind::Word => Attr::Word(self.at.ident("a word")?.0.to_owned()),
                AttrKind::Text => Attr::Text(self.at.string("a string in quotes")?),
            });
        }
        match Op::from_parts(row.mnemonic, &attrs) {
            Some(op) => Ok(op),
            // The kinds are right, so it is a word; only `rope` has one.
            None => {
                let words = "the pairs are `interleaved` or `halves`";
                let message = format!("unknown word in `{}`", row.mnemonic);
                self.at.fail(Diagnostic::new(last, message).note(words))
            }
        }
    }

    // --- provenance ---------------------------------------------------------------------------------

    /// `@41:9 (41) by reassociate`.
    fn provenance(&mut self, d: &Draft) -> Parsed<(Vec<Origin>, Option<String>)> {
        let origins = self.origins(d)?;
        let by = if self.at.eat_word("by") { Some(self.at.name("a pass")?.0) } else { None };
        Ok((origins, by))
    }

    /// `@41:9 (41) @"other.rs":3:5`.
    fn origins(&mut self, d: &Draft) -> Parsed<Vec<Origin>> {
        let mut origins = Vec::new();
        while self.at.eat('@') {
            let file = if self.at.kind(0) == Kind::Text {
                let file = self.at.string("a file")?;
                self.at.mark(':')?;
                file
            } else {
                d.f.source.clone()
            };
            let most = u64::from(u32::MAX);
            let line = self.at.natural("a line number", most)? as u32;
            self.at.mark(':')?;
            let col = self.at.natural("a column number", most)? as u32;
            let mut tag = None;
            if self.at.eat('(') {
                tag = Some(self.at.tag()?);
                self.at.mark(')')?;
            }
            origins.push(Origin { file, line, col, tag });
        }
        Ok(origins)
    }
}
