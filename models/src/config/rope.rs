//! Rotary position embedding: its base, and YaRN (arXiv 2309.00071) as DeepSeek-V2 uses it (section 3.1.4).
//!
//! Both ways to write it are read: `rope_theta` beside `rope_scaling`, as in the published checkpoints, and
//! `rope_parameters` with everything inside, as transformers 5 saves it.

use serde_json::{Map, Value, json};

use super::fields::Fields;

/// How positions turn queries and keys.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// Base of the frequencies, greater than 1.
    pub theta: f64,
    /// Extension to longer contexts; `None` is plain RoPE.
    pub yarn: Option<Yarn>,
}

/// YaRN: slow frequencies are divided by `factor`, fast ones kept, those between blended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yarn {
    /// Extended over original context length, at least 1.
    pub factor: f64,
    /// Context length, in tokens, that the model was first trained on.
    pub original_max_position_embeddings: usize,
    /// A dimension that turns more often than this within the original context is kept as it is.
    pub beta_fast: f64,
    /// A dimension that turns less often than this within the original context is divided by `factor`.
    pub beta_slow: f64,
    /// Numerator of the multiplier of cos and sin; `None` where the file does not say.
    pub mscale: Option<f64>,
    /// Denominator of that multiplier, and the growth of the attention scale; `None` where the file does not say.
    pub mscale_all_dim: Option<f64>,
}

/// `0.1 · mscale · ln(factor) + 1`, and 1 where the context is not extended.
pub fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

impl Rope {
    /// Angle per position of each of the `dim / 2` pairs, in radians per token.
    ///
    /// Pair `i` turns by `theta^(-2i/dim)`, divided by `factor` as far as YaRN's ramp says. The ramp's ends
    /// are rounded outwards to whole pairs, as in DeepSeek's code and in transformers; the frequencies hold at
    /// every position, also before the original length.
    pub fn inv_freq(&self, dim: usize) -> Vec<f64> {
        let plain = |pair: usize| self.theta.powf(-((2 * pair) as f64) / dim as f64);
        let Some(yarn) = self.yarn else { return (0..dim / 2).map(plain).collect() };

        // The (fractional) pair that turns `rotations` times within the original context.
        let pair_that_turns = |rotations: f64| {
            let original = yarn.original_max_position_embeddings as f64;
            let turns_per_radian = rotations * 2.0 * std::f64::consts::PI;
            dim as f64 * (original / turns_per_radian).ln() / (2.0 * self.theta.ln())
        };
        let low = pair_that_turns(yarn.beta_fast).floor().max(0.0);
        let mut high = pair_that_turns(yarn.beta_slow).ceil().min(dim as f64 - 1.0);
        if low == high {
            high += 0.001;
        }
        (0..dim / 2)
            .map(|pair| {
                let divided = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                plain(pair) * (1.0 - divided) + plain(pair) / yarn.factor * divided
            })
            .collect()
    }

    /// What the attention scale `1/sqrt(head)` is multiplied by: `m²` with `m = 0.1·mscale_all_dim·ln(factor) + 1`.
    ///
    /// It is 1 without YaRN, and where `mscale_all_dim` is not given or 0.
    pub fn attention_scale_factor(&self) -> f64 {
        let m = self.yarn.and_then(|y| y.mscale_all_dim.map(|all| yarn_mscale(y.factor, all)));
        m.map_or(1.0, |m| m * m)
    }

    /// What cos and sin are multiplied by.
    ///
    /// With `mscale` and `mscale_all_dim` both given and not 0 it is the ratio of their [`yarn_mscale`]s; it
    /// is `yarn_mscale(factor, 1)` otherwise. That is transformers' rule. DeepSeek's code differs where only
    /// one of the two is given; no published DeepSeek-V2 does that.
    pub fn cos_sin_scale(&self) -> f64 {
        let Some(yarn) = self.yarn else { return 1.0 };
        let given = |m: Option<f64>| m.filter(|m| *m != 0.0);
        match (given(yarn.mscale), given(yarn.mscale_all_dim)) {
            (Some(m), Some(all)) => yarn_mscale(yarn.factor, m) / yarn_mscale(yarn.factor, all),
            _ => yarn_mscale(yarn.factor, 1.0),
        }
    }

    /// Reads either form. Where a file holds both, they must agree.
    pub(super) fn read(fields: &mut Fields<'_>) -> Rope {
        let mut theta = fields.number("rope_theta", 1.0);
        let mut scaling = None;
        for key in ["rope_scaling", "rope_parameters"] {
            let Some(mut inner) = fields.object(key) else { continue };
            let yarn = Yarn::read(&mut inner);
            let inner_theta = inner.number("rope_theta", 1.0);
            fields.absorb(inner);
            if let (Some(outer), Some(found)) = (theta, inner_theta) {
                fields.check(&["rope_theta"], outer == found, || {
                    format!("is {outer} here and {found} in {key}; remove one of them")
                });
            }
            theta = theta.or(inner_theta);
            if let Some((first, before)) = scaling.replace((key, yarn)) {
                fields.check(&[key, first], before == yarn, || {
                    format!("states another scaling than {first}; remove one of them")
                });
            }
        }
        Rope { theta: theta.unwrap_or(10000.0), yarn: scaling.and_then(|(_, yarn)| yarn) }
    }

    /// Writes the published form.
    pub(super) fn write(&self, map: &mut Map<String, Value>) {
        map.remove("rope_parameters");
        map.insert("rope_theta".into(), json!(self.theta));
        map.insert("rope_scaling".into(), self.yarn.map_or(Value::Null, |y| y.to_json()));
    }
}

impl Yarn {
    /// `None` for the types that mean no scaling.
    fn read(fields: &mut Fields<'_>) -> Option<Yarn> {
        // `type` is the older name; transformers 5 writes both.
        let (new, old) = (fields.word("rope_type"), fields.word("type"));
        if let (Some(new), Some(old)) = (new, old) {
            fields.check(&["rope_type", "type"], new == old, || {
                format!("is \"{new}\", but `type` is \"{old}\"; remove one of them")
            });
        }
        fields.supports_only("partial_rotary_factor", &json!(1.0));
        match new.or(old) {
            None | Some("default" | "null") => None,
            Some("yarn") => {
                fields.supports_only("attention_factor", &Value::Null);
                fields.supports_only("truncate", &Value::Bool(true));
                let yarn = Yarn {
                    factor: fields.required_number("factor", 0.0),
                    original_max_position_embeddings: fields.size("original_max_position_embeddings"),
                    beta_fast: fields.number("beta_fast", 0.0).unwrap_or(32.0),
                    beta_slow: fields.number("beta_slow", 0.0).unwrap_or(1.0),
                    mscale: fields.factor("mscale"),
                    mscale_all_dim: fields.factor("mscale_all_dim"),
                };
                fields.check(&["factor"], yarn.factor >= 1.0, || {
                    format!("is {}, but yarn can only lengthen a context: write 1 or more", yarn.factor)
                });
                fields.check(&["beta_fast", "beta_slow"], yarn.beta_fast >= yarn.beta_slow, || {
                    format!("is {}, less than beta_slow, {}; swap the two", yarn.beta_fast, yarn.beta_slow)
                });
                Some(yarn)
            }
            Some(other) => {
                let key = if new.is_some() { "rope_type" } else { "type" };
                fields.note(key, format!("not supported: is \"{other}\", only \"yarn\" and \"default\" are"));
                None
            }
        }
    }

    fn to_json(self) -> Value {
        let mut out = json!({
            "type": "yarn",
            "factor": self.factor,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            "original_max_position_embeddings": self.original_max_position_embeddings,
        });
        for (key, value) in [("mscale", self.mscale), ("mscale_all_dim", self.mscale_all_dim)] {
            if let Some(value) = value {
                out[key] = json!(value);
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn published() -> Rope {
        let yarn = Yarn {
            factor: 40.0,
            original_max_position_embeddings: 4096,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: Some(0.707),
            mscale_all_dim: Some(0.707),
        };
        Rope { theta: 10000.0, yarn: Some(yarn) }
    }

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() <= 1e-12 * b.abs(), "{a} is not {b}");
    }

    /// Without scaling, `10000^(-2i/8)` is 1, 0.1, 0.01, 0.001.
    #[test]
    fn plain_frequencies_are_powers_of_the_base() {
        let rope = Rope { theta: 10000.0, yarn: None };
        for (found, expected) in rope.inv_freq(8).into_iter().zip([1.0, 0.1, 0.01, 0.001]) {
            close(found, expected);
        }
        assert_eq!((rope.attention_scale_factor(), rope.cos_sin_scale()), (1.0, 1.0));
    }

    /// By hand for 64 dimensions: 64·ln(4096/(32·2π))/(2·ln 10000) = 10.472 rounds down to 10, and
    /// 64·ln(4096/2π)/(2·ln 10000) = 22.513 rounds up to 23. Pairs up to 10 are kept, from 23 divided by 40.
    #[test]
    fn yarn_keeps_the_fast_and_divides_the_slow() {
        let found = published().inv_freq(64);
        let plain = Rope { theta: 10000.0, yarn: None }.inv_freq(64);
        for pair in 0..=10 {
            close(found[pair], plain[pair]);
        }
        for pair in 23..32 {
            close(found[pair], plain[pair] / 40.0);
        }
        // Pair 11 is 1/13 of the way: 12/13 of its frequency and 1/13 of a fortieth of it.
        close(found[11], plain[11] * (12.0 / 13.0 + 1.0 / 13.0 / 40.0));
        assert!(found.windows(2).all(|w| w[0] > w[1]));
    }

    /// A context so short that both ends fall on pair 0: a step, not a division by zero.
    #[test]
    fn the_ramp_never_has_length_zero() {
        let mut rope = published();
        if let Some(yarn) = &mut rope.yarn {
            yarn.original_max_position_embeddings = 6;
        }
        let found = rope.inv_freq(4);
        close(found[0], 1.0);
        close(found[1], 0.01 / 40.0);
    }

    /// 0.1 · 0.707 · ln 40 + 1 = 1.26080…, squared 1.58962…
    #[test]
    fn attention_grows_by_the_square_of_mscale() {
        let m: f64 = 1.260803777406; // 0.0707 · 3.688879454114 + 1, to twelve places
        assert!((published().attention_scale_factor() - m * m).abs() < 1e-9);
        close(published().cos_sin_scale(), 1.0);
    }

    #[test]
    fn one_of_the_two_mscales_alone_counts_for_cos_and_sin_as_none() {
        let alone = 0.1 * 40f64.ln() + 1.0;
        for (mscale, all) in
            [(None, None), (Some(0.707), None), (None, Some(0.707)), (Some(0.0), Some(0.707))]
        {
            let mut rope = published();
            if let Some(yarn) = &mut rope.yarn {
                (yarn.mscale, yarn.mscale_all_dim) = (mscale, all);
            }
            close(rope.cos_sin_scale(), alone);
            assert_eq!(rope.attention_scale_factor() == 1.0, all.is_none());
        }
        let mut rope = published();
        if let Some(yarn) = &mut rope.yarn {
            yarn.mscale = Some(1.0);
        }
        close(rope.cos_sin_scale(), alone / (0.0707 * 40f64.ln() + 1.0));
    }
}
