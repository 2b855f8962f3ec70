#!/usr/bin/env python3
"""Compares the host executor with other programs that run the same model on the same CPU.

    benches/peers/run.py [--threads N] [--rounds N] [--only NAME ...] [--phases 1x32 ...] [--out FILE.json]

Sets all of them up (a virtual environment, a build of candle's runner) under target/peers, makes one random model of bench-moe-0.3b in
f32 and bf16, asks each for the same greedy tokens, then takes turns measuring. A peer that cannot be set up is named and left out; one
whose first answer takes longer than a minute is not asked again, and that answer counts. What was measured before an interruption is
printed.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
WORK = ROOT / "target" / "peers"
PYTHON = WORK / "venv" / "bin" / "python"
PACKAGES = ["torch", "transformers", "safetensors", "gguf", "llama-cpp-python"]

# Sequences and tokens of each; decode follows on the same cache.
PHASES = [(1, 32), (1, 512), (1, 2048), (8, 32), (8, 2048)]
STEPS = 16
# Seconds that a first answer may take of a peer that is asked again.
PATIENCE = 60
TRAIN = (4, 257)


def say(text):
    print(text, file=sys.stderr, flush=True)


def texts(batch, tokens, vocabulary):
    """Tokens that differ by row and position."""
    return [[(i * 7919 + 13 + row * 101) % vocabulary for i in range(tokens)] for row in range(batch)]


class Peer:
    """A process that answers requests, a line each."""

    def __init__(self, label, dtype, command, threads, trains=False):
        self.label, self.dtype, self.trains = label, dtype, trains
        env = os.environ | {name: str(threads) for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
        )
        self.about = self.line()

    def line(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.label} ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.line()


def set_up(only):
    """The commands of the peers by label and type; those that cannot be made are said."""
    WORK.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cargo", "build", "--release", "-p", "latentc", "-p", "latentc-peer"], cwd=ROOT, check=True)
    release = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
    models = {}
    for dtype in ("f32", "bf16"):
        models[dtype] = WORK / f"model-{dtype}"
        if not (models[dtype] / "config.json").exists():
            command = [release / "latentc", "init", "bench-moe-0.3b", "-o", models[dtype], "--dtype", dtype]
            subprocess.run(command, check=True)
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", WORK / "venv"], check=True)
        for package in PACKAGES:
            done = subprocess.run([PYTHON, "-m", "pip", "install", "--quiet", package])
            if done.returncode:
                say(f"cannot install {package}")
    candle = WORK / "candle"
    if not only or "candle" in only:
        build = ["cargo", "build", "--release", "--manifest-path", HERE / "candle" / "Cargo.toml", "--target-dir", candle]
        if subprocess.run(build, env=os.environ | {"RUSTFLAGS": "-C target-cpu=native"}).returncode:
            say("cannot build candle's runner")
    commands = []
    for dtype, model in models.items():
        transformers = [PYTHON, HERE / "transformers_peer.py", model, "--dtype", dtype, "--threads", "{threads}"]
        commands += [
            ("latentc", dtype, [release / "latentc-peer", model]),
            ("transformers", dtype, transformers),
            ("transformers compiled", dtype, [*transformers, "--compile"]),
            ("candle", dtype, [candle / "release" / "candle-peer", model, dtype]),
        ]
        gguf = WORK / f"{dtype}.gguf"
        if not gguf.exists():
            subprocess.run([PYTHON, HERE / "to_gguf.py", model, gguf, "--dtype", dtype])
        commands.append(("llama.cpp", dtype, [PYTHON, HERE / "llama_cpp_peer.py", gguf, "--threads", "{threads}"]))
    return [c for c in commands if not only or c[0] in only]


def bandwidth(threads):
    """Bytes a second that all threads together read from memory, and what a product of f32 matrices makes, by the environment's torch."""
    program = f"""
import time, torch
torch.set_num_threads({threads})
def best(f, n):
    times = []
    for _ in range(n):
        start = time.perf_counter(); f(); times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
x = torch.ones(1 << 28)
a, b = torch.rand(2048, 2048), torch.rand(2048, 2048)
print((1 << 30) / best(lambda: x.sum(), 9), 2 * 2048 ** 3 / best(lambda: a @ b, 9))
"""
    done = subprocess.run([PYTHON, "-c", program], capture_output=True, text=True)
    return [float(x) for x in done.stdout.split()] or [None, None]


def measure(peers, phases, rounds, vocabulary, results):
    """Takes turns: each figure of each peer once, then all again."""
    for batch, tokens in phases:
        prompt = texts(batch, tokens, vocabulary)
        again = []
        for peer in list(peers):
            say(f"{batch} x {tokens}, first answer: {peer.label} {peer.dtype}")
            try:
                # The first time warms up, and says whether all make the same tokens.
                answer = peer.ask(op="generate", ids=prompt, steps=STEPS)
            except (RuntimeError, BrokenPipeError) as error:
                say(f"{error}: left out from here on")
                peers.remove(peer)
                continue
            slow = answer["prefill"] + sum(answer["decode"]) > PATIENCE
            results[peer.label, peer.dtype, batch, tokens] = {
                "tokens": answer["tokens"],
                "prefill": [answer["prefill"]] if slow else [],
                "decode": answer["decode"] if slow else [],
            }
            again += [] if slow else [peer]
        for turn in range(rounds):
            for peer in again:
                say(f"{batch} x {tokens}, round {turn + 1} of {rounds}: {peer.label} {peer.dtype}")
                answer = peer.ask(op="generate", ids=prompt, steps=STEPS)
                result = results[peer.label, peer.dtype, batch, tokens]
                result["prefill"].append(answer["prefill"])
                result["decode"] += answer["decode"]


def train(peers, rounds, vocabulary):
    """The same steps on the same texts by each peer that trains, in f32."""
    trained = {}
    for peer in peers:
        if peer.trains and peer.dtype == "f32":
            say(f"training: {peer.label}")
            trained[peer.label] = peer.ask(op="train", ids=texts(*TRAIN, vocabulary), steps=rounds + 1)
    return trained


def table(rows, head):
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    line = lambda row: "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
    return "\n".join([line(head), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])


def report(results, peak, trained):
    labels = list(dict.fromkeys((label, dtype) for label, dtype, _, _ in results))
    phases = list(dict.fromkeys((batch, tokens) for _, _, batch, tokens in results))
    out = []
    for dtype in ("f32", "bf16"):
        rows = []
        for batch, tokens in phases:
            ours = results.get(("latentc", dtype, batch, tokens))
            for phase in ("prefill", "decode"):
                row = [f"{phase}, {batch} x {tokens}"]
                for label in [l for l, d in labels if d == dtype]:
                    theirs = results.get((label, dtype, batch, tokens))
                    if not theirs or not theirs[phase]:
                        row.append("-")
                        continue
                    median = statistics.median(theirs[phase])
                    text = f"{median * 1e3:.1f} ms"
                    if ours and ours[phase] and label != "latentc":
                        text += f" ({median / statistics.median(ours[phase]):.2f})"
                    if ours and theirs["tokens"] != ours["tokens"]:
                        text += " *"
                    row.append(text)
                rows.append(row)
        row = ["peak memory"]
        row += [f"{peak[l, d] / 2**20:.0f} MiB" if (l, d) in peak else "-" for l, d in labels if d == dtype]
        rows.append(row)
        if dtype == "f32" and trained:
            row = [f"training step, {TRAIN[0]} x {TRAIN[1] - 1}"]
            ours = trained.get("latentc")
            for label in [l for l, d in labels if d == dtype]:
                if label not in trained:
                    row.append("-")
                    continue
                seconds = statistics.median(trained[label]["seconds"][1:])
                ratio = "" if label == "latentc" or not ours else f" ({seconds / statistics.median(ours['seconds'][1:]):.2f})"
                row.append(f"{seconds * 1e3:.0f} ms{ratio}")
            rows.append(row)
        out.append(table(rows, [dtype, *[l for l, d in labels if d == dtype]]))
    note = "Medians; in brackets, times ours. A star: not the same greedy tokens as ours."
    return "\n\n".join([*out, note])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="labels, such as latentc llama.cpp")
    phase = lambda text: tuple(int(n) for n in text.split("x"))
    parser.add_argument("--phases", nargs="+", type=phase, default=PHASES, metavar="BATCHxTOKENS", help="1x32 1x512 …; all if not given")
    parser.add_argument("--no-train", action="store_true")
    parser.add_argument("--out", type=Path, help="a file for all figures, as JSON")
    args = parser.parse_args()

    peers = []
    commands = set_up(args.only)
    vocabulary = json.loads((WORK / "model-f32" / "config.json").read_text())["vocab_size"]
    for label, dtype, command in commands:
        command = [str(part).format(threads=args.threads) for part in command]
        try:
            trains = label.startswith(("latentc", "transformers"))
            peers.append(Peer(label, dtype, command, args.threads, trains))
        except (RuntimeError, OSError) as error:
            say(f"{label} {dtype}: {error}: left out")
    read, multiply = bandwidth(args.threads)
    results, peak, trained = {}, {}, {}
    try:
        measure(peers, args.phases, args.rounds, vocabulary, results)
        peak = {(p.label, p.dtype): p.ask(op="peak")["bytes"] for p in peers}
        trained = {} if args.no_train else train(peers, args.rounds, vocabulary)
    except KeyboardInterrupt:
        say("interrupted: what follows is what was measured before")
    print(report(results, peak, trained))
    if read:
        print(f"This machine: reads {read / 1e9:.1f} GB/s, multiplies {multiply / 1e9:.0f} GFLOP/s in f32.")
    if args.out:
        figures = {
            "machine": platform.processor() or platform.machine(),
            "threads": args.threads,
            "bytes_per_s": read,
            "flop_per_s": multiply,
            "peers": {f"{p.label} {p.dtype}": p.about for p in peers},
            "phases": [{"peer": l, "dtype": d, "batch": b, "tokens": t, **r} for (l, d, b, t), r in results.items()],
            "peak": [{"peer": l, "dtype": d, "bytes": b} for (l, d), b in peak.items()],
            "train": trained,
        }
        scratch = args.out.with_suffix(".tmp")
        scratch.write_text(json.dumps(figures, indent=1))
        scratch.rename(args.out)


if __name__ == "__main__":
    main()
