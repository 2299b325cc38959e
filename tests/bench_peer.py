"""The peer of our benches: the same models in PyTorch and transformers, on the CPU, in f32 or bf16.

  python bench_peer.py train|infer --cfg small|base --threads N [--mode eager|compile] [--dtype f32|bf16] [--seconds S]

In bf16 training is autocast, with f32 parameters, and inference has bf16 parameters.

Prints a JSON object a line: what was measured, tokens per second by the median of the wall (tok_s_median) and per second of CPU time
of the main thread (tok_s_idle_est), which does everything where there is one thread. tests/bench_peer.sh sets them beside ours. Needs
torch and transformers 5; the experts are computed in one grouped product, as fast as transformers can."""

import argparse
import json
import statistics
import time
import tomllib
from pathlib import Path

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
CONTEXT, WRITTEN = 128, 32


def build(name):
    """The model of a recipe with fresh weights, and the recipe's training section."""
    training = tomllib.loads((RECIPES / f"{name}.toml").read_text())["training"]
    keys = json.loads((RECIPES / "models" / f"{name}.json").read_text())
    config = DeepseekV3Config(**keys, attn_implementation="sdpa", experts_implementation="grouped_mm")
    torch.manual_seed(1)
    return DeepseekV3ForCausalLM(config).float(), training


def emit(args, what, tokens, times):
    """`times` are pairs of seconds: by the wall, and of the main thread's CPU."""
    wall, cpu = (statistics.median(column) for column in zip(*times))
    figures = {"cfg": args.cfg, "mode": args.mode, "dtype": args.dtype, "threads": args.threads, "repeats": len(times)}
    print(json.dumps({"what": what, **figures, "tok_s_median": tokens / wall, "tok_s_idle_est": tokens / cpu}), flush=True)


def repeat(work, seconds):
    """Times of `work`, which returns what it took: one call warms up, three or more count."""
    work()
    times, end = [], time.monotonic() + seconds
    while len(times) < 3 or time.monotonic() < end:
        times.append(work())
    return times


def timed(work):
    """Wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.thread_time()
    work()
    return time.perf_counter() - wall, time.thread_time() - cpu


def train(args):
    model, training = build(args.cfg)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    shape = (training["global_batch_size"], training["sequence_length"])
    ids = torch.randint(0, model.config.vocab_size, shape)
    forward = torch.compile(model) if args.mode == "compile" else model

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bf16"):
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    emit(args, "train", ids.numel(), repeat(lambda: timed(step), args.seconds))


@torch.no_grad()
def infer(args):
    model, training = build(args.cfg)
    model.eval()
    if args.dtype == "bf16":
        model.bfloat16()
    forward = torch.compile(model, dynamic=True) if args.mode == "compile" else model
    ids = torch.randint(0, model.config.vocab_size, (1, training["sequence_length"]))

    def prefill():
        forward(input_ids=ids, use_cache=False, logits_to_keep=1)

    def decode():
        cache = DynamicCache(config=model.config)
        prompt = {"input_ids": ids[:, :CONTEXT], "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        last = forward(**prompt).logits[:, -1].argmax(-1, keepdim=True)

        def write(last=last):
            for _ in range(WRITTEN):
                logits = forward(input_ids=last, past_key_values=cache, use_cache=True).logits
                last = logits[:, -1].argmax(-1, keepdim=True)

        return timed(write)

    emit(args, "prefill", ids.numel(), repeat(lambda: timed(prefill), args.seconds))
    emit(args, "decode", WRITTEN, repeat(decode, args.seconds))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "infer"])
    parser.add_argument("--cfg", choices=["small", "base"], default="small")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--mode", choices=["eager", "compile"], default="eager")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--seconds", type=float, default=10, help="how long each figure is measured, three repeats at the least")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    {"train": train, "infer": infer}[args.what](args)


main()
