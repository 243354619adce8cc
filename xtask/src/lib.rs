//! The repository's own tools. Each is a function with a test that runs it, so that `cargo test` is all one has to know.

pub mod layers;
