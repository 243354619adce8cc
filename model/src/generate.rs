//! Text from a model.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::data::{TextTokenizer, TokenizerError};
use crate::torch::{TorchError, guarded};
use crate::transformer::{Cache, Transformer, Weights, tokens_tensor};

/// How to sample.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// Tokens to add at most; generation also ends with the document.
    pub tokens_max: u32,
    /// 0 takes the likeliest token every time; 1 samples as the model says.
    pub temperature: f32,
    /// Sample among so many likeliest tokens; 0: all.
    pub top_k: u32,
    pub seed: u64,
}

/// Why no text was generated.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    #[error("expected a temperature of 0 or more, got {0}")]
    Temperature(f32),
    #[error("the tokenizer has {tokenizer} tokens, the model {model}: they do not belong together")]
    Vocabulary { tokenizer: u32, model: u32 },
    #[error("the model's logits are not finite: it has diverged or its weights are damaged")]
    NotFinite,
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Torch(#[from] TorchError),
}

/// Continues `prompt`. `on_text` gets each piece as it comes; the result is all pieces, without the prompt.
///
/// The same model, prompt and options give the same text on the same machine.
///
/// # Errors
/// When the options or the tokenizer do not fit, or the model fails.
pub fn generate(
    model: &Transformer,
    tokenizer: &TextTokenizer,
    prompt: &str,
    options: &GenerateOptions,
    on_text: &mut dyn FnMut(&str),
) -> Result<String, GenerateError> {
    if options.temperature.is_nan() || options.temperature < 0.0 {
        return Err(GenerateError::Temperature(options.temperature));
    }
    let (tokens, vocabulary) = (tokenizer.vocabulary_size(), model.architecture().vocabulary_size);
    if tokens > vocabulary {
        return Err(GenerateError::Vocabulary { tokenizer: tokens, model: vocabulary });
    }
    let mut history = tokenizer.encode(prompt)?;
    if history.is_empty() {
        // A document starts after the end of another.
        history.push(tokenizer.end_of_text());
    }
    let prompt_length = history.len();
    let mut random = ChaCha8Rng::seed_from_u64(options.seed);
    let mut told = String::new();
    guarded(|| {
        tch::no_grad(|| {
            let mut decoder = Decoder::new(model);
            for _ in 0..options.tokens_max {
                let logits = decoder.next(&history);
                let next = sample(&logits, tokens, options, &mut random)?;
                if next == tokenizer.end_of_text() {
                    break;
                }
                history.push(next);
                let text = tokenizer.decode(&history[prompt_length..])?;
                // A character may take several tokens: until it is whole it decodes to U+FFFD.
                if !text.ends_with('\u{fffd}') && text.len() > told.len() {
                    on_text(&text[told.len()..]);
                    told = text;
                }
            }
            Ok(told)
        })
    })?
}

/// Logits of the next token, keeping keys and values of the positions before.
struct Decoder<'a> {
    model: &'a Transformer,
    weights: Weights,
    cache: Cache,
    seen: usize,
}

impl<'a> Decoder<'a> {
    fn new(model: &'a Transformer) -> Self {
        Self { model, weights: model.weights(), cache: Cache::default(), seen: 0 }
    }

    fn next(&mut self, history: &[u32]) -> Vec<f32> {
        let context = self.model.architecture().context_length as usize;
        let new = history.len() - self.seen;
        if self.cache.positions() as usize + new > context || self.seen == 0 {
            // Full, or nothing yet: start again from the later part of what fits. Half of the context
            // keeps the restarts rare.
            let keep = if history.len() > context { context.div_ceil(2) } else { history.len() };
            self.cache = Cache::default();
            self.seen = history.len() - keep;
        }
        let tokens_bt = tokens_tensor(&[history[self.seen..].to_vec()], self.model.device());
        self.seen = history.len();
        let logits_bv = self.model.next_logits(&self.weights, &tokens_bt, &mut self.cache);
        crate::parameters::to_host(&logits_bv.reshape(-1))
    }
}

/// Draws a token below `tokens`; a model's vocabulary may be padded beyond its tokenizer's.
fn sample(
    logits: &[f32],
    tokens: u32,
    options: &GenerateOptions,
    random: &mut ChaCha8Rng,
) -> Result<u32, GenerateError> {
    let mut ranked: Vec<(u32, f32)> = (0..tokens).zip(logits.iter().copied()).collect();
    if ranked.iter().any(|(_, logit)| !logit.is_finite()) {
        return Err(GenerateError::NotFinite);
    }
    // By falling logit, the lower number first among equals, so that the order is defined.
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let (likeliest, largest) = ranked[0];
    if options.temperature == 0.0 {
        return Ok(likeliest);
    }
    if options.top_k > 0 {
        ranked.truncate(options.top_k as usize);
    }
    let weights: Vec<f64> = ranked
        .iter()
        .map(|(_, logit)| (f64::from(logit - largest) / f64::from(options.temperature)).exp())
        .collect();
    let total: f64 = weights.iter().sum();
    // 53 random bits: a number in [0, 1).
    let mut left = (random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64 * total;
    for (weight, (token, _)) in weights.iter().zip(&ranked) {
        left -= weight;
        if left < 0.0 {
            return Ok(*token);
        }
    }
    Ok(likeliest)
}
