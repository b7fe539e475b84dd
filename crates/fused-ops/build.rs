//! Compiles the C++ part of the LibTorch backend, where that is wanted.

fn main() {
    println!("cargo:rerun-if-changed=src/libtorch/shim.cpp");
    #[cfg(feature = "tch")]
    libtorch();
}

#[cfg(feature = "tch")]
fn libtorch() {
    use std::path::PathBuf;
    // From the build script of torch-sys, which has found the library by now.
    let lib = PathBuf::from(std::env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys says where LibTorch is"));
    let include = lib.parent().map(|dir| dir.join("include")).unwrap_or_default();
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .file("src/libtorch/shim.cpp")
        .compile("clair-libtorch");
}
