//! What is summed, and where.
//!
//! An index that nobody keeps is summed by the product in which at least two factors use it. One that a single
//! factor uses is that factor's own affair, so that each term of a sum, and each operand of a function, has
//! its own sums. Where both a product and one inside it could sum, the author must say which.

use latentc_ir::{AxisId, Binary, DType, Op, Reduce, Unary, ValueId};

use crate::error::Diagnostic;
use crate::expr::{Expr, Index, Spot};
use crate::lower::{Lower, Lowered};
use crate::stdlib;

/// What a product is made of.
struct Factors<'e> {
    scale: f64,
    over: Vec<&'e Expr>,
    under: Vec<&'e Expr>,
}

impl Lower<'_> {
    /// A product, a quotient or both: what is shared and kept by nobody is summed, together with `bound`.
    pub(crate) fn product(&mut self, e: &Expr, kept: &[AxisId], bound: &[AxisId]) -> Lowered<ValueId> {
        let mut p = Factors { scale: 1.0, over: Vec::new(), under: Vec::new() };
        self.factors(e, &mut p)?;
        let mut summed = bound.to_vec();
        let mut uses: Vec<(AxisId, usize)> = Vec::new();
        for f in p.over.iter().chain(&p.under) {
            for a in self.free(f)? {
                match uses.iter_mut().find(|u| u.0 == a) {
                    Some(u) => u.1 += 1,
                    None => uses.push((a, 1)),
                }
            }
        }
        for (a, n) in uses {
            if n > 1 && !kept.contains(&a) && !summed.contains(&a) {
                summed.push(a);
            }
        }
        for f in &p.under {
            let free = self.free(f)?;
            if let Some(&a) = summed.iter().find(|a| free.contains(a)) {
                let axis = &self.frame.f.axis(a).name;
                let message = format!("`{axis}` is summed here, also under the fraction bar");
                let note = "name the quotient in an equation of its own, then sum it";
                return Err(Diagnostic::new(f.at(), message).note(note).into());
            }
        }
        for &a in summed.iter().filter(|a| !bound.contains(a)) {
            if let Some(at) = self.has_own_sum(e, a)? {
                let axis = &self.frame.f.axis(a).name;
                let message = format!(
                    "the sum over `{axis}` has two readings: in this product, or in the one around it"
                );
                let note = "give this product an equation of its own, or the other an axis of its own";
                return Err(Diagnostic::new(at, message).note(note).into());
            }
        }
        let inner: Vec<_> = kept.iter().chain(&summed).copied().collect();
        let over = p.over.iter().map(|f| self.value(f, &inner)).collect::<Lowered<Vec<_>>>()?;
        let mut y = match over[..] {
            [] => None,
            [x] if summed.is_empty() => Some(x),
            [x] => {
                let mut y = x;
                for &axis in &summed {
                    y = self.emit(e.at(), Op::Reduce { by: Reduce::Sum, axis }, &[y])?;
                }
                Some(y)
            }
            [first, ref rest @ ..] if summed.is_empty() => {
                let mut y = first;
                for &x in rest {
                    y = self.emit(e.at(), Op::Binary(Binary::Mul), &[y, x])?;
                }
                Some(y)
            }
            _ => Some(self.contract(e.at(), &over, &summed)?),
        };
        for f in &p.under {
            let x = match y {
                Some(y) => y,
                None => self.constant(std::mem::replace(&mut p.scale, 1.0), DType::F32),
            };
            let under = self.value(f, kept)?;
            y = Some(self.emit(f.at(), Op::Binary(Binary::Div), &[x, under])?);
        }
        match y {
            None => Ok(self.constant(p.scale, DType::F32)),
            Some(y) if p.scale == 1.0 => Ok(y),
            Some(y) if p.scale == -1.0 => self.emit(e.at(), Op::Unary(Unary::Neg), &[y]),
            Some(y) => {
                let scale = self.constant_beside(p.scale, y);
                self.emit(e.at(), Op::Binary(Binary::Mul), &[y, scale])
            }
        }
    }

    /// All factors of nested products; numbers are multiplied at once.
    fn factors<'e>(&self, e: &'e Expr, p: &mut Factors<'e>) -> Lowered<()> {
        if let Some(x) = self.number(e)? {
            p.scale *= x;
            return Ok(());
        }
        match e {
            Expr::Neg { value, .. } => {
                p.scale = -p.scale;
                self.factors(value, p)
            }
            Expr::Infix { op: Binary::Mul, left, right, .. } => {
                self.factors(left, p)?;
                self.factors(right, p)
            }
            Expr::Infix { op: Binary::Div, left, right, .. } => {
                self.factors(left, p)?;
                match self.number(right)? {
                    Some(x) => p.scale /= x,
                    None => p.under.push(right),
                }
                Ok(())
            }
            Expr::Number { .. }
            | Expr::Use { .. }
            | Expr::Not { .. }
            | Expr::Infix { .. }
            | Expr::Apply { .. } => {
                p.over.push(e);
                Ok(())
            }
        }
    }

    /// A product within a product that shares the index among its own factors: `(A[d] * x[d]) * (B[d] * x[d])` might
    /// mean one sum or two.
    fn has_own_sum(&self, e: &Expr, a: AxisId) -> Lowered<Option<Spot>> {
        let uses = |e: &Expr| self.free(e).map(|free| free.contains(&a));
        match e {
            Expr::Number { .. } | Expr::Use { .. } => Ok(None),
            Expr::Neg { value, .. } | Expr::Not { value, .. } => self.has_own_sum(value, a),
            Expr::Infix { op: Binary::Mul | Binary::Div, left, right, .. } => {
                for side in [left, right] {
                    // A product to the left may continue the one around it; to the right it stands in parentheses.
                    let grouped =
                        matches!(**side, Expr::Infix { op: Binary::Mul, .. }) && std::ptr::eq(side, right);
                    let found = if grouped { self.shared_in(side, a)? } else { self.has_own_sum(side, a)? };
                    if found.is_some() {
                        return Ok(found);
                    }
                }
                Ok(None)
            }
            Expr::Infix { left, right, .. } => Ok(self.shared_in(left, a)?.or(self.shared_in(right, a)?)),
            Expr::Apply { function, along, args, .. } => {
                let works_along = stdlib::along(self.frame, function, along)?.iter().any(|(x, _)| *x == a);
                for arg in args {
                    if !works_along
                        && uses(arg)?
                        && let Some(at) = self.shared_in(arg, a)?
                    {
                        return Ok(Some(at));
                    }
                }
                Ok(None)
            }
        }
    }

    /// Where a product in the expression shares the index among its factors.
    fn shared_in(&self, e: &Expr, a: AxisId) -> Lowered<Option<Spot>> {
        if let Expr::Infix { op: Binary::Mul | Binary::Div, at, .. } = e {
            let mut p = Factors { scale: 1.0, over: Vec::new(), under: Vec::new() };
            self.factors(e, &mut p)?;
            let mut users = 0;
            for f in p.over.iter().chain(&p.under) {
                users += usize::from(self.free(f)?.contains(&a));
            }
            if users > 1 {
                return Ok(Some(*at));
            }
        }
        if let Expr::Infix { op: Binary::Add | Binary::Sub, left, right, .. } = e {
            return Ok(self.shared_in(left, a)?.or(self.shared_in(right, a)?));
        }
        self.has_own_sum(e, a)
    }

    /// The indices that an expression is a function of, in order of appearance.
    pub(crate) fn free(&self, e: &Expr) -> Lowered<Vec<AxisId>> {
        let mut axes = Vec::new();
        let mut add = |more: Vec<AxisId>| {
            for a in more {
                if !axes.contains(&a) {
                    axes.push(a);
                }
            }
        };
        match e {
            Expr::Number { .. } => {}
            Expr::Use { indices, .. } => {
                for index in indices {
                    match index {
                        Index::Axis(letter) => add(vec![self.frame.axis(letter)?]),
                        Index::Group { parts, .. } => {
                            add(parts.iter().map(|p| self.frame.axis(p)).collect::<Lowered<_>>()?);
                        }
                        Index::Value(e) => add(self.free(e)?),
                    }
                }
            }
            Expr::Neg { value, .. } | Expr::Not { value, .. } => add(self.free(value)?),
            Expr::Infix { left, right, .. } => {
                add(self.free(left)?);
                add(self.free(right)?);
            }
            Expr::Apply { function, along, args, .. } => {
                for arg in args {
                    add(self.free(arg)?);
                }
                for (a, folded) in stdlib::along(self.frame, function, along)? {
                    if folded {
                        axes.retain(|&x| x != a);
                    } else if !axes.contains(&a) {
                        axes.push(a);
                    }
                }
            }
        }
        Ok(axes)
    }

    /// The number that an expression is, if it is one: literals, sizes of axes, and functions of them.
    pub(crate) fn number(&self, e: &Expr) -> Lowered<Option<f64>> {
        Ok(match e {
            Expr::Number { value, .. } => Some(*value),
            Expr::Use { name, indices }
                if indices.is_empty() && !self.frame.names.contains_key(&name.text) =>
            {
                match self.frame.f.axis_named(&name.text) {
                    None => None,
                    Some(a) => match self.frame.f.axis(a).size.fixed() {
                        Some(n) => Some(n as f64),
                        None => {
                            let message = format!("the size of `{}` is known at run time only", name.text);
                            return Err(Diagnostic::new(name.at, message).into());
                        }
                    },
                }
            }
            Expr::Neg { value, .. } => self.number(value)?.map(|x| -x),
            Expr::Infix { op, left, right, .. } if !op.is_comparison() && !op.is_logical() => {
                match (self.number(left)?, self.number(right)?) {
                    (Some(x), Some(y)) => Some(op.apply(x, y)),
                    _ => None,
                }
            }
            Expr::Apply { function, along, args, .. } if along.is_empty() => match &args[..] {
                [x] => stdlib::unary(&function.text).zip(self.number(x)?).map(|(u, x)| u.apply(x)),
                _ => None,
            },
            Expr::Use { .. } | Expr::Not { .. } | Expr::Infix { .. } | Expr::Apply { .. } => None,
        })
    }
}
