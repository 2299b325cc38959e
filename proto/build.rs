//! Compiles the protocol files with a pure-Rust compiler, so that no `protoc` is needed on any machine.

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files =
        ["report", "jobs", "cluster", "control", "state"].map(|name| format!("contraflow/v1/{name}.proto"));
    let mut compiler = protox::Compiler::new(["."])?;
    compiler.include_source_info(true).include_imports(true).open_files(files)?;
    // What reflection answers with.
    let out = std::env::var("OUT_DIR")?;
    std::fs::write(Path::new(&out).join("descriptors.bin"), compiler.encode_file_descriptor_set())?;
    let mut config = prost_build::Config::new();
    for name in ["StepReport", "GradientNorms", "LayerLoad"] {
        config.type_attribute(
            format!(".contraflow.v1.{name}"),
            "#[derive(serde::Serialize, serde::Deserialize)]",
        );
    }
    tonic_prost_build::configure().compile_fds_with_config(compiler.file_descriptor_set(), config)?;
    println!("cargo:rerun-if-changed=contraflow");
    Ok(())
}
