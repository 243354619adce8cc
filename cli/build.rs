//! Where the command finds libtorch when it runs, if it was built with what needs it.

include!("../model/link_torch.rs");

fn main() {
    if std::env::var_os("CARGO_FEATURE_WORKER").is_some() {
        link_torch();
    }
}
