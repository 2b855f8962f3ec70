#!/usr/bin/env python3
"""The project's own reference cases: small models and what they must compute.

    pip install numpy safetensors
    python3 make_case.py                   # write the cases below beside this file; --out DIR, --only CASE
    python3 make_case.py --check DIR ...   # recompute case folders from their files and compare

`forward.py` computes, in float64 and from the papers alone. What it computes is stored rounded once to
float32. The cases complement those made with Hugging Face transformers, whose field names they share:

tiny        deepseek_v2; compressed queries, YaRN past its original length with a ramp between kept and divided
            frequencies and two different mscales (so that cos and sin are multiplied by 1.04 too), group-limited
            routing over 5 groups of 3 experts, one dense and two MoE layers, odd sizes, a ragged batch,
            and rms_norm_eps 1e-3, which the norms of the latents must not take over.
tiny-llama  llama, as DeepSeek 67B: two queries to a key, RoPE by halves, rms_norm_eps 1e-3, a ragged batch.

A case is `config.json`, `model.safetensors` (float32, the published names), `expect.safetensors` and
`meta.json`. With b rows, s tokens, v vocabulary, h hidden, k experts per token, e experts, T decode steps, L a
layer; floats are float32, integers int64:

    input_ids  attention_mask  b,s    seq_lens  b     padding is token 0 on the right
    prefill_logits  b,s,v             loss            mean over the next-token targets that are no padding
    embed_out  layer_out.L  b,s,h                     the residual stream before layer 0, after layer L
    topk_idx.L  topk_weight.L  b,s,k                  by falling weight; with routed_scaling_factor
    expert_counts.L  e                                tokens of the prefill
    prompt_lens  b                                    the row's prompt, for decoding and for greedy
    decode_input_ids  b,T  decode_logits  b,T,v       fed one at a time after the prompt, through the cache
    greedy_ids  b,16                                  EOS neither stops the run nor occurs
    grad_along.NAME  scalar                           d loss / d s where the k-th element of NAME is p + s cos(k)

At padding floats are 0 and topk_idx is -1. A seed is rejected while some choice hangs by a thread: a routing
decision by less than 5e-4 over the batch or 1e-4 over the greedy run, or a greedy token by less than 1e-3. So
rounding to float32 changes no choice.
"""

import argparse
import json
import math
import os
import re
import sys

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from forward import empty_cache, forward, is_moe

HERE = os.path.dirname(os.path.abspath(__file__))
NEW_TOKENS = 16
MIN_PREFILL_MARGIN, MIN_ROUTING_MARGIN, MIN_GREEDY_MARGIN = 5e-4, 1e-4, 1e-3
# Stored values were rounded to float32, by this much relative to the largest at most, and to another order
# of summation in float64, which is far less.
TOLERANCE = 1e-6
# The step of central differences: its square is what they are off by, the last bit over it what rounding adds.
STEP = 1e-6

COMMON = dict(
    attention_bias=False, bos_token_id=0, eos_token_id=1, hidden_act="silu", initializer_range=0.02,
    tie_word_embeddings=False, torch_dtype="float32")

# name -> seed, row lengths, decode steps, config
CASES = {
    "tiny": (1, (37, 12, 25), 7, dict(
        COMMON, architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2",
        vocab_size=199, hidden_size=45, intermediate_size=71, num_hidden_layers=3, rms_norm_eps=1e-3,
        num_attention_heads=5, num_key_value_heads=5, q_lora_rank=19, kv_lora_rank=15, qk_nope_head_dim=11,
        qk_rope_head_dim=12, v_head_dim=13,
        first_k_dense_replace=1, moe_layer_freq=1, n_routed_experts=15, n_shared_experts=2,
        moe_intermediate_size=7, num_experts_per_tok=3, topk_method="group_limited_greedy", n_group=5,
        topk_group=2, norm_topk_prob=False, scoring_func="softmax", routed_scaling_factor=2.5,
        aux_loss_alpha=0.001, seq_aux=True, max_position_embeddings=256, rope_theta=500,
        rope_scaling=dict(type="yarn", factor=8, original_max_position_embeddings=32, beta_fast=2,
                          beta_slow=0.1, mscale=0.9, mscale_all_dim=0.7))),
    "tiny-llama": (2, (23, 9), 5, dict(
        COMMON, architectures=["LlamaForCausalLM"], model_type="llama",
        vocab_size=151, hidden_size=60, intermediate_size=77, num_hidden_layers=2, rms_norm_eps=1e-3,
        num_attention_heads=6, num_key_value_heads=3, max_position_embeddings=128, rope_theta=10000.0,
        rope_scaling=None)),
}


# ---- weights

def weight_shapes(config):
    """Name -> shape of every tensor, as in the published checkpoints."""
    c, d, i = config, config["hidden_size"], config["num_attention_heads"]
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], d), "lm_head.weight": (c["vocab_size"], d),
              "model.norm.weight": (d,)}

    def mlp(prefix, width):
        for name, shape in dict(gate=(width, d), up=(width, d), down=(d, width)).items():
            shapes[f"{prefix}.{name}_proj.weight"] = shape

    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for norm in ("input", "post_attention"):
            shapes[f"{prefix}.{norm}_layernorm.weight"] = (d,)
        if c["model_type"] == "deepseek_v2":
            n, r, v = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
            p, latent = c["q_lora_rank"], c["kv_lora_rank"]
            attention = dict(
                q_a_proj=(p, d), q_a_layernorm=(p,), q_b_proj=(i * (n + r), p),
                kv_a_proj_with_mqa=(latent + r, d), kv_a_layernorm=(latent,), kv_b_proj=(i * (n + v), latent),
                o_proj=(d, i * v))
        else:
            k, groups = d // i, c["num_key_value_heads"]
            attention = dict(q_proj=(i * k, d), k_proj=(groups * k, d), v_proj=(groups * k, d), o_proj=(d, i * k))
        shapes.update({f"{prefix}.self_attn.{name}.weight": shape for name, shape in attention.items()})
        if is_moe(c, layer):
            width = c["moe_intermediate_size"]
            shapes[f"{prefix}.mlp.gate.weight"] = (c["n_routed_experts"], d)
            mlp(f"{prefix}.mlp.shared_experts", c["n_shared_experts"] * width)
            for e in range(c["n_routed_experts"]):
                mlp(f"{prefix}.mlp.experts.{e}", width)
        else:
            mlp(f"{prefix}.mlp", c["intermediate_size"])
    return dict(sorted(shapes.items()))


def draw_weights(config, rng):
    """Float32 weights, large enough that attention, routing and logits are far from uniform."""
    out = {}
    for name, shape in weight_shapes(config).items():
        noise = rng.standard_normal(shape)
        if len(shape) == 1:
            value = 1.0 + 0.2 * noise
        elif "embed_tokens" in name:
            value = 0.7 * noise
        else:
            sharp = re.search(r"\.(q_b_proj|kv_b_proj|q_proj|k_proj|gate)\.weight|lm_head", name)
            value = (1.6 if sharp else 1.2) / math.sqrt(shape[-1]) * noise
        out[name] = value.astype(np.float32)
    return out


def stored_weights(folder):
    index = os.path.join(folder, "model.safetensors.index.json")
    if not os.path.exists(index):
        return load_file(os.path.join(folder, "model.safetensors"))
    out = {}
    with open(index) as f:
        for name, shard in json.load(f)["weight_map"].items():
            with safe_open(os.path.join(folder, shard), "np") as tensors:
                out[name] = tensors.get_tensor(name)
    return out


# ---- what a case expects

def smallest(margins):
    return min((float(np.min(m)) for m in margins), default=math.inf)


def decode(config, w, prompt, rest):
    """Logits after each token of `rest`, fed one at a time after the prompt."""
    cache = empty_cache(config)
    forward(config, w, prompt, cache)
    return np.concatenate([forward(config, w, rest[t:t + 1], cache)[0] for t in range(len(rest))])


def greedy(config, w, prompt):
    """New tokens, smallest lead of one over the next, smallest routing margin."""
    cache, new, lead, margins, tokens = empty_cache(config), [], math.inf, [], prompt
    for _ in range(NEW_TOKENS):
        logits, _, routing = forward(config, w, tokens, cache)
        margins += [r["margin"] for r in routing.values()]
        second, first = np.sort(logits[-1])[-2:]
        lead = min(lead, first - second)
        new.append(int(logits[-1].argmax()))
        tokens = np.array(new[-1:])
    return np.array(new), lead, smallest(margins)


def row_loss(logits, tokens):
    """The sum of the cross entropies of a row's next tokens."""
    top = logits.max(-1, keepdims=True)
    log_probs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return -log_probs[np.arange(len(tokens) - 1), tokens[1:]].sum()


def slopes(config, w, ids, lengths):
    """For each tensor, the slope of the loss along the direction cos(0), cos(1), ..., in float64."""
    w = {name: value.astype(np.float64) for name, value in w.items()}
    out = {}
    for name, value in w.items():
        direction = np.cos(np.arange(value.size)).reshape(value.shape)

        def loss(s):
            moved = dict(w)
            moved[name] = value + s * direction
            total = sum(row_loss(forward(config, moved, ids[row, :n])[0], ids[row, :n]) for row, n in enumerate(lengths))
            return total / sum(n - 1 for n in lengths)

        near, wide = ((loss(h) - loss(-h)) / (2 * h) for h in (STEP, 2 * STEP))
        # Twice the step, four times the error; a choice that changed between the two would show.
        assert abs(near - wide) < 1e-6 * max(1.0, abs(near)), (name, near, wide)
        out[f"grad_along.{name}"] = np.array(near + (near - wide) / 3)
    return out


def evaluate(config, w, ids, lengths, prompt_lens):
    """Every expected field, in float64, and what decides whether a seed will do."""
    w = {name: value.astype(np.float64) for name, value in w.items()}
    b, s = ids.shape
    out, info, total = {}, dict(margins=[], moved={}), 0.0

    def put(name, row, value, fill=0):
        if name not in out:
            out[name] = np.full((b, s, *value.shape[1:]), fill, dtype=value.dtype)
        out[name][row, :len(value)] = value

    decoded, new, leads, greedy_margins, apart = [], [], [], [], 0.0
    for row, (n, p) in enumerate(zip(lengths, prompt_lens)):
        tokens = ids[row, :n]
        logits, stream, routing = forward(config, w, tokens)
        put("prefill_logits", row, logits)
        put("embed_out", row, stream[0])
        for layer, value in enumerate(stream[1:]):
            put(f"layer_out.{layer}", row, value)
        for layer, r in routing.items():
            put(f"topk_idx.{layer}", row, r["chosen"], -1)
            put(f"topk_weight.{layer}", row, r["gates"])
            count = np.bincount(r["chosen"].ravel(), minlength=config["n_routed_experts"])
            out[f"expert_counts.{layer}"] = out.get(f"expert_counts.{layer}", 0) + count
            info["margins"].append(r["margin"])
            plain = np.argsort(-r["scores"], axis=-1, kind="stable")[:, :r["chosen"].shape[1]]
            moved = (np.sort(plain) != np.sort(r["chosen"])).any(-1).sum()
            info["moved"][layer] = info["moved"].get(layer, 0) + int(moved)
        total += row_loss(logits, tokens)

        decoded.append(decode(config, w, tokens[:p], tokens[p:n]))
        apart = max(apart, np.abs(decoded[-1] - logits[p:n]).max())
        row_new, lead, margin = greedy(config, w, tokens[:p])
        new.append(row_new), leads.append(lead), greedy_margins.append(margin)

    out["loss"] = np.array(total / sum(n - 1 for n in lengths))
    out["decode_logits"], out["greedy_ids"] = np.stack(decoded), np.stack(new)
    out["decode_input_ids"] = np.stack([ids[r, p:n] for r, (n, p) in enumerate(zip(lengths, prompt_lens))])
    info.update(prefill_margin=smallest(info.pop("margins")), routing_margin=min(greedy_margins),
                greedy_margin=min(leads), decode_vs_prefill=float(apart))
    return out, info


def rounded(fields):
    return {name: np.asarray(x, np.float32 if x.dtype.kind == "f" else np.int64, order="C")
            for name, x in fields.items()}


# ---- writing

def why_not(config, expect, info):
    """Why a seed will not do, or None."""
    if info["prefill_margin"] < MIN_PREFILL_MARGIN:
        return "routing of the batch nearly tied"
    if info["routing_margin"] < MIN_ROUTING_MARGIN:
        return "routing of the greedy run nearly tied"
    if info["greedy_margin"] < MIN_GREEDY_MARGIN:
        return "greedy token nearly tied"
    if (expect["greedy_ids"] == config["eos_token_id"]).any():
        return "greedy run meets EOS"
    if config.get("topk_method") == "group_limited_greedy" and not all(info["moved"].values()):
        return "the group limit changes nothing"
    return None


def write_case(name, out_dir):
    first_seed, lengths, steps, config = CASES[name]
    rejected, b, s = [], len(lengths), max(lengths)
    prompt_lens = [n - steps for n in lengths]
    while True:
        seed = first_seed + 1000 * len(rejected)
        rng = np.random.default_rng(seed)
        w = draw_weights(config, rng)
        ids = rng.integers(2, config["vocab_size"], (b, s))
        mask = np.arange(s) < np.array(lengths)[:, None]
        ids = np.where(mask, ids, 0)
        expect, info = evaluate(config, w, ids, lengths, prompt_lens)
        why = why_not(config, expect, info)
        if why is None:
            break
        rejected.append(why)
    assert info["decode_vs_prefill"] < 1e-10

    folder = os.path.join(out_dir, name)
    os.makedirs(folder, exist_ok=True)
    expect.update(input_ids=ids, attention_mask=mask, seq_lens=np.array(lengths), prompt_lens=np.array(prompt_lens))
    expect.update(slopes(config, w, ids, lengths))
    save_file(w, os.path.join(folder, "model.safetensors"), {"format": "pt"})
    save_file(rounded(expect), os.path.join(folder, "expect.safetensors"))
    meta = dict(
        case=name, seed=seed, numpy=np.__version__, parameters=sum(x.size for x in w.values()), batch=b, seq=s,
        seq_lens=list(lengths), prompt_lens=prompt_lens, padding="right", new_tokens=NEW_TOKENS,
        loss=float(expect["loss"]), loss_if_uniform=math.log(config["vocab_size"]),
        max_abs_logit=float(np.abs(expect["prefill_logits"]).max()),
        min_greedy_margin=float(info["greedy_margin"]), decode_vs_prefill_float64=info["decode_vs_prefill"],
        rejected_seeds={why: rejected.count(why) for why in sorted(set(rejected))})
    if info["moved"]:
        meta.update(
            min_routing_margin_prefill=info["prefill_margin"], min_routing_margin_greedy=info["routing_margin"],
            tokens_moved_by_group_limit=info["moved"],
            expert_counts={k.split(".")[1]: v.tolist() for k, v in expect.items() if k.startswith("expert_counts.")})
    for file, value in (("config.json", config), ("meta.json", meta)):
        with open(os.path.join(folder, file), "w") as f:
            json.dump(value, f, indent=1, sort_keys=True)
            f.write("\n")
    size = sum(os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder))
    print(f"{name}: seed {seed}, {len(rejected)} rejected, {meta['parameters']} parameters, {size} bytes")


# ---- checking

def check_case(folder):
    """Recomputes a case from its files; True if everything agrees."""
    with open(os.path.join(folder, "config.json")) as f:
        config = json.load(f)
    stored = load_file(os.path.join(folder, "expect.safetensors"))
    ids = stored["input_ids"]
    lengths = stored.get("seq_lens", np.full(len(ids), ids.shape[1])).tolist()
    found, info = evaluate(config, stored_weights(folder), ids, lengths, stored["prompt_lens"].tolist())
    if any(name.startswith("grad_along.") for name in stored):
        found.update(slopes(config, stored_weights(folder), ids, lengths))
    worst, bad = {}, sorted(set(found) - set(stored))
    for name, value in rounded(found).items():
        if name in bad:
            continue
        if value.shape != stored[name].shape:
            bad.append(name)
            continue
        apart = np.abs(value.astype(np.float64) - stored[name]).max()
        exact = value.dtype.kind == "i"
        kind = "integers" if exact else name.split(".")[0]
        worst[kind] = max(worst.get(kind, 0.0), float(apart))
        if not apart <= (0 if exact else TOLERANCE * max(1.0, np.abs(stored[name]).max())):
            bad.append(name)
    figures = ", ".join(f"{kind} {apart:.1e}" for kind, apart in sorted(worst.items()))
    verdict = f"DIFFERS in {', '.join(bad)}" if bad else "ok"
    name = os.path.basename(os.path.normpath(folder))
    print(f"{name}: {verdict}; {len(found)} fields, largest difference: {figures}; "
          f"decode from prefill {info['decode_vs_prefill']:.1e}")
    return not bad


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=HERE, help="folder to write the cases into")
    parser.add_argument("--only", choices=CASES, help="write one case")
    parser.add_argument("--check", nargs="+", metavar="DIR", help="case folders to recompute and compare")
    args = parser.parse_args()
    if args.check:
        results = [check_case(folder) for folder in args.check]
        sys.exit(0 if all(results) else 1)
    for name in [args.only] if args.only else CASES:
        write_case(name, args.out)


if __name__ == "__main__":
    main()
