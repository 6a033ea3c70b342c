"""A tiny random Llama over bytes as a GGUF file, tokenizer and all."""

from pathlib import Path

import gguf
import numpy as np

from tests.byte_tokenizer import byte_tokenizer

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS, POSITIONS = 64, 64, 4, 2, 2, 4096


def save_tiny_gguf(path: Path, architecture: str = "llama", **values: int | str) -> Path:
    """``values``: further entries of the header, as ``eot_token_id=3`` or ``chat_template="..."``."""
    vocabulary = byte_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    tokens += [tokens[3] + tokens[4], tokens[4] + tokens[5]]  # there have to be merges, and transformers 5.17 wants two
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<pad>", "<s>", "</s>") else 1 for token in tokens])
    writer.add_token_merges([f"{tokens[3]} {tokens[4]}", f"{tokens[4]} {tokens[5]}"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    for name, value in values.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"tokenizer.{name}" if name == "chat_template" else f"tokenizer.ggml.{name}", value)
    for name, shape in _shapes(len(tokens)).items():
        chance = np.random.default_rng(sum(name.encode()))
        writer.add_tensor(name, (np.ones if "norm" in name else chance.standard_normal)(shape).astype(np.float32) * 0.2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"token_embd.weight": (vocabulary, HIDDEN), "output.weight": (vocabulary, HIDDEN)}
    shapes["output_norm.weight"] = (HIDDEN,)
    for layer in range(LAYERS):
        own = {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}
        own |= {"attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN)}
        own |= {"attn_output": (HIDDEN, HIDDEN), "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN)}
        own["ffn_down"] = (HIDDEN, INNER)
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in own.items()}
    return shapes
