"""A folder of texts that two processes may use at once."""

from __future__ import annotations

import torch

from offload_triforce.runtime.shelf import Shelf
from tests.runtime.saved_texts import IDENTITY, make_text


def lengths(shelf):
    return sorted(len(text.tokens) for text in shelf.texts())


def test_what_is_gone_on_with_is_written_where_it_lay(tmp_path):
    shelf = Shelf(tmp_path, IDENTITY, make_text(1).shape)
    home = shelf.put(make_text(40))
    again = shelf.put(make_text(50), home)
    assert again.folder == home.folder
    assert lengths(shelf) == [50]


def test_neither_of_two_processes_loses_what_it_has_added(tmp_path):
    shape = make_text(1).shape
    one, other = (Shelf(tmp_path, IDENTITY, shape) for _ in range(2))
    one.put(make_text(40))
    (mine,), (theirs,) = list(one.texts()), list(other.texts())
    longer = make_text(60, fork=45)
    assert other.put(longer, theirs).folder == theirs.folder
    assert one.put(make_text(50), mine).folder != mine.folder
    assert lengths(one) == [50, 60]
    kept = next(text for text in one.texts() if len(text.tokens) == 60)
    assert torch.equal(kept.tokens, longer.tokens)


def test_what_another_process_has_removed_is_written_anew(tmp_path):
    shape = make_text(1).shape
    one, other = (Shelf(tmp_path, IDENTITY, shape) for _ in range(2))
    home = one.put(make_text(40))
    other.drop(next(other.texts()))
    assert one.put(make_text(50), home) is not None
    assert lengths(one) == [50]
