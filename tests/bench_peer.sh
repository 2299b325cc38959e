#!/usr/bin/env bash
# Our benches and PyTorch's on the same machine in the same minutes, in alternation, with the ratio of every figure.
#
#   tests/bench_peer.sh [small|base ...]     both models if none is named
#
# CONTRAFLOW_PEER_PYTHON  a Python with torch and transformers 5, to run tests/bench_peer.py
# CONTRAFLOW_PEER_ROUNDS  how often each is run, 2 if not set; the best round of either side counts
# CONTRAFLOW_PEER_DTYPES  the precisions of either side, "f32 bf16" if not set
#
# Without the first one our own figures are printed alone. The wall figures need a quiet machine; on a busy one go by
# those per CPU second, which are given for one thread.
set -euo pipefail
cd "$(dirname "$0")/.."

rounds=${CONTRAFLOW_PEER_ROUNDS:-2}
read -ra dtypes <<<"${CONTRAFLOW_PEER_DTYPES:-f32 bf16}"
python=${CONTRAFLOW_PEER_PYTHON:-}
[ -n "$python" ] || echo "no peer: set CONTRAFLOW_PEER_PYTHON to compare; our figures alone:"

figures=$(mktemp)
trap 'rm -f "$figures"' EXIT

# Each line of `figures`: who, figure, tokens/s by the median of the wall, tokens per CPU second.
ours() { # MODEL THREADS DTYPE
    local of="$1" set=(--set "precision.recipe=$3") what="$1/$3/$2"
    target/release/contraflow bench step "$of" --threads "$2" --steps 4 "${set[@]}" |
        sed -nE "s|^tokens/s: ([0-9.]+) median.*; ([0-9.]+) per CPU.*|ours $what/train \1 \2|p" >>"$figures"
    target/release/contraflow bench infer "$of" --threads "$2" "${set[@]}" |
        sed -nE "s|^(prefill\|decode).*: ([0-9.]+) median.*; ([0-9.]+) per CPU.*|ours $what/\1 \2 \3|p" >>"$figures"
}

peers() { # MODEL THREADS DTYPE
    local run=(env OMP_WAIT_POLICY=passive "$python" tests/bench_peer.py) with=(--cfg "$1" --threads "$2" --dtype "$3")
    for mode in eager compile; do
        "${run[@]}" train "${with[@]}" --mode "$mode" | peer_figures "$1/$3/$2" "$mode"
    done
    "${run[@]}" infer "${with[@]}" | peer_figures "$1/$3/$2" eager
}

peer_figures() { # PREFIX MODE
    sed -nE "s|.*\"what\": \"([a-z]+).*\"tok_s_median\": ([0-9.]+).*\"tok_s_idle_est\": ([0-9.]+).*|$2 $1/\1 \2 \3|p" \
        >>"$figures"
}

table() {
    awk '
        function best(who, figure, column,   key) { key = who SUBSEP figure SUBSEP column; return key in top ? top[key] : 0 }
        function line(what, figure, column,   ours, peer, mode) {
            ours = best("ours", figure, column)
            mode = best("compile", figure, column) > best("eager", figure, column) ? "compile" : "eager"
            peer = best(mode, figure, column)
            if (peer) printf "%-26s %-8s %10.1f %10.1f %-8s %5.2fx\n", figure, what, ours, peer, mode, ours / peer
            else printf "%-26s %-8s %10.1f\n", figure, what, ours
        }
        {
            if (!($2 in seen)) { seen[$2] = 1; order[++count] = $2 }
            for (column = 3; column <= 4; column++) {
                key = $1 SUBSEP $2 SUBSEP column
                if (!(key in top) || $column > top[key]) top[key] = $column
            }
        }
        END {
            printf "%-26s %-8s %10s %10s %-8s %6s\n", "model/dtype/threads/figure", "tokens", "ours", "peer", "", "ratio"
            for (i = 1; i <= count; i++) {
                line("per s", order[i], 3)
                if (order[i] ~ "/1/") line("per CPUs", order[i], 4)
            }
        }' "$figures"
}

[ $# -gt 0 ] || set -- small base
cargo build --release --quiet
for round in $(seq "$rounds"); do
    for model in "$@"; do
        for dtype in "${dtypes[@]}"; do
            for threads in 1 2; do
                echo "round $round: $model, $dtype, $threads thread(s)" >&2
                ours "$model" "$threads" "$dtype"
                [ -z "$python" ] || peers "$model" "$threads" "$dtype"
            done
        done
    done
done
table
