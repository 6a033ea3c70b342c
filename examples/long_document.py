"""A question about a long file, sampled, with the counts that tell how it went."""

import sys

from offload_triforce import TriForce
from offload_triforce.generation.prompt import build_prompt, read_text

path = sys.argv[1] if len(sys.argv) > 1 else __file__
model = sys.argv[2] if len(sys.argv) > 2 else "smollm2"

with TriForce.load(model, draft="ngram") as engine:
    prompt = build_prompt(engine.tokenizer, read_text(path), "What is this text about?")
    result = engine.generate(prompt, max_new_tokens=48, temperature=0.6, top_p=0.9, seed=0)
    stats = result.stats
    print(result.text)
    print(f"{stats.prompt_tokens} tokens read, {stats.new_tokens} written in {stats.passes} passes over the full cache")
    print(
        f"link: {stats.link_bytes_per_token / 1e6:.2f} MB per token; the cache has {stats.full_kv_bytes / 1e6:.2f} MB"
    )
