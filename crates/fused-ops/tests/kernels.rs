//! Every operation of the backend under test against the plain composition of Burn operations on Flex, values and
//! gradients.

#![allow(clippy::unwrap_used)]

mod common;
mod plain;

use std::sync::Arc;

use backend::{Backend, under_test};
use burn::tensor::{DType, Tensor};
use common::{check, difference, flex, random};
use fused_ops::{Activation, AdamW, Heads, Logits, Moments, Parameter, Rotary, Scores, Segment, Segments};

#[test]
fn linear_matches() {
    let (x, w) = (random(37, 24), random(41, 24));
    check(
        &[x.clone(), w.clone()],
        1e-5,
        |i| fused_ops::linear(i[0].clone(), i[1].clone()),
        |i| plain::linear(i[0].clone(), i[1].clone()),
    );
}

#[test]
fn low_rank_updates_match() {
    let (x, w, a, b) = (random(37, 24), random(41, 24).inner(), random(3, 24), random(41, 3));
    let product = |x: &Tensor<2>, w: &Tensor<2>| plain::linear(x.clone(), w.clone());
    let frozen = |i: &Tensor<2>| Tensor::from_inner(w.clone().to_device(&i.device().inner()));
    check(
        &[x, a, b],
        1e-5,
        |i| fused_ops::lora(i[0].clone(), frozen(&i[0]), i[1].clone(), i[2].clone(), 0.5),
        |i| product(&i[0], &frozen(&i[0])) + product(&product(&i[0], &i[1]), &i[2]) * 0.5,
    );
}

#[test]
fn norms_match() {
    let (x, w, b) = (random(131, 48), random(1, 48), random(1, 48));
    check(
        &[x.clone(), w.clone()],
        1e-5,
        |i| fused_ops::rms_norm(i[0].clone(), i[1].clone(), 1e-6),
        |i| plain::rms_norm(i[0].clone(), i[1].clone(), 1e-6),
    );
    let per_head = random(1, 16);
    check(
        &[x.clone(), per_head.clone()],
        1e-5,
        |i| fused_ops::rms_norm(i[0].clone(), i[1].clone(), 1e-6),
        |i| plain::rms_norm(i[0].clone(), i[1].clone(), 1e-6),
    );
    check(
        &[x.clone(), w.clone(), b.clone()],
        1e-5,
        |i| fused_ops::layer_norm(i[0].clone(), i[1].clone(), i[2].clone(), 1e-5),
        |i| plain::layer_norm(i[0].clone(), i[1].clone(), i[2].clone(), 1e-5),
    );
}

#[test]
fn rotary_and_activations_match() {
    let (tokens, half) = (19, 8);
    let angles: Vec<f32> = (0..tokens * half).map(|i| i as f32 * 0.37).collect();
    let table = Rotary {
        cos: angles.iter().map(|a| a.cos()).collect(),
        sin: angles.iter().map(|a| a.sin()).collect(),
        half,
        dim: 2 * half,
    };
    // All features of a head, or a part of them.
    for dim in [2 * half, 2 * half + 4] {
        let (x, table) = (random(tokens, 3 * dim), Rotary { dim, ..table.clone() });
        check(
            std::slice::from_ref(&x),
            1e-6,
            |i| fused_ops::rotary(i[0].clone(), &table),
            |i| plain::rotary(i[0].clone(), &table),
        );
    }
    let (gate, up) = (random(tokens, 33), random(tokens, 33));
    for kind in [Activation::Silu, Activation::GeluTanh] {
        check(
            &[gate.clone(), up.clone()],
            1e-5,
            |i| fused_ops::gated(i[0].clone(), i[1].clone(), kind),
            |i| plain::gated(i[0].clone(), i[1].clone(), kind),
        );
        check(
            std::slice::from_ref(&gate),
            1e-5,
            |i| fused_ops::activate(i[0].clone(), kind),
            |i| plain::activate(i[0].clone(), kind),
        );
    }
}

#[test]
fn packed_attention_matches() {
    let mut segments = Segments::default();
    let rows: [(usize, &[usize]); 4] = [(70, &[65, 3]), (0, &[9, 5]), (130, &[]), (4, &[0, 7])];
    let mut at = 0;
    for (shared, tails) in rows {
        segments.push_row(at, shared, tails);
        at += shared + tails.iter().sum::<usize>();
    }
    let segments = Arc::new(segments);
    // Features that fill no panel, and more than one.
    for dim in [8, 40] {
        let heads = Heads { query: 6, kv: 2, dim };
        let (q, k, v) = (random(at, 6 * dim), random(at, 2 * dim), random(at, 2 * dim));
        for (softcap, window) in
            [(None, None), (Some(2.0), None), (None, Some(70)), (Some(1.5), Some(5)), (None, Some(1))]
        {
            let scores = Scores { scale: 1.0 / (dim as f32).sqrt(), softcap, window };
            check(
                &[q.clone(), k.clone(), v.clone()],
                2e-5,
                |i| fused_ops::attention(i[0].clone(), i[1].clone(), i[2].clone(), &segments, heads, scores),
                |i| plain::attention(i[0].clone(), i[1].clone(), i[2].clone(), &segments, heads, scores),
            );
        }
    }
}

/// Long segments are taken apart into several tasks.
#[test]
fn attention_of_long_rows_matches() {
    let heads = Heads { query: 2, kv: 1, dim: 8 };
    let mut segments = Segments::default();
    segments.push_row(0, 1100, &[1050, 2]);
    let (segments, n) = (Arc::new(segments), 2152);
    let (q, k, v) = (random(n, 16), random(n, 8), random(n, 8));
    // Windows that reach into another task, and ones that hide most of a task's keys.
    for window in [None, Some(1030), Some(100), Some(7)] {
        let scores = Scores { scale: 0.35, softcap: None, window };
        check(
            &[q.clone(), k.clone(), v.clone()],
            2e-5,
            |i| fused_ops::attention(i[0].clone(), i[1].clone(), i[2].clone(), &segments, heads, scores),
            |i| plain::attention(i[0].clone(), i[1].clone(), i[2].clone(), &segments, heads, scores),
        );
    }
}

#[test]
fn attention_over_a_cache_matches() {
    let heads = Heads { query: 4, kv: 4, dim: 8 };
    let mut segments = Segments::default();
    segments.push(Segment { query: 0, len: 1, prefix: 0, prefix_len: 12, own: 12 });
    segments.push(Segment { query: 1, len: 3, prefix: 20, prefix_len: 0, own: 20 });
    let segments = Arc::new(segments);
    let (q, k, v) = (random(5, 32), random(30, 32), random(30, 32));
    let scores = Scores::scaled(0.5);
    let out = fused_ops::attention(q.clone(), k.clone(), v.clone(), &segments, heads, scores);
    let want = plain::attention(flex(&q), flex(&k), flex(&v), &segments, heads, scores);
    assert!(difference(&out, &want) < 1e-5 * under_test().backend.tolerance().operations as f32);
    let unattended = out.inner().narrow(0, 4, 1).abs().sum().into_scalar::<f32>();
    assert_eq!(unattended, 0.0, "a query outside every segment stays zero");
}

#[test]
fn head_matches() {
    let (h, w) = (random(40, 16), random(101, 16));
    let targets = Arc::new((0..40).map(|i| (i * 7) % 101).collect::<Vec<u32>>());
    let flat = |out: fused_ops::HeadOutput| out.logps.reshape([40, 1]);
    for logits in [Logits::default(), Logits { scale: 0.5, softcap: Some(3.0) }] {
        check(
            &[h.clone(), w.clone()],
            1e-5,
            |i| flat(fused_ops::head(i[0].clone(), i[1].clone(), &targets, logits)),
            |i| flat(plain::head(i[0].clone(), i[1].clone(), &targets, logits)),
        );
        let fused = fused_ops::head(h.clone(), w.clone(), &targets, logits).stats;
        let want = plain::head(flex(&h), flex(&w), &targets, logits).stats;
        let tolerance = 2e-5 * under_test().backend.tolerance().operations as f32;
        assert!(
            difference(&fused, &want) < tolerance,
            "statistics differ by {:e}",
            difference(&fused, &want)
        );
    }
}

#[test]
fn weights_of_sixteen_bits_are_their_values() {
    if !under_test().backend.has_bfloat16() {
        return;
    }
    let (x, w) = (random(11, 24), random(9, 24).inner());
    let narrow = w.cast(DType::BF16);
    let (wide, narrow) = (Tensor::from_inner(narrow.clone().cast(DType::F32)), Tensor::from_inner(narrow));
    let targets = Arc::new(vec![3; 11]);
    let linear = |w: &Tensor<2>| fused_ops::linear(x.clone(), w.clone());
    let head = |w: &Tensor<2>| fused_ops::head(x.clone(), w.clone(), &targets, Logits::default()).logps;
    assert_eq!(difference(&linear(&wide), &linear(&narrow)), 0.0);
    assert_eq!(difference(&head(&wide), &head(&narrow)), 0.0);
    let gradient = |w: &Tensor<2>| x.grad(&(linear(w).sum() + head(w).sum()).backward()).unwrap();
    assert_eq!(difference(&gradient(&wide), &gradient(&narrow)), 0.0);
}

#[test]
fn frozen_weights_change_no_gradient_and_get_none() {
    let (x, v, h) = (random(11, 24), random(24, 9), random(30, 9));
    let targets = Arc::new(vec![3; 11]);
    let run = |v: Tensor<2>, h: Tensor<2>| {
        let hidden = fused_ops::linear(x.clone(), v.transpose());
        fused_ops::head(hidden, h, &targets, Logits::default()).logps.sum().backward()
    };
    let with = run(v.clone(), h.clone());
    let (frozen_v, frozen_h) = (Tensor::from_inner(v.inner()), Tensor::from_inner(h.inner()));
    let without = run(frozen_v.clone(), frozen_h.clone());
    assert_eq!(difference(&x.grad(&with).unwrap(), &x.grad(&without).unwrap()), 0.0);
    assert!(frozen_v.grad(&without).is_none() && frozen_h.grad(&without).is_none());
}

#[test]
fn head_of_a_large_vocabulary_takes_several_chunks() {
    let (n, vocab) = (250, 140_000);
    let (h, w) = (random(n, 2), random(vocab, 2));
    let targets = Arc::new((0..n as u32).map(|i| i * 559).collect::<Vec<u32>>());
    let logps = fused_ops::head(h.clone(), w.clone(), &targets, Logits::default()).logps;
    let grads = logps.clone().sum().backward();
    let host = |t: Tensor<2>| t.into_data().try_into_vec_as::<f32>().unwrap();
    // In f64, which the plain composition does not offer: it sums 140,000 terms one after the other.
    let wide = |t: &Tensor<2>| host(t.clone().inner()).into_iter().map(f64::from).collect::<Vec<_>>();
    let (x, e) = (wide(&h), wide(&w));
    let (mut want, mut dh, mut dw) = (vec![0.0; n], vec![0.0; 2 * n], vec![0.0; 2 * vocab]);
    for i in 0..n {
        let x = &x[2 * i..2 * i + 2];
        let target = targets[i] as usize;
        let logits: Vec<f64> = e.chunks(2).map(|e| x[0] * e[0] + x[1] * e[1]).collect();
        let total: f64 = logits.iter().map(|z| z.exp()).sum();
        want[i] = logits[target] - total.ln();
        for (token, z) in logits.into_iter().enumerate() {
            let g = f64::from(u8::from(token == target)) - z.exp() / total;
            for j in 0..2 {
                dh[2 * i + j] += g * e[2 * token + j];
                dw[2 * token + j] += g * x[j];
            }
        }
    }
    // CubeCL adds the 140,000 terms one after the other: the worst of the 500 sums is off by 7e-4 (`numpy.cumsum`).
    let exact = matches!(under_test().backend, Backend::Flex | Backend::Tch | Backend::Cuda);
    let tolerance = if exact { 2e-5 } else { 2.5e-4 } * under_test().backend.tolerance().operations;
    let dims = [n, 1];
    for (what, got, want) in [
        ("log-probability", host(logps.inner().reshape(dims)), want),
        ("gradient of hidden", host(h.grad(&grads).unwrap()), dh),
        ("gradient of the weight", host(w.grad(&grads).unwrap()), dw),
    ] {
        let apart =
            got.iter().zip(&want).map(|(&got, want)| (f64::from(got) - want).abs() / want.abs().max(1.0));
        let worst = apart.fold(0.0, f64::max);
        assert!(worst < tolerance, "{what}: {worst:e}");
    }
}

/// ```python
/// p = torch.nn.Parameter(torch.tensor([1., -2., 3.])); o = torch.optim.AdamW([p], lr=0.1, weight_decay=0.01)
/// for g in ([0.5, -1., 2.], [1., 1., 1.], [-3., 0., 0.25]): p.grad = torch.tensor(g); o.step()
/// print(p.tolist(), o.state[p]["exp_avg_sq"].tolist())
/// # [0.8403..., ...] (computed in f64 by the loop below)
/// ```
#[test]
fn adamw_is_torchs() {
    let device = under_test().device;
    let mut p = Tensor::<2>::from_floats([[1.0, -2.0, 3.0]], &device);
    let mut moments = Moments::zeros(&p);
    let gradients = [[0.5, -1.0, 2.0], [1.0, 1.0, 1.0], [-3.0, 0.0, 0.25]];
    let (mut want, mut m, mut v) = ([1.0_f64, -2.0, 3.0], [0.0_f64; 3], [0.0_f64; 3]);
    for (i, gradient) in gradients.iter().enumerate() {
        let step = i as u32 + 1;
        let opt = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.999, eps: 1e-8, step };
        // Half of twice the gradient.
        let g = Tensor::<2>::from_floats([*gradient], &device) * 2.0;
        let half = Tensor::<1>::full([1], 0.5, &device);
        let parameter = Parameter { value: p, gradient: g, moments, weight_decay: 0.01 };
        (p, moments) = opt.update(vec![parameter], Some(&half)).remove(0);
        for j in 0..3 {
            let g = f64::from(gradient[j] as f32);
            m[j] = 0.9 * m[j] + 0.1 * g;
            v[j] = 0.999 * v[j] + 0.001 * g * g;
            want[j] *= 1.0 - 0.1 * 0.01;
            let (c1, c2) = (1.0 - 0.9_f64.powi(step as i32), 1.0 - 0.999_f64.powi(step as i32));
            want[j] -= 0.1 / c1 * m[j] / ((v[j] / c2).sqrt() + 1e-8);
        }
    }
    let got: Vec<f32> = p.into_data().try_to_vec().unwrap();
    for (g, w) in got.iter().zip(want) {
        assert!((f64::from(*g) - w).abs() < 2e-6, "{got:?} is not {want:?}");
    }
}

#[test]
fn sums_match() {
    let x = random(9, 1);
    let plan = Arc::new(vec![(0, 0), (1, 0), (1, 2), (4, 2), (8, 1), (7, 2)]);
    let values = |i: &[Tensor<2>]| i[0].clone().reshape([9]);
    check(
        std::slice::from_ref(&x),
        1e-6,
        |i| fused_ops::sum_into(values(i), &plan, 3).reshape([3, 1]),
        |i| plain::sum_into(values(i), &plan, 3).reshape([3, 1]),
    );
}

#[test]
#[should_panic(expected = "segments overlap")]
fn overlapping_segments_are_refused() {
    let mut segments = Segments::default();
    segments.push_row(0, 4, &[3]);
    segments.push_row(6, 2, &[]);
    let x = random(8, 8);
    let heads = Heads { query: 1, kv: 1, dim: 8 };
    fused_ops::attention(x.clone(), x.clone(), x, &Arc::new(segments), heads, Scores::scaled(1.0));
}
