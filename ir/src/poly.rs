//! Polynomials over run-time sizes, with exact integer coefficients: how costs depend on `b`, `t` and `s`.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Add, AddAssign, Mul};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::types::Size;

/// A sum of products of symbols. Coefficients are i128 and saturate; no model comes near.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Poly {
    /// The coefficient of each product, none of them 0.
    terms: BTreeMap<Powers, i128>,
}

/// The power of each symbol in a product, none of them 0.
type Powers = BTreeMap<String, u32>;

impl Poly {
    /// A number.
    pub fn constant(n: i128) -> Poly {
        let mut p = Poly::default();
        p.add_term(Powers::new(), n);
        p
    }

    /// A symbol.
    pub fn symbol(name: &str) -> Poly {
        Poly { terms: BTreeMap::from([(BTreeMap::from([(name.to_owned(), 1)]), 1)]) }
    }

    /// Whether it is 0 at all sizes.
    pub fn is_zero(&self) -> bool {
        self.terms.is_empty()
    }

    /// The number, if no symbol is in it.
    pub fn as_constant(&self) -> Option<i128> {
        match self.terms.first_key_value() {
            None => Some(0),
            Some((powers, n)) if powers.is_empty() && self.terms.len() == 1 => Some(*n),
            Some(_) => None,
        }
    }

    /// The symbols in it, sorted.
    pub fn symbols(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.terms.keys().flat_map(|p| p.keys().map(String::as_str)).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// Its value at these sizes.
    ///
    /// # Errors
    /// The name of a symbol without a size.
    pub fn eval(&self, sizes: &BTreeMap<String, u64>) -> Result<i128, String> {
        let bound = self.bind(sizes);
        bound.as_constant().ok_or_else(|| {
            format!("nothing binds the size `{}` of {self}", bound.symbols().first().unwrap_or(&""))
        })
    }

    /// The same polynomial with some symbols replaced by sizes.
    #[must_use]
    pub fn bind(&self, sizes: &BTreeMap<String, u64>) -> Poly {
        let mut bound = Poly::default();
        for (powers, n) in &self.terms {
            let mut left = powers.clone();
            let mut n = *n;
            left.retain(|symbol, power| match sizes.get(symbol) {
                Some(&size) => {
                    n = n.saturating_mul(i128::from(size).saturating_pow(*power));
                    false
                }
                None => true,
            });
            bound.add_term(left, n);
        }
        bound
    }

    fn add_term(&mut self, powers: Powers, n: i128) {
        let sum = self.terms.get(&powers).copied().unwrap_or(0).saturating_add(n);
        if sum == 0 {
            self.terms.remove(&powers);
        } else {
            self.terms.insert(powers, sum);
        }
    }
}

/// Multiplies a product by a power of a symbol.
fn raise(powers: &mut Powers, symbol: &str, power: u32) {
    *powers.entry(symbol.to_owned()).or_default() += power;
}

impl From<&Size> for Poly {
    fn from(size: &Size) -> Poly {
        match size {
            Size::Fixed(n) => Poly::constant(i128::from(*n)),
            Size::Sym(s) => Poly::symbol(s),
        }
    }
}

impl AddAssign<&Poly> for Poly {
    fn add_assign(&mut self, other: &Poly) {
        for (powers, n) in &other.terms {
            self.add_term(powers.clone(), *n);
        }
    }
}

impl Add<&Poly> for &Poly {
    type Output = Poly;
    fn add(self, other: &Poly) -> Poly {
        let mut sum = self.clone();
        sum += other;
        sum
    }
}

impl Mul<&Poly> for &Poly {
    type Output = Poly;
    fn mul(self, other: &Poly) -> Poly {
        let mut product = Poly::default();
        for (p, m) in &self.terms {
            for (q, n) in &other.terms {
                let mut powers = p.clone();
                q.iter().for_each(|(symbol, power)| raise(&mut powers, symbol, *power));
                product.add_term(powers, m.saturating_mul(*n));
            }
        }
        product
    }
}

impl Mul<i128> for &Poly {
    type Output = Poly;
    fn mul(self, n: i128) -> Poly {
        self * &Poly::constant(n)
    }
}

impl fmt::Display for Poly {
    /// `15728640 b t + 2 t^2 + 3`: higher degrees first, then by name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_zero() {
            return f.write_str("0");
        }
        let mut terms: Vec<_> = self.terms.iter().collect();
        terms.sort_by_key(|(powers, _)| std::cmp::Reverse(powers.values().sum::<u32>()));
        for (at, (powers, &n)) in terms.into_iter().enumerate() {
            match (at, n < 0) {
                (0, false) => {}
                (0, true) => f.write_str("-")?,
                (_, false) => f.write_str(" + ")?,
                (_, true) => f.write_str(" - ")?,
            }
            let mut words = Vec::new();
            if n.unsigned_abs() != 1 || powers.is_empty() {
                words.push(n.unsigned_abs().to_string());
            }
            for (symbol, &power) in powers {
                words.push(if power == 1 { symbol.clone() } else { format!("{symbol}^{power}") });
            }
            f.write_str(&words.join(" "))?;
        }
        Ok(())
    }
}

impl FromStr for Poly {
    type Err = String;

    /// Reads what `Display` writes.
    fn from_str(text: &str) -> Result<Poly, String> {
        let mut poly = Poly::default();
        let mut term: Option<(Powers, i128)> = None;
        let mut sign = 1;
        for word in text.split_whitespace() {
            if word == "+" || word == "-" {
                let (powers, n) =
                    term.take().ok_or_else(|| format!("`{word}` follows no term in `{text}`"))?;
                poly.add_term(powers, n);
                sign = if word == "-" { -1 } else { 1 };
                continue;
            }
            let (minus, word) = word.strip_prefix('-').map_or((1, word), |rest| (-1, rest));
            let (powers, n) = term.get_or_insert((Powers::new(), sign));
            *n *= minus;
            if word.starts_with(|c: char| c.is_ascii_digit()) {
                let factor: i128 = word.parse().map_err(|_| format!("`{word}` in `{text}` is no number"))?;
                *n = n.saturating_mul(factor);
                continue;
            }
            let (symbol, power) = word.split_once('^').unwrap_or((word, "1"));
            let power: u32 = power.parse().map_err(|_| format!("`{word}` in `{text}` is no power"))?;
            raise(powers, symbol, power);
        }
        let (powers, n) = term.ok_or_else(|| format!("`{text}` ends without a term"))?;
        poly.add_term(powers, n);
        Ok(poly)
    }
}

impl Serialize for Poly {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Poly {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Poly, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_and_text() {
        let (b, t) = (Poly::symbol("b"), Poly::symbol("t"));
        let p = &(&(&b * &t) * 15_728_640) + &(&(&t * &t) * -2);
        let p = &p + &Poly::constant(3);
        assert_eq!(p.to_string(), "15728640 b t - 2 t^2 + 3");
        assert_eq!(p.to_string().parse::<Poly>().unwrap(), p);
        let json = serde_json::to_string(&p).unwrap();
        assert_eq!(serde_json::from_str::<Poly>(&json).unwrap(), p);

        let sizes = BTreeMap::from([("t".to_owned(), 10)]);
        assert_eq!(p.bind(&sizes).to_string(), "157286400 b - 197");
        assert_eq!(p.eval(&sizes).unwrap_err(), "nothing binds the size `b` of 15728640 b t - 2 t^2 + 3");
        let sizes = BTreeMap::from([("t".to_owned(), 10), ("b".to_owned(), 2)]);
        assert_eq!(p.eval(&sizes).unwrap(), 314_572_603);

        assert_eq!(&b + &(&b * -1), Poly::default());
        assert_eq!((&b * -1).to_string(), "-b");
        assert_eq!((&b * -1).to_string().parse::<Poly>().unwrap(), &b * -1);
        assert_eq!(Poly::default().to_string().parse::<Poly>().unwrap(), Poly::default());
        for bad in ["", "+ 1", "b +", "t^x"] {
            assert!(bad.parse::<Poly>().is_err(), "{bad}");
        }
    }
}
