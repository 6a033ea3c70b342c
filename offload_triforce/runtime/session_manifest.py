"""What a saved session says of itself: a JSON file that names all the others, checked word by word when it is read.

Nothing in it is believed. Names follow from a file's place, sizes from shapes, and its own checksum covers all of it:
a flipped bit is found, and so is a manifest that somebody has made up. Nothing here needs torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import xxhash

from offload_triforce.machine.units import MOST_TOKENS
from offload_triforce.model.identity import ModelIdentity
from offload_triforce.runtime.checked_json import (
    ManifestError,
    VersionError,
    a_list,
    a_number,
    a_text,
    an_object,
    no_float,
    without_doubles,
)
from offload_triforce.runtime.shard_header import ITEMSIZE, TensorEntry, size_of

# The second version has a text whose end was read in part only; all others are written as the first, which is older.
FORMAT, VERSION, WITH_PART = "offload-triforce session", 1, 2
MOST_BYTES = 32 * 2**20  # of a manifest: that of a million tokens has two MB
MOST_PARTS = 65536  # tensors of a checkpoint, or of what was read in part
_MOST = {"layers": 4096, "kv_heads": 65536, "head_dim": 65536, "block": 2**24, "parts": MOST_PARTS, "dimension": 2**40}
_HASH = re.compile(r"[0-9a-f]{32}")
_STAMP = re.compile(r"[0-9a-f]{16}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}")
OWN_FILE = re.compile(r"(tokens|kv-\d{4,}-\d{6,}|(?:point|part)-\d{12,})-[0-9a-f]{16}\.safetensors")


@dataclass(frozen=True)
class FileEntry:
    """A file beside the manifest. ``checksum``: xxh3_128 over all its bytes, hexadecimal."""

    name: str
    size: int
    checksum: str


@dataclass(frozen=True)
class PointEntry:
    """A checkpoint of the first ``tokens`` tokens."""

    tokens: int
    file: FileEntry
    parts: tuple[TensorEntry, ...]


@dataclass(frozen=True)
class PartEntry:
    """What was read in part of ``tokens`` tokens behind the text, see ``PartRead``."""

    tokens: int
    chunk: int
    layer: int
    done: int
    file: FileEntry
    parts: tuple[TensorEntry, ...]


@dataclass(frozen=True)
class Manifest:
    """A saved session.

    Attributes:
        saved: when, in seconds since 1970.
        model: that read the text. long: see ``TextSource``.
        layers, kv_heads, head_dim, dtype: of the keys and values, see ``KVShape``; dtype as safetensors calls it.
        length: tokens. block: tokens of a shard; the last of a layer may have fewer.
        tokens: the file of their ids. shards: of each layer, those of each block. points: the checkpoints, ascending.
        part: of the tokens behind them, what a stopped prefill has read. Their ids follow the others.
    """

    saved: int
    model: ModelIdentity
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    long: bool
    length: int
    block: int
    tokens: FileEntry
    shards: tuple[tuple[FileEntry, ...], ...]
    points: tuple[PointEntry, ...]
    part: PartEntry | None = None

    @property
    def ids(self) -> int:
        """Tokens whose ids are there."""
        return self.length + (0 if self.part is None else self.part.tokens)

    @property
    def blocks(self) -> int:
        """Shards of a layer."""
        return -(-self.length // self.block)

    def reach(self, block: int) -> tuple[int, int]:
        """The tokens of a block: [start, stop)."""
        return block * self.block, min(self.length, (block + 1) * self.block)

    def kv(self, block: int) -> TensorEntry:
        """What is in the shards of a block."""
        start, stop = self.reach(block)
        return TensorEntry("kv", self.dtype, (2, self.kv_heads, stop - start, self.head_dim))

    @property
    def contents(self) -> list[tuple[FileEntry, list[TensorEntry]]]:
        """All files with what is in them, in the order in which they are read."""
        kv = [(shard, [self.kv(block)]) for layer in self.shards for block, shard in enumerate(layer)]
        points = [(point.file, list(point.parts)) for point in self.points]
        part = [] if self.part is None else [(self.part.file, list(self.part.parts))]
        return [(self.tokens, [tokens_of(self.ids)]), *points, *part, *kv]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file, _ in self.contents)


def tokens_of(length: int) -> TensorEntry:
    """What is in the file of the token ids."""
    return TensorEntry("tokens", "I32", (length,))


def tokens_name(stamp: str) -> str:
    """``stamp``: of the save that writes it."""
    return f"tokens-{stamp}.safetensors"


def shard_name(layer: int, block: int, stamp: str) -> str:
    """Of a layer's block."""
    return f"kv-{layer:04d}-{block:06d}-{stamp}.safetensors"


def point_name(tokens: int, stamp: str) -> str:
    """Of a checkpoint."""
    return f"point-{tokens:012d}-{stamp}.safetensors"


def part_name(tokens: int, stamp: str) -> str:
    """Of what was read in part of so many tokens."""
    return f"part-{tokens:012d}-{stamp}.safetensors"


def write_manifest(manifest: Manifest) -> bytes:
    """As it lies on disk."""
    model = manifest.model
    body = {
        "saved": manifest.saved,
        "model": [model.name, model.configuration, model.weights, model.tokenizer],
        "shape": [manifest.layers, manifest.kv_heads, manifest.head_dim, manifest.dtype],
        "long": manifest.long,
        "length": manifest.length,
        "block": manifest.block,
        "tokens": _file_as_json(manifest.tokens),
        "shards": [[_file_as_json(shard) for shard in layer] for layer in manifest.shards],
        "points": [_point_as_json(point) for point in manifest.points],
    }
    version, part = VERSION, manifest.part
    if part is not None:
        version = WITH_PART
        numbers = [part.tokens, part.chunk, part.layer, part.done]
        body["part"] = [*numbers, _file_as_json(part.file), _parts_as_json(part.parts)]
    return json.dumps({"format": FORMAT, "version": version, "checksum": _checksum(body), "session": body}).encode()


def _file_as_json(file: FileEntry) -> list[Any]:
    return [file.name, file.size, file.checksum]


def _point_as_json(point: PointEntry) -> list[Any]:
    return [point.tokens, _file_as_json(point.file), _parts_as_json(point.parts)]


def _parts_as_json(parts: Sequence[TensorEntry]) -> list[Any]:
    return [[part.name, part.dtype, list(part.shape)] for part in parts]


def _checksum(body: Any) -> str:
    return xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(data: bytes) -> Manifest:
    """Check and read what lies on disk.

    Raises:
        ManifestError: what is wrong with it.
    """
    try:
        whole = json.loads(data, object_pairs_hook=without_doubles, parse_float=no_float, parse_constant=no_float)
        if not isinstance(whole, dict) or whole.get("format") != FORMAT:
            raise ManifestError("does not say that it is one")
        if type(version := whole.get("version")) is not int or version not in (VERSION, WITH_PART):
            known = f"versions {VERSION} and {WITH_PART} are"
            raise VersionError(f"is of version {version!r:.40}, and only {known} read here")
        an_object(whole, "format version checksum session", "as a whole")
        if whole["checksum"] != _checksum(whole["session"]):
            raise ManifestError("does not have its own checksum")
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, numbers of a thousand digits, deeply nested
        raise ManifestError("is not JSON as it was written") from error
    return _Reader(whole["session"], version == WITH_PART).manifest()


class _Reader:
    """Goes through the part that describes the session, after the checksum."""

    def __init__(self, body: Any, with_part: bool) -> None:
        keys = "saved model shape long length block tokens shards points"
        self._body = an_object(body, f"{keys} part" if with_part else keys, "for a session")

    def manifest(self) -> Manifest:
        body = self._body
        shape = a_list(body["shape"], "numbers of a shape", 4)
        layers, kv_heads, head_dim = (
            a_number(value, _MOST[name], f"its {name}")
            for value, name in zip(shape[:3], ("layers", "kv_heads", "head_dim"), strict=True)
        )
        dtype = a_text(shape[3], ITEMSIZE.__contains__, "the dtype of keys and values")
        if type(body["long"]) is not bool:
            raise ManifestError("does not say whether its text is a long one")
        part = self._part_read(body["part"]) if "part" in body else None
        length = a_number(body["length"], MOST_TOKENS, "its number of tokens", 1 if part is None else 0)
        block = a_number(body["block"], _MOST["block"], "the tokens of a shard", 1)
        ids = length + (0 if part is None else part.tokens)
        tokens = self._file(body["tokens"], tokens_name, size_of([tokens_of(ids)]))
        saved = a_number(body["saved"], 2**40, "the time of saving")
        shape = (layers, kv_heads, head_dim, dtype)
        bare = Manifest(saved, self._model(), *shape, body["long"], length, block, tokens, (), (), part)
        return replace(bare, shards=self._shards(bare), points=self._points(length))

    def _model(self) -> ModelIdentity:
        name, configuration, weights, tokenizer = a_list(self._body["model"], "hashes of a model", 4)
        printable = a_text(name, lambda text: len(text) <= 200 and text.isprintable(), "the name of its model")
        hashes = [a_text(value, _HASH.fullmatch, "a hash of its model") for value in (configuration, weights)]
        return ModelIdentity(printable, *hashes, a_text(tokenizer, re.compile(r"|[0-9a-f]{32}").fullmatch, "a hash"))

    def _shards(self, manifest: Manifest) -> tuple[tuple[FileEntry, ...], ...]:
        # As many as there must be are counted on what is there: nothing is made for a number alone.
        layers = a_list(self._body["shards"], "layers", manifest.layers)
        for layer in layers:
            a_list(layer, "shards of a layer", manifest.blocks)
        sizes = [size_of([manifest.kv(max(0, block))]) for block in (0, manifest.blocks - 1)]
        found = []
        for index, layer in enumerate(layers):
            shards = (self._shard(v, index, b, sizes[b == manifest.blocks - 1]) for b, v in enumerate(layer))
            found.append(tuple(shards))
        return tuple(found)

    def _shard(self, value: Any, layer: int, block: int, size: int) -> FileEntry:
        return self._file(value, lambda stamp: shard_name(layer, block, stamp), size)

    def _points(self, length: int) -> tuple[PointEntry, ...]:
        found: list[PointEntry] = []
        for value in a_list(self._body["points"], "checkpoints"):
            tokens, file, parts = a_list(value, "entries of a checkpoint", 3)
            least = found[-1].tokens + 1 if found else 0
            tokens = a_number(tokens, length, "the tokens of a checkpoint", least)
            entries = self._entries(parts)
            name = lambda stamp, tokens=tokens: point_name(tokens, stamp)  # noqa: E731
            found.append(PointEntry(tokens, self._file(file, name, size_of(entries)), entries))
        return tuple(found)

    def _part_read(self, value: Any) -> PartEntry:
        *numbers, file, parts = a_list(value, "entries of what was read in part", 6)
        least = {"tokens": 1, "chunk": 1, "layer": 0, "done": 0}
        known = {
            name: a_number(number, MOST_TOKENS, f"the {name} of what was read in part", least[name])
            for name, number in zip(least, numbers, strict=True)
        }
        entries = self._entries(parts)
        name = lambda stamp: part_name(known["tokens"], stamp)  # noqa: E731
        return PartEntry(**known, file=self._file(file, name, size_of(entries)), parts=entries)

    def _entries(self, parts: Any) -> tuple[TensorEntry, ...]:
        entries = tuple(self._part(part) for part in a_list(parts, "parts of a checkpoint", most=_MOST["parts"]))
        if len({entry.name for entry in entries}) != len(entries):
            raise ManifestError("names a part of a checkpoint twice")
        return entries

    def _part(self, value: Any) -> TensorEntry:
        name, dtype, shape = a_list(value, "entries of a part", 3)
        numbers = [a_number(n, _MOST["dimension"], "a dimension") for n in a_list(shape, "dimensions", most=8)]
        checked = a_text(name, _PART.fullmatch, "the name of a part")
        return TensorEntry(checked, a_text(dtype, ITEMSIZE.__contains__, "the dtype of a part"), tuple(numbers))

    def _file(self, value: Any, name: Callable[[str], str], size: int) -> FileEntry:
        """A file whose name but for its stamp, and whose size, follow from what it holds."""
        given, bytes_, checksum = a_list(value, "entries of a file", 3)
        stamp = given[-28:-12] if isinstance(given, str) else ""
        if not _STAMP.fullmatch(stamp) or given != name(stamp):
            raise ManifestError(f"names {str(given)[:60]!r} where {name('*')} belongs")
        if type(bytes_) is not int or bytes_ != size:
            raise ManifestError(f"gives {str(bytes_)[:40]!r} bytes for {given}, whose tensors take {size:,}")
        return FileEntry(given, bytes_, a_text(checksum, _HASH.fullmatch, f"the checksum of {given}"))
