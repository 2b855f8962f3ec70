"""What each peer does: it says who it is in one line of JSON, then answers each line of a request with a line."""

import json
import resource
import sys


def peak():
    """The most memory that this process has had, in bytes."""
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def serve(name, peer, **more):
    """Answers requests by the peer's methods `generate(ids, steps)` and `train(ids, steps)`, if it has them."""
    print(json.dumps({"name": name, **more}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        op = request.pop("op")
        answer = peak() if op == "peak" else getattr(peer, op)(**request)
        print(json.dumps(answer), flush=True)
