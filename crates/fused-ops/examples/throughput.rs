//! GFLOP/s of the parts of a training step, at the shapes of SmolLM2-135M:
//! `cargo run --release -p fused-ops --example throughput [NAME]`, of those whose names contain this.

#![allow(clippy::print_stdout)]

use std::sync::Arc;
use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use fused_ops::{Activation, Heads, Logits, Scores, Segments, attention, gated, head, linear, rms_norm};

fn random(rows: usize, cols: usize) -> Tensor<2> {
    Tensor::random([rows, cols], Distribution::Normal(0.0, 1.0), &Device::flex())
}

fn tracked(t: &Tensor<2>) -> Tensor<2> {
    t.clone().autodiff().require_grad()
}

/// Best of five, after one warm-up.
fn time(name: &str, flops: f64, mut f: impl FnMut()) {
    if std::env::args().nth(1).is_some_and(|part| !name.contains(&part)) {
        return;
    }
    f();
    let mut best = f64::MAX;
    for _ in 0..std::env::args().nth(2).map_or(5, |n| n.parse().unwrap_or(5)) {
        let started = Instant::now();
        f();
        best = best.min(started.elapsed().as_secs_f64());
    }
    println!("{name:42} {:9.1} ms {:8.1} GFLOP/s", best * 1e3, flops / best / 1e9);
}

fn main() {
    let (t, h, f, v) = (2048, 576, 1536, 49152);
    let (x, up, down) = (random(t, h), random(f, h), random(h, f));
    let flops = 2.0 * (t * h * f) as f64;
    time("linear [2048,576] x [1536,576]ᵀ", flops, || drop(linear(x.clone(), up.clone())));
    let inner = random(t, f);
    time("linear [2048,1536] x [576,1536]ᵀ", flops, || drop(linear(inner.clone(), down.clone())));
    time("linear forward + backward", 3.0 * flops, || {
        let (x, w) = (tracked(&x), tracked(&up));
        drop(linear(x, w).sum().backward());
    });
    let (n, w) = (1024, random(v, h));
    let hidden = random(n, h);
    let targets = Arc::new((0..n as u32).collect::<Vec<_>>());
    let flops = 2.0 * (n * h * v) as f64;
    time("head forward, 1024 rows, vocabulary 49152", flops, || {
        drop(head(hidden.clone(), w.clone(), &targets, Logits::default()));
    });
    time("head forward + backward", 4.0 * flops, || {
        let (hidden, w) = (tracked(&hidden), tracked(&w));
        drop(head(hidden, w, &targets, Logits::default()).logps.sum().backward());
    });
    let heads = Heads { query: 9, kv: 3, dim: 64 };
    let mut segments = Segments::default();
    segments.push_row(0, 324, &[350, 350]);
    segments.push_row(1024, 324, &[350, 350]);
    let segments = Arc::new(segments);
    let (q, k, value) = (random(t, 576), random(t, 192), random(t, 192));
    let pairs: f64 = 2.0 * (324.0 * 324.0 / 2.0 + 2.0 * (350.0 * 324.0 + 350.0 * 350.0 / 2.0));
    let flops = 4.0 * 576.0 * pairs;
    let run = |q, k, v| attention(q, k, v, &segments, heads, Scores::scaled(0.125));
    time("attention forward", flops, || drop(run(q.clone(), k.clone(), value.clone())));
    time("attention forward + backward", 3.5 * flops, || {
        drop(run(tracked(&q), tracked(&k), tracked(&value)).sum().backward());
    });
    let norm = random(1, h);
    time("rms_norm forward + backward", 0.0, || {
        drop(rms_norm(tracked(&x), tracked(&norm), 1e-5).sum().backward());
    });
    time("swiglu forward + backward", 0.0, || {
        drop(gated(tracked(&inner), tracked(&inner), Activation::Silu).sum().backward());
    });
}
