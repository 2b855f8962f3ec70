#!/usr/bin/env python3
"""Makes the folder that the bundled model is trained from: text, tokenizer and configuration. Needs cargo and Python 3 alone.

    models/eighty-days/make.py [OUT]

The text is "Around the World in Eighty Days" by Jules Verne, in the public domain. It comes with the crate esaxx-rs, which the tokenizer
of latentc depends on, so cargo finds it. OUT (target/eighty-days if not given) then has

    train.txt, valid.txt    the chapters up to XXXIV, and those behind, a line for each paragraph
    start/                  config.json and tokenizer.json, from which `latentc init` makes the first weights
    larger/                 the same for larger.json

The same text gives the same files, byte for byte.
"""

import collections
import hashlib
import heapq
import json
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

SHA256 = "f95647ced7981db2c1c7c50c77a1b89e3df569d9a20e8ad5c9e40ed2d2f4d268"
FIRST_HELD_BACK = "Chapter XXXV\n"
END = "<end>"
# What no token reaches across: a word with the space before it, a digit, marks, the end of a paragraph.
PIECES = r" ?[A-Za-z]+|[0-9]| ?[^A-Za-z0-9 \n]+|\n| "


def source():
    """The file of the crate in cargo's registry."""
    metadata = ["cargo", "metadata", "--format-version", "1", "--locked"]
    packages = json.loads(subprocess.run(metadata, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)["packages"]
    found = [p for p in packages if p["name"] == "esaxx-rs"]
    if not found:
        sys.exit("esaxx-rs is no dependency any more: its release 0.1.10 on crates.io has data/eighty.txt")
    path = Path(found[0]["manifest_path"]).parent / "data" / "eighty.txt"
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256:
        sys.exit(f"{path}: not the text that the model was trained on (sha256 {SHA256})")
    return data.decode("utf-8-sig").replace("\r\n", "\n")


def prose(text):
    """The book alone, a line for each paragraph."""
    begin = re.search(r"\n\s*Chapter I\n", text)
    end = text.index("End of Project Gutenberg")
    paragraphs = re.split(r"\n\s*\n", text[begin.start() : end])
    lines = (re.sub(r"\s+", " ", p).strip() for p in paragraphs)
    return "".join(line + "\n" for line in lines if line)


def byte_names():
    """The character that stands for each byte in a byte-level vocabulary: itself if it can be seen, else one from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    names = {b: chr(b) for b in seen}
    for b in range(256):
        names.setdefault(b, chr(256 + len(names) - len(seen)))
    return [names[b] for b in range(256)]


def tokenizer(text, size):
    """Byte-pair encoding: the pair that is seen most often becomes a token, until there are `size`. The first pair in order wins a draw."""
    names = byte_names()
    words = collections.Counter(re.findall(PIECES, text))
    pieces = [[names[b] for b in word.encode()] for word in words]
    counts = list(words.values())
    pairs, where = collections.Counter(), collections.defaultdict(set)
    for n, piece in enumerate(pieces):
        for pair in zip(piece, piece[1:]):
            pairs[pair] += counts[n]
            where[pair].add(n)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    vocabulary, merges = [END, *names], []
    while len(vocabulary) < size:
        count, pair = heapq.heappop(heap)
        if pairs[pair] != -count:
            continue
        merges.append(pair)
        vocabulary.append("".join(pair))
        changed = set()
        for n in where.pop(pair):
            piece = pieces[n]
            for old in zip(piece, piece[1:]):
                pairs[old] -= counts[n]
                changed.add(old)
            at = 0
            while at + 1 < len(piece):
                if (piece[at], piece[at + 1]) == pair:
                    piece[at : at + 2] = ["".join(pair)]
                at += 1
            for new in zip(piece, piece[1:]):
                pairs[new] += counts[n]
                where[new].add(n)
                changed.add(new)
        for p in changed:
            if pairs[p] > 0:
                heapq.heappush(heap, (-pairs[p], p))
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Isolated", "invert": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    model |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    model |= {"vocab": {token: n for n, token in enumerate(vocabulary)}, "merges": [" ".join(m) for m in merges]}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 0, "content": END} | special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, levels]},
        "post_processor": None,
        "decoder": levels,
        "model": model,
    }


def main():
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "target" / "eighty-days"
    text = prose(source())
    at = text.index("\n" + FIRST_HELD_BACK) + 1
    files = {out / "train.txt": text[:at], out / "valid.txt": text[at:]}
    for start, name in [("start", "config.json"), ("larger", "larger.json")]:
        config = (HERE / name).read_text()
        tokens = tokenizer(text[:at], json.loads(config)["vocab_size"])
        files[out / start / "config.json"] = config
        files[out / start / "tokenizer.json"] = json.dumps(tokens, ensure_ascii=False) + "\n"
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8", newline="\n")
        print(f"{path}: {len(content.encode())} bytes, sha256 {hashlib.sha256(content.encode()).hexdigest()}")


if __name__ == "__main__":
    main()
