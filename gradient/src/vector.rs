//! The canonical vector as bytes: its digest, its plain form, and safetensors.

use manyhands_proto::Digest;
use safetensors::tensor::{Dtype, SafeTensorError, SafeTensors, TensorView};

use crate::layout::{CHUNK, Layout, Tensor};

/// Plain BLAKE3 of a vector's little-endian bytes, padding included.
pub fn digest(vector: &[f32]) -> Digest {
    // 128 KiB at a time: enough for the hash's widest kernels, little enough for the cache.
    const PIECE: usize = 32 * 1024;
    let mut hasher = blake3::Hasher::new();
    let mut bytes = Vec::with_capacity(4 * PIECE);
    for piece in vector.chunks(PIECE) {
        bytes.clear();
        bytes.extend(piece.iter().flat_map(|value| value.to_le_bytes()));
        hasher.update(&bytes);
    }
    Digest::new(*hasher.finalize().as_bytes())
}

/// A vector's little-endian bytes.
pub fn to_bytes(vector: &[f32]) -> Vec<u8> {
    vector.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Why bytes are not a canonical vector of the layout.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseVectorError {
    #[error("expected {expected} bytes, got {got}")]
    Length { expected: usize, got: usize },
    #[error("expected finite values, got an infinite one or NaN at index {index}")]
    NotFinite { index: usize },
    #[error("expected zeros in the padding, got another value at index {index}")]
    Padding { index: usize },
}

/// The vector with these little-endian bytes: finite, its padding 0.
///
/// # Errors
/// When the bytes are not such a vector.
pub fn from_bytes(bytes: &[u8], layout: &Layout) -> Result<Vec<f32>, ParseVectorError> {
    let expected = layout.vector_len() * 4;
    if bytes.len() != expected {
        return Err(ParseVectorError::Length { expected, got: bytes.len() });
    }
    let vector = floats(bytes);
    if let Some(index) = vector.iter().position(|value| !value.is_finite()) {
        return Err(ParseVectorError::NotFinite { index });
    }
    for (chunk, place) in layout.places().iter().enumerate() {
        let padding = chunk * CHUNK + place.real..(chunk + 1) * CHUNK;
        let start = padding.start;
        if let Some(offset) = vector[padding].iter().position(|value| value.to_bits() != 0) {
            return Err(ParseVectorError::Padding { index: start + offset });
        }
    }
    Ok(vector)
}

/// The 32-bit floats of a chunk or a vector, from little-endian bytes; a rest of under 4 bytes is
/// ignored.
pub fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// Why safetensors files are not the parameters of the layout.
#[derive(Debug, thiserror::Error)]
pub enum ParseSafetensorsError {
    #[error("expected a safetensors file: {0}")]
    Format(#[from] SafeTensorError),
    #[error("expected tensor {name}, it is missing")]
    Missing { name: String },
    #[error("expected only the model's tensors, once each, got {name}")]
    Unexpected { name: String },
    #[error("expected {name} of shape {expected:?}, got {got:?}")]
    Shape { name: String, expected: Vec<usize>, got: Vec<usize> },
    #[error("expected {name} as F32, BF16 or F16, got {got:?}")]
    Type { name: String, got: Dtype },
    #[error("expected finite values in {name}, got an infinite one or NaN")]
    NotFinite { name: String },
}

/// A vector's tensors as one safetensors file: f32, real shapes, Hugging Face's names, and the mark
/// `format: pt` that `transformers` asks for.
///
/// # Errors
/// When the safetensors library refuses, which it does not for a layout's tensors.
///
/// # Panics
/// When `vector` has not the layout's length.
pub fn to_safetensors(layout: &Layout, vector: &[f32]) -> Result<Vec<u8>, SafeTensorError> {
    layout.assert_covers(vector, "the vector");
    let contents: Vec<(&Tensor, Vec<u8>)> =
        layout.tensors().iter().map(|tensor| (tensor, to_bytes(&vector[tensor.range()]))).collect();
    let views = contents
        .iter()
        .map(|(tensor, bytes)| {
            let view = TensorView::new(Dtype::F32, tensor.shape().to_vec(), bytes)?;
            Ok((tensor.name(), view))
        })
        .collect::<Result<Vec<_>, SafeTensorError>>()?;
    let format = [("format".to_owned(), "pt".to_owned())].into_iter().collect();
    safetensors::serialize(views, Some(format))
}

/// The canonical vector from one safetensors file or several shards that together hold every tensor
/// once. 16-bit floats are widened exactly.
///
/// # Errors
/// When a file is malformed, a tensor is missing, unknown or there twice, has another shape or type,
/// or holds a value that is not finite.
pub fn from_safetensors(
    files: &[&[u8]],
    layout: &Layout,
) -> Result<Vec<f32>, ParseSafetensorsError> {
    let mut vector = vec![0.0; layout.vector_len()];
    let mut seen = vec![false; layout.tensors().len()];
    for bytes in files {
        for (name, view) in SafeTensors::deserialize(bytes)?.iter() {
            let index = layout.tensors().binary_search_by(|tensor| tensor.name().cmp(name)).ok();
            let Some(index) = index.filter(|&index| !seen[index]) else {
                return Err(ParseSafetensorsError::Unexpected { name: shortened(name) });
            };
            seen[index] = true;
            let tensor = &layout.tensors()[index];
            read_tensor(tensor, &view, &mut vector[tensor.range()])?;
        }
    }
    match seen.iter().position(|&seen| !seen) {
        None => Ok(vector),
        Some(index) => {
            Err(ParseSafetensorsError::Missing { name: layout.tensors()[index].name().to_owned() })
        }
    }
}

fn read_tensor(
    tensor: &Tensor,
    view: &TensorView<'_>,
    into: &mut [f32],
) -> Result<(), ParseSafetensorsError> {
    let name = || tensor.name().to_owned();
    if view.shape() != tensor.shape() {
        let (expected, got) = (tensor.shape().to_vec(), view.shape().to_vec());
        return Err(ParseSafetensorsError::Shape { name: name(), expected, got });
    }
    let dtype = view.dtype();
    let halves = || view.data().chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
    if dtype == Dtype::F32 {
        into.copy_from_slice(&floats(view.data()));
    } else if dtype == Dtype::BF16 {
        into.iter_mut().zip(halves()).for_each(|(v, h)| *v = half::bf16::from_bits(h).to_f32());
    } else if dtype == Dtype::F16 {
        into.iter_mut().zip(halves()).for_each(|(v, h)| *v = half::f16::from_bits(h).to_f32());
    } else {
        return Err(ParseSafetensorsError::Type { name: name(), got: dtype });
    }
    if into.iter().all(|value| value.is_finite()) {
        Ok(())
    } else {
        Err(ParseSafetensorsError::NotFinite { name: name() })
    }
}

/// Names come from strangers: no more of one than a message should hold.
fn shortened(name: &str) -> String {
    name.chars().take(120).collect()
}
