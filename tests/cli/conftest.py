"""Tiny models for the command line, and one thread each: there is nothing to share out among several."""

from functools import cache

import pytest
import typer.main

from tests.byte_tokenizer import save_tiny_llama


@pytest.fixture(scope="module", autouse=True)
def in_one_thread(one_thread):
    pass


@pytest.fixture(scope="session", autouse=True)
def commands_are_built_once():
    """Typer's test runner would build them all anew for each of a thousand calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("typer.testing._get_command", cache(typer.main.get_command), raising=False)
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="session")
def chatting(tmp_path_factory):
    """The same with a chat format, which refuses a system message of "no"."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("models") / "chatting")
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}"
        "{% if message['content'] == 'no' %}{{ raise_exception('not with me') }}{% endif %}"
        "<{{ message['role'] }}>{{ message['content'] }}{% endfor %}<assistant>"
    )
    return str(folder)


@pytest.fixture(scope="session")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 12, encoding="utf-8")
    return str(path)
