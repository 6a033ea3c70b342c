"""A real server on a loopback port, with a tiny model over bytes that has a chat template."""

from __future__ import annotations

import contextlib

import pytest

pytest.importorskip("fastapi")

from offload_triforce import TriForce
from offload_triforce.server.app import make_app
from offload_triforce.server.options import ServerOptions
from offload_triforce.server.serving import in_background
from tests.byte_tokenizer import byte_tokenizer
from tests.server.browsing import chromium  # noqa: F401  # a fixture
from tests.tiny import build

TEMPLATE = (
    "{% if tools %}[tools] {% for tool in tools %}{{ tool.function.name }} {% endfor %}\n{% endif %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
SMALL = {"budget": 64, "chunk": 4, "sink": 4, "recent": 16, "tile": 16, "gamma": 4, "prefill_chunk": 64}


def tiny_engine(**settings):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return TriForce(build("Llama", vocab_size=259, eos_token_id=2), tokenizer, **{**SMALL, **settings})


@contextlib.contextmanager
def serving(engine, **options):
    """(address, service) of a server that runs meanwhile."""
    chosen = ServerOptions(**{"names": ("tiny", "other"), "port": 0, "grace_seconds": 2.0, **options})
    app = make_app(engine, chosen)
    with in_background(app, chosen) as address:
        yield address, app.state.service


@contextlib.contextmanager
def openai_client(address):
    """OpenAI's own client of a server."""
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@contextlib.contextmanager
def anthropic_client(address):
    """Anthropic's own client of a server."""
    anthropic = pytest.importorskip("anthropic")
    with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def engine():
    with tiny_engine() as engine:
        yield engine


@pytest.fixture(scope="session")
def served(engine):
    with serving(engine) as (address, service):
        yield address, service


@pytest.fixture(scope="session")
def address(served):
    return served[0]


@pytest.fixture(scope="session")
def service(served):
    return served[1]


@pytest.fixture(scope="session")
def client(address):
    with openai_client(address) as client:
        yield client
