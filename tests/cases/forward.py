"""DeepSeek-V2 and its dense baseline, forward, in numpy and float64, as the papers write them.

This is the project's own reading of arXiv 2405.04434 (equation numbers in the comments are those of its
appendix C for attention, and of section 2.2 for the experts), kept apart from the compiler so that the two
can disagree. It knows no batch and no padding: a text is one row of tokens. Nothing is clever; where the
paper sums over all experts, so does this.

Axes, named as in the paper's sizes: t tokens of this call, s all tokens so far, d hidden, i heads, g
key/value heads, n head part without position, r rotated part, v head of the values, c latent, p compressed
query, e experts, f width of an MLP.
"""

import math

import numpy as np


def rope_parameters(config):
    """Base and YaRN parameters (None: plain RoPE) from either form of config.json."""
    inner = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = inner.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = inner.get("rope_type", inner.get("type", "default"))
    assert kind in ("yarn", "default"), kind
    return float(base), inner if kind == "yarn" else None


def yarn_mscale(factor, mscale):
    """YaRN's logarithm, section 3.1.4: sqrt(t) = 0.0707 ln s + 1 for mscale 0.707."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_angles(config, dim):
    """Radians per token of each pair, and the factor of cos and sin."""
    base, yarn = rope_parameters(config)
    kept = base ** (-np.arange(0, dim, 2) / dim)
    if yarn is None:
        return kept, 1.0
    factor, original = yarn["factor"], yarn["original_max_position_embeddings"]

    def pair_that_turns(rotations):
        return dim * math.log(original / (2 * math.pi * rotations)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(yarn.get("beta_fast", 32))), 0)
    high = min(math.ceil(pair_that_turns(yarn.get("beta_slow", 1))), dim - 1)
    if low == high:
        high += 0.001
    divided = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
    mscale, all_dim = yarn.get("mscale"), yarn.get("mscale_all_dim")
    if mscale and all_dim:
        turn = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    else:
        turn = yarn_mscale(factor, 1.0)
    return kept * (1 - divided) + kept / factor * divided, turn


def attention_scale(config, head):
    """1 / sqrt(head), times YaRN's logarithm squared where mscale_all_dim says so."""
    _, yarn = rope_parameters(config)
    all_dim = yarn.get("mscale_all_dim") if yarn else None
    m = yarn_mscale(yarn["factor"], all_dim) if all_dim else 1.0
    return m * m / math.sqrt(head)


def rope(config, x, start, interleaved):
    """Turns the last axis of x[t, ..., r], whose tokens begin at position `start`.

    DeepSeek-V2 stores pairs (2i, 2i+1), Llama pairs (i, i + r/2).
    """
    dim = x.shape[-1]
    angles, turn = rope_angles(config, dim)
    phase = np.exp(1j * np.outer(start + np.arange(len(x)), angles)) * turn
    phase = phase.reshape(len(x), *[1] * (x.ndim - 2), dim // 2)
    out = np.empty_like(x)
    pairs = (slice(0, None, 2), slice(1, None, 2)), (slice(dim // 2), slice(dim // 2, None))
    first, second = pairs[0] if interleaved else pairs[1]
    z = (x[..., first] + 1j * x[..., second]) * phase
    out[..., first], out[..., second] = z.real, z.imag
    return out


def rms_norm(x, weight, eps):
    return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attend(scores):
    """Softmax of scores[t, ..., s] over the past: the t tokens are the last of the s."""
    t, s = scores.shape[0], scores.shape[-1]
    future = np.arange(s) > (s - t + np.arange(t))[:, None]
    future = future.reshape(t, *[1] * (scores.ndim - 2), s)
    return softmax(np.where(future, -np.inf, scores))


def swiglu(x, w, prefix):
    gate, up, down = (w[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    y = x @ gate.T
    return (y / (1 + np.exp(-y)) * (x @ up.T)) @ down.T


def latent_attention(config, w, prefix, h, cache):
    """u[t, d] of (37) to (47). The cache is what the paper boxes: c_KV (41) and k_R (43)."""
    i, n, r = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    c, v, start = config["kv_lora_rank"], config["v_head_dim"], len(cache[0])
    # The norms of the latents have an epsilon of their own, whatever rms_norm_eps says.
    if config["q_lora_rank"] is None:
        q = h @ w[f"{prefix}.q_proj.weight"].T
    else:
        c_q = rms_norm(h @ w[f"{prefix}.q_a_proj.weight"].T, w[f"{prefix}.q_a_layernorm.weight"], 1e-6)  # (37)
        q = c_q @ w[f"{prefix}.q_b_proj.weight"].T
    q = q.reshape(-1, i, n + r)
    q_c, q_r = q[..., :n], rope(config, q[..., n:], start, interleaved=True)                   # (38) (39)
    down = h @ w[f"{prefix}.kv_a_proj_with_mqa.weight"].T
    c_kv = rms_norm(down[:, :c], w[f"{prefix}.kv_a_layernorm.weight"], 1e-6)                   # (41)
    k_r = rope(config, down[:, c:], start, interleaved=True)                                   # (43)
    cache[0], cache[1] = np.concatenate([cache[0], c_kv]), np.concatenate([cache[1], k_r])
    c_kv, k_r = cache
    w_uk, w_uv = np.split(w[f"{prefix}.kv_b_proj.weight"].reshape(i, n + v, c), [n], axis=1)
    k_c = np.einsum("inc,sc->sin", w_uk, c_kv)                                                 # (42)
    v_c = np.einsum("ivc,sc->siv", w_uv, c_kv)                                                 # (45)
    scores = np.einsum("tin,sin->tis", q_c, k_c) + np.einsum("tir,sr->tis", q_r, k_r)          # (40) (44)
    weights = attend(scores * attention_scale(config, n + r))
    o = np.einsum("tis,siv->tiv", weights, v_c)                                                # (46)
    return o.reshape(len(h), i * v) @ w[f"{prefix}.o_proj.weight"].T                           # (47)


def grouped_attention(config, w, prefix, h, cache):
    """Grouped-query attention as in Llama and DeepSeek 67B; the cache is keys and values."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    k_dim, start = config.get("head_dim") or config["hidden_size"] // heads, len(cache[0])
    q, k, v = (h @ w[f"{prefix}.{name}_proj.weight"].T for name in "qkv")
    q = rope(config, q.reshape(-1, heads, k_dim), start, interleaved=False)
    k = rope(config, k.reshape(-1, groups, k_dim), start, interleaved=False)
    cache[0] = np.concatenate([cache[0], k])
    cache[1] = np.concatenate([cache[1], v.reshape(-1, groups, k_dim)])
    k, v = cache
    q = q.reshape(-1, groups, heads // groups, k_dim)  # neighbouring heads share a key
    weights = attend(np.einsum("tgjk,sgk->tgjs", q, k) * attention_scale(config, k_dim))
    o = np.einsum("tgjs,sgk->tgjk", weights, v)
    return o.reshape(len(h), heads * k_dim) @ w[f"{prefix}.o_proj.weight"].T


def is_moe(config, layer):
    return (config.get("n_routed_experts") is not None and layer >= config.get("first_k_dense_replace", 0)
            and layer % config.get("moe_layer_freq", 1) == 0)


def kept_groups(config, scores):
    """Scores with those outside the best groups at 0, and how far that choice is from changing [t].

    A group is worth its best expert (section 2.2.2, with devices as groups).
    """
    groups = scores.reshape(len(scores), config["n_group"], -1)
    best = groups.max(axis=-1)
    order = np.argsort(-best, axis=-1, kind="stable")
    ranked, keep = np.take_along_axis(best, order, -1), config["topk_group"]
    mask = np.zeros(best.shape, bool)
    np.put_along_axis(mask, order[:, :keep], True, axis=-1)
    margin = ranked[:, keep - 1] - ranked[:, keep] if keep < config["n_group"] else np.full(len(scores), np.inf)
    return np.where(mask[..., None], groups, 0.0).reshape(scores.shape), margin


def route(config, scores):
    """Chosen experts [t, k] by falling score, their gates, and how far the choice is from changing [t]."""
    k, margin = config["num_experts_per_tok"], np.full(len(scores), np.inf)
    if config.get("topk_method", "greedy") == "group_limited_greedy":
        scores, margin = kept_groups(config, scores)
    order = np.argsort(-scores, axis=-1, kind="stable")
    ranked = np.take_along_axis(scores, order, -1)
    if k < scores.shape[-1]:
        margin = np.minimum(margin, ranked[:, k - 1] - ranked[:, k])
    gates = ranked[:, :k]
    if config.get("norm_topk_prob"):
        gates = gates / gates.sum(axis=-1, keepdims=True)
    return order[:, :k], gates * config.get("routed_scaling_factor", 1.0), margin


def experts(config, w, prefix, u):
    """(20) to (22) without the residual: shared experts, and the gated sum over all routed ones."""
    scores = softmax(u @ w[f"{prefix}.gate.weight"].T)                                         # (22)
    chosen, gates, margin = route(config, scores)                                              # (21)
    gate = np.zeros_like(scores)
    np.put_along_axis(gate, chosen, gates, axis=-1)
    out = swiglu(u, w, f"{prefix}.shared_experts") if config.get("n_shared_experts") else np.zeros_like(u)
    for e in range(scores.shape[1]):
        out = out + gate[:, e:e + 1] * swiglu(u, w, f"{prefix}.experts.{e}")                   # (20)
    return out, dict(chosen=chosen, gates=gates, margin=margin, scores=scores)


def empty_cache(config):
    if config["model_type"] == "deepseek_v2":
        tails = (config["kv_lora_rank"],), (config["qk_rope_head_dim"],)
    else:
        heads = config["num_attention_heads"]
        tails = ((config["num_key_value_heads"], config.get("head_dim") or config["hidden_size"] // heads),) * 2
    return [[np.zeros((0, *tail)) for tail in tails] for _ in range(config["num_hidden_layers"])]


def forward(config, w, ids, cache=None):
    """One call over the tokens `ids`, which follow those in `cache`; the cache is extended in place.

    Returns logits [t, vocabulary], the residual stream before layer 0 and after each layer, and the routing of
    each MoE layer.
    """
    cache = empty_cache(config) if cache is None else cache
    attention = latent_attention if config["model_type"] == "deepseek_v2" else grouped_attention
    eps = config.get("rms_norm_eps", 1e-6)
    h = w["model.embed_tokens.weight"][ids]
    stream, routing = [h], {}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        x = rms_norm(h, w[f"{prefix}.input_layernorm.weight"], eps)
        h = h + attention(config, w, f"{prefix}.self_attn", x, cache[layer])
        x = rms_norm(h, w[f"{prefix}.post_attention_layernorm.weight"], eps)
        if is_moe(config, layer):
            y, routing[layer] = experts(config, w, f"{prefix}.mlp", x)
        else:
            y = swiglu(x, w, f"{prefix}.mlp")
        h = h + y
        stream.append(h)
    head = "model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"
    logits = rms_norm(h, w["model.norm.weight"], eps) @ w[head].T
    return logits, stream, routing
