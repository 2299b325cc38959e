//! The shell blocks of README.md in order, and what is changed in each: steps are a hundredth, names of hosts and folders are those
//! of this machine. Knows nothing of how they are run.

/// How a block is run.
#[derive(Clone, Copy, Debug)]
pub enum How {
    /// To its end.
    Here,
    /// In a terminal of its own, beside the blocks that follow.
    Terminal,
    /// Not at all, and why.
    Skipped(&'static str),
}

/// A block of the README.
#[derive(Debug)]
pub struct Block {
    /// How it begins there.
    pub begins: &'static str,
    pub how: How,
    /// Text in it, and what takes its place; each has to be found. `{NAME}` is filled in by `stage`.
    pub instead: &'static [(&'static str, &'static str)],
}

const fn here(begins: &'static str, instead: &'static [(&'static str, &'static str)]) -> Block {
    Block { begins, how: How::Here, instead }
}

const fn terminal(begins: &'static str, instead: &'static [(&'static str, &'static str)]) -> Block {
    Block { begins, how: How::Terminal, instead }
}

/// A short `contraflow train` instead of the recipe's.
const SHORT: (&str, &str) = (
    "contraflow train",
    "contraflow train --set training.steps=7 --set training.sequence_length=64 --set checkpoint.every=1 \
     --set training.validation_sequences=4",
);

pub const BLOCKS: [Block; 22] = [
    here("cargo run --release -- train", &[("cargo run --release --", "contraflow"), SHORT]),
    Block { begins: "cargo test --workspace", how: How::Skipped("this test is part of it"), instead: &[] },
    here("contraflow plan --schedule", &[]),
    here("contraflow train --data", &[SHORT]),
    here(
        "contraflow data train-tokenizer",
        &[(
            "contraflow train small",
            "contraflow train small --set training.steps=1 --set training.global_batch_size=2 \
             --set training.micro_batch_size=2 --set training.validation_sequences=2",
        )],
    ),
    here(
        "contraflow train --resume  ",
        &[("steps=1000", "steps=10"), ("steps=1200", "steps=12"), ("step-00001100", "step-00000011")],
    ),
    here("contraflow train --resume s3://", &[]),
    here("contraflow train --set validate.every", &[SHORT, ("every=100", "every=1")]),
    here("contraflow export", &[SHORT]),
    here("contraflow train --set precision.recipe=bf16", &[SHORT]),
    here("contraflow plan deepseek-v3 --cluster", &[]),
    terminal("contraflow orchestrator --state state", &[("--state", "--listen 127.0.0.1:{PORT} --state")]),
    terminal("for i in 1 2 3 4 5", &[(":7070", ":{PORT}")]),
    terminal(
        "contraflow submit tiny",
        &[("training.steps=200", "training.steps=20 --set training.validation_sequences=4")],
    ),
    here("contraflow status job-1", &[("PID", "{PID}")]),
    here("contraflow certs init", &[("node0.example", "{HOST}")]),
    terminal("contraflow orchestrator --state cluster", &[(":7070", ":{PORT}")]),
    terminal(
        "contraflow worker --join node0.example",
        &[
            ("node0.example:7070", "{HOST}:{PORT}"),
            ("/shared", "shared"),
            ("10.0.0.2", "{HOST}"),
            ("contraflow", "CONTRAFLOW_TOKEN={WORKER_TOKEN} contraflow"),
        ],
    ),
    here(
        "contraflow jobs --orchestrator",
        &[
            ("node0.example:7070", "{HOST}:{PORT}"),
            ("contraflow", "CONTRAFLOW_TOKEN={CLIENT_TOKEN} contraflow"),
        ],
    ),
    here("contraflow certs renew", &[]),
    Block {
        begins: "contraflow certs init --dir certs --host contraflow-orchestrator",
        how: How::Skipped("it needs a Kubernetes cluster; tests/kubernetes.rs renders what it installs"),
        instead: &[],
    },
    here("export OTEL_EXPORTER_OTLP_ENDPOINT", &[]),
];
