"""The hub: asked once and quickly, its cache where it does not answer, one sentence where nothing helps."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from huggingface_hub import constants

from offload_triforce.errors import InputError
from offload_triforce.model import hub
from offload_triforce.model.loader import load_model, max_positions
from tests.byte_tokenizer import save_tiny_llama

CPU = torch.device("cpu")


class Server:
    """Answers every request with one status, and counts them."""

    def __init__(self, status):
        asked = self.asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                asked.append(self.path)
                self.send_response(status)
                self.end_headers()

            do_GET = do_HEAD

            def log_message(self, *_):
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve(monkeypatch):
    """Puts a hub that answers with a status (None: that is not there at all) in the place of the real one."""
    servers = []

    def begin(status):
        monkeypatch.setattr(hub, "_answers", {})
        server = Server(status or 200)
        if status is None:
            server.close()
        else:
            servers.append(server)
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        return server

    yield begin
    for server in servers:
        server.close()


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The hub's cache, empty."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def keep(cache, repository="us/tiny"):
    """A model in the hub's cache, as a download leaves it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    return save_tiny_llama(folder / "snapshots" / ("0" * 40))


@pytest.mark.parametrize(("status", "answers"), [(200, True), (307, True), (404, False), (407, False), (503, False)])
def test_an_answer_of_the_hub_is_told_from_that_of_a_gateway(serve, status, answers):
    serve(status)
    assert hub.is_reachable() is answers


def test_it_is_asked_once_in_a_minute(serve, monkeypatch):
    server = serve(200)
    assert hub.is_reachable()
    assert hub.is_reachable()
    assert server.asked == ["/"]
    now = time.monotonic()
    monkeypatch.setattr(hub.time, "monotonic", lambda: now + hub.HOLDS + 1)
    assert hub.is_reachable()
    assert len(server.asked) == 2


def test_a_refused_connection_is_not_tried_again(serve):
    serve(None)
    assert not hub.is_reachable()


def test_silence_ends_with_patience(monkeypatch):
    """A network that swallows everything: the connection is taken, and nothing comes."""
    monkeypatch.setattr(hub, "_answers", {})
    monkeypatch.setattr(hub, "PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert not hub.is_reachable()


def test_a_name_server_that_is_silent_does_not_hold_anybody_up(monkeypatch):
    """Looking up an address knows no time limit of its own."""
    monkeypatch.setattr(hub, "_answers", {})
    monkeypatch.setattr(hub, "PATIENCE", 0.1)
    free, answered = threading.Event(), threading.Event()
    monkeypatch.setattr("huggingface_hub.get_session", lambda: (free.wait(20), answered.set()))
    assert not hub.is_reachable()
    assert not answered.is_set(), "it was waited for"
    free.set()


def test_offline_by_the_users_wish_asks_nobody(serve, monkeypatch):
    server = serve(200)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.is_reachable()
    assert server.asked == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "nobody/none",
            "'nobody/none' is neither a local folder or GGUF file nor in the hub's cache here, and the hub",
        ),
        ("lama-3.1-8b", "nearest are llama-3.1-8b"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B is not in the hub's cache here, and the hub cannot be"),
        ("what is this", "nor a model's name"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(serve, cache, text, words):
    serve(None)
    with pytest.raises(InputError) as error:
        hub.require(text)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_what_can_be_had_is_not_refused(serve, cache):
    serve(200)
    hub.require("nobody/none")  # whether there is such a model is for the hub to say
    serve(None)
    keep(cache)
    hub.require("us/tiny")


def test_a_copy_is_whole_or_none(cache):
    assert not hub.has_copy("us/tiny")
    folder = keep(cache)
    assert hub.has_copy("us/tiny")
    weights = folder / "model.safetensors"
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    weights.rename(folder / "model-1.safetensors")
    assert not hub.has_copy("us/tiny")
    (folder / "model-2.safetensors").write_bytes(b"")
    assert hub.has_copy("us/tiny")


def test_a_copy_loads_without_the_hub(serve, cache):
    """And is never waited for: the only request is the one question whether the hub is there."""
    server = serve(503)
    keep(cache)
    model, tokenizer = load_model("us/tiny", torch.float32, CPU)
    assert model.config.num_hidden_layers == 2
    assert tokenizer.decode(tokenizer("naïve").input_ids) == "naïve"
    assert max_positions("us/tiny") == 4096
    assert server.asked == ["/"]
    assert constants.HF_HUB_OFFLINE is False, "who loads something else later is not held to it"


def test_half_a_copy_is_one_sentence(serve, cache):
    serve(None)
    (keep(cache) / "model.safetensors").unlink()
    with pytest.raises(InputError) as error:
        load_model("us/tiny", torch.float32, CPU)
    assert "us/tiny" in str(error.value)
    assert "\n" not in str(error.value)


def test_files_are_loaded_without_a_question(serve, tmp_path):
    server = serve(200)
    load_model(str(save_tiny_llama(tmp_path)), torch.float32, CPU)
    assert server.asked == []
