//! Arithmetic on a backend's own tensors, so that the generic kernels read like formulas.

use std::ops::{Add, Div, Mul, Neg, Range, Sub};

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Scalar, TensorMetadata};
use burn::tensor::{DType, FloatDType, IndexingUpdateOp, Shape, Slice};

use crate::ops::FusedOps;

/// A float tensor of the backend `B`.
pub struct Value<B: Backend>(pub FloatTensor<B>);

impl<B: Backend> Clone for Value<B> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

macro_rules! binary {
    ($trait:ident $method:ident $tensor:ident $scalar:ident) => {
        impl<B: Backend> $trait for Value<B> {
            type Output = Self;
            fn $method(self, other: Self) -> Self {
                Self(B::$tensor(self.0, other.0))
            }
        }
        impl<B: Backend> $trait<f32> for Value<B> {
            type Output = Self;
            fn $method(self, other: f32) -> Self {
                Self(B::$scalar(self.0, Scalar::from(other)))
            }
        }
    };
}
binary!(Add add float_add float_add_scalar);
binary!(Sub sub float_sub float_sub_scalar);
binary!(Mul mul float_mul float_mul_scalar);
binary!(Div div float_div float_div_scalar);

impl<B: Backend> Neg for Value<B> {
    type Output = Self;
    fn neg(self) -> Self {
        Self(B::float_neg(self.0))
    }
}

impl<B: FusedOps> Value<B> {
    /// Host values of a shape, on the device of `like`, as `f32`.
    pub fn upload(values: Vec<f32>, shape: &[usize], like: &Self) -> Self {
        Self(B::upload_floats(like.0.clone(), values, shape.to_vec()))
    }

    /// A weight in the data type of what it is multiplied with.
    pub fn weight_for(self, other: &Self) -> Self {
        if self.dtype() == other.dtype() { self } else { Self(B::weight_as(self.0, other.0.clone())) }
    }

    /// Indices on the device of `like`.
    pub fn indices(values: Vec<u32>, shape: &[usize], like: &Self) -> IntTensor<B> {
        B::upload_indices(like.0.clone(), values, shape.to_vec())
    }
}

impl<B: Backend> Value<B> {
    pub fn zeros(shape: &[usize], dtype: DType, like: &Self) -> Self {
        let shape = Shape::from(shape.to_vec());
        Self(B::float_zeros(shape, &like.0.device(), FloatDType::from(dtype)))
    }

    pub fn dims(&self) -> Vec<usize> {
        self.0.shape().to_vec()
    }

    pub fn dtype(&self) -> DType {
        self.0.dtype()
    }

    pub fn cast(self, dtype: DType) -> Self {
        if self.dtype() == dtype { self } else { Self(B::float_cast(self.0, FloatDType::from(dtype))) }
    }

    /// As `f32`, in which everything but large products is computed.
    pub fn wide(self) -> Self {
        self.cast(DType::F32)
    }

    pub fn exp(self) -> Self {
        Self(B::float_exp(self.0))
    }

    pub fn ln(self) -> Self {
        Self(B::float_log(self.0))
    }

    pub fn sqrt(self) -> Self {
        Self(B::float_sqrt(self.0))
    }

    pub fn tanh(self) -> Self {
        Self(B::float_tanh(self.0))
    }

    pub fn recip(self) -> Self {
        Self(B::float_recip(self.0))
    }

    pub fn square(self) -> Self {
        self.clone() * self
    }

    /// -1, 0 or 1.
    pub fn sign(self) -> Self {
        Self(B::float_sign(self.0))
    }

    /// At most 0.
    pub fn negative_part(self) -> Self {
        Self(B::float_clamp_max(self.0, Scalar::from(0.0_f32)))
    }

    pub fn sum(self, dim: usize) -> Self {
        self.reduced(dim, |part| Self(B::float_sum_dim(part.0, dim)))
    }

    pub fn mean(self, dim: usize) -> Self {
        let size = self.dims()[dim];
        self.sum(dim) * (1.0 / size as f32)
    }

    pub fn max(self, dim: usize) -> Self {
        self.reduced(dim, |part| Self(B::float_max_dim(part.0, dim)))
    }

    /// A reduction of one dimension, in two stages where it is long: CubeCL's kernels leave out values of rows of
    /// more than about 200,000.
    fn reduced(self, dim: usize, reduce: impl Fn(Self) -> Self) -> Self {
        const LONGEST: usize = 1 << 16;
        let size = self.dims()[dim];
        if size <= LONGEST {
            return reduce(self);
        }
        let starts = (0..size).step_by(LONGEST);
        let parts = starts.map(|start| reduce(self.clone().narrow(dim, start..(start + LONGEST).min(size))));
        reduce(Self::cat(parts.collect(), dim))
    }

    pub fn matmul(self, other: Self) -> Self {
        Self(B::float_matmul(self.0, other.0))
    }

    /// The last two dimensions exchanged.
    pub fn t(self) -> Self {
        Self(B::float_transpose(self.0))
    }

    pub fn permute(self, axes: &[usize]) -> Self {
        Self(B::float_permute(self.0, axes))
    }

    pub fn reshape(self, shape: &[usize]) -> Self {
        Self(B::float_reshape(self.0, Shape::from(shape.to_vec())))
    }

    /// A range of one dimension.
    pub fn narrow(self, dim: usize, range: Range<usize>) -> Self {
        let whole = self.dims();
        if range == (0..whole[dim]) {
            return self;
        }
        let mut slices: Vec<Slice> = whole.into_iter().map(|size| Slice::from(0..size)).collect();
        slices[dim] = Slice::from(range);
        Self(B::float_slice(self.0, &slices))
    }

    /// Rows written over those of a range.
    pub fn assign(self, rows: Range<usize>, values: Self) -> Self {
        let slices = [Slice::from(rows), Slice::from(0..self.dims()[1])];
        Self(B::float_slice_assign(self.0, &slices, values.0))
    }

    pub fn cat(parts: Vec<Self>, dim: usize) -> Self {
        let mut parts: Vec<FloatTensor<B>> = parts.into_iter().map(|part| part.0).collect();
        match parts.len() {
            1 => Self(parts.remove(0)),
            _ => Self(B::float_cat(parts, dim)),
        }
    }

    pub fn gather(self, dim: usize, indices: IntTensor<B>) -> Self {
        Self(B::float_gather(dim, self.0, indices))
    }

    /// Adds `values` at `indices` of dimension `dim`.
    pub fn scatter_add(self, dim: usize, indices: IntTensor<B>, values: Self) -> Self {
        Self(B::float_scatter(dim, self.0, indices, values.0, IndexingUpdateOp::Add))
    }

    /// `cap · tanh(x / cap)`, or `x` where there is no cap.
    pub fn softcapped(self, cap: Option<f32>) -> Self {
        match cap {
            Some(cap) => (self * (1.0 / cap)).tanh() * cap,
            None => self,
        }
    }

    /// Derivative of [`Value::softcapped`], given its result.
    pub fn softcap_slope(self, cap: Option<f32>) -> Option<Self> {
        cap.map(|cap| -(self * (1.0 / cap)).square() + 1.0)
    }
}
