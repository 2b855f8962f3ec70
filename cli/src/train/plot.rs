//! The loss over the steps, and how evenly experts were used, as SVG.

use std::fmt::Write;

use super::balance::Balance;
use super::metrics::Record;

const WIDTH: f64 = 720.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 28.0;
const BOTTOM: f64 = 40.0;

/// Heights of the panels, with names above and numbers below.
const LOSS: f64 = 360.0;
const LOAD: f64 = 240.0;

/// A line has so many points at most: each is the mean of its steps.
const POINTS: usize = 500;

/// An axis: the numbers at its ends, and the places of those.
struct Axis {
    numbers: (f64, f64),
    places: (f64, f64),
}

impl Axis {
    fn place(&self, x: f64) -> f64 {
        let ((a, b), (from, to)) = (self.numbers, self.places);
        from + (x - a) / (b - a) * (to - from)
    }

    /// Round numbers of the axis: steps of 1, 2 or 5 times a power of ten, a handful of them.
    fn ticks(&self) -> Vec<f64> {
        let (a, b) = self.numbers;
        let rough = (b - a) / 6.0;
        let ten = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|k| k * ten).into_iter().find(|&s| s >= rough).unwrap_or(ten);
        let (first, last) = ((a / step).ceil() as i64, (b / step).floor() as i64);
        (first..=last).map(|k| k as f64 * step).collect()
    }
}

/// A line: what it is, its colour, its points.
type Line = (&'static str, &'static str, Vec<(f64, f64)>);

/// Training and validation loss of these steps; below, where there are experts, how much more than the mean the busiest has to do.
pub(super) fn svg(records: &[Record]) -> String {
    let all = |of: &dyn Fn(&Record) -> Option<f64>| {
        records.iter().filter_map(|r| Some((r.step as f64, of(r)?))).collect::<Vec<_>>()
    };
    let loss = vec![
        ("loss", "#4878a8", thinned(all(&|r| Some(r.loss)))),
        ("validation", "#c0504d", all(&|r| r.valid_loss)),
    ];
    let of_load =
        |of: fn(&Balance) -> f64| thinned(all(&|r: &Record| r.balance.as_ref().map(|b| 1.0 + of(b))));
    let load = vec![
        ("busiest expert over mean, worst layer", "#b8860b", of_load(|b| b.max_violation)),
        ("mean of layers", "#5b8c5a", of_load(|b| b.mean_violation)),
    ];
    let mut panels = vec![(LOSS, loss)];
    if !load[0].2.is_empty() {
        panels.push((LOAD, load));
    }
    let height: f64 = panels.iter().map(|(height, _)| height).sum();
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let last = records.last().map_or(1.0, |r| r.step as f64).max(1.0);
    let mut above = 0.0;
    for (height, lines) in &panels {
        panel(&mut out, last, (above, above + height), lines);
        above += height;
    }
    out.push_str("</svg>\n");
    out
}

/// Draws lines over the steps up to `last` into the part of the picture between two heights.
fn panel(out: &mut String, last: f64, (above, below): (f64, f64), lines: &[Line]) {
    let heights = || lines.iter().flat_map(|(.., points)| points).map(|p| p.1);
    let (low, high) = heights().fold((f64::MAX, f64::MIN), |(a, b), y| (a.min(y), b.max(y)));
    // Something to draw on when there is nothing to draw, or all is one number.
    let (low, high) = if low > high { (0.0, 1.0) } else { (low, high.max(low + 1e-3)) };
    let margin = (high - low) * 0.05;
    let (top, bottom) = (above + TOP, below - BOTTOM);
    let x = Axis { numbers: (0.0, last), places: (LEFT, WIDTH - RIGHT) };
    let y = Axis { numbers: (low - margin, high + margin), places: (bottom, top) };

    let mut put = |line: String| writeln!(out, "{line}").expect("a string has room");
    for t in x.ticks() {
        let at = x.place(t);
        put(format!("<path d=\"M{at:.1} {top}V{bottom}\" stroke=\"#eee\"/>"));
        put(format!("<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{t}</text>", bottom + 16.0));
    }
    for t in y.ticks() {
        let (at, right) = (y.place(t), WIDTH - RIGHT);
        put(format!("<path d=\"M{LEFT} {at:.1}H{right}\" stroke=\"#eee\"/>"));
        let label = format!("{t:.3}");
        let label = label.trim_end_matches('0').trim_end_matches('.');
        put(format!("<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>", LEFT - 6.0, at + 4.0));
    }
    let middle = (LEFT + WIDTH - RIGHT) / 2.0;
    put(format!("<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">step</text>", below - 8.0));
    let mut legend = LEFT;
    for (name, colour, line) in lines.iter().filter(|(.., line)| !line.is_empty()) {
        let points: Vec<_> =
            line.iter().map(|p| format!("{:.1},{:.1}", x.place(p.0), y.place(p.1))).collect();
        put(format!("<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\"/>", points.join(" ")));
        put(format!("<text x=\"{legend}\" y=\"{}\" fill=\"{colour}\">{name}</text>", above + 18.0));
        legend += 24.0 + 7.0 * name.len() as f64;
    }
}

/// Means of neighbours, so that there are few enough points.
fn thinned(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    let each = points.len().div_ceil(POINTS).max(1);
    let mean = |part: &[(f64, f64)], of: fn(&(f64, f64)) -> f64| {
        part.iter().map(of).sum::<f64>() / part.len() as f64
    };
    points.chunks(each).map(|part| (mean(part, |p| p.0), mean(part, |p| p.1))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: u64, loss: f64, valid_loss: Option<f64>) -> Record {
        Record {
            step,
            objective: loss,
            loss,
            balance: None,
            grad_norm: 1.0,
            rate: 1e-3,
            sequences: 8,
            tokens: 100,
            tokens_per_s: 10.0,
            valid_loss,
        }
    }

    #[test]
    fn lines_lie_within_their_frames() {
        let mut records: Vec<_> =
            (1..=1201).map(|n| record(n, 6.0 / n as f64, n.is_multiple_of(400).then_some(2.0))).collect();
        let lines = |records: &[Record]| -> Vec<Vec<(f64, f64)>> {
            let number = |s: &str| s.parse::<f64>().expect("a number");
            let pair = |p: &str| p.split_once(',').map(|(x, y)| (number(x), number(y))).expect("two");
            let points =
                |rest: &str| rest.split('"').next().unwrap_or_default().split(' ').map(pair).collect();
            svg(records).split("points=\"").skip(1).map(points).collect()
        };
        let within = |line: &[(f64, f64)], top: f64, bottom: f64| {
            for (x, y) in line {
                assert!((LEFT..=WIDTH - RIGHT).contains(x) && (top..=bottom).contains(y), "{x} {y}");
            }
        };
        let drawn = lines(&records);
        assert_eq!(drawn.iter().map(Vec::len).collect::<Vec<_>>(), [401, 3]);
        drawn.iter().for_each(|line| within(line, TOP, LOSS - BOTTOM));
        assert!(drawn[0][0].1 < drawn[0][400].1, "a loss that falls goes down");

        // Experts have a panel of their own, below.
        for r in &mut records {
            r.balance = Some(Balance::of_violations(vec![3.0 / r.step as f64, 0.1]));
        }
        let drawn = lines(&records);
        assert_eq!(drawn.iter().map(Vec::len).collect::<Vec<_>>(), [401, 3, 401, 401]);
        drawn[..2].iter().for_each(|line| within(line, TOP, LOSS - BOTTOM));
        drawn[2..].iter().for_each(|line| within(line, LOSS + TOP, LOSS + LOAD - BOTTOM));
        assert!(drawn[2].iter().zip(&drawn[3]).all(|(worst, mean)| worst.1 <= mean.1));
    }

    #[test]
    fn there_is_a_picture_of_nothing_and_of_one_step() {
        for records in [vec![], vec![record(1, 2.0, None)]] {
            let svg = svg(&records);
            assert!(svg.ends_with("</svg>\n") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }
}
