//! Where the examples find libtorch when they run.

include!("../model/link_torch.rs");

fn main() {
    link_torch();
}
