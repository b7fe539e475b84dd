//! Losses against values from PyTorch, gradients against theory, and limits.

#![allow(clippy::unwrap_used)]

use apo_loss::{
    Divergence, LabelWeights, LabelledLogps, PairLogps, Scores, aot, aot_unpaired, apo_down, apo_zero,
    apo_zero_unpaired, bco_pair, discopop, exo_pair, hinge, ipo, kl_estimate, kto, length_desensitized,
    nca_pair, pair_weights, rewards, robust, sft, sigmoid, sigmoid_norm, sppo_hard,
};
use burn::tensor::{DType, Device, Tensor, TensorData};

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

/// The log-probabilities of the values below.
fn example() -> PairLogps {
    pairs(&[-10.0, -300.0, -55.5], &[-20.0, -310.0, -70.0], &[-12.0, -290.0, -55.5], &[-15.0, -330.0, -69.0])
}

fn usual(pairs: &PairLogps) -> Scores {
    pairs.scores(Divergence::ReverseKl)
}

/// ```python
/// import math, torch, torch.nn.functional as F
/// c, rc = torch.tensor([-10., -300., -55.5]), torch.tensor([-12., -290., -55.5])
/// r, rr = torch.tensor([-20., -310., -70.]), torch.tensor([-15., -330., -69.])
/// cl, rl, b, e, tau, ls = c - rc, r - rr, 0.1, 0.1, 0.05, F.logsigmoid
/// lc, lr = torch.tensor([5., 150., 20.]), torch.tensor([8., 140., 25.])
/// d, nd, s = cl - rl, cl/lc - rl/lr, lambda x: torch.sort(x)[0]
/// sm = lambda x: -ls(x)*(1-e) - ls(-x)*e
/// print(torch.relu(1 - b*d))                                                   # hinge
/// print((nd - 1/(2*b))**2)                                                     # ipo
/// print(-ls(b*nd))                                                             # sigmoid_norm
/// print(torch.sigmoid(b*d)*(ls(b*d)-math.log1p(-e)) + torch.sigmoid(-b*d)*(ls(-b*d)-math.log(e)))  # exo_pair
/// print(-ls(b*cl) - .5*ls(-b*cl) - .5*ls(-b*rl))                               # nca_pair
/// print((-(1-e)*ls(b*d) + e*ls(-b*d))/(1-2*e))                                 # robust
/// print(-ls(b*cl) - ls(-b*rl))                                                 # bco_pair
/// print((cl-.5/b)**2 + (rl+.5/b)**2)                                           # sppo_hard
/// print(sm(b*(s(c-r) - s(rc-rr))))                                             # aot
/// print(sm(b*(s(cl) - s(rl))))                                                 # aot_unpaired
/// m = torch.sigmoid(b*d/tau)
/// print(-ls(b*d)*(1-m) + torch.exp(-b*d)*m)                                    # discopop
/// ```
#[test]
fn every_other_loss_has_its_value_in_pytorch() {
    let p = example();
    let scores = usual(&p);
    let per_token = scores.per_token(tensor(&[5.0, 150.0, 20.0]), tensor(&[8.0, 140.0, 25.0]));
    let near = |got: Tensor<1>, want: [f32; 3]| {
        let got = host(got);
        for (g, w) in got.iter().zip(want) {
            assert!((g - w).abs() < 1e-6 * w.abs().max(1.0), "{got:?} is not {want:?}");
        }
    };
    near(hinge(&scores, 0.1), [0.3, 4.0, 0.9]);
    near(ipo(&per_token, 0.1), [15.800_624, 27.139_137, 24.601_601]);
    near(sigmoid_norm(&per_token, 0.1), [0.643_209_87, 0.703_678_25, 0.691_149_18]);
    near(exo_pair(&scores, 0.1, 0.1), [0.198_971_91, 2.007_515, 0.457_189_14]);
    near(nca_pair(&p, 0.1), [1.234_246_7, 2.533_356_7, 1.361_919_2]);
    near(robust(&scores, 0.1, 0.1), [0.315_686_05, 3.423_587_1, 0.631_896_67]);
    near(bco_pair(&p, 0.1), [1.072_215_8, 3.440_189_8, 1.337_543_8]);
    near(sppo_hard(&p, 0.1), [9.0, 850.0, 41.0]);
    near(aot(&p, 0.1, 0.1), [0.473_186_05, 0.848_382_06, 2.370_183]);
    near(aot_unpaired(&p, 0.1, 0.1), [0.924_076_97, 0.654_396_65, 1.772_977_6]);
    near(discopop(&scores, 0.1, 0.05), [0.496_585_22, 3.048_587_3, 0.873_792_11]);
}

/// ```python
/// cl, rl = cl / 10, rl / 10
/// for f in [lambda x: 1 - torch.exp(-x), lambda x: math.log(2) + ls(x), lambda x: (torch.exp(-0.5*x) - 1)/-0.5]:
///     print(-ls(b*(f(cl) - f(rl))))
/// ```
#[test]
fn divergences_change_the_scores() {
    let p = pairs(&[-1.0, -30.0, -5.55], &[-2.0, -31.0, -7.0], &[-1.2, -29.0, -5.55], &[-1.5, -33.0, -6.9]);
    let loss = |divergence| host(sigmoid(&p.scores(divergence), 0.1));
    close(loss(Divergence::ForwardKl), &[0.652_508_5, 0.830_610_99, 0.687_902_45]);
    close(loss(Divergence::JensenShannon), &[0.674_526_93, 0.754_222_1, 0.690_588]);
    close(loss(Divergence::Alpha(0.5)), &[0.655_947_15, 0.829_411_8, 0.688_033_22]);
    assert_eq!(loss(Divergence::Alpha(1.0)), loss(Divergence::ReverseKl));
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
    let p = example();
    close(host(apo_zero(&p, 0.1)), &[0.827_706_7, 1.611_855_7, 0.975_020_8]);
    close(host(apo_down(&p, 0.1)), &[0.881_646_3, 1.221_515_5, 0.975_020_8]);
    close(host(sigmoid(&usual(&p), 0.1)), &[0.403_186_0, 3.048_587_3, 0.644_396_7]);
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
    close(gradient(|p, beta| sigmoid(&usual(p), beta)).to_vec(), &[-0.15, 0.15]);
}

type Loss = (&'static str, fn(&PairLogps) -> Tensor<1>);

/// Every loss with settings of its own.
fn losses() -> Vec<Loss> {
    vec![
        ("apo_zero", |p| apo_zero(p, 0.3)),
        ("apo_down", |p| apo_down(p, 0.3)),
        ("sigmoid", |p| sigmoid(&usual(p), 0.3)),
        ("forward_kl", |p| sigmoid(&p.scores(Divergence::ForwardKl), 0.3)),
        ("js_divergence", |p| sigmoid(&p.scores(Divergence::JensenShannon), 0.3)),
        ("alpha_divergence", |p| sigmoid(&p.scores(Divergence::Alpha(0.4)), 0.3)),
        ("hinge", |p| hinge(&usual(p), 0.3)),
        ("ipo", |p| ipo(&usual(p), 0.3)),
        ("exo_pair", |p| exo_pair(&usual(p), 0.3, 0.01)),
        ("nca_pair", |p| nca_pair(p, 0.3)),
        ("robust", |p| robust(&usual(p), 0.3, 0.2)),
        ("bco_pair", |p| bco_pair(p, 0.3)),
        ("sppo_hard", |p| sppo_hard(p, 0.3)),
        ("aot", |p| aot(p, 0.3, 0.1)),
        ("aot_unpaired", |p| aot_unpaired(p, 0.3, 0.1)),
        ("discopop", |p| discopop(&usual(p), 0.3, 0.05)),
    ]
}

/// Pairs in `f64`: differences of 1e-5 are exact enough for slopes.
fn precise(values: [[f64; 3]; 4]) -> PairLogps {
    let device = Device::flex().autodiff();
    let [chosen, rejected, ref_chosen, ref_rejected] =
        values.map(|row| Tensor::<1>::from_data(TensorData::from(row), (&device, DType::F64)));
    PairLogps { chosen: chosen.require_grad(), rejected: rejected.require_grad(), ref_chosen, ref_rejected }
}

#[test]
fn gradients_are_the_slopes() {
    let values = [[-10.0, -30.0, -5.5], [-12.0, -31.7, -7.0], [-11.0, -29.3, -5.0], [-11.2, -33.0, -6.1]];
    let sum = |loss: fn(&PairLogps) -> Tensor<1>, values| {
        let total: Vec<f64> = loss(&precise(values)).sum().into_data().try_into_vec().unwrap();
        total[0]
    };
    for (name, loss) in losses() {
        let p = precise(values);
        let grads = loss(&p).sum().backward();
        let gradient = |tensor: &Tensor<1>| -> Vec<f64> {
            tensor.grad(&grads).unwrap().into_data().try_into_vec().unwrap()
        };
        for (side, gradient) in [gradient(&p.chosen), gradient(&p.rejected)].into_iter().enumerate() {
            for (i, got) in gradient.into_iter().enumerate() {
                let moved = |by: f64| {
                    let mut values = values;
                    values[side][i] += by;
                    sum(loss, values)
                };
                let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                assert!((got - slope).abs() < 1e-7 * slope.abs().max(1.0), "{name}: {got} is not {slope}");
            }
        }
    }
}

#[test]
fn extreme_log_probabilities_give_finite_losses_and_gradients() {
    for (name, loss) in losses() {
        let p = pairs(&[-3000.0, -2500.0], &[-2500.0, -3000.0], &[-2500.0, -3000.0], &[-3000.0, -2500.0]);
        let value = loss(&p);
        let grads = value.clone().sum().backward();
        let all = [host(value), host(p.chosen.grad(&grads).unwrap()), host(p.rejected.grad(&grads).unwrap())];
        for values in all {
            assert!(values.iter().all(|v| v.is_finite()), "{name}: {values:?}");
        }
    }
}

#[test]
fn sft_is_the_token_mean() {
    let loss = host(sft(tensor(&[-30.0, -10.0]), 4.0));
    close(vec![f32::midpoint(loss[0], loss[1])], &[40.0 / 8.0]);
}

/// ```python
/// lp, rf = torch.tensor([-10., -300., -55.5, -70.]), torch.tensor([-12., -290., -55.5, -69.])
/// lab, b, x = torch.tensor([1, 0, 1, 0]).bool(), .1, lp - rf
/// kl = torch.clamp((torch.tensor([-20., -30., -41., -50.]) - torch.tensor([-21., -33., -40., -52.])).mean(), min=0)
/// print(torch.where(lab, 1.5*(1 - torch.sigmoid(b*(x - kl))), 0.5*(1 - torch.sigmoid(b*(kl - x)))))
/// print(torch.where(lab, 1 - torch.sigmoid(b*x), torch.sigmoid(b*x)))
/// ```
#[test]
fn labelled_completions_have_their_values_in_pytorch() {
    let rows = LabelledLogps {
        logps: tensor(&[-10.0, -300.0, -55.5, -70.0]).require_grad(),
        ref_logps: tensor(&[-12.0, -290.0, -55.5, -69.0]),
        labels: tensor(&[1.0, 0.0, 1.0, 0.0]),
    };
    let other = tensor(&[-20.0, -30.0, -41.0, -50.0]).require_grad();
    let kl = kl_estimate(other.clone(), tensor(&[-21.0, -33.0, -40.0, -52.0]));
    assert_eq!(host(kl.clone()), [1.25]);
    assert_eq!(host(kl_estimate(tensor(&[-3.0]), tensor(&[-2.0]))), [0.0], "an estimate below 0 is 0");
    let loss = kto(&rows, kl, 0.1, LabelWeights { desirable: 1.5, undesirable: 0.5 });
    close(host(loss.clone()), &[0.721_888_1, 0.122_542_5, 0.796_814, 0.221_993_06]);
    close(
        host(apo_zero_unpaired(&rows, 0.1, LabelWeights::default())),
        &[0.450_166_05, 0.268_941_43, 0.5, 0.475_020_8],
    );
    let grads = loss.sum().backward();
    assert!(other.grad(&grads).is_none(), "the estimate has no gradient");
    // -w β σ'(β(x - kl)) for desirable rows, the opposite sign for the others.
    let slope = |x: f32| {
        let s = 1.0 / (1.0 + (-0.1 * x).exp());
        0.1 * s * (1.0 - s)
    };
    let want = [-1.5 * slope(0.75), 0.5 * slope(-11.25), -1.5 * slope(-1.25), 0.5 * slope(-2.25)];
    close(host(rows.logps.grad(&grads).unwrap()), &want);
}

/// ```python
/// import torch
/// print(torch.tensor([-10., -3.]) + 0.4 * torch.tensor([-5., 0.]))       # common + alpha * beyond
/// print(torch.exp(torch.tensor([-.5, -2.])) * torch.exp(torch.tensor([-.25, -1.])))
/// ```
#[test]
fn weights_of_tokens_and_pairs_have_their_values_in_pytorch() {
    close(
        host(length_desensitized(tensor(&[-10.0, -3.0]), tensor(&[-5.0, 0.0]), 0.4).inner()),
        &[-12.0, -3.0],
    );
    let chosen = tensor(&[-0.5, -2.0]).require_grad();
    let weights = pair_weights(chosen.clone(), tensor(&[-0.25, -1.0]));
    close(host(weights.clone().inner()), &[0.472_366_55, 0.049_787_068]);
    let gradients = (weights * chosen.clone()).sum().backward();
    close(host(chosen.grad(&gradients).unwrap()), &[0.472_366_55, 0.049_787_068]);
}

#[test]
fn extreme_labelled_completions_give_finite_losses_and_gradients() {
    let rows = LabelledLogps {
        logps: tensor(&[-3000.0, -2500.0, -3000.0, -2500.0]).require_grad(),
        ref_logps: tensor(&[-2500.0, -3000.0, -2500.0, -3000.0]),
        labels: tensor(&[1.0, 1.0, 0.0, 0.0]),
    };
    for kl in [0.0, 500.0] {
        let loss = kto(&rows, tensor(&[kl]), 0.5, LabelWeights::default());
        let grads = loss.clone().sum().backward();
        for values in [host(loss), host(rows.logps.grad(&grads).unwrap())] {
            assert!(values.iter().all(|v| v.is_finite()), "{values:?}");
        }
    }
}
