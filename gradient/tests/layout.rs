use manyhands_gradient::layout::LayoutError;
use manyhands_gradient::vector::{self, ParseVectorError};
use manyhands_gradient::{CHUNK, Layout, assert_ieee, initial_theta};
use manyhands_proto::{ChunkIndex, ParameterCount};

use crate::support::{architecture, layout};

#[test]
fn the_canonical_vector_is_sorted_padded_and_complete() {
    let layout = layout();
    let names: Vec<_> = layout.tensors().iter().map(|tensor| tensor.name()).collect();
    assert_eq!(names.len(), 2 + 9 * 11);
    assert!(names.is_sorted());
    // Plain string order: layer 10 comes before layer 2.
    let position = |name: &str| names.iter().position(|other| *other == name);
    assert!(
        position("model.layers.10.mlp.up_proj.weight")
            < position("model.layers.2.mlp.up_proj.weight")
    );

    let k_proj = layout.tensor("model.layers.3.self_attn.k_proj.weight").expect("it is there");
    assert_eq!(k_proj.shape(), [24, 48]);
    assert_eq!(k_proj.offset() % CHUNK, 0);
    assert!(layout.tensor("lm_head.weight").is_none(), "tied weights are there once");

    let per_layer = 2 * 48 + 2 * 48 * 48 + 2 * 24 * 48 + 3 * 130 * 48;
    assert_eq!(layout.parameter_count(), ParameterCount(700 * 48 + 48 + 11 * per_layer));
    let real: usize = layout.places().iter().map(|place| place.real).sum();
    assert_eq!(real as u64, layout.parameter_count().0);
    assert_eq!(layout.place(ChunkIndex(layout.chunk_count() as u32)), None);
    for (index, tensor) in layout.tensors().iter().enumerate() {
        for chunk in tensor.chunks() {
            assert_eq!(layout.places()[chunk].tensor, index, "no chunk spans tensors");
        }
    }
}

#[test]
fn untied_weights_have_an_output_projection() {
    let untied =
        manyhands_proto::run_file::Architecture { tie_embeddings: false, ..architecture() };
    let untied = Layout::of(&untied).expect("a valid architecture");
    assert_eq!(untied.tensor("lm_head.weight").map(|tensor| tensor.elements()), Some(700 * 48));
}

#[test]
fn what_is_no_layout_is_refused() {
    let named = |name: &str, shape: &[usize]| (name.to_owned(), shape.to_vec());
    assert_eq!(Layout::from_tensors(vec![]), Err(LayoutError::Empty));
    assert_eq!(
        Layout::from_tensors(vec![named("a", &[1]), named("a", &[2])]),
        Err(LayoutError::Duplicate { name: "a".to_owned() })
    );
    assert!(matches!(
        Layout::from_tensors(vec![named("a", &[3, 0])]),
        Err(LayoutError::EmptyTensor { .. })
    ));
    assert_eq!(
        Layout::from_tensors(vec![named("a", &[usize::MAX, 2])]),
        Err(LayoutError::TooLarge)
    );
    assert_eq!(Layout::from_tensors(vec![named("a", &[1 << 50])]), Err(LayoutError::TooLarge));
}

#[test]
fn a_seed_gives_the_same_theta_on_every_machine() {
    let (architecture, layout) = (architecture(), layout());
    let theta = initial_theta(&layout, &architecture, 7);
    assert_eq!(
        vector::digest(&theta).to_string(),
        "6a624f6d287a8e340cb49898fbcf9f57f451a3a8c63fb70d9f351b66f4ec68c2"
    );
    assert_ne!(theta, initial_theta(&layout, &architecture, 8));

    let deviation = |name: &str| {
        let values = &theta[layout.tensor(name).expect("it is there").range()];
        (values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
    };
    assert!((deviation("model.embed_tokens.weight") - 0.02).abs() < 3e-4);
    let residual = 0.02 / 22.0_f64.sqrt();
    assert!((deviation("model.layers.4.mlp.down_proj.weight") - residual).abs() < 2e-4);
    assert_eq!(deviation("model.layers.4.input_layernorm.weight"), 1.0);
}

#[test]
fn theta_survives_bytes_and_safetensors() {
    let layout = layout();
    let theta = initial_theta(&layout, &architecture(), 7);
    let bytes = vector::to_bytes(&theta);
    assert_eq!(vector::from_bytes(&bytes, &layout).as_ref(), Ok(&theta));
    assert_eq!(vector::digest(&theta), manyhands_proto::Digest::of(&bytes));

    let file = vector::to_safetensors(&layout, &theta).expect("a layout's tensors");
    assert!(file.len() < bytes.len(), "real shapes, no padding");
    assert_eq!(vector::from_safetensors(&[&file], &layout).expect("our own file"), theta);
    assert!(vector::from_safetensors(&[&file, &file], &layout).is_err(), "each tensor once");
    assert!(vector::from_safetensors(&[], &layout).is_err(), "nothing may be missing");
    for length in (0..file.len()).step_by(file.len() / 50) {
        assert!(vector::from_safetensors(&[&file[..length]], &layout).is_err());
    }
    let mut infinite = theta;
    infinite[0] = f32::INFINITY;
    let file = vector::to_safetensors(&layout, &infinite).expect("a layout's tensors");
    assert!(vector::from_safetensors(&[&file], &layout).is_err());
}

#[test]
fn a_vector_from_a_stranger_is_finite_and_its_padding_is_zero() {
    let layout = layout();
    let mut theta = initial_theta(&layout, &architecture(), 7);
    let expected = theta.len() * 4;
    assert_eq!(
        vector::from_bytes(&[0; 12], &layout),
        Err(ParseVectorError::Length { expected, got: 12 })
    );
    let padded = layout.tensor("model.norm.weight").expect("it is there").range().end;
    theta[padded] = 1.0;
    assert_eq!(
        vector::from_bytes(&vector::to_bytes(&theta), &layout),
        Err(ParseVectorError::Padding { index: padded })
    );
    theta[3] = f32::NAN;
    assert_eq!(
        vector::from_bytes(&vector::to_bytes(&theta), &layout),
        Err(ParseVectorError::NotFinite { index: 3 })
    );
}

#[test]
fn threads_here_do_ieee_arithmetic() {
    assert_ieee();
    std::thread::spawn(assert_ieee).join().expect("a new thread does too");
}
