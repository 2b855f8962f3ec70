"""A peer: Hugging Face transformers on the CPU, eager or compiled."""

import argparse
import time

import torch
import transformers

from protocol import serve

transformers.logging.set_verbosity_error()


class Peer:
    def __init__(self, args):
        torch.set_num_threads(args.threads)
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            args.model, dtype=dtype, attn_implementation="sdpa", experts_implementation=args.experts
        )
        self.model.eval()
        self.forward = torch.compile(self.model, dynamic=True) if args.compile else self.model

    def read(self, ids, past):
        """Reads tokens behind those in the cache; gives the likeliest next ones, and the cache."""
        with torch.inference_mode():
            out = self.forward(input_ids=torch.tensor(ids), past_key_values=past, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1).tolist(), out.past_key_values

    def generate(self, ids, steps):
        start = time.perf_counter()
        last, past = self.read(ids, None)
        prefill = time.perf_counter() - start
        made, decode = [last], []
        for _ in range(steps):
            start = time.perf_counter()
            last, past = self.read([[i] for i in last], past)
            decode.append(time.perf_counter() - start)
            made.append(last)
        return {"prefill": prefill, "decode": decode, "tokens": made}

    def train(self, ids, steps):
        model = self.model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
        ids = torch.tensor(ids)
        seconds, losses = [], []
        for _ in range(steps):
            start = time.perf_counter()
            logits = self.forward(input_ids=ids[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "loss": losses}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--experts", choices=["eager", "grouped_mm", "batched_mm"], default="grouped_mm")
    arguments = parser.parse_args()
    how = "compiled" if arguments.compile else "eager"
    name = f"transformers {transformers.__version__}, torch {torch.__version__}, {how}, experts {arguments.experts}"
    serve(name, Peer(arguments))
