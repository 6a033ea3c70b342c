"""Three lines to the first token. Takes a model (name, hub id, folder, GGUF file); by default, the demo's."""

import sys

from offload_triforce import TriForce

engine = TriForce.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
for piece in engine.stream("A pass over the full cache is", max_new_tokens=32):
    print(piece, end="", flush=True)
print()
