//! Learning-rate schedules (`transformers.optimization`).

use crate::args::Scheduler;

/// Factor of the peak learning rate for step `step` (from 0) of `total`, after `warmup` steps.
pub fn factor(kind: Scheduler, step: usize, warmup: usize, total: usize) -> f64 {
    if kind == Scheduler::Constant {
        return 1.0;
    }
    if step < warmup {
        return step as f64 / warmup as f64;
    }
    let progress = (step - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
    match kind {
        Scheduler::Linear => (1.0 - progress).max(0.0),
        Scheduler::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        Scheduler::Constant | Scheduler::ConstantWithWarmup => 1.0,
    }
}

/// Warm-up in steps: a value below 1 is a fraction of the run.
pub fn warmup(setting: f64, total: usize) -> usize {
    if setting < 1.0 { (setting * total as f64).ceil() as usize } else { setting as usize }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_goes_to_zero_after_warmup() {
        let at = |step| factor(Scheduler::Linear, step, 2, 6);
        assert_eq!([at(0), at(1), at(2), at(4), at(6)], [0.0, 0.5, 1.0, 0.5, 0.0]);
        assert_eq!(factor(Scheduler::Cosine, 4, 2, 6), 0.5);
        assert_eq!(factor(Scheduler::ConstantWithWarmup, 5, 2, 6), 1.0);
    }

    #[test]
    fn a_fraction_is_rounded_up() {
        assert_eq!([warmup(0.1, 11), warmup(3.0, 11), warmup(0.0, 11)], [2, 3, 0]);
    }
}
