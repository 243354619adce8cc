// Included by the build script of every package whose binaries or tests link libtorch, here and in the other folders:
//
//     include!("../model/link_torch.rs");
//
//     fn main() {
//         link_torch();
//     }
//
// Each needs it, because what the build scripts of tch and torch-sys say about linking reaches their own binaries only.
// The flags reach a package's binaries, tests and examples, but not its doctests: those cannot find libtorch when they run.
// A package that uses libtorch in some of its features only asks for the feature first (`CARGO_FEATURE_<NAME>`).

/// Lets the loader find libtorch where `LIBTORCH` says, with no `LD_LIBRARY_PATH`.
fn link_torch() {
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    let Some(libtorch) = std::env::var_os("LIBTORCH").filter(|path| !path.is_empty()) else {
        println!("cargo::error=LIBTORCH is not set: run `make build`, or put `scripts/with-libtorch` before the cargo command");
        return;
    };
    let libraries = std::path::Path::new(&libtorch).join("lib");
    if !libraries.is_absolute() || !libraries.is_dir() {
        println!(
            "cargo::error=LIBTORCH is `{}`: expected the absolute path of a folder with `lib` in it; \
             unset it, and `make build` fetches one",
            std::path::Path::new(&libtorch).display()
        );
        return;
    }
    println!("cargo::rustc-link-search=native={}", libraries.display());
    println!("cargo::rustc-link-arg=-Wl,-rpath,{}", libraries.display());
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|system| system == "linux") {
        // No symbol of libtorch_cuda.so is named by our code, it registers itself when it is loaded. libtorch.so pulls it
        // in where there is one, and the linker must not drop libtorch.so for being empty.
        println!("cargo::rustc-link-arg=-Wl,--no-as-needed");
        println!("cargo::rustc-link-arg=-ltorch");
    }
}
