//! AdamW on the flat f32 master weights, after Loshchilov & Hutter, "Decoupled Weight Decay
//! Regularization" (2019), with the gradient clipped by its global norm.
//!
//! Weights of two dimensions decay; norms, the only ones of one dimension, do not, as is usual for Llama.
//!
//! On a CPU a step reads gradients where the backward pass left them, once for their norm and once for everything
//! else, in an order that no number of threads changes: what tch offers of libtorch takes a dozen passes, and its
//! fused optimisers are not among it.
//!
//! Shape in names: `p` the canonical vector.

use std::ops::Range;

use manyhands_gradient::moments8::Moments;
use manyhands_gradient::{CHUNK, Layout};
use manyhands_proto::run_file::Training;
use multiversion::multiversion;
use tch::{Device, Kind, Tensor};

use crate::parameters::{Parameters, host_values, to_device, to_host};

/// Keeps a division by a vanishing gradient norm finite; the value that PyTorch's `clip_grad_norm_` has.
const CLIP_EPSILON: f64 = 1e-6;

/// The optimiser's state: first and second moments and the number of steps they average over.
#[derive(Debug)]
pub(crate) struct AdamW {
    first_p: Tensor,
    second_p: Tensor,
    step: u64,
    spans: Vec<Span>,
}

/// Where a tensor lies, how much padding follows it, and whether it decays.
#[derive(Debug)]
struct Span {
    range: Range<usize>,
    padding: usize,
    decays: bool,
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
            spans: spans(layout),
        }
    }

    /// A state that has seen nothing.
    pub(crate) fn fresh(layout: &Layout, device: Device) -> Self {
        let zeros = || Tensor::zeros([layout.vector_len() as i64], (Kind::Float, device));
        Self { first_p: zeros(), second_p: zeros(), step: 0, spans: spans(layout) }
    }

    /// Changes θ by one step along `gradients`, one of each weight.
    ///
    /// # Panics
    /// When they are not f32 or not as large as the weights.
    pub(crate) fn step(
        &mut self,
        parameters: &Parameters,
        gradients: &[Tensor],
        training: &Training,
        learning_rate: f64,
    ) {
        self.step += 1;
        tch::no_grad(|| {
            if parameters.device() == Device::Cpu {
                self.step_on_host(parameters, gradients, training, learning_rate);
            } else {
                self.step_on_device(parameters, gradients, training, learning_rate);
            }
        });
    }

    fn step_on_host(
        &mut self,
        parameters: &Parameters,
        gradients: &[Tensor],
        training: &Training,
        learning_rate: f64,
    ) {
        let corrections = corrections(self.step, training);
        let mut gradients: Vec<Tensor> = gradients.iter().map(Tensor::contiguous).collect();
        let mut theta_p = parameters.flat().shallow_clone();
        let mut pieces = self.pieces(host_values(&mut theta_p), &mut gradients);
        let threads = match tch::get_num_threads() {
            _ if pieces.len() < PARALLEL_MIN => 1,
            threads => threads.max(1) as usize,
        };
        in_parallel(&mut pieces, threads, |piece| piece.squares = sum_of_squares(piece.gradient));
        let norm = pieces.iter().map(|piece| piece.squares).sum::<f64>().sqrt();
        let step = HostStep {
            clip: (training.gradient_clip / (norm + CLIP_EPSILON)).min(1.0) as f32,
            first_kept: training.beta1 as f32,
            first_taken: (1.0 - training.beta1) as f32,
            second_kept: training.beta2 as f32,
            second_taken: (1.0 - training.beta2) as f32,
            root_scale: (1.0 / corrections.1.sqrt()) as f32,
            epsilon: training.epsilon as f32,
            rate: (learning_rate / corrections.0) as f32,
            decay: (1.0 - learning_rate * training.weight_decay) as f32,
        };
        in_parallel(&mut pieces, threads, |piece| adamw(step, piece));
    }

    /// All that a step reads and writes, in pieces of one tensor each.
    fn pieces<'a>(
        &'a mut self,
        mut theta: &'a mut [f32],
        gradients: &'a mut [Tensor],
    ) -> Vec<Piece<'a>> {
        assert_eq!(gradients.len(), self.spans.len(), "a gradient for each weight");
        let mut first = host_values(&mut self.first_p);
        let mut second = host_values(&mut self.second_p);
        let mut pieces = Vec::new();
        for (span, gradient) in self.spans.iter().zip(gradients) {
            let gradient = &*host_values(gradient);
            assert_eq!(gradient.len() + span.padding, span.range.len(), "as large as its weight");
            let [theta, first, second] = [&mut theta, &mut first, &mut second].map(|values| {
                let of_tensor = values.split_off_mut(..span.range.len());
                of_tensor.expect("vectors are as long as the layout says").chunks_mut(PIECE)
            });
            let parts = gradient.chunks(PIECE).zip(theta).zip(first.zip(second));
            pieces.extend(parts.map(|((gradient, theta), (first, second))| Piece {
                gradient,
                theta,
                first,
                second,
                decays: span.decays,
                squares: 0.0,
            }));
        }
        pieces
    }

    fn step_on_device(
        &mut self,
        parameters: &Parameters,
        gradients: &[Tensor],
        training: &Training,
        learning_rate: f64,
    ) {
        let mut pieces = Vec::with_capacity(2 * gradients.len());
        for (span, gradient) in self.spans.iter().zip(gradients) {
            pieces.push(gradient.reshape(-1));
            pieces
                .push(gradient.new_zeros([span.padding as i64], (Kind::Float, gradient.device())));
        }
        let gradient_p = Tensor::cat(&pieces, 0);
        // Stays on the device: reading the norm would wait for it.
        let norm = gradient_p.norm();
        let factor = ((norm + CLIP_EPSILON).reciprocal() * training.gradient_clip).clamp_max(1.0);
        let gradient_p = gradient_p * factor;

        let Training { beta1, beta2, epsilon, weight_decay, .. } = *training;
        let _ = self.first_p.lerp_(&gradient_p, 1.0 - beta1);
        let _ = self.second_p.g_mul_scalar_(beta2);
        let squared_p = &gradient_p * &gradient_p;
        let _ = self.second_p.g_add_(&(squared_p * (1.0 - beta2)));

        let mut theta_p = parameters.flat().shallow_clone();
        for Span { range, .. } in self.spans.iter().filter(|span| span.decays) {
            let _ = theta_p
                .narrow(0, range.start as i64, range.len() as i64)
                .g_mul_scalar_(1.0 - learning_rate * weight_decay);
        }
        let corrections = corrections(self.step, training);
        let denominator_p = self.second_p.sqrt() / corrections.1.sqrt() + epsilon;
        let update_p = (&self.first_p / denominator_p) * (-learning_rate / corrections.0);
        let _ = theta_p.g_add_(&update_p);
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

fn spans(layout: &Layout) -> Vec<Span> {
    layout
        .tensors()
        .iter()
        .map(|tensor| Span {
            range: tensor.chunks().start * CHUNK..tensor.chunks().end * CHUNK,
            padding: tensor.chunks().len() * CHUNK - tensor.elements(),
            decays: tensor.shape().len() >= 2,
        })
        .collect()
}

/// What the moments lack because they began at 0.
fn corrections(steps: u64, training: &Training) -> (f64, f64) {
    let steps = i32::try_from(steps).unwrap_or(i32::MAX);
    (1.0 - training.beta1.powi(steps), 1.0 - training.beta2.powi(steps))
}

/// Values of a piece at most: small enough to share out, large enough to be worth it. Which pieces there are does not
/// depend on the number of threads, and so no bit does.
const PIECE: usize = 16 * CHUNK;
/// Fewer pieces are not worth a thread.
const PARALLEL_MIN: usize = 8;

/// The same part of everything that a step reads and writes. Where padding follows, the gradient ends before it.
struct Piece<'a> {
    gradient: &'a [f32],
    theta: &'a mut [f32],
    first: &'a mut [f32],
    second: &'a mut [f32],
    decays: bool,
    /// Of the gradient, summed.
    squares: f64,
}

fn in_parallel(pieces: &mut [Piece<'_>], threads: usize, work: impl Fn(&mut Piece<'_>) + Sync) {
    if threads == 1 {
        return pieces.iter_mut().for_each(work);
    }
    let share = pieces.len().div_ceil(threads);
    let work = &work;
    std::thread::scope(|scope| {
        for share in pieces.chunks_mut(share) {
            scope.spawn(move || share.iter_mut().for_each(work));
        }
    });
}

/// The numbers of one step.
#[derive(Debug, Clone, Copy)]
struct HostStep {
    /// What of the gradient is left after clipping.
    clip: f32,
    first_kept: f32,
    first_taken: f32,
    second_kept: f32,
    second_taken: f32,
    /// 1 / √(1 − β₂ⁿ).
    root_scale: f32,
    epsilon: f32,
    /// Learning rate / (1 − β₁ⁿ).
    rate: f32,
    /// What of a weight that decays is left.
    decay: f32,
}

#[multiversion(targets("x86_64+avx2"))]
fn adamw(step: HostStep, piece: &mut Piece<'_>) {
    let decay = if piece.decays { step.decay } else { 1.0 };
    let values = piece.gradient.iter().zip(&mut *piece.theta);
    let moments = piece.first.iter_mut().zip(&mut *piece.second);
    for ((gradient, theta), (first, second)) in values.zip(moments) {
        let gradient = *gradient * step.clip;
        *first = step.first_kept * *first + step.first_taken * gradient;
        *second = step.second_kept * *second + step.second_taken * (gradient * gradient);
        let root = second.sqrt() * step.root_scale + step.epsilon;
        *theta = *theta * decay - step.rate * (*first / root);
    }
}

/// In f64 over blocks that are summed in f32, lane by lane, so that an order is fixed and the loop has no dependence.
#[multiversion(targets("x86_64+avx2"))]
fn sum_of_squares(values: &[f32]) -> f64 {
    const LANES: usize = 32;
    let (blocks, mut sum) = (values.chunks(CHUNK), 0.0);
    for block in blocks {
        let mut lanes = [0.0_f32; LANES];
        let (whole, rest) = block.as_chunks::<LANES>();
        for values in whole {
            for (lane, value) in lanes.iter_mut().zip(values) {
                *lane += value * value;
            }
        }
        let squares = lanes.into_iter().chain(rest.iter().map(|value| value * value));
        sum += squares.map(f64::from).sum::<f64>();
    }
    sum
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
        for [first, second, third] in gradients {
            let matrix = Tensor::from_slice(&[first, second]).view([1, 2]);
            let gradients =
                [matrix, Tensor::from_slice(&[third])].map(|it| it.to_kind(Kind::Float));
            optimizer.step(&parameters, &gradients, &training(), 0.01);
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

    #[test]
    fn a_device_steps_as_the_host_does() {
        let named = [("matrix".to_owned(), vec![70, 90]), ("norm".to_owned(), vec![90])];
        let layout = Layout::from_tensors(named.to_vec()).expect("a layout");
        let theta = vec![0.0; layout.vector_len()];
        let [host, device] = [0, 1].map(|_| Parameters::new(&layout, &theta, Device::Cpu));
        let [mut on_host, mut on_device] = [0, 1].map(|_| AdamW::fresh(&layout, Device::Cpu));
        tch::manual_seed(1);
        for scale in [1e-4, 1.0] {
            let gradients = [[70, 90].as_slice(), &[90]]
                .map(|shape| Tensor::randn(shape, (Kind::Float, Device::Cpu)) * scale);
            (on_host.step, on_device.step) = (on_host.step + 1, on_device.step + 1);
            on_host.step_on_host(&host, &gradients, &training(), 0.01);
            on_device.step_on_device(&device, &gradients, &training(), 0.01);
        }
        let largest = |of: &[f32]| of.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
        let difference = |one: &[f32], other: &[f32]| {
            let apart: Vec<f32> = one.iter().zip(other).map(|(one, other)| one - other).collect();
            largest(&apart) / largest(one)
        };
        let (of_host, of_device) = (on_host.moments(), on_device.moments());
        assert!(difference(&host.to_vec(), &device.to_vec()) < 1e-5);
        assert!(difference(&of_host.first, &of_device.first) < 1e-5);
        assert!(difference(&of_host.second, &of_device.second) < 1e-5);
    }
}
