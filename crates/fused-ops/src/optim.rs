//! AdamW with decoupled weight decay, in place where the tensor is not shared.

use burn::tensor::Tensor;

/// Settings of one AdamW step (Loshchilov & Hutter, arXiv 1711.05101; `torch.optim.AdamW`).
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay; the parameter is multiplied by `1 - lr · weight_decay`.
    pub weight_decay: f64,
    /// Number of this step, from 1.
    pub step: u32,
}

/// First and second moment of one parameter, of its shape.
#[derive(Debug, Clone)]
pub struct Moments {
    /// Running mean of the gradient.
    pub first: Tensor<2>,
    /// Running mean of its square.
    pub second: Tensor<2>,
}

impl Moments {
    /// Zeros of the parameter's shape.
    pub fn zeros(parameter: &Tensor<2>) -> Self {
        let zeros = Tensor::zeros(parameter.dims(), &parameter.device().inner());
        Self { first: zeros.clone(), second: zeros }
    }
}

impl AdamW {
    /// One step. `parameter` and `gradient` have no autodiff association; the gradient is multiplied by
    /// `scale` first. Works in place where a tensor has no other owner.
    pub fn update(
        &self,
        parameter: Tensor<2>,
        gradient: Tensor<2>,
        moments: Moments,
        scale: f32,
    ) -> (Tensor<2>, Moments) {
        #[cfg(feature = "flex")]
        if crate::fused(&parameter) {
            return self.update_flex(parameter, &gradient, moments, scale);
        }
        let gradient = gradient * scale;
        let first = moments.first * self.beta1 + gradient.clone() * (1.0 - self.beta1);
        let second = moments.second * self.beta2 + gradient.square() * (1.0 - self.beta2);
        let correction1 = 1.0 - f64::from(self.beta1).powi(self.step as i32);
        let correction2 = 1.0 - f64::from(self.beta2).powi(self.step as i32);
        let denominator = second.clone().sqrt() / correction2.sqrt() + self.eps;
        let step = first.clone() / denominator * (self.lr / correction1);
        let parameter = parameter * (1.0 - self.lr * self.weight_decay) - step;
        (parameter, Moments { first, second })
    }

    #[cfg(feature = "flex")]
    fn update_flex(
        &self,
        parameter: Tensor<2>,
        gradient: &Tensor<2>,
        moments: Moments,
        scale: f32,
    ) -> (Tensor<2>, Moments) {
        use burn::backend::Flex;
        use burn::backend::flex::FlexTensor;
        let primitive = |t: Tensor<2>| -> FlexTensor {
            let t = t.try_into_primitive::<Flex>().expect("checked: a Flex tensor");
            if t.is_contiguous() && t.layout().start_offset() == 0 { t } else { t.to_contiguous() }
        };
        let (mut p, g) = (primitive(parameter), primitive(gradient.clone()));
        let (mut m, mut v) = (primitive(moments.first), primitive(moments.second));
        let (p_data, m_data, v_data) = (p.storage_mut(), m.storage_mut(), v.storage_mut());
        crate::kernels::adamw::step(self, p_data, g.storage(), m_data, v_data, scale);
        let tensor = Tensor::from_primitive::<Flex>;
        (tensor(p), Moments { first: tensor(m), second: tensor(v) })
    }
}

/// Sum of the squares of all elements, in `f64`. Reads back from the device.
pub fn sum_of_squares(tensor: &Tensor<2>) -> f64 {
    #[cfg(feature = "flex")]
    if crate::fused(tensor) {
        let primitive = tensor.clone().try_into_primitive::<burn::backend::Flex>();
        let primitive = primitive.expect("checked: a Flex tensor").to_contiguous();
        return crate::kernels::adamw::sum_of_squares(primitive.storage());
    }
    f64::from(tensor.clone().square().sum().into_scalar::<f32>())
}
