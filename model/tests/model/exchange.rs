//! Models that leave and come back, and text that they write.

use std::fs;

use manyhands_gradient::vector::ParseSafetensorsError;
use manyhands_model::data::TextTokenizer;
use manyhands_model::hugging_face::{ExportError, ImportError, export, import};
use manyhands_model::{Device, GenerateError, GenerateOptions, Transformer, generate};
use manyhands_proto::run_file::{Architecture, Precision};
use tempfile::TempDir;

use crate::support::{architecture, theta};

fn tokenizer() -> TextTokenizer {
    let texts = (0..200).map(|number| format!("many hands make light work, {number} of them\n"));
    TextTokenizer::train(300, texts).expect("trains")
}

fn model(architecture: &Architecture, theta: &[f32]) -> Transformer {
    Transformer::new(architecture, Precision::F32, theta, Device::Cpu).expect("a layout")
}

#[test]
fn an_exported_model_comes_back_the_same() {
    let home = TempDir::new().expect("a folder");
    for tie_embeddings in [true, false] {
        let architecture = Architecture { tie_embeddings, ..architecture() };
        let start = theta(&architecture, 21);
        let folder = home.path().join(format!("tied-{tie_embeddings}"));
        export(&folder, &architecture, &start, &tokenizer()).expect("exports");
        for name in
            ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
        {
            assert!(folder.join(name).is_file(), "{name} is missing");
        }
        let back = import(&folder).expect("imports");
        assert_eq!(back.architecture, architecture);
        assert!(start.iter().zip(&back.theta).all(|(a, b)| a.to_bits() == b.to_bits()));
        let tokens = [vec![1, 2, 3, 250]];
        assert_eq!(
            model(&architecture, &start).logits(&tokens),
            model(&architecture, &back.theta).logits(&tokens)
        );
        let path = back.tokenizer.expect("was exported");
        assert_eq!(TextTokenizer::open(&path).expect("opens").digest(), tokenizer().digest());
        assert!(matches!(
            export(&folder, &architecture, &start, &tokenizer()),
            Err(ExportError::FolderExists(_))
        ));
    }
}

#[test]
fn a_folder_that_does_not_fit_is_refused_by_name() {
    let home = TempDir::new().expect("a folder");
    let architecture = architecture();
    let folder = home.path().join("model");
    export(&folder, &architecture, &theta(&architecture, 22), &tokenizer()).expect("exports");
    let config = fs::read_to_string(folder.join("config.json")).expect("a config");
    let with = |from: &str, to: &str| {
        assert!(config.contains(from), "{from} is in {config}");
        fs::write(folder.join("config.json"), config.replace(from, to)).expect("writes");
        import(&folder).expect_err("refused")
    };
    assert!(matches!(
        with("\"intermediate_size\": 64", "\"intermediate_size\": 65"),
        ImportError::Weights(ParseSafetensorsError::Shape { .. })
    ));
    assert!(matches!(
        with("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3"),
        ImportError::Weights(ParseSafetensorsError::Missing { .. })
    ));
    assert!(matches!(
        with("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1"),
        ImportError::Weights(ParseSafetensorsError::Unexpected { .. })
    ));
    assert!(matches!(with("\"silu\"", "\"gelu\""), ImportError::Config { .. }));
    fs::write(folder.join("model.safetensors"), "no weights").expect("writes");
    fs::write(folder.join("config.json"), &config).expect("writes");
    assert!(matches!(import(&folder), Err(ImportError::Weights(ParseSafetensorsError::Format(_)))));
    fs::write(
        folder.join("model.safetensors.index.json"),
        r#"{"weight_map":{"model.norm.weight":"../elsewhere.safetensors"}}"#,
    )
    .expect("writes");
    assert!(matches!(import(&folder), Err(ImportError::WeightFileName { .. })));
}

#[test]
fn logits_of_a_position_do_not_depend_on_what_follows_it() {
    let architecture = architecture();
    let model = model(&architecture, &theta(&architecture, 23));
    let long = model.logits(&[vec![5, 6, 7, 8, 9]]);
    let short = model.logits(&[vec![5, 6, 7]]);
    let vocabulary = architecture.vocabulary_size as usize;
    let largest =
        long[..3 * vocabulary].iter().zip(&short).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(largest < 1e-5, "{largest}");
}

#[test]
fn generating_with_kept_keys_and_values_gives_what_starting_anew_gives() {
    let architecture = architecture();
    // Large weights: likeliest tokens that are clearly likeliest.
    let large: Vec<f32> = theta(&architecture, 24).iter().map(|w| w * 6.0).collect();
    let model = model(&architecture, &large);
    let tokenizer = tokenizer();
    let options = GenerateOptions { tokens_max: 12, temperature: 0.0, top_k: 0, seed: 0 };
    let mut pieces = String::new();
    let text =
        generate(&model, &tokenizer, "many hands", &options, &mut |piece| pieces.push_str(piece));
    let text = text.expect("generates");
    assert_eq!(text, pieces);

    let mut history = tokenizer.encode("many hands").expect("encodes");
    let prompt = history.len();
    for _ in 0..12 {
        let logits = model.logits(&[history.clone()]);
        let last = &logits[logits.len() - architecture.vocabulary_size as usize..];
        let likeliest = (0..last.len()).max_by(|a, b| last[*a].total_cmp(&last[*b]).then(b.cmp(a)));
        let likeliest = likeliest.expect("a vocabulary") as u32;
        if likeliest == tokenizer.end_of_text() {
            break;
        }
        history.push(likeliest);
    }
    let anew = tokenizer.decode(&history[prompt..]).expect("decodes");
    assert!(
        anew.starts_with(&text) && anew.trim_end_matches('\u{fffd}').len() <= text.len(),
        "{anew:?} {text:?}"
    );
}

#[test]
fn sampling_follows_its_seed_and_goes_on_past_the_context() {
    let architecture = architecture();
    let model = model(&architecture, &theta(&architecture, 25));
    let tokenizer = tokenizer();
    let text = |seed, prompt: &str| {
        let options = GenerateOptions { tokens_max: 70, temperature: 1.0, top_k: 40, seed };
        generate(&model, &tokenizer, prompt, &options, &mut |_| {}).expect("generates")
    };
    assert_eq!(text(1, ""), text(1, ""));
    assert_ne!(text(1, ""), text(2, ""));
    let long_prompt = "many hands make light work, ".repeat(20);
    assert!(!text(3, &long_prompt).is_empty());
    let cold = GenerateOptions { tokens_max: 1, temperature: f32::NAN, top_k: 0, seed: 0 };
    let refused = generate(&model, &tokenizer, "x", &cold, &mut |_| {});
    assert!(matches!(refused, Err(GenerateError::Temperature(_))));
}
