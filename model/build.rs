//! Where this package's own tests and examples find libtorch when they run.

include!("link_torch.rs");

fn main() {
    link_torch();
}
