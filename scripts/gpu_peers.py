#!/usr/bin/env python3
"""What PyTorch takes for what `latentc bench` has measured: python gpu_peers.py DIR -o FILE [--seconds N].

DIR holds the JSON of `latentc bench`. Of each kernel that was measured there, the main part is done with torch at the same sizes: a
matrix product, a grouped one, one summed by groups, an attention. What stands around it (norms, gates, residuals) is not, which
favours torch. Of each step, a DeepSeek-V2 of as many layers is run, written below with the same operations, eager and through
torch.compile.

Kernels are timed by device events, many launches behind a wait that lasts until all are enqueued, over sets of operands that together
are larger than the cache. Steps are timed by the host, from a device that waits to one that waits again, as ours are. Figures are
medians with quartiles. All that does not run, or for which no time is left, is named.
"""

import argparse
import json
import math
import pathlib
import random
import time

import torch
import torch.nn.functional as F

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
ROOT = pathlib.Path(__file__).resolve().parent.parent
# Operands of one item, together: more than any cache.
BEYOND = 256 << 20 if CUDA else 1 << 20


def quartiles(samples):
    samples = sorted(samples)

    def at(part):
        place = part * (len(samples) - 1)
        below, above = samples[math.floor(place)], samples[math.ceil(place)]
        return below + (above - below) * (place - math.floor(place))

    return {"median": at(0.5), "low": at(0.25), "high": at(0.75), "samples": len(samples)}


def wait():
    if CUDA:
        torch.cuda.synchronize()


def launches(run, sets, repeat=9):
    """Seconds of one launch. `run` is given one of the sets."""
    run(*sets[0])
    wait()
    start = time.perf_counter()
    run(*sets[1 % len(sets)])
    wait()
    each = time.perf_counter() - start
    count = max(1, min(100, int(5e-3 / each)))
    samples = []
    for _ in range(repeat):
        if CUDA:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            # So many cycles: half a millisecond, and 30 µs for each launch.
            torch.cuda._sleep(int((5e-4 + 3e-5 * count) * 2e9))
            begin.record()
            for n in range(count):
                run(*sets[n % len(sets)])
            end.record()
            wait()
            samples.append(begin.elapsed_time(end) / 1e3 / count)
        else:
            start = time.perf_counter()
            for n in range(count):
                run(*sets[n % len(sets)])
            samples.append((time.perf_counter() - start) / count)
    return quartiles(samples)


def steps(run, repeat):
    """Seconds of a whole step, host and all."""
    for _ in range(3):
        run()
    wait()
    samples = []
    for _ in range(repeat):
        wait()
        start = time.perf_counter()
        run()
        wait()
        samples.append(time.perf_counter() - start)
    return quartiles(samples)


def sets_of(make, most=64):
    """As many sets of operands as are larger than the cache."""
    first = make()
    size = sum(t.numel() * t.element_size() for t in first if isinstance(t, torch.Tensor))
    return [first] + [make() for _ in range(min(most, math.ceil(BEYOND / max(size, 1))) - 1)]


def normal(*shape, dtype, std=0.02):
    return torch.randn(*shape, dtype=dtype, device=DEVICE) * std


def product(work, dtype):
    few, many = sorted((work["m"], work["n"]))
    many *= work["count"]
    batch, k = work["batch"], work["k"]
    if batch == 1:
        return "linear", launches(F.linear, sets_of(lambda: (normal(few, k, dtype=dtype), normal(many, k, dtype=dtype))))

    def make():
        return normal(batch, few, k, dtype=dtype), normal(batch, many, k, dtype=dtype).transpose(1, 2)

    return "bmm", launches(torch.bmm, sets_of(make))


def by_groups(x, w, ends):
    """Rows of x, sorted by group, times the transposed matrix of their group."""
    if hasattr(torch, "_grouped_mm") and CUDA and x.dtype == torch.bfloat16:
        return torch._grouped_mm(x, w.transpose(1, 2), offs=ends)
    y = x.new_empty(x.shape[0], w.shape[1])
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            y[start:end] = x[start:end] @ w[group].T
        start = end
    return y


def grouped(work, dtype):
    groups, rows, n, k = work["groups"], work["rows"], work["n"] * work["count"], work["k"]
    w = normal(groups, n, k, dtype=dtype)

    def make():
        # Each choice reads other matrices.
        chosen = random.sample(range(groups), rows) if rows <= groups else random.choices(range(groups), k=rows)
        counts = torch.bincount(torch.tensor(chosen), minlength=groups)
        return normal(rows, k, dtype=dtype), w, counts.cumsum(0).to(torch.int32).to(DEVICE)

    by = "_grouped_mm" if hasattr(torch, "_grouped_mm") and CUDA and dtype == torch.bfloat16 else "loop of matmul"
    return by, launches(by_groups, [make() for _ in range(16)])


def over_rows(a, b, ends):
    """For each group, the transposed rows of a times the rows of b, both sorted by group."""
    if hasattr(torch, "_grouped_mm") and CUDA and a.dtype == torch.bfloat16:
        return torch._grouped_mm(a.T, b, offs=ends)
    y = a.new_zeros(ends.shape[0], a.shape[1], b.shape[1])
    start = 0
    for group, end in enumerate(ends.tolist()):
        y[group] = a[start:end].T @ b[start:end]
        start = end
    return y


def outer(work, dtype):
    groups, rows, m, n = (work[k] for k in ("groups", "rows", "m", "n"))

    def make():
        counts = torch.bincount(torch.randint(groups, (rows,)), minlength=groups)
        return normal(rows, m, dtype=dtype), normal(rows, n, dtype=dtype), counts.cumsum(0).to(torch.int32).to(DEVICE)

    by = "_grouped_mm" if hasattr(torch, "_grouped_mm") and CUDA and dtype == torch.bfloat16 else "loop of matmul"
    return by, launches(over_rows, [make() for _ in range(4)])


def attention(work, dtype):
    batch, rows, positions = work["batch"], work["rows"], work["positions"]
    keys, values, tokens = work["keys"], work["values"], work["tokens"]
    if tokens > 1 and rows != tokens:
        raise ValueError("rows are heads of several tokens: no call of torch does that")
    causal = tokens > 1 and work["causal"]
    if causal and tokens != positions:
        raise ValueError("torch's causal mask wants as many rows as positions")

    def run(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def make(width):
        q = normal(1, batch, rows, keys, dtype=dtype, std=1)
        return q, normal(1, batch, positions, keys, dtype=dtype, std=1), normal(1, batch, positions, width, dtype=dtype, std=1)

    found = [("sdpa", launches(run, sets_of(lambda: make(values)), 5))]
    if values < keys <= 256:
        # Flash attention wants values as wide as keys.
        found.append(("sdpa, values padded", launches(run, sets_of(lambda: make(keys)), 5)))
    return min(found, key=lambda f: f[1]["median"])


class Model:
    """A DeepSeek-V2 with random weights. Of each token in the past, the latent and the rotated key are kept, and decode multiplies
    with the latents as they are."""

    def __init__(self, config, kinds, dtype, grad):
        self.c, self.dtype, self.kinds, self.weights = config, dtype, kinds, []
        c, d = config, config["hidden_size"]
        heads, nope, rope = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
        self.sizes = heads, nope, rope, c["v_head_dim"], c["kv_lora_rank"]

        def weight(*shape, ones=False):
            w = torch.ones(shape, dtype=dtype, device=DEVICE) if ones else normal(*shape, dtype=dtype)
            w.requires_grad_(grad)
            self.weights.append(w)
            return w

        def swiglu(width):
            return {"up": weight(2 * width, d), "down": weight(d, width)}

        def layer(kind):
            rank = c.get("q_lora_rank")
            w = {"norm": weight(d, ones=True), "norm2": weight(d, ones=True), "norm_kv": weight(self.sizes[4], ones=True)}
            w["qa"] = weight(rank, d) if rank else None
            w["norm_q"] = weight(rank, ones=True) if rank else None
            w["qb"] = weight(heads * (nope + rope), rank or d)
            w["kva"] = weight(self.sizes[4] + rope, d)
            w["kvb"] = weight(heads, nope + self.sizes[3], self.sizes[4])
            w["o"] = weight(d, heads * self.sizes[3])
            if kind == "dense":
                w["mlp"] = swiglu(c["intermediate_size"])
            else:
                experts, width = c["n_routed_experts"], c["moe_intermediate_size"]
                w["gate"] = weight(experts, d)
                w["up"], w["down"] = weight(experts, 2 * width, d), weight(experts, d, width)
                w["mlp"] = swiglu(width * c["n_shared_experts"])
            return w

        self.layers = [layer(kind) for kind in kinds]
        self.embed, self.norm, self.head = weight(c["vocab_size"], d), weight(d, ones=True), weight(c["vocab_size"], d)

    def rms(self, x, g):
        return F.rms_norm(x, (x.shape[-1],), g, self.c["rms_norm_eps"])

    def rotated(self, x, pos):
        half = x.shape[-1] // 2
        freq = self.c.get("rope_theta", 10000.0) ** (-torch.arange(half, device=DEVICE) / half)
        angle = pos[..., None].float() * freq
        while angle.dim() < x.dim():
            angle = angle.unsqueeze(-2)
        a, b = x.float().unflatten(-1, (half, 2)).unbind(-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)

    def attend(self, x, w, pos, cache):
        heads, nope, rope, value, latent = self.sizes
        b, t, _ = x.shape
        q = self.rms(F.linear(x, w["qa"]), w["norm_q"]) if w["qa"] is not None else x
        q = F.linear(q, w["qb"]).view(b, t, heads, nope + rope)
        q_c, q_r = q.split((nope, rope), -1)
        q_r = self.rotated(q_r, pos)
        kv, k_r = F.linear(x, w["kva"]).split((latent, rope), -1)
        kv, k_r = self.rms(kv, w["norm_kv"]), self.rotated(k_r, pos)
        w_k, w_v = w["kvb"].split((nope, value), 1)
        scale = (nope + rope) ** -0.5
        if cache is not None:
            # One token: its row of the cache, then one key and value for all heads.
            cache[:, -1] = torch.cat((kv, k_r), -1)[:, 0]
            absorbed = torch.einsum("bthn,hnc->bhtc", q_c, w_k)
            q = torch.cat((absorbed, q_r.transpose(1, 2)), -1).transpose(1, 2)
            k = cache[:, None]
            o = F.scaled_dot_product_attention(q, k, k[..., :latent], scale=scale)
            o = torch.einsum("bthc,hvc->bthv", o, w_v)
        else:
            k_c = torch.einsum("btc,hnc->bhtn", kv, w_k)
            v = torch.einsum("btc,hvc->bhtv", kv, w_v)
            k = torch.cat((k_c, k_r[:, None].expand(-1, heads, -1, -1)), -1)
            q = torch.cat((q_c, q_r), -1).transpose(1, 2)
            v = F.pad(v, (0, nope + rope - value))
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., :value].transpose(1, 2)
        return F.linear(o.reshape(b, t, heads * value), w["o"])

    def swiglu(self, x, w):
        gate, up = F.linear(x, w["up"]).chunk(2, -1)
        return F.linear(F.silu(gate) * up, w["down"])

    def experts(self, x, w):
        c = self.c
        experts, k = c["n_routed_experts"], c["num_experts_per_tok"]
        scores = F.linear(x.float(), w["gate"].float()).softmax(-1)
        ranked = scores
        if c.get("topk_method") == "group_limited_greedy":
            by_group = scores.unflatten(-1, (c["n_group"], -1))
            best = by_group.amax(-1).topk(c["topk_group"], -1).indices
            open_ = torch.zeros_like(by_group[..., 0]).scatter(-1, best, 1.0)
            ranked = (by_group * open_[..., None]).flatten(-2)
        chosen = ranked.topk(k, -1).indices
        gates = scores.gather(-1, chosen) * c.get("routed_scaling_factor", 1.0)
        flat = chosen.flatten()
        order = flat.argsort()
        ends = (flat[:, None] == torch.arange(experts, device=DEVICE)).sum(0).cumsum(0).to(torch.int32)
        gate, up = by_groups(x[order // k], w["up"], ends).chunk(2, -1)
        y = by_groups(F.silu(gate) * up, w["down"], ends)
        y = y * gates.flatten()[order, None].to(y.dtype)
        return torch.zeros_like(x).index_add(0, order // k, y)

    def logits(self, tokens, pos, caches, last):
        x = F.embedding(tokens, self.embed)
        for n, w in enumerate(self.layers):
            x = x + self.attend(self.rms(x, w["norm"]), w, pos, caches[n] if caches else None)
            h = self.rms(x, w["norm2"])
            y = self.swiglu(h, w["mlp"])
            if "gate" in w:
                y = y + self.experts(h.flatten(0, 1), w).view_as(x)
            x = x + y
        return F.linear(self.rms(x[:, -1:] if last else x, self.norm), self.head)


def model_step(report, config, repeat):
    """Pairs of a name and a function that measures."""
    each = report["layers_of_each_kind"] if report.get("layers_of_each_kind") else None
    dense = config.get("first_k_dense_replace", config["num_hidden_layers"])
    routed = config["num_hidden_layers"] - dense
    kinds = ["dense"] * min(dense, each or dense) + ["routed"] * min(routed, each or routed)
    dtype, graph = DTYPES[report["dtype"]], report["graph"]
    b, t, s = report["batch"], report["tokens"], report["context"]
    grad = graph == "gradient"
    model = Model(config, kinds, dtype, grad)
    tokens = torch.randint(0, config["vocab_size"], (b, t), device=DEVICE)
    pos = torch.arange(s - t, s, device=DEVICE).expand(b, t)
    width = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    caches = [normal(b, s, width, dtype=dtype, std=1) for _ in kinds] if graph == "decode" else None

    def forward():
        return model.logits(tokens, pos, caches, graph in ("decode", "prefill"))

    def loss():
        logits = forward().flatten(0, 1).float()
        return F.cross_entropy(logits, tokens.flatten())

    def run(step):
        if grad:

            def whole():
                for w in model.weights:
                    w.grad = None
                step().backward()

            return whole

        def whole():
            with torch.no_grad():
                step()

        return whole

    step = loss if grad else forward
    yield "eager", lambda: steps(run(step), repeat)
    if not CUDA:
        return
    yield "compiled", lambda: steps(run(torch.compile(step, dynamic=False)), repeat)
    if graph == "decode":
        # Launches recorded once: what torch can do at best where they are short.
        yield "compiled, recorded", lambda: steps(run(torch.compile(step, dynamic=False, mode="reduce-overhead")), repeat)


def ceilings():
    size = (1 << 30) if CUDA else (1 << 24)
    a = torch.empty(size // 2, dtype=torch.uint8, device=DEVICE)
    c = torch.empty_like(a)
    copy = launches(lambda a, c: c.copy_(a), [(a, c)])
    side = 8192 if CUDA else 256
    dtype = torch.bfloat16 if CUDA else torch.float32
    x, y = normal(side, side, dtype=dtype), normal(side, side, dtype=dtype)
    matmul = launches(torch.matmul, [(x, y)])
    return {
        f"copy of {size // 2} bytes": {"unit": "B/s", "rate": size / copy["median"], **copy},
        f"matmul of {side}": {"unit": "FLOP/s", "rate": 2 * side**3 / matmul["median"], **matmul},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=pathlib.Path)
    parser.add_argument("-o", "--out", type=pathlib.Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing after so many")
    parser.add_argument("--repeat", type=int, default=15)
    args = parser.parse_args()
    begun = time.monotonic()
    random.seed(0)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if CUDA else "this CPU"
    result = {"device": f"torch {torch.__version__} on {name}", "ceilings": ceilings(), "items": {}, "failed": {}}

    def save():
        temporary = args.out.with_name(f".{args.out.name}.tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.rename(args.out)

    def measure(item, run):
        if time.monotonic() - begun > args.seconds:
            result["failed"][item] = "no time was left"
            return
        try:
            by, seconds = run()
            result["items"][item] = {"by": by, **seconds}
        except Exception as error:  # what one item does must not end the others
            result["failed"][item] = f"{type(error).__name__}: {error}"[:300]
        if CUDA:
            torch.cuda.empty_cache()
        save()

    reports = {file.stem: json.loads(file.read_text()) for file in sorted(args.dir.glob("*.json"))}
    kinds = {"product": product, "grouped": grouped, "outer": outer, "stream": attention}
    done = {}
    for stem, report in reports.items():
        dtype = DTYPES[report["dtype"]]
        for row in report["kernels"]:
            work = row.get("work")
            if not work or not row.get("time"):
                continue
            item = f"{stem}/{row['name']}/{','.join(str(n) for n in row['sizes'].values())}"
            key = json.dumps([work, report["dtype"]])
            if key in done and done[key] in result["items"]:
                result["items"][item] = result["items"][done[key]]
                continue
            done[key] = item
            measure(item, lambda work=work, dtype=dtype: kinds[work["is"]](work, dtype))
    # Steps: those that are cut first, and what must be compiled last.
    waiting = []
    models = [item for item in reports.items() if "layers" in item[1]]
    for stem, report in sorted(models, key=lambda r: r[1]["layers"]):
        config = ROOT / "models/configs" / f"{report['model']}.json"
        if not config.exists():
            result["failed"][f"{stem}/step"] = f"no configuration of {report['model']} is bundled"
            continue
        config = json.loads(config.read_text())
        if config.get("model_type") != "deepseek_v2" or not report["step"].get("seconds"):
            continue
        waiting.append((stem, report, config))
    for wanted in ("eager", "compiled", "compiled, recorded"):
        for stem, report, config in waiting:
            if wanted != "eager" and not report.get("layers_of_each_kind"):
                continue  # a stack of that depth takes minutes to compile

            def run(report=report, config=config, wanted=wanted):
                for by, timed in model_step(report, config, args.repeat):
                    if by == wanted:
                        return by, timed()
                raise ValueError("not for this graph")

            if wanted == "compiled, recorded" and report["graph"] != "decode":
                continue
            if wanted != "eager" and not CUDA:
                continue
            measure(f"{stem}/step/{wanted}", run)
    save()
    print(f"{len(result['items'])} items, {len(result['failed'])} that were not measured, {time.monotonic() - begun:.0f} s")
    for item, why in result["failed"].items():
        print(f"  {item}: {why}")


if __name__ == "__main__":
    main()
