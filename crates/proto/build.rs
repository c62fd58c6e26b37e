//! Compiles `/proto` in pure Rust and keeps the descriptors for server reflection.

use std::{env, error::Error, fs, path::PathBuf};

const ROOT: &str = "../../proto";
const FILES: [&str; 3] =
    ["muster/cluster/v1/cluster.proto", "muster/expert/v1/expert.proto", "muster/v1/inference.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    for file in FILES {
        println!("cargo:rerun-if-changed={ROOT}/{file}");
    }
    let mut compiler = protox::Compiler::new([ROOT])?;
    compiler.include_imports(true).include_source_info(true).open_files(FILES)?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    fs::write(out.join("muster.descriptors"), compiler.encode_file_descriptor_set())?;
    // `bytes::Bytes` for payloads: decoding then shares the frame's buffer instead of copying it.
    tonic_prost_build::configure().bytes(".").compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
