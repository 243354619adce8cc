//! A small run for unit tests.

use manyhands_proto::Digest;
use manyhands_proto::run_file::{DataSet, RunFile, RunSpec};

pub(crate) fn spec() -> RunSpec {
    let text = r#"
        [run]
        name = "tiny"
        rounds = 2
        [model]
        vocabulary_size = 300
        hidden_size = 32
        layers = 1
        heads = 4
        key_value_heads = 2
        feed_forward_size = 64
        context_length = 32
        [training]
        steps_per_round = 4
        batch_sequences = 4
        micro_batch_sequences = 2
        learning_rate = 1e-3
        [data]
        dataset = "data"
    "#;
    RunFile::parse(text).expect("a good file").resolve(DataSet {
        manifest: Digest::of(b"manifest"),
        train_sequences: 10_000,
        held_out_sequences: 2,
        theta: Digest::of(b"theta 0"),
        theta_is_given: false,
    })
}
