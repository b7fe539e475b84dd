//! Learning-rate schedules (`transformers.optimization`).

use std::f64::consts::PI;

use clap::ValueEnum;
use serde::Serialize;
use serde_json::{Map, Value};

/// Shapes, with transformers' names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Scheduler {
    /// Straight down to 0.
    Linear,
    /// Half a cosine down to 0 (`num_cycles`).
    Cosine,
    /// Half a cosine down to `min_lr`, or to `min_lr_rate` of the peak (`num_cycles`).
    CosineWithMinLr,
    /// No change.
    Constant,
    /// Warm-up, then no change.
    ConstantWithWarmup,
    /// Down to `lr_end` (1e-7) by a `power` (1).
    Polynomial,
    /// With the inverse square root of the step (`timescale`).
    InverseSqrt,
}

/// A shape with its settings.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Straight down to 0.
    Linear,
    /// Cosine down to a share of the peak.
    Cosine {
        /// Cycles of the cosine; one half ends at the bottom.
        num_cycles: f64,
        /// Lowest share of the peak.
        min_lr_rate: f64,
    },
    /// No change, without warm-up.
    Constant,
    /// No change after the warm-up.
    ConstantWithWarmup,
    /// `(1 - progress)^power`, from the peak down to a share of it.
    Polynomial {
        /// Last share of the peak.
        end_rate: f64,
        /// Exponent.
        power: f64,
    },
    /// `1/sqrt` of the step in units of a time scale.
    InverseSqrt {
        /// Steps; the warm-up, or 10,000 without one, where not given.
        timescale: Option<f64>,
    },
}

impl Schedule {
    /// Of a shape, `--lr-scheduler-kwargs` (a JSON object) and the peak learning rate.
    pub fn new(kind: Scheduler, kwargs: Option<&str>, peak: f64) -> Result<Self, String> {
        let mut given: Map<String, Value> = match kwargs {
            None => Map::new(),
            Some(text) => serde_json::from_str(text)
                .map_err(|e| format!("--lr-scheduler-kwargs is not a JSON object: {e}"))?,
        };
        let mut take = |name: &str| match given.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value
                .as_f64()
                .or_else(|| value.as_str()?.parse().ok())
                .filter(|number| number.is_finite() && *number >= 0.0)
                .map(Some)
                .ok_or_else(|| {
                    format!("--lr-scheduler-kwargs: {name} is {value}, expected a number of 0 or more")
                }),
        };
        let share = |value: f64| if peak > 0.0 { value / peak } else { 0.0 };
        let schedule = match kind {
            Scheduler::Linear => Self::Linear,
            Scheduler::Constant => Self::Constant,
            Scheduler::ConstantWithWarmup => Self::ConstantWithWarmup,
            Scheduler::Cosine => {
                Self::Cosine { num_cycles: take("num_cycles")?.unwrap_or(0.5), min_lr_rate: 0.0 }
            }
            Scheduler::CosineWithMinLr => {
                let min_lr_rate = match (take("min_lr")?, take("min_lr_rate")?) {
                    (Some(lr), None) => share(lr),
                    (None, Some(rate)) => rate,
                    _ => {
                        return Err("cosine_with_min_lr needs one of min_lr and min_lr_rate in \
                                    --lr-scheduler-kwargs, such as '{\"min_lr_rate\": 0.1}'"
                            .into());
                    }
                };
                Self::Cosine { num_cycles: take("num_cycles")?.unwrap_or(0.5), min_lr_rate }
            }
            Scheduler::Polynomial => {
                let end = take("lr_end")?.unwrap_or(1e-7);
                if end >= peak {
                    return Err(format!("polynomial: lr_end ({end}) must be below --learning-rate ({peak})"));
                }
                Self::Polynomial { end_rate: share(end), power: take("power")?.unwrap_or(1.0) }
            }
            Scheduler::InverseSqrt => {
                Self::InverseSqrt { timescale: take("timescale")?.filter(|t| *t > 0.0) }
            }
        };
        match given.keys().next() {
            None => Ok(schedule),
            Some(key) => {
                Err(format!("--lr-scheduler-kwargs: {key:?} has no effect with this --lr-scheduler-type"))
            }
        }
    }

    /// Factor of the peak learning rate for step `step` (from 0) of `total`, after `warmup` steps.
    pub fn factor(self, step: usize, warmup: usize, total: usize) -> f64 {
        if self == Self::Constant {
            return 1.0;
        }
        if step < warmup {
            return step as f64 / warmup as f64;
        }
        let progress = (step - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
        match self {
            Self::Linear => (1.0 - progress).max(0.0),
            Self::Cosine { num_cycles, min_lr_rate } => {
                let wave = 0.5 * (1.0 + (PI * num_cycles * 2.0 * progress).cos());
                (wave * (1.0 - min_lr_rate) + min_lr_rate).max(0.0)
            }
            Self::Constant | Self::ConstantWithWarmup => 1.0,
            Self::Polynomial { end_rate, .. } if step > total => end_rate,
            Self::Polynomial { end_rate, power } => {
                (1.0 - end_rate) * (1.0 - progress).powf(power) + end_rate
            }
            Self::InverseSqrt { timescale } => {
                let own = if warmup > 0 { warmup as f64 } else { 10_000.0 };
                let timescale = timescale.unwrap_or(own);
                1.0 / ((step as f64 + timescale - warmup as f64) / timescale).sqrt()
            }
        }
    }
}

/// Warm-up in steps: a value below 1 is a fraction of the run.
pub fn warmup(setting: f64, total: usize) -> usize {
    if setting < 1.0 { (setting * total as f64).ceil() as usize } else { setting as usize }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factors(kind: Scheduler, kwargs: &str, warmup: usize) -> [f64; 6] {
        let schedule = Schedule::new(kind, Some(kwargs), 1e-3).unwrap();
        [0, 1, 3, 6, 11, 12].map(|step| schedule.factor(step, warmup, 12))
    }

    fn near(got: [f64; 6], want: [f64; 6]) {
        assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-11), "{got:?} is not {want:?}");
    }

    /// ```python
    /// o = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    /// s = transformers.get_scheduler(NAME, o, num_warmup_steps=3, num_training_steps=12, scheduler_specific_kwargs=KWARGS)
    /// print([s.lr_lambdas[0](i) for i in (0, 1, 3, 6, 11, 12)])
    /// ```
    #[test]
    fn factors_are_those_of_transformers() {
        let third = 1.0 / 3.0;
        let cases = [
            (Scheduler::Linear, "{}", [0.0, third, 1.0, 2.0 * third, third * third, 0.0]),
            (Scheduler::Cosine, r#"{"num_cycles": 1.0}"#, [0.0, third, 1.0, 0.25, 0.883_022_221_559, 1.0]),
            (
                Scheduler::CosineWithMinLr,
                r#"{"min_lr_rate": 0.1}"#,
                [0.0, third, 1.0, 0.775, 0.127_138_320_646, 0.1],
            ),
            (
                Scheduler::CosineWithMinLr,
                r#"{"min_lr": "2e-4", "num_cycles": 0.5}"#,
                [0.0, third, 1.0, 0.8, 0.224_122_951_686, 0.2],
            ),
            (Scheduler::Polynomial, "{}", [0.0, third, 1.0, 0.6667, 0.1112, 0.0001]),
            (
                Scheduler::Polynomial,
                r#"{"lr_end": 1e-4, "power": 2.0}"#,
                [0.0, third, 1.0, 0.5, 0.111_111_111_111, 0.1],
            ),
            (Scheduler::InverseSqrt, "{}", [0.0, third, 1.0, 0.5_f64.sqrt(), 0.522_232_967_867, 0.5]),
            (
                Scheduler::InverseSqrt,
                r#"{"timescale": 10}"#,
                [0.0, third, 1.0, 0.877_058_019_307, 0.745_355_992_5, 0.725_476_250_11],
            ),
            (Scheduler::ConstantWithWarmup, "{}", [0.0, third, 1.0, 1.0, 1.0, 1.0]),
            (Scheduler::Constant, "{}", [1.0; 6]),
        ];
        for (kind, kwargs, want) in cases {
            near(factors(kind, kwargs, 3), want);
        }
        let want = [
            1.0,
            0.999_950_003_75,
            0.999_850_033_742,
            0.999_700_134_933,
            0.999_450_453_334,
            0.999_400_539_461,
        ];
        near(factors(Scheduler::InverseSqrt, "{}", 0), want);
    }

    #[test]
    fn settings_that_do_not_fit_are_named() {
        let reason = |kind, kwargs| Schedule::new(kind, Some(kwargs), 1e-6).unwrap_err();
        assert!(reason(Scheduler::Linear, r#"{"power": 2}"#).contains("\"power\" has no effect"));
        assert!(reason(Scheduler::CosineWithMinLr, "{}").contains("min_lr_rate"));
        assert!(reason(Scheduler::CosineWithMinLr, r#"{"min_lr": 0, "min_lr_rate": 0}"#).contains("one of"));
        assert!(reason(Scheduler::Polynomial, r#"{"lr_end": 1}"#).contains("below"));
        assert!(reason(Scheduler::Cosine, r#"{"num_cycles": "x"}"#).contains("num_cycles"));
        assert!(reason(Scheduler::Cosine, "no JSON").contains("JSON"));
    }

    #[test]
    fn a_fraction_is_rounded_up() {
        assert_eq!([warmup(0.1, 11), warmup(3.0, 11), warmup(0.0, 11)], [2, 3, 0]);
    }
}
