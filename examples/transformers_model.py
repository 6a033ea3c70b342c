"""For people who have a transformers model already: one more argument to generate()."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from offload_triforce import Settings, triforce_generate
from offload_triforce.model.fetch import fetch_model

source = Path(sys.argv[1] if len(sys.argv) > 1 else fetch_model("smollm2"))
where = {"gguf_file": source.name} if source.suffix == ".gguf" else {}
folder = source.parent if where else source
tokenizer = AutoTokenizer.from_pretrained(folder, **where)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)

inputs = tokenizer("def fibonacci(n):\n", return_tensors="pt")
options = {"max_new_tokens": 40, "do_sample": False}
plain = model.generate(**inputs, **options)
ours = model.generate(
    **inputs,
    **options,
    custom_generate=triforce_generate,
    triforce_settings=Settings(gamma=8),
    triforce_draft="ngram",
)
print(tokenizer.decode(ours[0], skip_special_tokens=True))
print("same tokens as transformers:", torch.equal(plain, ours))
