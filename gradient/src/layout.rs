//! The canonical vector: which tensor, which chunk, which offset.
//!
//! A model's unique tensors, sorted by name, row-major, each padded with zeros to whole chunks of
//! [`CHUNK`] values. No chunk spans tensors, so whatever works on a chunk works on one tensor.

use std::ops::Range;

use manyhands_proto::run_file::Architecture;
use manyhands_proto::{ChunkIndex, ParameterCount};

/// Values in a chunk. 4,096 f32 are 16 KiB: one chunk group of the BLAKE3 tree.
pub const CHUNK: usize = 4096;

/// One tensor of the model and its place in the canonical vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    name: String,
    shape: Vec<usize>,
    elements: usize,
    first_chunk: u32,
    chunks: u32,
}

impl Tensor {
    /// The name that Hugging Face's Llama gives this tensor.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Real values, without padding.
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// Index of the first value in the canonical vector.
    pub fn offset(&self) -> usize {
        self.first_chunk as usize * CHUNK
    }

    /// Where the real values lie in the canonical vector.
    pub fn range(&self) -> Range<usize> {
        self.offset()..self.offset() + self.elements
    }

    /// The chunks of this tensor, padding included.
    pub fn chunks(&self) -> Range<usize> {
        self.first_chunk as usize..(self.first_chunk + self.chunks) as usize
    }
}

/// A chunk's tensor and how many of its values are real.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkPlace {
    /// Index into [`Layout::tensors`].
    pub tensor: usize,
    /// 1 to [`CHUNK`]: what follows is padding.
    pub real: usize,
}

/// Why a list of tensors is no layout.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    #[error("expected at least one tensor, got none")]
    Empty,
    #[error("expected every dimension of {name} to be at least 1, got {shape:?}")]
    EmptyTensor { name: String, shape: Vec<usize> },
    #[error("expected unique tensor names, got {name} twice")]
    Duplicate { name: String },
    #[error("expected at most {} chunks of {CHUNK} values, got more", u32::MAX)]
    TooLarge,
}

/// The order and the places of a model's tensors. Equal architectures have equal layouts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    tensors: Vec<Tensor>,
    places: Vec<ChunkPlace>,
    parameters: u64,
}

impl Layout {
    /// The layout of a Llama decoder, by the names that Hugging Face gives its tensors.
    ///
    /// # Errors
    /// When a dimension is zero or the model has more than 2³² chunks.
    pub fn of(architecture: &Architecture) -> Result<Self, LayoutError> {
        Self::from_tensors(llama_tensors(architecture))
    }

    /// The layout of any tensors, in any order; they are sorted by name (plain byte order).
    ///
    /// # Errors
    /// When there is no tensor, a dimension is zero, a name comes twice, or the vector is too long.
    pub fn from_tensors(mut named: Vec<(String, Vec<usize>)>) -> Result<Self, LayoutError> {
        if named.is_empty() {
            return Err(LayoutError::Empty);
        }
        named.sort();
        if let Some(pair) = named.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(LayoutError::Duplicate { name: pair[0].0.clone() });
        }
        let mut tensors = Vec::with_capacity(named.len());
        let mut places = Vec::new();
        let mut parameters = 0_u64;
        for (index, (name, shape)) in named.into_iter().enumerate() {
            let elements = shape
                .iter()
                .try_fold(1_usize, |product, &dimension| product.checked_mul(dimension))
                .ok_or(LayoutError::TooLarge)?;
            if elements == 0 {
                return Err(LayoutError::EmptyTensor { name, shape });
            }
            let first_chunk = u32::try_from(places.len()).map_err(|_| LayoutError::TooLarge)?;
            let chunks =
                u32::try_from(elements.div_ceil(CHUNK)).map_err(|_| LayoutError::TooLarge)?;
            first_chunk.checked_add(chunks).ok_or(LayoutError::TooLarge)?;
            places.extend((0..chunks as usize).map(|chunk| ChunkPlace {
                tensor: index,
                real: (elements - chunk * CHUNK).min(CHUNK),
            }));
            parameters += elements as u64;
            tensors.push(Tensor { name, shape, elements, first_chunk, chunks });
        }
        Ok(Self { tensors, places, parameters })
    }

    /// The tensors, sorted by name.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        let index = self.tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok()?;
        self.tensors.get(index)
    }

    /// Real parameters, without padding.
    pub fn parameter_count(&self) -> ParameterCount {
        ParameterCount(self.parameters)
    }

    pub fn chunk_count(&self) -> usize {
        self.places.len()
    }

    /// Values in the canonical vector, padding included.
    pub fn vector_len(&self) -> usize {
        self.places.len() * CHUNK
    }

    /// Every chunk's tensor and real length, in order.
    pub fn places(&self) -> &[ChunkPlace] {
        &self.places
    }

    /// The tensor and real length of one chunk; `None` past the end.
    pub fn place(&self, chunk: ChunkIndex) -> Option<ChunkPlace> {
        self.places.get(chunk.0 as usize).copied()
    }

    /// Panics unless `vector` has this layout's length: a vector of another model is our own mistake.
    pub(crate) fn assert_covers(&self, vector: &[f32], what: &str) {
        assert_eq!(vector.len(), self.vector_len(), "{what} must be a whole canonical vector");
    }
}

fn llama_tensors(architecture: &Architecture) -> Vec<(String, Vec<usize>)> {
    let size = |value: u32| value as usize;
    let hidden = size(architecture.hidden_size);
    let feed_forward = size(architecture.feed_forward_size);
    let vocabulary = size(architecture.vocabulary_size);
    let head = hidden.checked_div(size(architecture.heads)).unwrap_or(0);
    let queries = size(architecture.heads) * head;
    let keys = size(architecture.key_value_heads) * head;

    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocabulary, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    if !architecture.tie_embeddings {
        tensors.push(("lm_head.weight".to_owned(), vec![vocabulary, hidden]));
    }
    for layer in 0..architecture.layers {
        let mut add = |name: &str, shape: Vec<usize>| {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape));
        };
        add("input_layernorm", vec![hidden]);
        add("post_attention_layernorm", vec![hidden]);
        add("self_attn.q_proj", vec![queries, hidden]);
        add("self_attn.k_proj", vec![keys, hidden]);
        add("self_attn.v_proj", vec![keys, hidden]);
        add("self_attn.o_proj", vec![hidden, queries]);
        add("mlp.gate_proj", vec![feed_forward, hidden]);
        add("mlp.up_proj", vec![feed_forward, hidden]);
        add("mlp.down_proj", vec![hidden, feed_forward]);
    }
    tensors
}
