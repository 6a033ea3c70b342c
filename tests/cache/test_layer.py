"""All caches keep one protocol. What its calls do is tested with each cache, snapshots too, against a plain text."""

from __future__ import annotations

import inspect

import pytest

from offload_triforce.cache.buffer import GrowingBuffer
from offload_triforce.cache.full import FullCache
from offload_triforce.cache.layer import CacheLayers, FilledLayers
from offload_triforce.cache.retrieval import RetrievalCache
from offload_triforce.cache.streaming import StreamingCache
from offload_triforce.cache.target import TargetCaches
from offload_triforce.cache.window import WindowCache

CALLS = ("end_step", "select", "commit", "reset", "snapshot", "restore")
FILLED = ("fill", "end_fill")


@pytest.mark.parametrize("cache", [GrowingBuffer, FullCache, WindowCache, RetrievalCache, StreamingCache])
def test_a_cache_takes_what_the_protocol_says(cache):
    for name in CALLS:
        assert parameters(cache, name) == parameters(CacheLayers, name)


@pytest.mark.parametrize("cache", [FullCache, WindowCache, RetrievalCache, TargetCaches])
def test_a_prefill_fills_them_all_in_the_same_way(cache):
    for name in FILLED:
        assert parameters(cache, name) == parameters(FilledLayers, name)


def parameters(kind, name):
    return list(inspect.signature(getattr(kind, name)).parameters)
