"""Settings as they are given: text where a setting has a unit, and one sentence for what cannot be read."""

import pytest

from offload_triforce.config import IN_TOKENS, Settings
from offload_triforce.errors import InputError


def test_lengths_and_speeds_may_be_text():
    given = {"context": "128K", "budget": "4,096", "tile": "1k", "link_gbps": "25 GB/s"}
    assert Settings.from_mapping(given) == Settings(context=131072, budget=4096, tile=1024, link_gbps=25.0)
    assert Settings.from_mapping({"link_gbps": "0.2"}).link_gbps == 0.2


@pytest.mark.parametrize("name", [*IN_TOKENS, "link_gbps"])
def test_what_cannot_be_read_names_its_setting(name):
    with pytest.raises(InputError, match=f"^{name} 'lots' is not a "):
        Settings.from_mapping({name: "lots"})


def test_text_is_checked_as_numbers_are():
    with pytest.raises(InputError, match="context must be a whole number of at least 2, not 1"):
        Settings.from_mapping({"context": "1"})
    with pytest.raises(InputError, match="gamma must be a whole number"):
        Settings.from_mapping({"gamma": "12"})
