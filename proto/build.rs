//! Compiles the protocol files with a pure-Rust compiler, so that no `protoc` is needed on any machine.

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["report", "jobs", "cluster", "events", "control", "state"]
        .map(|name| format!("contraflow/v1/{name}.proto"));
    let mut compiler = protox::Compiler::new(["."])?;
    compiler.include_source_info(true).include_imports(true).open_files(files)?;
    // What reflection answers with.
    let out = std::env::var("OUT_DIR")?;
    std::fs::write(Path::new(&out).join("descriptors.bin"), compiler.encode_file_descriptor_set())?;
    let mut config = prost_build::Config::new();
    for name in ["StepReport", "StepRecord", "GradientNorms", "LayerLoad"] {
        config.type_attribute(
            format!(".contraflow.v1.{name}"),
            "#[derive(serde::Serialize, serde::Deserialize)]",
        );
    }
    step_record_as_json(&mut config);
    tonic_prost_build::configure().compile_fds_with_config(compiler.file_descriptor_set(), config)?;
    println!("cargo:rerun-if-changed=contraflow");
    Ok(())
}

/// A step record is also a line of JSON: layers in order, absent fields left out, a number that JSON does not have as null.
fn step_record_as_json(config: &mut prost_build::Config) {
    config.btree_map([".contraflow.v1.StepRecord.max_vio"]);
    config.type_attribute(".contraflow.v1.StepRecord", "#[serde(default)]");
    let or_nan = |with: &str| format!("#[serde(deserialize_with = \"crate::or_nan::{with}\")]");
    for name in ["loss", "balance_loss", "grad_norm"] {
        config.field_attribute(format!(".contraflow.v1.StepRecord.{name}"), or_nan("number"));
    }
    for name in ["mtp_loss", "mfu", "validation_loss"] {
        let field = format!(".contraflow.v1.StepRecord.{name}");
        config.field_attribute(field, "#[serde(skip_serializing_if = \"Option::is_none\")]");
    }
    config.field_attribute(".contraflow.v1.StepRecord.loads", "#[serde(skip)]");
    for (name, with) in [("embedding", "number"), ("layers", "numbers"), ("head", "number")] {
        config.field_attribute(format!(".contraflow.v1.GradientNorms.{name}"), or_nan(with));
    }
}
