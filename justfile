# Shortcuts for common tasks; `just` alone lists them.

default:
    @just --list

# All tests, as the README says
test:
    cargo test --workspace

# All checks that a change has to pass
ci:
    .ci/run

# Format, then lint
lint:
    cargo fmt
    cargo clippy --workspace --all-targets -- -D warnings

# The operator: its tests, and the definitions of its kinds as the chart has them
operator:
    cargo test --manifest-path k8s/operator/Cargo.toml

crds:
    cargo run --quiet --manifest-path k8s/operator/Cargo.toml -- crds trainingjobs > k8s/chart/crds/trainingjobs.yaml
    cargo run --quiet --manifest-path k8s/operator/Cargo.toml -- crds trainingclusters > k8s/chart/crds/trainingclusters.yaml

# Fuzz every file parser for this many seconds each, on the stable toolchain (needs a C++ compiler)
fuzz seconds="60":
    fuzz/run {{seconds}}

# Long runs of tests: a million seeds, twenty storms, an hour of watchers, twenty kills, 8 GB of weights converted, the memory of `base`
long:
    SEEDS=1000000 cargo test --workspace --release --test simulation no_seed -- --nocapture
    CONTRAFLOW_STORMS=20 cargo test --workspace --release --test processes storm -- --nocapture
    CONTRAFLOW_SOAK_MINUTES=60 cargo test --workspace --release --test processes soak -- --nocapture
    CONTRAFLOW_GIGABYTES=8 cargo test --workspace --release --test hf gigabytes -- --nocapture
    CONTRAFLOW_BASE=1 cargo test --workspace --release --test planned_memory a_rank -- --nocapture
    CONTRAFLOW_KILLS=20 cargo test --workspace --release --test processes killed_workers -- --nocapture

# An export against the real transformers, with a Python that has torch and transformers
transformers python="python3":
    CONTRAFLOW_PYTHON="$(command -v {{python}})" cargo test --test hf transformers -- --nocapture

# Licences, advisories and sources of the dependencies (needs cargo-deny)
deny:
    cargo deny check
    cargo deny --manifest-path k8s/operator/Cargo.toml check --config deny.toml

# Update the expected output of the command-line tests; review the diff
cli:
    TRYCMD=overwrite cargo test --test cli

# k8s/install.yaml from the chart (needs helm)
manifest:
    helm template contraflow k8s/chart --namespace contraflow --include-crds > k8s/install.yaml

# Our speed against PyTorch's, in alternation; see the top of the script for its requirements
bench-peer *MODELS:
    tests/bench_peer.sh {{MODELS}}

# Files and lines of the release build's very code, for addresses and debuggers: target/release/contraflow.debug
symbols:
    cargo rustc --release --bin contraflow -- -C strip=none
    cp target/release/contraflow target/release/contraflow.debug
    cargo build --release

# All figures quoted in the documents
figures:
    cargo build --release
    @echo "== the default run: loss, validation and baselines, tokens/s, MFU, bubble"
    target/release/contraflow train
    @echo "== speed of the benchmark models"
    target/release/contraflow bench step small --threads 1
    target/release/contraflow bench step small --threads 2
    target/release/contraflow bench step base --threads 1
    target/release/contraflow bench step base --threads 2
    target/release/contraflow bench infer small --threads 1
    target/release/contraflow bench infer base --threads 1
    @echo "== steps on this machine as its profile predicts them"
    target/release/contraflow bench profile --to target/machine.toml
    target/release/contraflow bench prediction --cluster target/machine.toml
    @echo "== the cluster: fabric, load, event log, placement, simulation"
    target/release/contraflow bench fabric
    target/release/contraflow bench load
    target/release/contraflow bench dashboard --pages tests/dashboard/measure.mjs
    target/release/contraflow bench viewers
    target/release/contraflow bench store
    target/release/contraflow bench placement
    target/release/contraflow bench simulation
    @echo "== plans"
    target/release/contraflow plan
    target/release/contraflow plan --schedule dualpipe --pipeline 8 --micro-batches 20
