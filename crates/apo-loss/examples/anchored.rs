//! Fifty gradient steps on the log-probabilities of one pair that start at the reference: DPO and APO-zero raise
//! the winner and lower the loser, APO-down lowers both, the loser more.
//!
//! `cargo run -p apo-loss --release --example anchored`

use apo_loss::{Divergence, PairLogps, apo_down, apo_zero, sigmoid};
use burn::tensor::{Device, Tensor};

type Loss<'a> = &'a dyn Fn(&PairLogps) -> Tensor<1>;

fn main() {
    let beta = 0.1;
    let dpo = |pairs: &PairLogps| sigmoid(&pairs.scores(Divergence::ReverseKl), beta);
    let zero = |pairs: &PairLogps| apo_zero(pairs, beta);
    let down = |pairs: &PairLogps| apo_down(pairs, beta);
    let losses: [(&str, Loss); 3] = [("sigmoid", &dpo), ("apo_zero", &zero), ("apo_down", &down)];
    #[allow(clippy::print_stdout)]
    for (name, loss) in losses {
        let [chosen, rejected] = descend(loss);
        println!("{name:9} log-ratio of the winner {chosen:+.2}, of the loser {rejected:+.2}");
    }
}

/// Log-ratios of both completions after the steps.
fn descend(loss: Loss) -> [f32; 2] {
    let device = Device::flex().autodiff();
    let reference = Tensor::<1>::from_floats([-40.0], &device);
    let (mut chosen, mut rejected) = (reference.clone(), reference.clone());
    for _ in 0..50 {
        let pairs = PairLogps {
            chosen: chosen.require_grad(),
            rejected: rejected.require_grad(),
            ref_chosen: reference.clone(),
            ref_rejected: reference.clone(),
        };
        let gradients = loss(&pairs).sum().backward();
        let step = |logps: &Tensor<1>| {
            let values = logps.clone().inner();
            let moved = match logps.grad(&gradients) {
                Some(gradient) => values - gradient * 10.0,
                None => values,
            };
            Tensor::from_inner(moved)
        };
        (chosen, rejected) = (step(&pairs.chosen), step(&pairs.rejected));
    }
    [chosen, rejected].map(|logps| (logps - reference.clone()).into_scalar::<f32>())
}
