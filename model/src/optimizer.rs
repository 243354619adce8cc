//! AdamW on the flat f32 master weights, after Loshchilov & Hutter, "Decoupled Weight Decay
//! Regularization" (2019), with the gradient clipped by its global norm.
//!
//! Weights of two dimensions decay; norms, the only ones of one dimension, do not, as is usual for Llama.
//!
//! Shape in names: `p` the canonical vector.

use manyhands_gradient::Layout;
use manyhands_gradient::moments8::Moments;
use manyhands_proto::run_file::Training;
use tch::{Device, Kind, Tensor};

use crate::parameters::{Parameters, to_device, to_host};

/// Keeps a division by a vanishing gradient norm finite; the value that PyTorch's `clip_grad_norm_` has.
const CLIP_EPSILON: f64 = 1e-6;

/// The optimiser's state: first and second moments and the number of steps they average over.
#[derive(Debug)]
pub(crate) struct AdamW {
    first_p: Tensor,
    second_p: Tensor,
    step: u64,
    /// Offset and length of what decays.
    decaying: Vec<(i64, i64)>,
}

impl AdamW {
    /// A state from canonical vectors of moments, after `step` steps.
    ///
    /// # Panics
    /// When a vector is not as long as the layout's.
    pub(crate) fn new(layout: &Layout, moments: &Moments, step: u64, device: Device) -> Self {
        let Moments { first, second } = moments;
        assert_eq!(first.len(), layout.vector_len(), "m must be a whole canonical vector");
        assert_eq!(second.len(), layout.vector_len(), "v must be a whole canonical vector");
        Self {
            first_p: to_device(first, device),
            second_p: to_device(second, device),
            step,
            decaying: decaying(layout),
        }
    }

    /// A state that has seen nothing.
    pub(crate) fn fresh(layout: &Layout, device: Device) -> Self {
        let zeros = || Tensor::zeros([layout.vector_len() as i64], (Kind::Float, device));
        Self { first_p: zeros(), second_p: zeros(), step: 0, decaying: decaying(layout) }
    }

    /// Changes θ by one step along `gradient_p`, which is clipped in place.
    pub(crate) fn step(
        &mut self,
        parameters: &Parameters,
        gradient_p: &mut Tensor,
        training: &Training,
        learning_rate: f64,
    ) {
        tch::no_grad(|| {
            let norm = gradient_p.norm();
            // Stays on the device: reading the norm would wait for it.
            let factor =
                ((norm + CLIP_EPSILON).reciprocal() * training.gradient_clip).clamp_max(1.0);
            let _ = gradient_p.g_mul_(&factor);

            self.step += 1;
            let Training { beta1, beta2, epsilon, weight_decay, .. } = *training;
            let _ = self.first_p.lerp_(gradient_p, 1.0 - beta1);
            let _ = self.second_p.g_mul_scalar_(beta2);
            let squared_p = &*gradient_p * &*gradient_p;
            let _ = self.second_p.g_add_(&(squared_p * (1.0 - beta2)));

            let mut theta_p = parameters.flat().shallow_clone();
            for &(offset, length) in &self.decaying {
                let _ = theta_p
                    .narrow(0, offset, length)
                    .g_mul_scalar_(1.0 - learning_rate * weight_decay);
            }
            let steps = i32::try_from(self.step).unwrap_or(i32::MAX);
            let first_correction = 1.0 - beta1.powi(steps);
            let second_correction = 1.0 - beta2.powi(steps);
            let denominator_p = self.second_p.sqrt() / second_correction.sqrt() + epsilon;
            let update_p = (&self.first_p / denominator_p) * (-learning_rate / first_correction);
            let _ = theta_p.g_add_(&update_p);
        });
    }

    /// First and second moments as canonical vectors.
    pub(crate) fn moments(&self) -> Moments {
        Moments { first: to_host(&self.first_p), second: to_host(&self.second_p) }
    }

    /// Steps taken since the moments were zero.
    pub(crate) fn steps(&self) -> u64 {
        self.step
    }
}

fn decaying(layout: &Layout) -> Vec<(i64, i64)> {
    layout
        .tensors()
        .iter()
        .filter(|tensor| tensor.shape().len() >= 2)
        .map(|tensor| (tensor.offset() as i64, tensor.elements() as i64))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn training() -> Training {
        serde_json::from_str(
            r#"{"steps_per_round":1,"batch_sequences":1,"micro_batch_sequences":1,"learning_rate":0.01,
                "weight_decay":0.1,"beta1":0.9,"beta2":0.95,"epsilon":1e-8,"gradient_clip":1.0}"#,
        )
        .expect("a training section")
    }

    /// AdamW of one number in f64, as the paper writes it: decay, moments, correction, update.
    fn by_hand(theta: f64, gradients: &[f64], learning_rate: f64, decay: f64) -> (f64, f64, f64) {
        let (mut theta, mut first, mut second) = (theta, 0.0, 0.0);
        for (step, gradient) in (1..).zip(gradients) {
            theta -= learning_rate * decay * theta;
            first = 0.9 * first + 0.1 * gradient;
            second = 0.95 * second + 0.05 * gradient * gradient;
            let corrected = first / (1.0 - 0.9_f64.powi(step));
            let root = (second / (1.0 - 0.95_f64.powi(step))).sqrt();
            theta -= learning_rate * corrected / (root + 1e-8);
        }
        (theta, first, second)
    }

    #[test]
    fn three_steps_are_what_they_are_by_hand() {
        let named = [("matrix".to_owned(), vec![1, 2]), ("norm".to_owned(), vec![1])];
        let layout = Layout::from_tensors(named.to_vec()).expect("a layout");
        let (matrix, norm) = (0, layout.tensors()[1].offset());
        let mut theta = vec![0.0; layout.vector_len()];
        (theta[matrix], theta[matrix + 1], theta[norm]) = (0.5, -2.0, 1.0);
        let parameters = Parameters::new(&layout, &theta, Device::Cpu);
        let mut optimizer = AdamW::fresh(&layout, Device::Cpu);
        // The second is longer than 1, and is clipped to it: (3, 4, 0) / 5.
        let gradients = [[0.1, -0.2, 0.3], [3.0, 4.0, 0.0], [0.0, 0.5, -0.5]];
        for gradient in gradients {
            let mut vector = vec![0.0; layout.vector_len()];
            (vector[matrix], vector[matrix + 1], vector[norm]) =
                (gradient[0], gradient[1], gradient[2]);
            let mut gradient_p = to_device(&vector, Device::Cpu);
            optimizer.step(&parameters, &mut gradient_p, &training(), 0.01);
        }
        assert_eq!(optimizer.steps(), 3);
        let end = parameters.to_vec();
        let moments = optimizer.moments();
        for (place, start, gradients, decay) in [
            (matrix, 0.5, [0.1, 0.6, 0.0], 0.1),
            (matrix + 1, -2.0, [-0.2, 0.8, 0.5], 0.1),
            (norm, 1.0, [0.3, 0.0, -0.5], 0.0),
        ] {
            let (theta, first, second) = by_hand(start, &gradients, 0.01, decay);
            assert!(
                (f64::from(end[place]) - theta).abs() < 1e-6,
                "θ[{place}] is {}, not {theta}",
                end[place]
            );
            assert!((f64::from(moments.first[place]) - first).abs() < 1e-6);
            assert!((f64::from(moments.second[place]) - second).abs() < 1e-7);
        }
        assert_eq!(end[2], 0.0, "padding does not move");
    }
}
