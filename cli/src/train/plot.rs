//! The loss over the steps, as SVG.

use std::fmt::Write;

use super::metrics::Record;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 360.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 28.0;
const BOTTOM: f64 = 40.0;

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

/// Training and validation loss of these steps.
pub(super) fn svg(records: &[Record]) -> String {
    let train = thinned(records.iter().map(|r| (r.step as f64, r.loss)).collect());
    let valid: Vec<_> = records.iter().filter_map(|r| Some((r.step as f64, r.valid_loss?))).collect();
    let losses = || train.iter().chain(&valid).map(|p| p.1);
    let (low, high) = losses().fold((f64::MAX, f64::MIN), |(a, b), y| (a.min(y), b.max(y)));
    // Something to draw on when there is nothing to draw, or all is one number.
    let (low, high) = if low > high { (0.0, 1.0) } else { (low, high.max(low + 1e-3)) };
    let margin = (high - low) * 0.05;
    let last = records.last().map_or(1.0, |r| r.step as f64).max(1.0);
    let x = Axis { numbers: (0.0, last), places: (LEFT, WIDTH - RIGHT) };
    let y = Axis { numbers: (low - margin, high + margin), places: (HEIGHT - BOTTOM, TOP) };

    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let mut put = |line: String| writeln!(out, "{line}").expect("a string has room");
    for t in x.ticks() {
        let (at, bottom) = (x.place(t), HEIGHT - BOTTOM);
        put(format!("<path d=\"M{at:.1} {TOP}V{bottom}\" stroke=\"#eee\"/>"));
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
    put(format!("<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">step</text>", HEIGHT - 8.0));
    let mut legend = LEFT;
    for (name, colour, line) in [("loss", "#4878a8", &train), ("validation", "#c0504d", &valid)] {
        if line.is_empty() {
            continue;
        }
        let points: Vec<_> =
            line.iter().map(|p| format!("{:.1},{:.1}", x.place(p.0), y.place(p.1))).collect();
        put(format!("<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\"/>", points.join(" ")));
        put(format!("<text x=\"{legend}\" y=\"18\" fill=\"{colour}\">{name}</text>"));
        legend += 60.0;
    }
    put("</svg>".to_owned());
    out
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
            loss,
            grad_norm: 1.0,
            rate: 1e-3,
            sequences: 8,
            tokens: 100,
            tokens_per_s: 10.0,
            valid_loss,
        }
    }

    #[test]
    fn lines_lie_within_their_frame() {
        let records: Vec<_> =
            (1..=1201).map(|n| record(n, 6.0 / n as f64, n.is_multiple_of(400).then_some(2.0))).collect();
        let svg = svg(&records);
        let lines: Vec<Vec<(f64, f64)>> = svg
            .split("points=\"")
            .skip(1)
            .map(|rest| {
                let points = rest.split('"').next().unwrap_or_default().split(' ');
                let number = |s: &str| s.parse::<f64>().expect("a number");
                points.map(|p| p.split_once(',').map(|(x, y)| (number(x), number(y))).expect("two")).collect()
            })
            .collect();
        assert_eq!(lines.iter().map(Vec::len).collect::<Vec<_>>(), [401, 3]);
        for (x, y) in lines.iter().flatten() {
            assert!((LEFT..=WIDTH - RIGHT).contains(x) && (TOP..=HEIGHT - BOTTOM).contains(y), "{x} {y}");
        }
        assert!(lines[0][0].1 < lines[0][400].1, "a loss that falls goes down");
    }

    #[test]
    fn there_is_a_picture_of_nothing_and_of_one_step() {
        for records in [vec![], vec![record(1, 2.0, None)]] {
            let svg = svg(&records);
            assert!(svg.ends_with("</svg>\n") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }
}
