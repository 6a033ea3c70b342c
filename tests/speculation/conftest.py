"""Toys are faster on one thread than on several."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def in_one_thread(one_thread):
    pass
