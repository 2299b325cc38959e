//! Compiles the protocol files with a pure-Rust compiler, so that no `protoc` is needed on any machine.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let descriptors = protox::compile(["contraflow/v1/report.proto"], ["."])?;
    prost_build::Config::new()
        .type_attribute(".", "#[derive(serde::Serialize, serde::Deserialize)]")
        .compile_fds(descriptors)?;
    println!("cargo:rerun-if-changed=contraflow");
    Ok(())
}
