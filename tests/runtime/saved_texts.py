"""Texts to save, of any length and dtype, and whether what comes back is the same to the last bit."""

import torch

from offload_triforce.model.identity import ModelIdentity
from offload_triforce.runtime.held import Checkpoint, HeldText, KVShape
from offload_triforce.runtime.part import PartRead
from offload_triforce.runtime.session_files import open_text, save_text

IDENTITY = ModelIdentity("ToyForCausalLM, 0.01e9 weights", "a" * 32, "b" * 32, "c" * 32)
BLOCK = 16  # tokens of a shard


def make_text(
    tokens, seed=0, layers=2, kv_heads=2, head_dim=4, dtype=torch.bfloat16, every=0, fork=None, long=False, part=0
):
    """A text whose shorter versions are its beginnings: what each token leaves depends on it and those before it.

    ``every``: tokens from one checkpoint to the next. ``fork``: from this token on, it is another text. ``part``: so
    many tokens behind it were read in part.
    """
    ids = [(seed * 7919 + i * 31) % 50_000 for i in range(tokens)]
    if fork is not None:
        ids[fork:] = [id_ + 1 for id_ in ids[fork:]]
    shape = KVShape(layers, kv_heads, head_dim, dtype)
    kv = [_numbers(ids, seed + layer, kv_heads, head_dim, dtype) for layer in range(layers)]
    counts = list(range(every, tokens, every)) if every else []
    points = [Checkpoint(n, _parts(n, ids, choice=False)) for n in counts] + [Checkpoint(tokens, _parts(tokens, ids))]
    behind = PartRead(tokens, torch.arange(part), 8, 1, 2, _parts(tokens + part, ids, choice=False)) if part else None
    return HeldText(torch.tensor(ids), points, shape, kv, long, behind)


def _numbers(ids, seed, kv_heads, head_dim, dtype):
    """[2, K, n, D] in all bit patterns, NaN too: they are copied, not computed with."""
    numbers = torch.tensor(ids, dtype=torch.int64)[:, None] * 2_654_435_761
    numbers = numbers + torch.arange(2 * kv_heads * head_dim) * 40_503 + seed * 977
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    whole = (numbers * 6_364_136_223 >> 7).to(bits).view(dtype)
    return whole.view(len(ids), 2, kv_heads, head_dim).permute(1, 2, 0, 3)  # a view, as a cache may give


def _parts(tokens, ids, choice=True):
    generator = torch.Generator().manual_seed(sum(ids[:tokens]) % 2**31)
    parts = {
        "window.kv": torch.randn(2, 3, 5, generator=generator).to(torch.bfloat16),
        "recurrent.state": torch.randn(3, 4, generator=generator),
        "recurrent.length": torch.tensor(tokens),
        "recurrent.conv": torch.empty(0, 4, dtype=torch.float16),
    }
    if choice:
        parts["retrieval.codes"] = torch.randint(0, 255, (7,), dtype=torch.uint8, generator=generator)
        parts["retrieval.chosen"] = torch.rand(9, generator=generator) > 0.5
    return parts


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def check_same(found, wanted):
    """All of a text, to the last bit."""
    assert found.tokens.dtype == torch.int64
    assert torch.equal(found.tokens, wanted.tokens)
    assert (found.shape, found.long) == (wanted.shape, wanted.long)
    for layer in range(wanted.shape.layers):
        one, other = (text.read(layer, 0, len(wanted.tokens)) for text in (found, wanted))
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert torch.equal(bits(one), bits(other))
    assert [point.tokens for point in found.checkpoints] == [point.tokens for point in wanted.checkpoints]
    for one, other in zip(found.checkpoints, wanted.checkpoints, strict=True):
        assert set(one.parts) == set(other.parts)
        assert one.size == other.size
        check_same_parts(one.parts, other.parts)
    if wanted.part is None:
        assert found.part is None
        return
    one, other = found.part, wanted.part
    assert (one.held, one.chunk, one.layer, one.done) == (other.held, other.chunk, other.layer, other.done)
    assert torch.equal(one.tokens, other.tokens)
    check_same_parts(one.tensors, other.tensors)


def check_same_parts(found, wanted):
    assert set(found) == set(wanted)
    for name, part in wanted.items():
        assert (found[name].shape, found[name].dtype) == (part.shape, part.dtype)
        assert torch.equal(bits(found[name]), bits(part))


def save(folder, text, identity=IDENTITY, **options):
    return save_text(folder, text, identity, block=BLOCK, **options)


def reopen(folder, text, identity=IDENTITY, **options):
    return open_text(folder, identity, text.shape, **options)


def files(folder):
    return {path.name: path.stat().st_ino for path in folder.iterdir() if path.name.endswith(".safetensors")}
