//! Frequencies of the rotary embedding, as `transformers.modeling_rope_utils` defines them.

use std::f64::consts::PI;
use std::sync::Arc;

use fused_ops::Rotary;

/// One rotary embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// How frequencies are found.
    pub kind: RopeKind,
    /// Base of the angles.
    pub theta: f64,
    /// Features of a head that are rotated; even.
    pub dim: usize,
    /// Factor of cosines and sines.
    pub attention_factor: f32,
}

/// How frequencies are found.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeKind {
    /// `theta^(-2i/dim)`.
    Default,
    /// Those divided by a factor.
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// NTK: a larger base for sequences longer than the model was made for.
    Dynamic {
        /// Stretch.
        factor: f64,
        /// Length from which the base grows.
        positions: usize,
    },
    /// YaRN (arXiv 2309.00071): interpolated below, extrapolated above a ramp.
    Yarn {
        /// Stretch.
        factor: f64,
        /// Start and end of the ramp, in pairs of features.
        ramp: [f64; 2],
    },
    /// Llama 3: long waves stretched, short ones kept.
    Llama3 {
        /// Stretch.
        factor: f64,
        /// Waves longer than `original / low` are stretched.
        low: f64,
        /// Waves shorter than `original / high` are kept.
        high: f64,
        /// Length the model was pretrained with.
        original: f64,
    },
    /// LongRoPE: a divisor for each frequency, another one beyond the original length.
    LongRope {
        /// Divisors up to the original length.
        short: Vec<f32>,
        /// Divisors beyond it.
        long: Vec<f32>,
        /// Length the model was pretrained with.
        original: usize,
    },
}

/// Ends of YaRN's ramp for wavelengths of `fast` and `slow` rotations over `original` positions.
pub fn yarn_ramp(fast: f64, slow: f64, dim: usize, theta: f64, original: f64, truncate: bool) -> [f64; 2] {
    let at = |rotations: f64| dim as f64 * (original / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln());
    let (low, high) = (at(fast), at(slow));
    let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
    [low.max(0.0), high.min(dim as f64 - 1.0)]
}

impl Rope {
    /// How much longer than in training sequences may be, as far as the settings tell.
    pub fn stretch(&self) -> f64 {
        match self.kind {
            RopeKind::Linear { factor }
            | RopeKind::Dynamic { factor, .. }
            | RopeKind::Yarn { factor, .. } => factor,
            RopeKind::Default | RopeKind::Llama3 { .. } | RopeKind::LongRope { .. } => 1.0,
        }
    }

    /// Frequencies depend on the length of the sequence.
    pub fn depends_on_length(&self) -> bool {
        matches!(self.kind, RopeKind::Dynamic { .. } | RopeKind::LongRope { .. })
    }

    /// Length up to which a sequence has other frequencies than beyond: all of its keys are others then.
    pub fn switches_after(&self) -> Option<usize> {
        match self.kind {
            RopeKind::LongRope { original, .. } => Some(original),
            _ => None,
        }
    }

    /// Angles per position, for a row whose longest sequence has `length` tokens. In `f32`, as transformers
    /// computes them.
    fn frequencies(&self, length: usize) -> Vec<f32> {
        let plain = |theta: f64| -> Vec<f32> {
            let power = |i: usize| (theta as f32).powf((2 * i) as f32 / self.dim as f32);
            (0..self.dim / 2).map(|i| 1.0 / power(i)).collect()
        };
        match &self.kind {
            RopeKind::Default => plain(self.theta),
            RopeKind::Linear { factor } => {
                plain(self.theta).into_iter().map(|f| f / *factor as f32).collect()
            }
            RopeKind::Dynamic { factor, positions } => {
                let length = length.max(*positions) as f64;
                let dim = self.dim as f64;
                let growth = (factor * length / *positions as f64 - (factor - 1.0)).powf(dim / (dim - 2.0));
                plain(self.theta * growth)
            }
            RopeKind::Yarn { factor, ramp: [low, high] } => {
                let high = if low == high { high + 0.001 } else { *high };
                let blend = |(i, f): (usize, f32)| {
                    let stretched = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0) as f32;
                    f / *factor as f32 * stretched + f * (1.0 - stretched)
                };
                plain(self.theta).into_iter().enumerate().map(blend).collect()
            }
            RopeKind::Llama3 { factor, low, high, original } => {
                let stretch = |f: f32| {
                    let wave = 2.0 * PI / f64::from(f);
                    if wave > original / low {
                        f / *factor as f32
                    } else if wave < original / high {
                        f
                    } else {
                        let smooth = ((original / wave - low) / (high - low)) as f32;
                        (1.0 - smooth) * f / *factor as f32 + smooth * f
                    }
                };
                plain(self.theta).into_iter().map(stretch).collect()
            }
            RopeKind::LongRope { short, long, original } => {
                let divisors = if length > *original { long } else { short };
                plain(self.theta).into_iter().zip(divisors).map(|(f, divisor)| f / divisor).collect()
            }
        }
    }

    /// Cosines and sines of the given positions for heads of `dim` features. Frequencies that depend on the length
    /// are those of a sequence up to the last of its positions, never of what is batched with it: the sequences have
    /// `lengths` tokens here, or are the packed rows that begin at position 0.
    pub fn table(&self, positions: &[u32], dim: usize, lengths: Option<&[usize]>) -> Rotary {
        if !self.depends_on_length() {
            return self.rows(positions, dim, &[positions.len()]);
        }
        let rows = || positions.chunk_by(|_, &next| next != 0).map(<[u32]>::len).collect();
        let lengths = lengths.map_or_else(rows, <[usize]>::to_vec);
        self.rows(positions, dim, &lengths)
    }

    fn rows(&self, positions: &[u32], dim: usize, lengths: &[usize]) -> Rotary {
        let (mut cos, mut sin): (Vec<f32>, Vec<f32>) = (Vec::new(), Vec::new());
        let mut at = 0;
        for &len in lengths {
            let row = &positions[at..at + len];
            let length = row.iter().max().map_or(0, |&last| last as usize + 1);
            let frequencies = self.frequencies(length);
            // Most positions of a batch stand in several of its rows; a single token is in none but its own.
            let mut known = vec![None; if len > 1 { length } else { 0 }];
            for &position in row {
                if let Some(&Some(from)) = known.get(position as usize) {
                    let to = from + frequencies.len();
                    cos.extend_from_within(from..to);
                    sin.extend_from_within(from..to);
                    continue;
                }
                if let Some(place) = known.get_mut(position as usize) {
                    *place = Some(cos.len());
                }
                for frequency in &frequencies {
                    let angle = position as f32 * frequency;
                    cos.push(angle.cos() * self.attention_factor);
                    sin.push(angle.sin() * self.attention_factor);
                }
            }
            at += len;
        }
        Rotary { cos: Arc::from(cos), sin: Arc::from(sin), half: self.dim / 2, dim }
    }
}
