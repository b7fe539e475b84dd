//! The operations of generation on the backend under test: packed weights and paged attention against the plain
//! composition of Burn operations on Flex.

#![allow(clippy::unwrap_used)]

// Not all of it is used here.
#[allow(dead_code)]
mod plain;

mod common;

use std::sync::Arc;

use backend::under_test;
use burn::tensor::{Device, Tensor};
use fused_ops::{Cache, Heads, PAGE, Packed, Scores, Segment, Segments, Span, cached_attention, linear};

fn random(rows: usize, cols: usize) -> Tensor<2> {
    Tensor::from_data(common::normal(rows, cols), &under_test().device)
}

fn host(tensor: &Tensor<2>) -> Vec<f32> {
    tensor.clone().into_data().try_into_vec_as::<f32>().unwrap()
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |top, d| if d.is_nan() { f32::INFINITY } else { top.max(d) })
}

fn allowed(tolerance: f32) -> f32 {
    tolerance * under_test().backend.tolerance().operations as f32
}

#[test]
fn packed_weights_give_the_same_products() {
    for (tokens, inner, outer) in [(1, 24, 41), (13, 33, 64), (250, 48, 100), (29, 576, 96)] {
        let (x, w) = (random(tokens, inner), random(outer, inner));
        let want = host(&linear(x.clone(), w.clone()));
        let got = host(&Packed::new(w.clone(), false).linear(x.clone()));
        assert!(
            worst(&got, &want) < allowed(1e-5) * (inner as f32).sqrt(),
            "{tokens}x{inner}x{outer}: {:e}",
            worst(&got, &want)
        );
        let narrow = host(&Packed::new(w, true).linear(x));
        // Eight bits of each factor: sums of `inner` products of size 1 are off by about sqrt(inner) · 2^-9 · sqrt(2).
        let noise = (inner as f32).sqrt() * 2.0_f32.powi(-9) * 1.5 * 6.0;
        assert!(worst(&narrow, &want) < noise, "{tokens}x{inner}x{outer}: {:e}", worst(&narrow, &want));
        if under_test().backend.is_on_host() {
            assert!(narrow != want, "16 bits were asked for");
        }
    }
}

/// Sequences of different lengths, written and read in several passes over scattered pages.
fn in_passes(heads: Heads, scores: Scores, narrow: bool, tolerance: f32) {
    let lengths = [70, 33, 5];
    let total: usize = lengths.iter().sum();
    let (q, k, v) = (
        random(total, heads.query * heads.dim),
        random(total, heads.kv * heads.dim),
        random(total, heads.kv * heads.dim),
    );
    let mut segments = Segments::default();
    let starts = [0, 70, 103];
    for (&query, &len) in starts.iter().zip(&lengths) {
        segments.push(Segment { query, len, prefix: query, prefix_len: 0, own: query });
    }
    let flex = |t: &Tensor<2>| t.clone().to_device(&Device::flex());
    let want = host(&plain::attention(flex(&q), flex(&k), flex(&v), &Arc::new(segments), heads, scores));
    let pages = [vec![6, 1, 3], vec![2, 7], vec![5]];
    let mut cache = Cache::new(&q, narrow, 8, heads);
    let mut seen = [0; 3];
    let width = heads.query * heads.dim;
    for part in [[31, 1, 0], [1, 31, 5], [38, 1, 0]] {
        let rows = |t: &Tensor<2>| {
            let parts =
                (0..3).filter(|&i| part[i] > 0).map(|i| t.clone().narrow(0, starts[i] + seen[i], part[i]));
            Tensor::cat(parts.collect(), 0)
        };
        let mut query = 0;
        let mut spans = Vec::new();
        for i in (0..3).filter(|&i| part[i] > 0) {
            spans.push(Span { query, len: part[i], seen: seen[i], pages: pages[i].clone() });
            query += part[i];
        }
        let out;
        (out, cache) =
            cached_attention([rows(&q), rows(&k), rows(&v)], cache, &Arc::new(spans.clone()), heads, scores);
        let out = host(&out);
        for (span, i) in spans.iter().zip((0..3).filter(|&i| part[i] > 0)) {
            let first = (starts[i] + seen[i]) * width;
            let (got, want) =
                (&out[span.query * width..][..span.len * width], &want[first..][..span.len * width]);
            assert!(
                worst(got, want) < tolerance,
                "{heads:?}, sequence {i} from {}: {:e}",
                seen[i],
                worst(got, want)
            );
            seen[i] += part[i];
        }
    }
    assert_eq!(seen, lengths);
}

#[test]
fn attention_over_pages_is_that_of_whole_sequences() {
    let shapes = [
        Heads { query: 6, kv: 2, dim: 16 },
        Heads { query: 9, kv: 3, dim: 64 },
        Heads { query: 4, kv: 4, dim: 40 },
        Heads { query: 14, kv: 1, dim: 80 },
    ];
    for heads in shapes {
        let plain = Scores::scaled(0.25);
        let capped = Scores { softcap: Some(5.0), window: Some(20), ..plain };
        for scores in [plain, capped] {
            in_passes(heads, scores, false, allowed(2e-5));
            // Probabilities and values of 8 bits.
            in_passes(heads, scores, true, 0.06);
        }
    }
}

#[test]
#[should_panic(expected = "more tokens than its pages hold")]
fn a_sequence_without_room_is_refused() {
    let heads = Heads { query: 1, kv: 1, dim: 8 };
    let x = random(PAGE + 1, 8);
    let spans = Arc::new(vec![Span { query: 0, len: PAGE + 1, seen: 0, pages: vec![0] }]);
    cached_attention(
        [x.clone(), x.clone(), x.clone()],
        Cache::new(&x, false, 2, heads),
        &spans,
        heads,
        Scores::scaled(1.0),
    );
}

#[test]
fn what_a_page_held_before_does_not_matter() {
    let (heads, scores) = (Heads { query: 2, kv: 1, dim: 16 }, Scores::scaled(0.25));
    let span = |len, seen, query| Span { query, len, seen, pages: vec![0] };
    for narrow in [false, true] {
        let [q, k, v] = [32, 16, 16].map(|width| random(7, width));
        let run = |mut cache: Cache| {
            let mut outs = Vec::new();
            // A prompt of six tokens, then one more.
            for (from, len) in [(0, 6), (6, 1)] {
                let part = [&q, &k, &v].map(|x| x.clone().narrow(0, from, len));
                let out;
                (out, cache) =
                    cached_attention(part, cache, &Arc::new(vec![span(len, from, 0)]), heads, scores);
                outs.extend(host(&out));
            }
            outs
        };
        let want = run(Cache::new(&q, narrow, 1, heads));
        let broken = [32, 16, 16].map(|width| random(PAGE, width) * f32::NAN);
        let cache = Cache::new(&q, narrow, 1, heads);
        let (_, cache) = cached_attention(broken, cache, &Arc::new(vec![span(PAGE, 0, 0)]), heads, scores);
        assert_eq!(run(cache), want);
        assert!(want.iter().all(|value| value.is_finite()));
    }
}
