"""Settings as they are given: text where a setting has a unit, and one sentence for what cannot be read."""

from dataclasses import fields
from pathlib import Path

import pytest

from offload_triforce.config import Settings
from offload_triforce.errors import InputError

ROOT = Path(__file__).parent.parent
IN_TOKENS = [each.name for each in fields(Settings) if each.metadata.get("tokens")]


def test_every_setting_says_what_it_is_and_that_is_said_once():
    """The class documents it, commands show it, and nobody writes it down a second time."""
    sources = [path.read_text() for path in (ROOT / "offload_triforce").rglob("*.py")]
    for each in fields(Settings):
        text = each.metadata["help"]
        assert text.endswith("."), each.name
        assert f"        {each.name}: {text}" in Settings.__doc__
        start = text[:40]
        assert sum(source.count(start) for source in sources) == 1, each.name


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
