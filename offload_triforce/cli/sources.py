"""Models by what a user calls them: asked before torch is imported whether they can be had, so that a no comes soon."""

from __future__ import annotations

from rich.text import Text

from offload_triforce.cli.ending import notes, say


def find_models(model: str, draft: str) -> tuple[str, str]:
    """Target and draft as ``TriForce.load`` takes them; what is not here yet is brought.

    Raises:
        InputError: one of them cannot be had from here.
    """
    from offload_triforce.model.fetch import find_draft, find_source

    with notes.status(Text(f"looking for {model}")):
        return find_source(model), find_draft(draft)


def say_unpacked(source: str, dtype: str, device: str, quantize: str | None) -> None:
    """Say what becomes of a GGUF file that is to be quantised: it is unpacked first."""
    if quantize is None:
        return
    from offload_triforce.model.loader import resolve_device, resolve_dtype
    from offload_triforce.model.local_files import find_gguf
    from offload_triforce.model.quantize import note_on

    file = find_gguf(source)
    if file is not None:
        say(note_on(file, resolve_dtype(dtype, resolve_device(device)), quantize))
