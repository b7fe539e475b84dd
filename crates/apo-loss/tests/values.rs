//! Losses against values from PyTorch, gradients against theory, and limits.

#![allow(clippy::unwrap_used)]

use apo_loss::{PairLogps, apo_down, apo_zero, rewards, sft, sigmoid};
use burn::tensor::{Device, Tensor};

fn tensor(values: &[f32]) -> Tensor<1> {
    Tensor::from_floats(values, &Device::flex().autodiff())
}

fn host(tensor: Tensor<1>) -> Vec<f32> {
    tensor.into_data().try_into_vec().unwrap()
}

fn pairs(chosen: &[f32], rejected: &[f32], ref_chosen: &[f32], ref_rejected: &[f32]) -> PairLogps {
    PairLogps {
        chosen: tensor(chosen).require_grad(),
        rejected: tensor(rejected).require_grad(),
        ref_chosen: tensor(ref_chosen),
        ref_rejected: tensor(ref_rejected),
    }
}

fn close(got: Vec<f32>, want: &[f32]) {
    for (g, w) in got.iter().zip(want) {
        assert!((g - w).abs() < 1e-6, "{got:?} is not {want:?}");
    }
}

/// ```python
/// import torch, torch.nn.functional as F
/// c = torch.tensor([-10., -300., -55.5]) - torch.tensor([-12., -290., -55.5]); b = 0.1
/// r = torch.tensor([-20., -310., -70.]) - torch.tensor([-15., -330., -69.])
/// print((1 - torch.sigmoid(b*c)) + torch.sigmoid(b*r))
/// print(torch.sigmoid(b*c) + 1 - torch.sigmoid(b*(c-r)))
/// print(-F.logsigmoid(b*(c-r)))
/// ```
#[test]
fn values_are_those_of_the_formulas_in_pytorch() {
    let p = pairs(
        &[-10.0, -300.0, -55.5],
        &[-20.0, -310.0, -70.0],
        &[-12.0, -290.0, -55.5],
        &[-15.0, -330.0, -69.0],
    );
    close(host(apo_zero(&p, 0.1)), &[0.827_706_7, 1.611_855_7, 0.975_020_8]);
    close(host(apo_down(&p, 0.1)), &[0.881_646_3, 1.221_515_5, 0.975_020_8]);
    close(host(sigmoid(&p, 0.1)), &[0.403_186_0, 3.048_587_3, 0.644_396_7]);
    let (chosen, rejected) = rewards(&p, 0.1);
    close(host(chosen), &[0.2, -1.0, 0.0]);
    close(host(rejected), &[-0.5, 2.0, -0.1]);
}

#[test]
fn at_the_start_the_gradients_are_those_of_the_paper() {
    let beta = 0.3;
    let gradient = |loss: fn(&PairLogps, f64) -> Tensor<1>| {
        let p = pairs(&[-7.0], &[-9.0], &[-7.0], &[-9.0]);
        let grads = loss(&p, beta).sum().backward();
        [host(p.chosen.grad(&grads).unwrap())[0], host(p.rejected.grad(&grads).unwrap())[0]]
    };
    close(gradient(apo_zero).to_vec(), &[-0.075, 0.075]);
    close(gradient(apo_down).to_vec(), &[0.0, 0.075]);
    close(gradient(sigmoid).to_vec(), &[-0.15, 0.15]);
}

#[test]
fn extreme_log_probabilities_give_finite_losses_and_gradients() {
    for loss in [apo_zero, apo_down, sigmoid] {
        let p = pairs(&[-3000.0, -2500.0], &[-2500.0, -3000.0], &[-2500.0, -3000.0], &[-3000.0, -2500.0]);
        let value = loss(&p, 0.5);
        let grads = value.clone().sum().backward();
        for values in
            [host(value), host(p.chosen.grad(&grads).unwrap()), host(p.rejected.grad(&grads).unwrap())]
        {
            assert!(values.iter().all(|v| v.is_finite()), "{values:?}");
        }
    }
}

#[test]
fn sft_is_the_token_mean() {
    let loss = host(sft(tensor(&[-30.0, -10.0]), 8));
    close(vec![f32::midpoint(loss[0], loss[1])], &[40.0 / 8.0]);
}
