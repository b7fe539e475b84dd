//! CPU kernels on slices: no tensor type, no allocation policy, only arithmetic.

pub mod adamw;
pub mod attention;
mod blocks;
pub mod brain;
pub mod dither;
pub mod elementwise;
pub mod head;
mod layout;
pub mod matrix;
pub mod norm;
pub mod packed;
pub mod paged;
pub mod panel;
pub mod product;
mod scores;
pub mod simd;
