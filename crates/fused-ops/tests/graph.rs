//! Where the graph branches and joins, and rows of tables: the same values and gradients as Burn's own operations on
//! Flex.

#![allow(clippy::unwrap_used)]

mod common;

use backend::under_test;
use burn::tensor::{DType, Tensor};
use common::{check, difference, random};
use fused_ops::{add, branches, cast, join, linear, lookup, narrow, select};

const TOLERANCE: f32 = 1e-5;

/// Three uses of a tensor, one of which branches again; a fourth beside the branches; one branch that is not used.
fn used(x: Tensor<2>) -> Tensor<2> {
    let [a, b, c, _unused] = branches(x.clone());
    let [c, d] = branches(c);
    a * 2.0 + b.tanh() + c * d + (x * 0.5).tanh()
}

fn used_plainly(x: Tensor<2>) -> Tensor<2> {
    x.clone() * 2.0 + x.clone().tanh() + x.clone() * x.clone() + (x * 0.5).tanh()
}

#[test]
fn gradients_of_branches_are_summed() {
    let (x, w) = (random(33, 17), (random(17, 17).inner() * 0.2).autodiff().require_grad());
    check(std::slice::from_ref(&x), TOLERANCE, |i| used(i[0].clone()), |i| used_plainly(i[0].clone()));
    // Of a tensor that is computed, and again for the gradient of a weight.
    let product = |i: &[Tensor<2>]| linear(i[0].clone(), i[1].clone());
    let plain = |i: &[Tensor<2>]| i[0].clone().matmul(i[1].clone().transpose());
    check(&[x.clone(), w.clone()], TOLERANCE, |i| used(product(i)), |i| used_plainly(plain(i)));
    check(
        &[x, w],
        TOLERANCE,
        |i| {
            let [a, b] = branches(i[0].clone());
            linear(a, i[1].clone()) + linear(b, i[1].clone())
        },
        |i| plain(i) * 2.0,
    );
}

#[test]
fn branches_without_a_graph_are_the_tensor() {
    let x = random(5, 7).inner();
    for branch in branches::<2>(x.clone()) {
        assert!(branch.into_data() == x.clone().into_data());
    }
}

#[test]
fn a_join_is_a_sum() {
    let (x, y) = (random(33, 17), random(33, 17));
    check(
        &[x.clone(), y.clone()],
        TOLERANCE,
        |i| join(i[0].clone(), i[1].clone()),
        |i| i[0].clone() + i[1].clone(),
    );
    if under_test().backend.has_bfloat16() {
        let rounded = cast(y.clone(), DType::BF16.into());
        let sum = join(x.clone(), rounded);
        assert_eq!(sum.dtype(), DType::F32);
        let apart = difference(&sum, &(x.clone() + y.clone()));
        assert!(apart > 0.0 && apart < 0.05, "{apart}");
        let grads = sum.sum().backward();
        for leaf in [x, y] {
            let gradient = leaf.grad(&grads).unwrap();
            assert_eq!(gradient.dtype(), DType::F32);
            assert!(gradient.into_data().try_into_vec_as::<f32>().unwrap().iter().all(|&g| g == 1.0));
        }
    }
}

const ROWS: [u32; 7] = [3, 0, 3, 8, 1, 3, 8];

fn rows_plainly(table: Tensor<2>) -> Tensor<2> {
    let rows = ROWS.map(|row| table.clone().narrow(0, row as usize, 1));
    Tensor::cat(rows.to_vec(), 0)
}

#[test]
fn rows_have_their_gradients_summed() {
    let (table, w) = (random(9, 20), random(20, 20));
    for rows in [select, lookup] {
        check(
            std::slice::from_ref(&table),
            TOLERANCE,
            |i| rows(i[0].clone(), &ROWS),
            |i| rows_plainly(i[0].clone()),
        );
        // The table has other gradients, before and after.
        check(
            &[table.clone(), w.clone()],
            TOLERANCE,
            |i| linear(linear(rows(i[0].clone(), &ROWS), i[1].clone()), i[0].clone()),
            |i| {
                let hidden = rows_plainly(i[0].clone()).matmul(i[1].clone().transpose());
                hidden.matmul(i[0].clone().transpose())
            },
        );
    }
}

#[test]
fn rows_of_a_frozen_table() {
    if under_test().backend.has_bfloat16() {
        let table = narrow(random(9, 20).inner());
        let (rows, all) = (lookup(table.clone(), &ROWS), table.cast(DType::F32).into_data());
        let all = all.try_into_vec_as::<f32>().unwrap();
        let want: Vec<f32> = ROWS.iter().flat_map(|&row| all[row as usize * 20..][..20].to_vec()).collect();
        assert!(rows.into_data().try_into_vec_as::<f32>().unwrap() == want);
    }
}

#[test]
fn a_sum_leaves_what_others_hold() {
    let (a, b) = (random(40, 900).inner(), random(40, 900).inner());
    let before = a.clone().into_data();
    let sum = add(a.clone(), b.clone());
    assert!(a.clone().into_data() == before);
    assert!(difference(&sum, &(a.clone() + b.clone())) == 0.0);
    assert!(difference(&add(a, b), &sum) == 0.0);
}
