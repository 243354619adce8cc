//! `config.json` of a `LlamaForCausalLM`.

use manyhands_proto::run_file::Architecture;
use serde::{Deserialize, Serialize};

/// The fields that decide what a Llama computes. Those that are missing have the defaults of
/// `transformers`; fields that are not named here do not change the logits.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct LlamaConfig {
    architectures: Vec<String>,
    model_type: String,
    vocab_size: u32,
    hidden_size: u32,
    intermediate_size: u32,
    num_hidden_layers: u32,
    num_attention_heads: u32,
    #[serde(default)]
    num_key_value_heads: Option<u32>,
    #[serde(default)]
    head_dim: Option<u32>,
    #[serde(default = "silu")]
    hidden_act: String,
    max_position_embeddings: u32,
    #[serde(default = "rms_norm_eps")]
    rms_norm_eps: f64,
    /// Up to version 4 of `transformers`.
    #[serde(default)]
    rope_theta: Option<f64>,
    #[serde(default)]
    rope_scaling: Option<RopeParameters>,
    /// From version 5 on.
    #[serde(default)]
    rope_parameters: Option<RopeParameters>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    bos_token_id: Option<serde_json::Value>,
    #[serde(default)]
    eos_token_id: Option<serde_json::Value>,
    #[serde(default = "float32")]
    torch_dtype: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct RopeParameters {
    #[serde(default = "default_rope", alias = "type")]
    rope_type: String,
    #[serde(default)]
    rope_theta: Option<f64>,
}

fn silu() -> String {
    "silu".to_owned()
}

fn rms_norm_eps() -> f64 {
    1e-6
}

fn float32() -> String {
    "float32".to_owned()
}

fn default_rope() -> String {
    "default".to_owned()
}

/// Why a `config.json` does not describe a model that this crate computes.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("expected the config.json of a Llama model: {0}")]
    Json(#[from] serde_json::Error),
    #[error("{field}: expected {expected}, got {got}")]
    Unsupported { field: &'static str, expected: String, got: String },
}

impl LlamaConfig {
    pub(super) fn of(architecture: &Architecture, end_of_text: u32) -> Self {
        Self {
            architectures: vec!["LlamaForCausalLM".to_owned()],
            model_type: "llama".to_owned(),
            vocab_size: architecture.vocabulary_size,
            hidden_size: architecture.hidden_size,
            intermediate_size: architecture.feed_forward_size,
            num_hidden_layers: architecture.layers,
            num_attention_heads: architecture.heads,
            num_key_value_heads: Some(architecture.key_value_heads),
            head_dim: Some(architecture.hidden_size / architecture.heads),
            hidden_act: silu(),
            max_position_embeddings: architecture.context_length,
            rms_norm_eps: architecture.norm_epsilon,
            rope_theta: Some(architecture.rope_theta),
            rope_scaling: None,
            rope_parameters: Some(RopeParameters {
                rope_type: default_rope(),
                rope_theta: Some(architecture.rope_theta),
            }),
            tie_word_embeddings: architecture.tie_embeddings,
            attention_bias: false,
            mlp_bias: false,
            bos_token_id: Some(end_of_text.into()),
            eos_token_id: Some(end_of_text.into()),
            torch_dtype: float32(),
        }
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<Self, ConfigError> {
        Ok(serde_json::from_slice(bytes)?)
    }

    /// The architecture, if this crate computes the same model.
    pub(super) fn architecture(&self) -> Result<Architecture, ConfigError> {
        let expect = |holds: bool, field, expected: &str, got: String| {
            if holds {
                Ok(())
            } else {
                Err(ConfigError::Unsupported { field, expected: expected.to_owned(), got })
            }
        };
        expect(self.model_type == "llama", "model_type", "llama", self.model_type.clone())?;
        expect(self.hidden_act == "silu", "hidden_act", "silu", self.hidden_act.clone())?;
        expect(!self.attention_bias, "attention_bias", "false", "true".to_owned())?;
        expect(!self.mlp_bias, "mlp_bias", "false", "true".to_owned())?;
        for rope in self.rope_scaling.iter().chain(&self.rope_parameters) {
            let plain = rope.rope_type == "default";
            expect(plain, "rope_scaling", "none or the type \"default\"", rope.rope_type.clone())?;
        }
        let heads = self.num_attention_heads;
        let even = heads > 0
            && self.hidden_size.is_multiple_of(heads)
            && (self.hidden_size / heads).is_multiple_of(2);
        let sizes = format!("{heads} heads for a hidden size of {}", self.hidden_size);
        expect(even, "num_attention_heads", "heads of one even size", sizes)?;
        let key_value_heads = self.num_key_value_heads.unwrap_or(heads);
        let divides = key_value_heads > 0 && heads.is_multiple_of(key_value_heads);
        expect(
            divides,
            "num_key_value_heads",
            "a divisor of num_attention_heads",
            key_value_heads.to_string(),
        )?;
        let head = self.head_dim.unwrap_or(self.hidden_size / heads);
        expect(
            head == self.hidden_size / heads,
            "head_dim",
            "hidden_size / num_attention_heads",
            head.to_string(),
        )?;
        let rope_theta =
            self.rope_parameters.as_ref().and_then(|rope| rope.rope_theta).or(self.rope_theta);
        Ok(Architecture {
            vocabulary_size: self.vocab_size,
            hidden_size: self.hidden_size,
            layers: self.num_hidden_layers,
            heads,
            key_value_heads,
            feed_forward_size: self.intermediate_size,
            context_length: self.max_position_embeddings,
            rope_theta: rope_theta.unwrap_or(10_000.0),
            norm_epsilon: self.rms_norm_eps,
            tie_embeddings: self.tie_word_embeddings,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PUBLISHED: &str = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","vocab_size":49152,
        "hidden_size":576,"intermediate_size":1536,"num_hidden_layers":30,"num_attention_heads":9,
        "num_key_value_heads":3,"hidden_act":"silu","max_position_embeddings":8192,"rms_norm_eps":1e-05,
        "rope_theta":100000,"rope_scaling":null,"tie_word_embeddings":true,"torch_dtype":"bfloat16","use_cache":true}"#;

    #[test]
    fn a_published_config_becomes_an_architecture_and_survives_a_round_trip() {
        let architecture = LlamaConfig::parse(PUBLISHED.as_bytes())
            .and_then(|c| c.architecture())
            .expect("a Llama");
        assert_eq!(
            (architecture.heads, architecture.key_value_heads, architecture.rope_theta),
            (9, 3, 100_000.0)
        );
        let written = serde_json::to_vec(&LlamaConfig::of(&architecture, 0)).expect("plain values");
        let again =
            LlamaConfig::parse(&written).and_then(|config| config.architecture()).expect("our own");
        assert_eq!(again, architecture);
    }

    #[test]
    fn a_model_that_computes_something_else_is_refused_by_field() {
        for (from, to, field) in [
            (r#""model_type":"llama""#, r#""model_type":"qwen3""#, "model_type"),
            (r#""hidden_act":"silu""#, r#""hidden_act":"gelu""#, "hidden_act"),
            (
                r#""rope_scaling":null"#,
                r#""rope_scaling":{"rope_type":"llama3","factor":8.0}"#,
                "rope_scaling",
            ),
            (r#""use_cache":true"#, r#""head_dim":128"#, "head_dim"),
            (r#""num_key_value_heads":3"#, r#""num_key_value_heads":4"#, "num_key_value_heads"),
        ] {
            let refused = LlamaConfig::parse(PUBLISHED.replace(from, to).as_bytes())
                .and_then(|c| c.architecture());
            assert!(
                matches!(&refused, Err(ConfigError::Unsupported { field: got, .. }) if *got == field),
                "{to} gave {refused:?}"
            );
        }
    }
}
