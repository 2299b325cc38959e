# The image that k8s/chart runs: docker build -t contraflow:0.1.0 .
FROM rust:1-bookworm AS build
WORKDIR /source
COPY . .
RUN cargo build --release --locked
# A workspace of its own: k8s/operator/Cargo.toml says why.
RUN cargo build --release --locked --manifest-path k8s/operator/Cargo.toml

# The binary needs libc, libgcc and the certificates of object stores.
FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /source/target/release/contraflow /usr/local/bin/contraflow
COPY --from=build /source/k8s/operator/target/release/contraflow-operator /usr/local/bin/contraflow-operator
COPY --from=build /source/LICENSE* /usr/share/doc/contraflow/
# Where it keeps what it has measured of the machine.
ENV HOME=/tmp
USER 10001:10001
ENTRYPOINT ["/usr/local/bin/contraflow"]
