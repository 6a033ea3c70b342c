"""What users import: it is there, it is complete, and the errors among it are written down."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import offload_triforce
from offload_triforce import errors
from offload_triforce.errors import TriForceError

ROOT = Path(__file__).parent.parent
ERRORS = [each for _, each in inspect.getmembers(errors, inspect.isclass) if each.__module__ == errors.__name__]


@pytest.mark.parametrize("name", offload_triforce.__all__)
def test_every_name_is_there(name):
    assert getattr(offload_triforce, name) is not None
    assert name in dir(offload_triforce)


def test_names_are_listed_once():
    assert set(offload_triforce._HOMES) | {"__version__"} == set(offload_triforce.__all__)
    assert list(offload_triforce.__all__) == sorted(set(offload_triforce.__all__))
    with pytest.raises(AttributeError, match="has no attribute 'Trifroce'"):
        getattr(offload_triforce, "Trifroce")  # noqa: B009


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_is_public_and_written_down(error):
    assert issubclass(error, TriForceError)
    assert getattr(offload_triforce, error.__name__) is error
    assert error.__doc__
    rows = [line for line in (ROOT / "docs" / "errors.md").read_text().splitlines() if line.startswith("| `")]
    assert [row.split("|")[1].strip() for row in rows].count(f"`{error.__name__}`") == 1


def test_no_error_of_ours_is_anything_else():
    """Whatever module raises one, users can catch it by a name that they can import."""
    for module in pkgutil.walk_packages(offload_triforce.__path__, "offload_triforce."):
        source = Path(importlib.util.find_spec(module.name).origin)
        if not module.ispkg and re.search(r"^class \w+\(TriForceError\b", source.read_text(), re.MULTILINE):
            assert module.name == errors.__name__
