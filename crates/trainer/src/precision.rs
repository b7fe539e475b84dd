//! Data types of a run: what frozen matrices are held in, and what is computed in.

use backend::Backend;
use burn::tensor::DType;
use serde::Serialize;

use crate::args::{Args, Dtype};

/// Data types of a run. Weights that are trained, their gradients, the optimizer, the residual stream, norms, softmax
/// and losses are always `f32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Precision {
    /// What was asked for.
    pub dtype: &'static str,
    /// Of matrices that are not trained.
    pub frozen: &'static str,
    /// Of matrix products and attention.
    pub compute: &'static str,
    /// Why.
    pub reason: &'static str,
}

impl Precision {
    /// What `--dtype` and `--bf16` ask for, or a usage error.
    pub fn new(args: &Args) -> Result<Self, String> {
        let adapter = args.peft.use_peft || args.peft.adapter_path.is_some();
        let narrow = args.dtype == Dtype::Bfloat16;
        let mixed = narrow || args.bf16 == Some(true);
        if mixed {
            let flag = if narrow { "--dtype bfloat16" } else { "--bf16 True" };
            args.backend.check_bfloat16(flag).map_err(|error| error.to_string())?;
        }
        let name = |narrow: bool| if narrow { "bfloat16" } else { "float32" };
        Ok(Self {
            dtype: name(mixed),
            frozen: name(narrow && adapter),
            compute: name(mixed),
            reason: match (mixed, narrow && adapter) {
                (true, _) if args.backend == Backend::Flex && !fused_ops::has_narrow_products() => {
                    "asked for: products in bfloat16, which save memory here and no time: this processor does not multiply \
                     them (AVX512-BF16)"
                }
                (true, true) => {
                    "asked for: products and the base model in bfloat16; what is trained, softmax and losses in float32"
                }
                (true, false) => {
                    "asked for: products in bfloat16; weights, gradients, softmax and losses in float32"
                }
                _ if args.backend.has_bfloat16() => {
                    "full precision; this backend also computes in --dtype bfloat16"
                }
                _ => "full precision: this backend has no faster type for training",
            },
        })
    }

    /// Data type of frozen matrices.
    pub fn frozen(self) -> DType {
        dtype(self.frozen)
    }

    /// Data type of products.
    pub fn compute(self) -> DType {
        dtype(self.compute)
    }

    /// Distinguishes values computed in different types.
    pub fn key(self) -> String {
        format!("{} {}", self.frozen, self.compute)
    }
}

fn dtype(name: &str) -> DType {
    if name == "bfloat16" { DType::BF16 } else { DType::F32 }
}
