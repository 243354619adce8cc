//! Test binaries of this package link libtorch.

include!("../model/link_torch.rs");

fn main() {
    link_torch();
}
