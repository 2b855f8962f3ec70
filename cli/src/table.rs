//! Columns of text, and numbers for people.

use std::fmt::Write;

use latentc_runtime::train::budget::Budget;

/// Rows of equally many cells as lines. The first `left` columns are aligned to the left, the others to the right.
pub(crate) fn table(rows: &[Vec<String>], left: usize) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |n: usize| rows.iter().filter_map(|r| r.get(n)).map(|c| c.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for row in rows {
        let cell = |(n, (cell, w)): (usize, (&String, &usize))| {
            if n < left { format!("{cell:w$}") } else { format!("{cell:>w$}") }
        };
        let cells: Vec<_> = row.iter().zip(&widths).enumerate().map(cell).collect();
        let _ = writeln!(out, "{}", cells.join("  ").trim_end());
    }
    out
}

/// 21385000000 as `21,385,000,000`.
pub(crate) fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A size or `least`.
pub(crate) fn parse_budget(text: &str) -> Result<Budget, String> {
    if text.trim() == "least" {
        return Ok(Budget::Least);
    }
    parse_size(text).map(Budget::Bytes).map_err(|why| format!("{why}, or `least`"))
}

/// `20GiB`, `512 MiB`, `1.5GB` or a number of bytes.
fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let at = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let units = [
        ("", 1u64),
        ("B", 1),
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
    ];
    let unit = unit.trim();
    let bytes = units.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).map(|(_, bytes)| *bytes);
    match (number.parse::<f64>(), bytes) {
        (Ok(n), Some(bytes)) if n.is_finite() && n > 0.0 => Ok((n * bytes as f64) as u64),
        _ => Err("give a size such as 20GiB, 512MiB or a number of bytes".to_owned()),
    }
}

/// 21385000000 as `21.4B`.
pub(crate) fn short(n: u64) -> String {
    let x = n as f64;
    match n {
        0..1_000 => n.to_string(),
        1_000..1_000_000 => format!("{:.1}K", x / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1}M", x / 1e6),
        1_000_000_000.. => format!("{:.1}B", x / 1e9),
    }
}
