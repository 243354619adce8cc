//! θ on a device: one flat f32 tensor in canonical order, and views of it for each weight.

use std::collections::BTreeMap;

use manyhands_gradient::Layout;
use tch::{Device, Kind, Tensor};

/// The master weights of a model. The flat tensor is what the optimiser changes; the weights are views
/// of the same memory that gradients are taken for, so there is one copy of θ, not two.
#[derive(Debug)]
pub(crate) struct Parameters {
    flat_p: Tensor,
    weights: Vec<Tensor>,
    places: BTreeMap<String, usize>,
}

impl Parameters {
    /// Copies a canonical vector to a device.
    ///
    /// # Panics
    /// When `theta` is not as long as the layout's vector.
    pub(crate) fn new(layout: &Layout, theta: &[f32], device: Device) -> Self {
        assert_eq!(theta.len(), layout.vector_len(), "θ must be a whole canonical vector");
        let flat_p = to_device(theta, device);
        let weights = layout
            .tensors()
            .iter()
            .map(|tensor| {
                let shape: Vec<i64> = tensor.shape().iter().map(|&size| size as i64).collect();
                view(&flat_p, tensor).view(shape.as_slice()).detach().set_requires_grad(true)
            })
            .collect();
        let places = layout
            .tensors()
            .iter()
            .enumerate()
            .map(|(at, tensor)| (tensor.name().to_owned(), at))
            .collect();
        Self { flat_p, weights, places }
    }

    /// θ as a canonical vector, the same bits that are on the device.
    pub(crate) fn to_vec(&self) -> Vec<f32> {
        to_host(&self.flat_p)
    }

    pub(crate) fn device(&self) -> Device {
        self.flat_p.device()
    }

    /// Weights in the order of the layout.
    pub(crate) fn weights(&self) -> &[Tensor] {
        &self.weights
    }

    /// # Panics
    /// When the layout has no such tensor: the layout and the model come from one architecture.
    pub(crate) fn weight(&self, name: &str) -> &Tensor {
        let place =
            self.places.get(name).unwrap_or_else(|| panic!("the layout has no tensor {name}"));
        &self.weights[*place]
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    pub(crate) fn flat(&self) -> &Tensor {
        &self.flat_p
    }
}

/// The part of a flat tensor that holds one weight, without its padding.
fn view(flat_p: &Tensor, tensor: &manyhands_gradient::layout::Tensor) -> Tensor {
    flat_p.narrow(0, tensor.offset() as i64, tensor.elements() as i64)
}

/// The values of a contiguous f32 tensor on the CPU, where they lie.
///
/// # Panics
/// When it is no such tensor.
pub(crate) fn host_values(tensor: &mut Tensor) -> &mut [f32] {
    assert_eq!(tensor.kind(), Kind::Float, "canonical vectors are f32");
    assert_eq!(tensor.device(), Device::Cpu, "values on the host");
    assert!(tensor.is_contiguous(), "values in one piece");
    // SAFETY: the pointer is to as many f32 as the tensor has, which stay as long as it does. That no operation of
    // libtorch works on them meanwhile is up to this thread, which has none under way: on a CPU they end before
    // they return.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<f32>(), tensor.numel()) }
}

/// A canonical vector as a tensor.
pub(crate) fn to_device(vector: &[f32], device: Device) -> Tensor {
    // `from_slice` copies, and on the CPU `to_device` does not copy again.
    Tensor::from_slice(vector).to_device(device)
}

/// A flat f32 tensor as a canonical vector.
pub(crate) fn to_host(flat_p: &Tensor) -> Vec<f32> {
    assert_eq!(flat_p.kind(), Kind::Float, "canonical vectors are f32");
    let mut vector = vec![0.0; flat_p.numel()];
    let length = vector.len();
    flat_p.detach().to_device(Device::Cpu).copy_data(&mut vector, length);
    vector
}
