//! Compiles the message definitions, without a protobuf compiler on the machine.

fn main() {
    if std::env::var_os("CARGO_FEATURE_STD").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed=src/message/wire.proto");
    let descriptors =
        protox::compile(["src/message/wire.proto"], ["src/message"]).expect("wire.proto compiles");
    prost_build::Config::new().compile_fds(descriptors).expect("wire.proto generates");
}
