//! Tensors in the memory of this process, as their backends have them.

use burn::backend::TensorMetadata;

use crate::kernels::panel::Element;

/// A tensor that kernels read and write directly.
pub trait Host: Clone + TensorMetadata {
    /// The same values without gaps.
    fn flat(&self) -> Self;

    /// All values of a tensor without gaps, which must be of this type.
    fn storage<T: Element>(&self) -> &[T];

    /// The same, to be changed: copied first where something else holds them.
    fn storage_mut<T: Element>(&mut self) -> &mut [T];

    /// A tensor of these values.
    fn new<T: Element>(values: Vec<T>, shape: &[usize]) -> Self;
}
