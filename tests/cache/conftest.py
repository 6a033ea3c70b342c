"""Tiny tensors, thousands of steps: a second thread would only get in the way."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def in_one_thread(one_thread):
    pass
