"""A peer: llama.cpp through the bindings of llama-cpp-python, on a GGUF file that `to_gguf.py` wrote."""

import argparse
import time

import llama_cpp as llama
import numpy as np

from protocol import serve


class Peer:
    def __init__(self, args):
        self.threads = args.threads
        # It says on stderr what it does; only errors are of interest.
        self.log = llama.llama_log_callback(lambda level, text, _: None)
        llama.llama_log_set(self.log, None)
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(args.model.encode(), llama.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {args.model}")
        self.vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))

    def context(self, batch, positions):
        params = llama.llama_context_default_params()
        params.n_ctx = batch * ((positions + 255) // 256 * 256)
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = batch
        params.n_threads = params.n_threads_batch = self.threads
        context = llama.llama_init_from_model(self.model, params)
        if not context:
            raise SystemExit("llama.cpp makes no context")
        return context

    def read(self, context, rows, past):
        """Reads tokens [batch][n] from position `past` on; gives the likeliest next ones."""
        flat = [(row, past + i, token, i + 1 == len(ids)) for row, ids in enumerate(rows) for i, token in enumerate(ids)]
        best = {}
        for first in range(0, len(flat), 512):
            part = flat[first : first + 512]
            batch = llama.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for i, (row, position, token, last) in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, last
                batch.seq_id[i][0] = row
            if llama.llama_decode(context, batch) != 0:
                raise SystemExit("llama.cpp cannot decode")
            for i, (row, _, _, last) in enumerate(part):
                if last:
                    logits = llama.llama_get_logits_ith(context, i)
                    best[row] = int(np.ctypeslib.as_array(logits, shape=(self.vocab,)).argmax())
            llama.llama_batch_free(batch)
        return [best[row] for row in range(len(rows))]

    def generate(self, ids, steps):
        context = self.context(len(ids), len(ids[0]) + steps)
        start = time.perf_counter()
        last = self.read(context, ids, 0)
        prefill = time.perf_counter() - start
        made, decode = [last], []
        for step in range(steps):
            start = time.perf_counter()
            last = self.read(context, [[i] for i in last], len(ids[0]) + step)
            decode.append(time.perf_counter() - start)
            made.append(last)
        llama.llama_free(context)
        return {"prefill": prefill, "decode": decode, "tokens": made}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    serve(f"llama.cpp (llama-cpp-python {llama.__version__})", Peer(arguments))
