//! Each operation, forward and backward, beside the plain composition of Burn operations, at the shapes of
//! SmolLM2-135M: `cargo xtask bench ops [NAME]`. Throughput is in floating-point operations for products and in bytes
//! read and written for the others, to be held against the machine's limits (`product` and `sum`).

#![allow(clippy::unwrap_used)]

#[path = "../tests/plain/mod.rs"]
// Not all of it is measured.
#[allow(dead_code)]
mod plain;

use std::hint::black_box;
use std::sync::Arc;

use backend::under_test;
use burn::tensor::{DType, Distribution, Int, Tensor};
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group};
use fused_ops::{Activation, AdamW, Heads, Logits, Moments, Packed, Parameter, Rotary, Scores, Segments};

#[global_allocator]
static ALLOCATOR: allocator::Allocator = allocator::Allocator;

const TOKENS: usize = 2048;
const HIDDEN: usize = 576;
const INNER: usize = 1536;
const VOCAB: usize = 49_152;

fn random(rows: usize, cols: usize) -> Tensor<2> {
    Tensor::random([rows, cols], Distribution::Normal(0.0, 1.0), &under_test().device)
}

/// In 16 bits.
fn sixteen(x: Tensor<2>) -> Tensor<2> {
    fused_ops::cast(x, DType::BF16.into())
}

/// In 32 bits.
fn single(x: Tensor<2>) -> Tensor<2> {
    fused_ops::cast(x, DType::F32.into())
}

/// Waits for the device.
fn finish(tensor: Tensor<2>) {
    black_box(tensor.slice([0..1, 0..1]).into_data());
}

/// Forward and backward pass of `op`, whose inputs all have gradients.
fn pass(inputs: &[Tensor<2>], op: &impl Fn(&[Tensor<2>]) -> Tensor<2>) {
    let leaves: Vec<Tensor<2>> = inputs.iter().map(|x| x.clone().autodiff().require_grad()).collect();
    let gradients = op(&leaves).sum().backward();
    finish(leaves[0].grad(&gradients).unwrap());
}

/// One operation, fused and plain.
fn compare(
    c: &mut Criterion,
    name: &str,
    work: Throughput,
    inputs: &[Tensor<2>],
    fused: impl Fn(&[Tensor<2>]) -> Tensor<2>,
    plain: impl Fn(&[Tensor<2>]) -> Tensor<2>,
) {
    let mut group: BenchmarkGroup<'_, _> = c.benchmark_group(name);
    group.sample_size(10).throughput(work);
    group.bench_function("fused", |b| b.iter(|| pass(inputs, &fused)));
    group.bench_function("plain", |b| b.iter(|| pass(inputs, &plain)));
    group.finish();
}

/// Bytes of so many values read or written.
fn values(count: usize) -> Throughput {
    Throughput::Bytes(4 * count as u64)
}

fn limits(c: &mut Criterion) {
    let (a, b) = (random(2048, 2048), random(2048, 2048));
    let mut group = c.benchmark_group("limit");
    group.sample_size(10).throughput(Throughput::Elements(2 * 2048_u64.pow(3)));
    group.bench_function("product", |bencher| {
        bencher.iter(|| finish(fused_ops::linear(a.clone(), b.clone())));
    });
    if under_test().backend.has_bfloat16() {
        let (a, b) = (sixteen(a), sixteen(b));
        group.bench_function("product of 16 bits", |bencher| {
            bencher.iter(|| finish(fused_ops::linear(a.clone(), b.clone())));
        });
    }
    let large = random(8192, 4096);
    group.throughput(values(3 * 8192 * 4096));
    group.bench_function("sum", |bencher| {
        bencher.iter(|| finish(fused_ops::join(large.clone(), large.clone())));
    });
    group.finish();
}

/// A way there and back.
type Types = (&'static str, fn(Tensor<2>) -> Tensor<2>, fn(Tensor<2>) -> Tensor<2>);

/// What operations are measured in, beside the plain composition in 32 bits.
fn types() -> Vec<Types> {
    let all: [Types; 2] = [("", |x| x, |x| x), (" of 16 bits", sixteen, single)];
    let count = if under_test().backend.has_bfloat16() { 2 } else { 1 };
    all[..count].to_vec()
}

fn products(c: &mut Criterion) {
    let work = |passes: usize| Throughput::Elements((2 * passes * TOKENS * HIDDEN * INNER) as u64);
    let frozen = random(INNER, HIDDEN);
    let base = |like: &Tensor<2>| {
        if like.device().is_autodiff() { Tensor::from_inner(frozen.clone()) } else { frozen.clone() }
    };
    let rows = 512;
    let targets = Arc::new((0..rows as u32).collect::<Vec<_>>());
    let flat = |out: fused_ops::HeadOutput| out.logps.reshape([rows, 1]);
    for (name, to, back) in types() {
        compare(
            c,
            &format!("linear{name}"),
            work(3),
            &[random(TOKENS, HIDDEN), random(INNER, HIDDEN)],
            |i| back(fused_ops::linear(to(i[0].clone()), i[1].clone())),
            |i| plain::linear(i[0].clone(), i[1].clone()),
        );
        compare(
            c,
            &format!("lora{name}"),
            work(2),
            &[random(TOKENS, HIDDEN), random(16, HIDDEN), random(INNER, 16)],
            |i| back(fused_ops::lora(to(i[0].clone()), base(&i[0]), i[1].clone(), i[2].clone(), 2.0)),
            |i| {
                let update = plain::linear(plain::linear(i[0].clone(), i[1].clone()), i[2].clone());
                plain::linear(i[0].clone(), base(&i[0])) + update * 2.0
            },
        );
        compare(
            c,
            &format!("head{name}"),
            Throughput::Elements(6 * (rows * HIDDEN * VOCAB) as u64),
            &[random(rows, HIDDEN), random(VOCAB, HIDDEN)],
            |i| flat(fused_ops::head(to(i[0].clone()), i[1].clone(), &targets, Logits::default())),
            |i| flat(plain::head(i[0].clone(), i[1].clone(), &targets, Logits::default())),
        );
    }
}

fn attention(c: &mut Criterion) {
    let heads = Heads { query: 9, kv: 3, dim: 64 };
    let mut segments = Segments::default();
    segments.push_row(0, 324, &[350, 350]);
    segments.push_row(1024, 324, &[350, 350]);
    let segments = Arc::new(segments);
    // A causal half of each square, and the tails' view of the shared part.
    let pairs = 2 * (324 * 324 / 2 + 2 * (350 * 324 + 350 * 350 / 2));
    for (name, to, back) in types() {
        compare(
            c,
            &format!("attention{name}"),
            Throughput::Elements(12 * (HIDDEN * pairs) as u64),
            &[random(TOKENS, 576), random(TOKENS, 192), random(TOKENS, 192)],
            |i| {
                let [q, k, v] = [0, 1, 2].map(|n| to(i[n].clone()));
                back(fused_ops::attention(q, k, v, &segments, heads, Scores::scaled(0.125)))
            },
            |i| {
                let [q, k, v] = [0, 1, 2].map(|n| i[n].clone());
                plain::attention(q, k, v, &segments, heads, Scores::scaled(0.125))
            },
        );
    }
}

fn elementwise(c: &mut Criterion) {
    let (x, inner) = (random(TOKENS, HIDDEN), random(TOKENS, INNER));
    compare(
        c,
        "rms_norm",
        values(5 * TOKENS * HIDDEN),
        &[x.clone(), random(1, HIDDEN)],
        |i| fused_ops::rms_norm(i[0].clone(), i[1].clone(), 1e-5),
        |i| plain::rms_norm(i[0].clone(), i[1].clone(), 1e-5),
    );
    compare(
        c,
        "layer_norm",
        values(5 * TOKENS * HIDDEN),
        &[x.clone(), random(1, HIDDEN), random(1, HIDDEN)],
        |i| fused_ops::layer_norm(i[0].clone(), i[1].clone(), i[2].clone(), 1e-5),
        |i| plain::layer_norm(i[0].clone(), i[1].clone(), i[2].clone(), 1e-5),
    );
    for (name, kind) in [("swiglu", Activation::Silu), ("geglu", Activation::GeluTanh)] {
        compare(
            c,
            name,
            values(8 * TOKENS * INNER),
            &[inner.clone(), inner.clone()],
            |i| fused_ops::gated(i[0].clone(), i[1].clone(), kind),
            |i| plain::gated(i[0].clone(), i[1].clone(), kind),
        );
    }
    let angles = |f: fn(f32) -> f32| (0..TOKENS * 32).map(|i| f(i as f32 * 1e-3)).collect::<Arc<[f32]>>();
    let table = Rotary { cos: angles(f32::cos), sin: angles(f32::sin), half: 32, dim: 64 };
    compare(
        c,
        "rotary",
        values(4 * TOKENS * HIDDEN),
        &[x],
        |i| fused_ops::rotary(i[0].clone(), &table),
        |i| plain::rotary(i[0].clone(), &table),
    );
}

/// Rows of a table of weights, and its gradient, zeros but for those rows.
fn embedding(c: &mut Criterion) {
    let ids: Vec<u32> = (0..TOKENS as u32).map(|i| i * 7919 % VOCAB as u32).collect();
    compare(
        c,
        "embedding",
        values(VOCAB * HIDDEN + 4 * TOKENS * HIDDEN),
        &[random(VOCAB, HIDDEN)],
        |i| fused_ops::lookup(i[0].clone(), &ids),
        |i| {
            let rows: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
            i[0].clone().select(0, Tensor::<1, Int>::from_data(rows.as_slice(), &i[0].device()))
        },
    );
}

/// Parameters, both moments and gradients: seven values moved for each.
fn adamw(c: &mut Criterion) {
    let (rows, cols) = (INNER, 4 * HIDDEN);
    let gradient = random(rows, cols);
    let adamw = AdamW { lr: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, step: 3 };
    let mut group = c.benchmark_group("adamw");
    group.sample_size(20).throughput(values(7 * rows * cols));
    let mut value = random(rows, cols);
    let mut moments = Moments::zeros(&value);
    group.bench_function("fused", |b| {
        b.iter(|| {
            let (old, kept) = (value.clone(), moments.clone());
            // Without other owners, so that it is updated in place.
            value = Tensor::zeros([1, 1], &under_test().device);
            moments = Moments::zeros(&value);
            let parameter =
                Parameter { value: old, gradient: gradient.clone(), moments: kept, weight_decay: 0.0 };
            let (new, kept) = adamw.update(vec![parameter], None).remove(0);
            (value, moments) = (new, kept);
            finish(value.clone());
        });
    });
    let (mut p, mut m, mut v) = (random(rows, cols), gradient.clone(), gradient.clone().square());
    group.bench_function("plain", |b| {
        b.iter(|| {
            m = m.clone() * 0.9 + gradient.clone() * 0.1;
            v = v.clone() * 0.999 + gradient.clone().square() * 0.001;
            p = p.clone() * (1.0 - 1e-6) - m.clone() / (v.clone().sqrt() / 0.05 + 1e-8) * 1e-4;
            finish(p.clone());
        });
    });
    group.finish();
}

/// Products of generation: weights of 30 layers, each read once a step, with few rows and with many.
fn packed(c: &mut Criterion) {
    for narrow in [false, true] {
        let weights: Vec<Packed> = (0..60).map(|_| Packed::new(random(INNER, HIDDEN), narrow)).collect();
        for rows in [1, 8, 29, 64, 512] {
            let x = random(rows, HIDDEN);
            let work = Throughput::Elements((2 * weights.len() * rows * INNER * HIDDEN) as u64);
            let mut group = c.benchmark_group(format!("packed {} bits", if narrow { 16 } else { 32 }));
            group.sample_size(10).throughput(work);
            let pass = || weights.iter().for_each(|weight| finish(weight.linear(x.clone())));
            group.bench_function(rows.to_string(), |b| b.iter(|| rayon::scope(|_| pass())));
            group.finish();
        }
    }
}

criterion_group!(ops, limits, products, attention, elementwise, embedding, adamw, packed);

fn main() {
    // As in training: otherwise most of the time goes into memory that is taken for the first time.
    allocator::keep_freed_memory();
    ops();
    Criterion::default().configure_from_args().final_summary();
}
