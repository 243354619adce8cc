//! Where the program finds libtorch when it runs.

include!("../model/link_torch.rs");

fn main() {
    link_torch();
}
