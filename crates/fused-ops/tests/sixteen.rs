//! Every operation in 16 bits beside itself in 32.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use backend::{Backend, under_test};
use burn::tensor::{DType, Tensor};
use common::{difference, random};
use fused_ops::{Activation, Heads, Logits, Rotary, Scores, Segments};

/// A linear layer in 16 bits is the exact one of its rounded operands, rounded; the gradient of its weight is not.
#[test]
fn products_of_sixteen_bits_are_summed_in_thirty_two() {
    if !under_test().backend.has_bfloat16() {
        return;
    }
    // Odd sizes, fewer rows than a tile, rows that share places in a cache.
    for (tokens, inner, outer) in [(37, 24, 41), (5, 33, 64), (50, 2048, 35), (300, 47, 100)] {
        let (x, w, g) = (random(tokens, inner), random(outer, inner), random(tokens, outer));
        let narrow = |t: &Tensor<2>| fused_ops::cast(t.clone(), DType::BF16.into());
        let single = |t: Tensor<2>| fused_ops::cast(t, DType::F32.into());
        let run = |x: Tensor<2>, w: Tensor<2>, out: &dyn Fn(Tensor<2>) -> Tensor<2>| {
            let y = out(fused_ops::linear(x, w));
            (y.clone(), (y * g.clone()).sum().backward())
        };
        let rounded = single(narrow(&g)).inner();
        let (y, grads) = run(narrow(&x), w.clone(), &single);
        let weight = Tensor::from_inner(single(fused_ops::narrow(w.clone().inner()))).require_grad();
        let exact_x = Tensor::from_inner(single(narrow(&x)).inner()).require_grad();
        let exact_y = fused_ops::linear(exact_x.clone(), weight.clone());
        let exact = (exact_y.clone() * Tensor::from_inner(rounded)).sum().backward();
        let of = |t: &Tensor<2>, grads| t.grad(grads).unwrap();
        let apart = |a: &Tensor<2>, b: &Tensor<2>| {
            difference(a, b) / b.clone().inner().abs().max().into_scalar::<f32>()
        };
        let size = format!("{tokens}x{inner}x{outer}");
        assert!(apart(&y, &exact_y) < 0.005, "{size}: {:e}", apart(&y, &exact_y));
        let (dx, want) = (of(&x, &grads), of(&exact_x, &exact));
        assert!(apart(&dx, &want) < 0.005, "{size}: {:e}", apart(&dx, &want));
        let (dw, want) = (of(&w, &grads), of(&weight, &exact));
        let allowed = if under_test().backend == Backend::Flex { 1e-5 } else { 0.005 };
        assert!(apart(&dw, &want) < allowed, "{size}: {:e}", apart(&dw, &want));
    }
}

/// In 16 bits it is what it is in 32 of the same operands, to within their rounding; adapters as well, whose gradients are of
/// their own type.
#[test]
fn sixteen_bits_are_close_to_thirty_two() {
    if !under_test().backend.has_bfloat16() {
        return;
    }
    let narrow = |t: &Tensor<2>| fused_ops::cast(t.clone(), DType::BF16.into());
    let single = |t: Tensor<2>| fused_ops::cast(t, DType::F32.into());
    let near = |inputs: &[Tensor<2>], wide: Tensor<2>, half: Tensor<2>| {
        let g = random(wide.dims()[0], wide.dims()[1]);
        let apart = |a: &Tensor<2>, b: &Tensor<2>| {
            difference(a, b) / b.clone().inner().abs().max().into_scalar::<f32>()
        };
        assert!(apart(&half, &wide) < 0.02, "values: {:e}", apart(&half, &wide));
        let [half, wide] = [half, wide].map(|out| (out * g.clone()).sum().backward());
        for (i, input) in inputs.iter().enumerate() {
            let (a, b) = (input.grad(&half).unwrap(), input.grad(&wide).unwrap());
            assert_eq!(a.dtype(), DType::F32);
            assert!(apart(&a, &b) < 0.03, "gradient {i}: {:e}", apart(&a, &b));
        }
    };
    let mut segments = Segments::default();
    segments.push_row(0, 70, &[65, 3]);
    let segments = Arc::new(segments);
    for dim in [20, 40, 7] {
        let heads = Heads { query: 6, kv: 2, dim };
        let inputs = [random(138, 6 * dim), random(138, 2 * dim), random(138, 2 * dim)];
        for (softcap, window) in [(None, None), (Some(2.0), None), (None, Some(9)), (Some(2.0), Some(9))] {
            let scores = Scores { scale: 0.25, softcap, window };
            let run = |[q, k, v]: [Tensor<2>; 3]| fused_ops::attention(q, k, v, &segments, heads, scores);
            let half = single(run(inputs.each_ref().map(narrow)));
            near(&inputs, run(inputs.clone()), half);
        }
    }
    let (x, w, a, b) = (random(37, 24), random(41, 24).inner(), random(3, 24), random(41, 3));
    let run =
        |x: Tensor<2>| fused_ops::lora(x, Tensor::from_inner(w.clone()), a.clone(), b.clone(), 4.0 / 3.0);
    let half = single(run(narrow(&x)));
    near(&[x.clone(), a.clone(), b.clone()], run(x), half);
    // A device's are held to Flex's when a run starts.
    if !under_test().backend.is_on_host() {
        return;
    }
    // Several tasks.
    let mut long = Segments::default();
    long.push_row(0, 300, &[310]);
    let (long, heads) = (Arc::new(long), Heads { query: 2, kv: 1, dim: 20 });
    let inputs = [random(610, 40), random(610, 20), random(610, 20)];
    let run = |[q, k, v]: [Tensor<2>; 3]| fused_ops::attention(q, k, v, &long, heads, Scores::scaled(0.25));
    near(&inputs, run(inputs.clone()), single(run(inputs.each_ref().map(narrow))));
    let (x, y, scale, shift) = (random(37, 48), random(37, 48), random(1, 48), random(1, 48));
    let angles = |f: fn(f32) -> f32| (0..37 * 8).map(|i| f(i as f32 * 0.37)).collect::<Arc<[f32]>>();
    let table = Rotary { cos: angles(f32::cos), sin: angles(f32::sin), half: 8, dim: 24 };
    let one = |inputs: &[Tensor<2>], op: &dyn Fn(Tensor<2>) -> Tensor<2>| {
        near(inputs, op(inputs[0].clone()), single(op(narrow(&inputs[0]))));
    };
    one(&[x.clone(), scale.clone()], &|x| fused_ops::rms_norm(x, scale.clone(), 1e-5));
    one(std::slice::from_ref(&x), &|x| fused_ops::rotary(x, &table));
    for kind in [Activation::Silu, Activation::GeluTanh] {
        one(std::slice::from_ref(&x), &|x| fused_ops::activate(x, kind));
        let half = single(fused_ops::gated(narrow(&x), narrow(&y), kind));
        near(&[x.clone(), y.clone()], fused_ops::gated(x.clone(), y.clone(), kind), half);
    }
    one(&[x.clone(), scale.clone(), shift.clone()], &|x| {
        fused_ops::layer_norm(x, scale.clone(), shift.clone(), 1e-5)
    });
    let (table, targets) = (random(301, 48), Arc::new((0..37).map(|i| i * 8).collect::<Vec<u32>>()));
    for logits in [Logits::default(), Logits { scale: 0.5, softcap: Some(3.0) }] {
        let head = |x: Tensor<2>| fused_ops::head(x, table.clone(), &targets, logits).logps.reshape([37, 1]);
        near(&[x.clone(), table.clone()], head(x.clone()), head(narrow(&x)));
    }
}
