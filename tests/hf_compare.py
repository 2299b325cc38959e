"""Loads an exported directory with the real transformers and compares logits.

  python hf_compare.py EXPORT LOGITS

LOGITS is a safetensors file with `input_ids` [N, S] and `logits` [N, S, V], as `contraflow eval --logits` writes it. Prints the
largest difference; exit code 1 if it is above 5e-5, or if a tensor of the model was not in the export."""

import sys

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

LIMIT = 5e-5


def main(export, logits):
    config = AutoConfig.from_pretrained(export)
    model, report = AutoModelForCausalLM.from_pretrained(
        export, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model.eval()
    faults = {key: sorted(names) for key, names in report.items() if names and key != "unexpected_keys"}
    # transformers has no multi-token prediction: those tensors, and no others, are too many for it.
    mtp = [f"model.layers.{config.num_hidden_layers}."] if getattr(config, "num_nextn_predict_layers", 0) else []
    unexpected = [name for name in report["unexpected_keys"] if not name.startswith(tuple(mtp))]
    if faults or unexpected:
        sys.exit(f"{export}: not what transformers expects: {faults} unexpected {unexpected}")
    ours = load_file(logits)
    with torch.no_grad():
        theirs = model(input_ids=ours["input_ids"].long()).logits
    difference = (theirs - ours["logits"].float()).abs().max().item()
    print(f"{tuple(theirs.shape)} logits, largest {theirs.abs().max().item():.3f}, largest difference {difference:.3g}")
    if not difference <= LIMIT:
        sys.exit(f"{export}: expected logits within {LIMIT}, got a difference of {difference}")


main(*sys.argv[1:])
