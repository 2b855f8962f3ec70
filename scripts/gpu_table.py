#!/usr/bin/env python3
"""What scripts/gpu-check.sh does with its results, with nothing but Python's own library.

    gpu_table.py same A B [--as NAME=NAME]… --tolerance X   compares the tensors that two safetensors files have in common
    gpu_table.py table DIR [-o FILE]                        joins DIR/bench/*.json and DIR/peers.json as Markdown
"""

import argparse
import array
import json
import math
import pathlib
import struct
import sys


def tensors(path):
    """The f32 tensors of a file, by name."""
    data = pathlib.Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    start = 8 + length
    found = {}
    for name, t in json.loads(data[8:start]).items():
        if name != "__metadata__" and t["dtype"] == "F32":
            values = array.array("f")
            a, b = t["data_offsets"]
            values.frombytes(data[start + a : start + b])
            found[name] = values
    return found


def same(args):
    """Errors are relative to the largest element of a tensor, or absolute where that is below 1."""
    ours, theirs = tensors(args.a), tensors(args.b)
    names = dict(pair.split("=", 1) for pair in args.names)
    common = [(n, names.get(n, n)) for n in ours if names.get(n, n) in theirs]
    if not common:
        sys.exit(f"{args.a} and {args.b} have no tensor in common")
    worst, where = 0.0, ""
    for mine, other in common:
        a, b = ours[mine], theirs[other]
        if len(a) != len(b):
            sys.exit(f"{mine} has {len(a)} elements, {other} {len(b)}")
        scale = max([1.0] + [abs(y) for y in b])
        for x, y in zip(a, b):
            error = abs(x - y) / scale
            if math.isnan(error):
                sys.exit(f"{mine}: {x} where {other} has {y}")
            if error > worst:
                worst, where = error, mine
    said = f"{len(common)} tensors, worst error {worst:.1e} {'in ' + where if where else ''}"
    if worst > args.tolerance:
        sys.exit(f"{said}, more than {args.tolerance:.1e}")
    print(said)


def time(seconds):
    if seconds is None:
        return ""
    return f"{seconds * 1e6:.1f}" if seconds < 1 else f"{seconds * 1e6:.0f}"


def si(x):
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if x >= 10**power:
            return f"{x / 10**power:.3g} {prefix}"
    return f"{x:.3g} "


def ratio(peer, ours):
    return f"{peer / ours:.2f}" if peer and ours else ""


def table(args):
    folder = pathlib.Path(args.dir)
    files = sorted((folder / "bench").glob("*.json"))
    if not files:
        sys.exit(f"{folder}/bench holds no measurements")
    peers = {}
    if (folder / "peers.json").exists():
        peers = json.loads((folder / "peers.json").read_text())
    items = peers.get("items", {})
    lines = []
    first = json.loads(files[0].read_text())
    lines += [f"Ours: {first['device']}. Peers: {peers.get('device', 'not measured')}.", ""]
    lines += ["| item | copy | read | product |", "|---|---|---|---|"]
    for file in files:
        c = json.loads(file.read_text())["ceilings"]
        rates = [f"{si(c[key]['rate'])}{unit}" for key, unit in (("copy", "B/s"), ("read", "B/s"), ("product", "FLOP/s"))]
        lines.append(f"| {file.stem} | {' | '.join(rates)} |")
    for name, c in peers.get("ceilings", {}).items():
        lines.append(f"| torch, {name} | {si(c['rate'])}{c['unit']} | | |")
    lines += ["", "| step | µs | spread | kernels, summed | bound | of bound | tokens/s | peer | peer, µs | peer / ours |"]
    lines.append("|---|" + "---|" * 9)
    for file in files:
        report = json.loads(file.read_text())
        step = report["step"]
        if not step.get("seconds"):
            continue
        s = step["seconds"]
        known = [(n, p) for n, p in items.items() if n.split("/")[0] == file.stem and n.split("/")[1] == "step"]
        for name, peer in known or [("", {})]:
            label = name.split("/", 2)[2] if name else ""
            lines.append(
                f"| {file.stem} | {time(s['median'])} | {50 * (s['high'] - s['low']) / s['median']:.1f}% "
                f"| {time(step.get('launches_seconds'))} | {time(step['bound_seconds'])} | {100 * step['of_bound']:.0f}% "
                f"| {step['tokens_per_second']:.0f} | {label} | {time(peer.get('median'))} "
                f"| {ratio(peer.get('median'), s['median'])} |"
            )
    for file in files:
        report = json.loads(file.read_text())
        rows = [r for r in report["kernels"] if r.get("time")]
        if not rows:
            continue
        lines += ["", f"**{file.stem}**", ""]
        lines.append("| kernel | way | launches | µs | spread | B/s | FLOP/s | of bound | of all | peer | peer, µs | peer / ours |")
        lines.append("|---|---|" + "---|" * 10)
        for row in rows:
            t = row["time"]
            s = t["seconds"]
            sizes = ",".join(str(n) for n in row["sizes"].values())
            peer = items.get(f"{file.stem}/{row['name']}/{sizes}", {})
            way = row["way"] if isinstance(row["way"], str) else next(iter(row["way"]))
            lines.append(
                f"| {row['name']} | {way} | {row['launches']} | {time(s['median'])} "
                f"| {50 * (s['high'] - s['low']) / s['median']:.1f}% | {si(t['bytes_per_second'])} | {si(t['flops_per_second'])} "
                f"| {100 * t['of_bound']:.0f}% | {100 * t['of_launches']:.1f}% "
                f"| {peer.get('by', '')} | {time(peer.get('median'))} | {ratio(peer.get('median'), s['median'])} |"
            )
    for name, why in peers.get("failed", {}).items():
        lines += ["", f"Not measured: {name}: {why}"]
    text = "\n".join(lines) + "\n"
    if args.out:
        place = pathlib.Path(args.out)
        temporary = place.with_name(f".{place.name}.tmp")
        temporary.write_text(text)
        temporary.rename(place)
    else:
        print(text, end="")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("same")
    command.add_argument("a")
    command.add_argument("b")
    command.add_argument("--as", dest="names", action="append", default=[], metavar="NAME=NAME")
    command.add_argument("--tolerance", type=float, required=True)
    command.set_defaults(run=same)
    command = commands.add_parser("table")
    command.add_argument("dir")
    command.add_argument("-o", "--out")
    command.set_defaults(run=table)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
