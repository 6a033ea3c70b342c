"""What several tests of sessions need."""

from functools import partial

import pytest

from offload_triforce.planner import sizes
from offload_triforce.runtime import pool, saving, shelf
from offload_triforce.runtime.session_files import save_text


@pytest.fixture
def small_groups(monkeypatch):
    """So that short texts are read in several groups, and are worth keeping, and lie on disk in several shards."""
    monkeypatch.setattr(sizes, "GROUP", 40)
    monkeypatch.setattr(sizes, "MARKED_GROUP", 24)
    monkeypatch.setattr(pool, "WORTH_KEEPING", 12)
    monkeypatch.setattr(pool, "LEAST_SHARED", 4)
    for module in (saving, shelf):
        monkeypatch.setattr(module, "save_text", partial(save_text, block=32))


@pytest.fixture
def folder(tmp_path):
    """Where a session may be saved."""
    return tmp_path / "session"
