//! A Llama-architecture decoder: RMSNorm, rotary position embedding, grouped-query attention, SwiGLU.
//!
//! It computes what `LlamaForCausalLM` of Hugging Face `transformers` computes, from weights of the
//! same names and shapes; rotary embeddings are in its "rotate half" convention.
//!
//! Shapes in names: `b` sequence of a batch, `t` position (token), `s` position attended to,
//! `c` channel (`hidden_size`), `h` query head, `g` key/value head, `d` channel within a head,
//! `f` feed-forward channel, `v` token of the vocabulary.

use manyhands_gradient::Layout;
use manyhands_gradient::layout::LayoutError;
use manyhands_proto::run_file::{Architecture, Precision};
use tch::{Device, Kind, Reduction, Tensor};

use crate::parameters::Parameters;

/// The model: its architecture, its weights, and the tables of its rotary embedding.
#[derive(Debug)]
pub struct Transformer {
    architecture: Architecture,
    precision: Precision,
    parameters: Parameters,
    rotary: Rotary,
}

/// Cosines and sines of the rotary embedding for every position up to `positions`.
#[derive(Debug)]
struct Rotary {
    cos_td: Tensor,
    /// Negative in the first half of a head.
    signed_sin_td: Tensor,
}

/// The weights in the number format of the computation. For f32 these are the master weights; for
/// bf16 they are rounded copies through which gradients flow back to the master weights.
pub(crate) struct Weights {
    embedding_vc: Tensor,
    layers: Vec<LayerWeights>,
    norm_c: Tensor,
    head_vc: Tensor,
}

struct LayerWeights {
    attention_norm_c: Tensor,
    query_cc: Tensor,
    key_gdc: Tensor,
    value_gdc: Tensor,
    output_cc: Tensor,
    feed_forward_norm_c: Tensor,
    gate_fc: Tensor,
    up_fc: Tensor,
    down_cf: Tensor,
}

/// Keys and values of the positions so far, one pair per layer; what makes generating a token cost
/// one position instead of all.
#[derive(Debug, Default)]
pub(crate) struct Cache {
    layers: Vec<(Tensor, Tensor)>,
    positions: i64,
}

pub(crate) fn kind_of(precision: Precision) -> Kind {
    match precision {
        Precision::F32 => Kind::Float,
        Precision::Bf16 => Kind::BFloat16,
    }
}

impl Transformer {
    /// A model with the weights θ, a canonical vector.
    ///
    /// # Errors
    /// When the architecture has no layout (a dimension of zero, too many parameters).
    ///
    /// # Panics
    /// When `theta` is not as long as the layout's vector: callers check what they receive.
    pub fn new(
        architecture: &Architecture,
        precision: Precision,
        theta: &[f32],
        device: Device,
    ) -> Result<Self, LayoutError> {
        Ok(Self::with_layout(architecture, precision, &Layout::of(architecture)?, theta, device))
    }

    /// The same, for a layout that is known to be this architecture's.
    pub(crate) fn with_layout(
        architecture: &Architecture,
        precision: Precision,
        layout: &Layout,
        theta: &[f32],
        device: Device,
    ) -> Self {
        Self {
            architecture: architecture.clone(),
            precision,
            parameters: Parameters::new(layout, theta, device),
            rotary: Rotary::new(architecture, device),
        }
    }

    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    pub fn device(&self) -> Device {
        self.parameters.device()
    }

    /// θ as a canonical vector: the bits that are on the device.
    pub fn theta(&self) -> Vec<f32> {
        self.parameters.to_vec()
    }

    pub(crate) fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Logits in f32 for `tokens`, `[sequence, position, vocabulary]` flattened row-major.
    ///
    /// # Panics
    /// When the sequences differ in length, are empty or longer than the context, or a token is outside
    /// the vocabulary.
    pub fn logits(&self, tokens: &[Vec<u32>]) -> Vec<f32> {
        let tokens_bt = tokens_tensor(tokens, self.device());
        tch::no_grad(|| {
            let weights = self.weights();
            let hidden_btc = self.hidden(&weights, &tokens_bt, None);
            let logits_btv = hidden_btc.linear(&weights.head_vc, None::<Tensor>);
            let flat = logits_btv.to_kind(Kind::Float).reshape(-1);
            crate::parameters::to_host(&flat)
        })
    }

    /// Sum over all targets of −log p(target), in nats; a scalar f32 tensor, differentiable.
    pub(crate) fn loss_sum(&self, inputs_bt: &Tensor, targets_bt: &Tensor) -> Tensor {
        let weights = self.weights();
        let hidden_btc = self.hidden(&weights, inputs_bt, None);
        let logits_nv = hidden_btc
            .linear(&weights.head_vc, None::<Tensor>)
            .view([-1, i64::from(self.architecture.vocabulary_size)])
            .to_kind(Kind::Float);
        let ignore_none = -100;
        logits_nv.cross_entropy_loss(
            &targets_bt.reshape(-1),
            None::<Tensor>,
            Reduction::Sum,
            ignore_none,
            0.0,
        )
    }

    /// Logits in f32 of the position after `tokens_bt`'s last, `[sequence, vocabulary]`.
    pub(crate) fn next_logits(
        &self,
        weights: &Weights,
        tokens_bt: &Tensor,
        cache: &mut Cache,
    ) -> Tensor {
        let hidden_btc = self.hidden(weights, tokens_bt, Some(cache));
        let last_bc = hidden_btc.select(1, -1);
        last_bc.linear(&weights.head_vc, None::<Tensor>).to_kind(Kind::Float)
    }

    /// The weights in the number format of the computation.
    pub(crate) fn weights(&self) -> Weights {
        let kind = kind_of(self.precision);
        let weight = |name: &str| self.parameters.weight(name).to_kind(kind);
        let embedding_vc = weight("model.embed_tokens.weight");
        let head_vc = if self.parameters.has("lm_head.weight") {
            weight("lm_head.weight")
        } else {
            embedding_vc.shallow_clone()
        };
        let layers = (0..self.architecture.layers)
            .map(|layer| {
                let weight = |name: &str| weight(&format!("model.layers.{layer}.{name}.weight"));
                LayerWeights {
                    attention_norm_c: weight("input_layernorm"),
                    query_cc: weight("self_attn.q_proj"),
                    key_gdc: weight("self_attn.k_proj"),
                    value_gdc: weight("self_attn.v_proj"),
                    output_cc: weight("self_attn.o_proj"),
                    feed_forward_norm_c: weight("post_attention_layernorm"),
                    gate_fc: weight("mlp.gate_proj"),
                    up_fc: weight("mlp.up_proj"),
                    down_cf: weight("mlp.down_proj"),
                }
            })
            .collect();
        Weights { embedding_vc, layers, norm_c: weight("model.norm.weight"), head_vc }
    }

    fn hidden(
        &self,
        weights: &Weights,
        tokens_bt: &Tensor,
        mut cache: Option<&mut Cache>,
    ) -> Tensor {
        let first = cache.as_ref().map_or(0, |cache| cache.positions);
        let tokens = tokens_bt.size()[1];
        assert!(
            (1..=i64::from(self.architecture.context_length)).contains(&(first + tokens)),
            "positions beyond the context have no rotary embedding"
        );
        let rotary = self.rotary.positions(first, tokens, kind_of(self.precision));
        let no_padding_token = -1;
        let mut x_btc =
            Tensor::embedding(&weights.embedding_vc, tokens_bt, no_padding_token, false, false);
        for (layer, weights) in weights.layers.iter().enumerate() {
            let normed_btc = self.norm(&x_btc, &weights.attention_norm_c);
            let mixed_btc =
                self.attention(weights, &normed_btc, &rotary, layer, cache.as_deref_mut());
            let mixed_btc = x_btc + mixed_btc;
            let normed_btc = self.norm(&mixed_btc, &weights.feed_forward_norm_c);
            x_btc = mixed_btc + feed_forward(weights, &normed_btc);
        }
        if let Some(cache) = cache {
            cache.positions += tokens;
        }
        self.norm(&x_btc, &weights.norm_c)
    }

    fn norm(&self, x_btc: &Tensor, weight_c: &Tensor) -> Tensor {
        let channels = i64::from(self.architecture.hidden_size);
        x_btc.rms_norm([channels].as_slice(), Some(weight_c), self.architecture.norm_epsilon)
    }

    fn attention(
        &self,
        weights: &LayerWeights,
        x_btc: &Tensor,
        rotary: &Rotary,
        layer: usize,
        cache: Option<&mut Cache>,
    ) -> Tensor {
        let (batch, tokens, channels) = x_btc.size3().expect("hidden states have three dimensions");
        let heads = i64::from(self.architecture.heads);
        let key_heads = i64::from(self.architecture.key_value_heads);
        let project = |weight: &Tensor, heads: i64| {
            x_btc.linear(weight, None::<Tensor>).view([batch, tokens, heads, -1]).transpose(1, 2)
        };
        let query_bhtd = rotary.rotate(&project(&weights.query_cc, heads));
        let mut key_bgsd = rotary.rotate(&project(&weights.key_gdc, key_heads));
        let mut value_bgsd = project(&weights.value_gdc, key_heads);
        if let Some(cache) = cache {
            (key_bgsd, value_bgsd) = cache.extend(layer, key_bgsd, value_bgsd);
        }
        let key_bhsd = repeat_heads(&key_bgsd, heads / key_heads);
        let value_bhsd = repeat_heads(&value_bgsd, heads / key_heads);
        // A single new position sees everything before it; several are a sequence from its start.
        let causal = tokens > 1;
        let mixed_bhtd = Tensor::scaled_dot_product_attention(
            &query_bhtd,
            &key_bhsd,
            &value_bhsd,
            None::<Tensor>,
            0.0,
            causal,
            None,
            false,
        );
        mixed_bhtd
            .transpose(1, 2)
            .reshape([batch, tokens, channels])
            .linear(&weights.output_cc, None::<Tensor>)
    }
}

fn feed_forward(weights: &LayerWeights, x_btc: &Tensor) -> Tensor {
    let gate_btf = x_btc.linear(&weights.gate_fc, None::<Tensor>).silu();
    let up_btf = x_btc.linear(&weights.up_fc, None::<Tensor>);
    (gate_btf * up_btf).linear(&weights.down_cf, None::<Tensor>)
}

/// Each key/value head serves `times` consecutive query heads: `bgsd` → `bhsd`, h = g · times.
fn repeat_heads(x_bgsd: &Tensor, times: i64) -> Tensor {
    if times == 1 {
        return x_bgsd.shallow_clone();
    }
    let (batch, heads, tokens, channels) = x_bgsd.size4().expect("heads have four dimensions");
    x_bgsd.unsqueeze(2).expand([batch, heads, times, tokens, channels], false).reshape([
        batch,
        heads * times,
        tokens,
        channels,
    ])
}

impl Rotary {
    /// Angles t · θ^(−2i/d), i < d/2, twice in a row, as in Hugging Face's Llama.
    fn new(architecture: &Architecture, device: Device) -> Self {
        let head = i64::from(architecture.hidden_size / architecture.heads);
        let positions = i64::from(architecture.context_length);
        let options = (Kind::Float, Device::Cpu);
        let exponents_i = Tensor::arange(head / 2, options) * 2.0 / head as f64;
        let frequencies_i = Tensor::pow_scalar(architecture.rope_theta, &exponents_i).reciprocal();
        let angles_ti = Tensor::arange(positions, options).outer(&frequencies_i);
        let (cos_ti, sin_ti) = (angles_ti.cos(), angles_ti.sin());
        Self {
            cos_td: Tensor::cat(&[&cos_ti, &cos_ti], -1).to_device(device),
            signed_sin_td: Tensor::cat(&[&-&sin_ti, &sin_ti], -1).to_device(device),
        }
    }

    fn positions(&self, first: i64, count: i64, kind: Kind) -> Self {
        let part = |table_td: &Tensor| table_td.narrow(0, first, count).to_kind(kind);
        Self { cos_td: part(&self.cos_td), signed_sin_td: part(&self.signed_sin_td) }
    }

    /// Turns the vector of values i and i + d/2 of a head by angle i, for every i < d/2.
    fn rotate(&self, x_bhtd: &Tensor) -> Tensor {
        let half = self.cos_td.size()[1] / 2;
        x_bhtd * &self.cos_td + x_bhtd.roll([half], [-1]) * &self.signed_sin_td
    }
}

impl Cache {
    pub(crate) fn positions(&self) -> i64 {
        self.positions
    }

    /// Appends the new positions of a layer and gives all of them.
    fn extend(&mut self, layer: usize, key_bgsd: Tensor, value_bgsd: Tensor) -> (Tensor, Tensor) {
        let (keys, values) = match self.layers.get(layer) {
            Some((keys, values)) => {
                (Tensor::cat(&[keys, &key_bgsd], 2), Tensor::cat(&[values, &value_bgsd], 2))
            }
            None => (key_bgsd, value_bgsd),
        };
        let kept = (keys.shallow_clone(), values.shallow_clone());
        if layer < self.layers.len() {
            self.layers[layer] = kept;
        } else {
            self.layers.push(kept);
        }
        (keys, values)
    }
}

/// Equally long sequences as an i64 tensor `bt`.
///
/// # Panics
/// When there is none or they differ in length.
pub(crate) fn tokens_tensor(sequences: &[Vec<u32>], device: Device) -> Tensor {
    let length = sequences.first().expect("at least one sequence").len();
    assert!(
        sequences.iter().all(|sequence| sequence.len() == length),
        "sequences of a batch are equally long"
    );
    let flat: Vec<i64> = sequences.iter().flatten().map(|&token| i64::from(token)).collect();
    Tensor::from_slice(&flat).view([sequences.len() as i64, length as i64]).to_device(device)
}
