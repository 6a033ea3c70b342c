"""The window of hidden states against a plain list, and the protocol that it keeps."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_triforce.cache.hidden import HiddenWindow
from offload_triforce.cache.layer import CacheLayers

WIDTH = 3
WHERE = {"dtype": torch.float32, "device": torch.device("cpu")}


def rows(positions, branch=0):
    """Hidden states that say which token they are of."""
    return torch.tensor([[float(n), float(branch), 1.0] for n in positions]).reshape(-1, WIDTH)


def check(window, length, missing=()):
    """Whatever is said to be there is the right thing, and what should be there is."""
    assert window.length == length
    expected = [n for n in range(length) if n not in missing and (n >= length - window.capacity or n < window.sink)]
    for n in range(length):
        part = range(n, n + 1)
        if window.has(part):
            assert torch.equal(window.rows(part), rows([n]))
    latest = [n for n in expected if n >= window.oldest]
    assert all(window.has(range(n, n + 1)) for n in latest)
    assert not window.has(range(length, length + 1))
    if window.oldest < length:
        assert torch.equal(window.rows(range(window.oldest, length)), rows(range(window.oldest, length)))


def test_it_keeps_the_protocol():
    for name in ("end_step", "select", "commit", "reset", "snapshot", "restore"):
        wanted = list(inspect.signature(getattr(CacheLayers, name)).parameters)
        assert list(inspect.signature(getattr(HiddenWindow, name)).parameters) == wanted
    assert isinstance(HiddenWindow(4, 1, WIDTH, **WHERE), CacheLayers)


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 12),
    st.integers(0, 4),
    st.integers(0, 40),
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6), st.booleans()), max_size=8),
)
def test_a_prefill_and_passes(capacity, sink, prompt, chunk, passes):
    """Chunks of a prompt, then passes over a path and a wrong branch beside it, some of them seen by nobody."""
    window = HiddenWindow(capacity, sink, WIDTH, **WHERE)
    for start in range(0, prompt, chunk):
        part = range(start, min(start + chunk, prompt))
        for piece in window.wanted(part, prompt):
            window.fill(piece.start, rows(piece))
    window.end_fill(prompt)
    check(window, prompt)
    assert all(window.has(range(n, n + 1)) for n in range(max(0, prompt - capacity), prompt))
    length, missing = prompt, set()
    for path, wrong, shown in passes:
        part = range(length, length + path)
        pending = torch.cat([rows(part[:1]), rows(range(wrong), branch=9), rows(part[1:])])
        if shown:
            window.see(pending)
        else:
            missing |= set(part)
        window.end_step(len(pending))
        kept = [0, *range(1 + wrong, path + wrong)]
        window.select(kept)
        window.commit(path)
        length += path
        check(window, length, missing)
        if shown:
            assert all(window.has(range(n, n + 1)) for n in part if n >= length - capacity)
        twin = HiddenWindow(capacity, sink, WIDTH, **WHERE)
        twin.restore(window.snapshot())
        check(twin, length, missing)
        assert twin.oldest == window.oldest
    window.reset()
    check(window, 0)


def test_what_is_dropped_leaves_nothing():
    window = HiddenWindow(4, 2, WIDTH, **WHERE)
    window.see(rows([0, 1]))
    window.end_step(2)
    window.select([])
    window.commit(0)
    assert window.length == 0
    assert not window.has(range(1))
    with pytest.raises(IndexError, match="are not there"):
        window.rows(range(1))
    with pytest.raises(IndexError, match="cannot accept"):
        window.commit(1)
