"""The command ``serve``: an OpenAI-compatible server for one model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from offload_triforce.cli.common import examples, guarded
from offload_triforce.cli.ending import loading, say
from offload_triforce.cli.options import Config, Device, Draft, Quantize, QuantizeHead
from offload_triforce.cli.settings import build_settings, takes_settings
from offload_triforce.cli.sources import find_models, say_unpacked
from offload_triforce.cli.values import read_tokens
from offload_triforce.errors import InputError
from offload_triforce.machine.units import parse_bytes
from offload_triforce.model.packing import check_packing

EXAMPLES = examples(
    "offload-triforce serve --model qwen3-8b --context 128K",
    "offload-triforce serve --model ./model --name coder --port 8080",
    "offload-triforce serve --model m.gguf --host 0.0.0.0 --api-key-file key.txt",
)
NEEDED = ("fastapi", "uvicorn", "prometheus_client")
SERVER = {"rich_help_panel": "Server"}
LEAST_CONTEXT = 512  # tokens; caches of this length are made first, where the settings name none
KEY = "OFFLOAD_TRIFORCE_API_KEY"


@guarded
@takes_settings()
def serve(
    *,
    model: Annotated[str, typer.Option(help="A name that models lists, a hub id, a folder or a GGUF file.")],
    draft: Draft = "ngram",
    name: Annotated[
        list[str] | None,
        typer.Option(help="What clients call the model; may be repeated. By default --model.", **SERVER),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; others than loopback need a key.", **SERVER)] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes a free one.", **SERVER)] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar=KEY, show_envvar=True, help="What clients have to show.", **SERVER)
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file that holds it.", **SERVER)] = None,
    cors: Annotated[
        list[str] | None, typer.Option(help="An origin whose pages may ask, or *; may be repeated.", **SERVER)
    ] = None,
    queue: Annotated[int, typer.Option(min=0, help="Most requests that wait; others get a 429.", **SERVER)] = 64,
    max_new_tokens: Annotated[
        str, typer.Option(help="Limit of an answer where a request names none.", **SERVER)
    ] = "4096",
    max_prompt: Annotated[
        str | None, typer.Option(help="Most tokens of a prompt; by default what the context allows.", **SERVER)
    ] = None,
    max_body: Annotated[str, typer.Option(help="Most bytes of a request: 64MB.", **SERVER)] = "64MB",
    grace: Annotated[
        float, typer.Option(min=0.0, help="Seconds that answers have to end in, on SIGTERM.", **SERVER)
    ] = 30.0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16: weights and KV cache.")] = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    quantize_head: QuantizeHead = None,
    config: Config = None,
    given: dict[str, Any],
) -> None:
    """Serve a model by OpenAI's API (and Anthropic's), with a page to try it."""
    check_extra()
    settings = build_settings(given, config)
    check_packing(quantize, quantize_head)
    if api_key_file is not None:
        api_key = _read_key(api_key_file, api_key)
    about: dict[str, Any] = {
        "names": tuple(name or [Path(model).stem if model.endswith(".gguf") else model]),
        "host": host,
        "port": port,
        "api_key": api_key,
        "cors": tuple(cors or ()),
        "queue": queue,
        "new_tokens": read_tokens(max_new_tokens, "--max-new-tokens"),
        "prompt_tokens": None if max_prompt is None else read_tokens(max_prompt, "--max-prompt"),
        "body_bytes": parse_bytes(max_body, "--max-body"),
        "grace_seconds": grace,
    }
    from offload_triforce.server.options import ServerOptions

    options = ServerOptions(**about)  # refused before the weights are read
    source, small = find_models(model, draft)
    from offload_triforce.engine import TriForce
    from offload_triforce.server.app import make_app
    from offload_triforce.server.serving import check_port, make_server

    check_port(options)
    say_unpacked(source, dtype, device, quantize)
    with loading(model):
        engine = TriForce.load(source, small, dtype, device, quantize, settings, quantize_head)
    with engine:
        with engine.session() as session:  # what does not fit is found out now, and not by the first client
            session.make_room(settings.context or LEAST_CONTEXT)
        say(f"serving {', '.join(options.names)} at http://{options.host}:{options.port}/ (Ctrl-C ends it)")
        make_server(make_app(engine, options), options).run()


def check_extra() -> None:
    """The packages that only a server needs.

    Raises:
        InputError: names what is missing.
    """
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(f"serve needs {', '.join(missing)}; pip install 'offload-triforce[serve]'")


def _read_key(file: Path, given: str | None) -> str:
    if given is not None:
        raise InputError("--api-key and --api-key-file exclude each other; give one of them")
    try:
        return file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"{file} holds no text; it should hold the API key alone") from error
