//! A client in another language, made from the published protocol files, where there is a Python that has grpcio.

use std::path::Path;
use std::process::Command;

use crate::cluster::{Cluster, JOB};
use crate::deadline;

/// A Python with grpcio and grpcio-tools: `$CONTRAFLOW_GRPC_PYTHON`, or the one on the path. `None` is printed.
fn python() -> Option<String> {
    let named = std::env::var("CONTRAFLOW_GRPC_PYTHON").ok();
    let python = named.clone().unwrap_or_else(|| "python3".into());
    let import = Command::new(&python).args(["-c", "import grpc, grpc_tools"]).output();
    let has_both = import.is_ok_and(|output| output.status.success());
    assert!(has_both || named.is_none(), "CONTRAFLOW_GRPC_PYTHON: {python} cannot import grpc, grpc_tools");
    if !has_both {
        eprintln!("SKIPPED: no client in Python, {python} cannot import grpc, grpc_tools");
    }
    has_both.then_some(python)
}

#[test]
fn a_client_generated_from_the_proto_files_submits_and_follows_a_job() {
    let Some(python) = python() else { return };
    let cluster = Cluster::start(4);
    let mut arguments = vec!["train", "tiny", "--print-recipe", "--set", "training.steps=5"];
    let axes =
        JOB.iter().filter(|change| !change.starts_with("training.steps") && !change.starts_with("model"));
    axes.for_each(|change| arguments.extend(["--set", change]));
    let (code, recipe, stderr) = cluster.run(&arguments);
    assert_eq!(code, 0, "{stderr}");
    let path = cluster.path().join("recipe.toml");
    std::fs::write(&path, recipe).unwrap();
    let proto = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    let client = deadline::output(
        Command::new(python)
            .arg(proto.join("client.py"))
            .arg(&cluster.address)
            .arg(&path)
            .env("PYTHONPATH", &proto),
    );
    let out = String::from_utf8(client.stdout).unwrap();
    assert!(client.status.success(), "{}", String::from_utf8_lossy(&client.stderr));
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines.len(), 6, "{out}");
    assert!(lines[0].starts_with("1 ") && lines[5].starts_with("trained"), "{out}");
}
