"""Writes fixtures of the architectures next to DeepSeek-V3: what transformers computes with small random models.

  python parity_fixtures.py tests/fixtures [NAME...]

Each directory of parity/ holds the model in the published form, `fixture.safetensors` with activations, loss, gradients and
greedy tokens, and `optim.safetensors` with one step of AdamW. Everything runs in f32 with eager attention on one thread.
fp8/ holds a model in FP8 with a scale per block, and what some of its matrices stand for."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()

SMALL = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, n_shared_experts=2, n_routed_experts=8, num_experts_per_tok=3,
    kv_lora_rank=12, q_lora_rank=None, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10,
    first_k_dense_replace=1, n_group=1, topk_group=1, max_position_embeddings=256, rms_norm_eps=1e-6,
    hidden_act="silu", attention_bias=False, initializer_range=0.02,
)
V2 = dict(model_type="deepseek_v2", scoring_func="softmax", norm_topk_prob=False, aux_loss_alpha=0.001, seq_aux=True)
V3 = dict(model_type="deepseek_v3", scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=True)


def yarn(factor, mscale, mscale_all_dim, original):
    return dict(type="yarn", factor=factor, beta_fast=32, beta_slow=1, mscale=mscale, mscale_all_dim=mscale_all_dim,
                original_max_position_embeddings=original)


# As the published files spell it. The two factors of YaRN differ: equal ones would hide which goes where.
SPECS = {
    "v2_lite": SMALL | V2 | dict(topk_method="greedy", routed_scaling_factor=1.0, rope_theta=10000,
                                 rope_scaling=yarn(4, 0.9, 0.6, 64)),
    "v2_grouped": SMALL | V2 | dict(topk_method="group_limited_greedy", q_lora_rank=16, n_group=4, topk_group=2,
                                    routed_scaling_factor=4.0, rope_theta=10000, rope_scaling=None),
    "moonlight": SMALL | V3 | dict(routed_scaling_factor=2.446, rope_theta=50000.0, rope_scaling=None),
    "kimi_k2": SMALL | V3 | dict(model_type="kimi_k2", q_lora_rank=16, n_shared_experts=1, n_routed_experts=12,
                                 routed_scaling_factor=2.827, rope_theta=50000.0, rope_scaling=yarn(8, 1.0, 1.0, 32)),
    "tied": SMALL | V3 | dict(tie_word_embeddings=True, q_lora_rank=16, n_group=4, topk_group=2, routed_scaling_factor=2.5,
                              rope_theta=10000.0, rope_scaling=None),
}
SEEDS = {name: 100 + index for index, name in enumerate(SPECS)}


def published_names(tensors):
    """transformers stacks the experts of a layer; the files have one tensor each. A head that is the embedding is not in them."""
    out = {}
    for name, value in tensors.items():
        if name == "lm_head.weight" and value.data_ptr() == tensors["model.embed_tokens.weight"].data_ptr():
            continue
        if name.endswith("experts.gate_up_proj"):
            for expert, pair in enumerate(value):
                gate, up = pair.chunk(2)
                out[name.replace("gate_up_proj", f"{expert}.gate_proj.weight")] = gate
                out[name.replace("gate_up_proj", f"{expert}.up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(value):
                out[name.replace("down_proj", f"{expert}.down_proj.weight")] = down
        else:
            out[name] = value
    return {name: value.detach().clone().contiguous() for name, value in out.items()}


def build(published):
    # Kimi K2 is DeepSeek-V3 under another name, which transformers knows only with code from elsewhere.
    v2 = published["model_type"] == "deepseek_v2"
    config_class, model_class = (DeepseekV2Config, DeepseekV2ForCausalLM) if v2 else (DeepseekV3Config, DeepseekV3ForCausalLM)
    keys = {key: value for key, value in published.items() if key != "model_type"}
    config = config_class(**keys, attn_implementation="eager", experts_implementation="eager")
    model = model_class(config).float().eval()
    # DeepSeek-V2 turns that many columns of a head; transformers takes the number from here.
    assert not v2 or config.head_dim == config.qk_rope_head_dim
    return config, model


def fill(model, generator):
    for name, value in sorted(list(model.named_parameters()) + list(model.named_buffers())):
        if "rotary_emb" in name:
            continue
        random = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if name.endswith("e_score_correction_bias"):
            random = 0.15 * random - 0.9
        elif value.dim() == 1:
            random = 1 + 0.15 * random
        elif "embed_tokens" in name:
            # A large table that is the head as well would predict that every token comes once more.
            random = 0.25 * random if model.config.tie_word_embeddings else random
        else:
            random = random * (1.3 if "lm_head" in name or "gate.weight" in name else 1.0) / math.sqrt(value.shape[-1])
        value.data.copy_(random)


def by_expert(indices, weights):
    """The chosen experts of each token by ascending id: torch promises no order."""
    indices, order = indices.sort(-1)
    return indices, weights.gather(-1, order)


def traced(model, config, ids):
    """One pass forward and backward, with what comes out of every layer and gate."""
    found, hooks = {}, []
    keep = lambda module, key: hooks.append(module.register_forward_hook(lambda m, a, out: found.__setitem__(key, out)))
    keep(model.model.embed_tokens, "hidden.0")
    keep(model.model.norm, "final_norm")
    for layer, block in enumerate(model.model.layers):
        keep(block, f"hidden.{layer + 1}")
        if layer >= config.first_k_dense_replace:
            def gate(m, a, out, layer=layer):
                found[f"moe.{layer}.router_logits"] = out[0]
                indices, weights = by_expert(out[2], out[1])
                found[f"moe.{layer}.topk_indices"], found[f"moe.{layer}.topk_weights"] = indices, weights
            hooks.append(block.mlp.gate.register_forward_hook(gate))
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    for hook in hooks:
        hook.remove()
    rope = model.model.rotary_emb
    found |= {"input_ids": ids, "logits": out.logits, "loss": out.loss, "rope.inv_freq": rope.inv_freq,
              "rope.cos_sin_scale": torch.tensor(rope.attention_scaling),
              "softmax_scale": torch.tensor(model.model.layers[0].self_attn.scaling)}
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return found, published_names(gradients)


def greedy(model, generator, vocab, prompt=6, new=12, prompts=40):
    """The prompt out of several whose continuation has the widest margins, and that continuation."""
    best = None
    for row in torch.randint(1, vocab, (prompts, prompt), generator=generator):
        ids, logits, gap = row[None], [], math.inf
        with torch.no_grad():
            for _ in range(new):
                last = model(input_ids=ids, use_cache=False).logits[:, -1]
                top = last.topk(2)[0][0]
                gap = min(gap, float(top[0] - top[1]))
                logits.append(last)
                ids = torch.cat([ids, last.argmax(-1, keepdim=True)], 1)
        if best is None or gap > best[0]:
            best = (gap, ids, torch.stack(logits, 1))
    gap, ids, logits = best
    return gap, {"gen.prompt": ids[:, :prompt], "gen.tokens": ids[:, prompt:], "gen.logits": logits}


def margin(model, config, found):
    """The least gap that decides an expert or a group."""
    least = math.inf
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        gate = model.model.layers[layer].mlp.gate
        logits = found[f"moe.{layer}.router_logits"].detach().double().view(-1, config.n_routed_experts)
        v2 = config.model_type == "deepseek_v2"
        choice = logits.softmax(-1) if v2 else logits.sigmoid() + gate.e_score_correction_bias.double()
        if config.n_group > 1:
            groups = choice.view(len(choice), config.n_group, -1)
            scores = groups.max(-1)[0] if v2 else groups.topk(2, -1)[0].sum(-1)
            ranked, order = scores.sort(-1, descending=True)
            least = min(least, float((ranked[:, config.topk_group - 1] - ranked[:, config.topk_group]).min()))
            dropped = torch.zeros_like(scores).scatter(1, order[:, config.topk_group:], 1).bool()
            choice = groups.masked_fill(dropped[..., None], -math.inf).flatten(1)
        ranked = choice.sort(-1, descending=True)[0]
        k = config.num_experts_per_tok
        least = min(least, float((ranked[:, k - 1] - ranked[:, k]).min()))
    return least


def one_step(model, config, ids, bias_speed=1e-3):
    """AdamW on everything and on matrices only, from the same weights; the biases move as in the DeepSeek-V3 report."""
    out = {"batches": ids[None]}
    start = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for variant, rate in (("decay_all", 1e-3), ("decay_2d", 2e-3)):
        model.load_state_dict(start)
        found, gradients = traced(model, config, ids)
        parameters = list(model.parameters())
        flat = [p for p in parameters if p.dim() == 1]
        decayed = [p for p in parameters if p.dim() > 1] + (flat if variant == "decay_all" else [])
        spared = [] if variant == "decay_all" else flat
        optimizer = torch.optim.AdamW([dict(params=decayed, weight_decay=0.1), dict(params=spared, weight_decay=0.0)],
                                      lr=rate, betas=(0.9, 0.95), eps=1e-8)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        clipped = published_names({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()})
        # An expert that no token chose has a gradient of zero, not none: it decays like the others.
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        optimizer.step()
        counts = []
        for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
            count = torch.bincount(found[f"moe.{layer}.topk_indices"].flatten(), minlength=config.n_routed_experts)
            counts.append(count)
            gate = model.model.layers[layer].mlp.gate
            if hasattr(gate, "e_score_correction_bias"):
                gate.e_score_correction_bias.data += bias_speed * torch.sign(count.float().mean() - count)
        final = published_names(model.state_dict())
        out |= {f"{variant}.lr": torch.tensor([rate], dtype=torch.float64), f"{variant}.loss": found["loss"][None],
                f"{variant}.grad_norm_before_clip": norm[None], f"{variant}.expert_counts": torch.stack(counts)[None]}
        out |= {f"{variant}.final_norm.{name}": value.norm()[None] for name, value in final.items()}
        out |= {f"{variant}.last_clipped_grad_norm.{name}": value.norm()[None] for name, value in clipped.items()}
        last = f"model.layers.{config.num_hidden_layers - 1}."
        out |= {f"{variant}.final.{name}": value for name, value in final.items()
                if name.startswith(last) and "experts" not in name and value.numel() < 600}
    model.load_state_dict(start)
    return out


def make(name, published, root):
    directory = root / name
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(SEEDS[name])
    config, model = build(published)
    fill(model, generator)
    draws = []
    for _ in range(20):  # the draw whose routing is farthest from ties, so that rounding cannot flip an expert
        ids = torch.randint(0, config.vocab_size, (2, 17), generator=generator)
        found, gradients = traced(model, config, ids)
        draws.append((margin(model, config, found), ids))
    least, ids = max(draws, key=lambda draw: draw[0])
    found, gradients = traced(model, config, ids)
    gap, generated = greedy(model, generator, config.vocab_size)
    values = found | generated | {"grad." + key: value for key, value in gradients.items()}
    weights = published_names(model.state_dict())
    save = lambda tensors, file: save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()},
                                           directory / file, metadata={"format": "pt"})
    save(weights, "model.safetensors")
    save(values, "fixture.safetensors")
    save(one_step(model, config, ids), "optim.safetensors")
    (directory / "config.json").write_text(json.dumps(published, indent=1) + "\n")
    meta = dict(torch=torch.__version__, transformers=transformers.__version__, seed=SEEDS[name],
                min_routing_margin=least, min_top2_gap=gap, logits_absmax=float(found["logits"].detach().abs().max()))
    (directory / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    assert least > 1e-4 and gap > 5e-4, meta
    # What is on disk is what transformers loads under the published names.
    if published["model_type"] != "kimi_k2":
        again = type(model).from_pretrained(directory, attn_implementation="eager", experts_implementation="eager").eval()
        with torch.no_grad():
            assert torch.equal(again(input_ids=ids, use_cache=False).logits, found["logits"].detach()), name
    assert set(load_file(directory / "model.safetensors")) == set(weights)
    print(name, sum(file.stat().st_size for file in directory.iterdir()) // 1024, "KiB", json.dumps(meta))


FP8 = SMALL | V3 | dict(
    vocab_size=40, hidden_size=136, intermediate_size=132, moe_intermediate_size=8, n_shared_experts=1,
    n_routed_experts=2, num_experts_per_tok=1, q_lora_rank=12, routed_scaling_factor=2.5, rope_theta=10000,
    rope_scaling=None,
    quantization_config=dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128]),
)


def make_fp8(directory):
    """Random codes and scales, as the published files have them: scales may lie in another file than their matrix."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(7)
    _, model = build({key: value for key, value in FP8.items() if key != "quantization_config"})
    fill(model, generator)
    files, expected = ({}, {}), {}
    for number, (name, value) in enumerate(sorted(published_names(model.state_dict()).items())):
        if value.dim() == 1 or any(part in name for part in ("embed_tokens", "lm_head", "mlp.gate.")):
            files[0][name] = value if name.endswith("correction_bias") else value.bfloat16()
            continue
        codes = torch.randint(0, 127, value.shape, generator=generator, dtype=torch.uint8)
        codes += 128 * torch.randint(0, 2, value.shape, generator=generator, dtype=torch.uint8)
        blocks = [-(-size // 128) for size in value.shape]
        scales = torch.rand(blocks, generator=generator) * 2e-4 + 1e-5
        files[number % 2][name] = codes.view(torch.float8_e4m3fn)
        files[(number + 1) % 2][name + "_scale_inv"] = scales
        per_element = np.repeat(np.repeat(scales.numpy(), 128, 0), 128, 1)[: value.shape[0], : value.shape[1]]
        numbers = codes.view(torch.float8_e4m3fn).float().numpy() * per_element
        if name.startswith("model.layers.0.mlp.") and "up_proj" not in name:
            expected[name] = torch.from_numpy(numbers)
    names = [f"model-{number + 1:05}-of-00002.safetensors" for number in range(2)]
    for name, tensors in zip(names, files):
        save_file(tensors, directory / name, metadata={"format": "pt"})
    index = {key: name for name, tensors in zip(names, files) for key in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=index), indent=1) + "\n")
    (directory / "config.json").write_text(json.dumps(FP8, indent=1) + "\n")
    save_file(expected, directory / "expected.safetensors")


if __name__ == "__main__":
    root = Path(sys.argv[1])
    for name in sys.argv[2:] or [*SPECS, "fp8"]:
        if name == "fp8":
            make_fp8(root / "fp8")
        else:
            make(name, SPECS[name], root / "parity")
