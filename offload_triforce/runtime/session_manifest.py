"""What a saved session says of itself: a JSON file that names all the others, checked word by word when it is read.

Nothing in it is believed. Names follow from a file's place, sizes from shapes, and its own checksum covers all of it:
a flipped bit is found, and so is a manifest that somebody has made up. Nothing here needs torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import xxhash

from offload_triforce.machine.units import MOST_TOKENS
from offload_triforce.model.identity import ModelIdentity
from offload_triforce.runtime.shard_header import ITEMSIZE, TensorEntry, size_of

FORMAT, VERSION = "offload-triforce session", 1
MOST_BYTES = 32 * 2**20  # of a manifest: that of a million tokens has two MB
_MOST = {"layers": 4096, "kv_heads": 65536, "head_dim": 65536, "block": 2**24, "parts": 1024, "dimension": 2**40}
_HASH = re.compile(r"[0-9a-f]{32}")
_STAMP = re.compile(r"[0-9a-f]{16}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}")
OWN_FILE = re.compile(r"(tokens|kv-\d{4,}-\d{6,}|point-\d{12,})-[0-9a-f]{16}\.safetensors")


class ManifestError(Exception):
    """What is wrong, as the end of "its manifest ..."."""


class VersionError(ManifestError):
    """It is of a version that is not read here."""


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
class Manifest:
    """A saved session.

    Attributes:
        saved: when, in seconds since 1970.
        model: that read the text. long: see ``TextSource``.
        layers, kv_heads, head_dim, dtype: of the keys and values, see ``KVShape``; dtype as safetensors calls it.
        length: tokens. block: tokens of a shard; the last of a layer may have fewer.
        tokens: the file of their ids. shards: of each layer, those of each block. points: the checkpoints, ascending.
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
        return [(self.tokens, [tokens_of(self.length)]), *points, *kv]

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
    return json.dumps({"format": FORMAT, "version": VERSION, "checksum": _checksum(body), "session": body}).encode()


def _file_as_json(file: FileEntry) -> list[Any]:
    return [file.name, file.size, file.checksum]


def _point_as_json(point: PointEntry) -> list[Any]:
    parts = [[part.name, part.dtype, list(part.shape)] for part in point.parts]
    return [point.tokens, _file_as_json(point.file), parts]


def _checksum(body: Any) -> str:
    return xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(data: bytes) -> Manifest:
    """Check and read what lies on disk.

    Raises:
        ManifestError: what is wrong with it.
    """
    try:
        whole = json.loads(data, object_pairs_hook=_without_doubles, parse_float=_no_float, parse_constant=_no_float)
        if not isinstance(whole, dict) or whole.get("format") != FORMAT:
            raise ManifestError("does not say that it is one")
        if type(version := whole.get("version")) is not int or version != VERSION:
            raise VersionError(f"is of version {version!r:.40}, and only version {VERSION} is read here")
        _object(whole, "format version checksum session", "as a whole")
        if whole["checksum"] != _checksum(whole["session"]):
            raise ManifestError("does not have its own checksum")
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, numbers of a thousand digits, deeply nested
        raise ManifestError("is not JSON as it was written") from error
    return _Reader(whole["session"]).manifest()


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found


def _no_float(_: str) -> NoReturn:
    raise ValueError("a number that is not whole")


def _object(value: Any, keys: str, what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != set(keys.split()):
        raise ManifestError(f"has other entries than it should {what}")
    return value


def _list(value: Any, what: str, length: int | None = None, most: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        count = "some" if length is None else f"{length:,}"
        raise ManifestError(f"does not list {count} {what}")
    if most is not None and len(value) > most:
        raise ManifestError(f"lists {len(value):,} {what}, and more than {most:,} are never written")
    return value


def _number(value: Any, most: int, what: str, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ManifestError(f"gives {str(value)[:40]!r} as {what}, not a whole number between {least:,} and {most:,}")
    return value


def _text(value: Any, fits: Callable[[str], Any], what: str) -> str:
    if not isinstance(value, str) or not fits(value):
        raise ManifestError(f"gives {str(value)[:40]!r} as {what}")
    return value


class _Reader:
    """Goes through the part that describes the session, after the checksum."""

    def __init__(self, body: Any) -> None:
        keys = "saved model shape long length block tokens shards points"
        self._body = _object(body, keys, "for a session")

    def manifest(self) -> Manifest:
        body = self._body
        shape = _list(body["shape"], "numbers of a shape", 4)
        layers, kv_heads, head_dim = (
            _number(value, _MOST[name], f"its {name}")
            for value, name in zip(shape[:3], ("layers", "kv_heads", "head_dim"), strict=True)
        )
        dtype = _text(shape[3], ITEMSIZE.__contains__, "the dtype of keys and values")
        if type(body["long"]) is not bool:
            raise ManifestError("does not say whether its text is a long one")
        length = _number(body["length"], MOST_TOKENS, "its number of tokens", 1)
        block = _number(body["block"], _MOST["block"], "the tokens of a shard", 1)
        tokens = self._file(body["tokens"], tokens_name, size_of([tokens_of(length)]))
        saved = _number(body["saved"], 2**40, "the time of saving")
        shape = (layers, kv_heads, head_dim, dtype)
        bare = Manifest(saved, self._model(), *shape, body["long"], length, block, tokens, (), ())
        return replace(bare, shards=self._shards(bare), points=self._points(length))

    def _model(self) -> ModelIdentity:
        name, configuration, weights, tokenizer = _list(self._body["model"], "hashes of a model", 4)
        printable = _text(name, lambda text: len(text) <= 200 and text.isprintable(), "the name of its model")
        hashes = [_text(value, _HASH.fullmatch, "a hash of its model") for value in (configuration, weights)]
        return ModelIdentity(printable, *hashes, _text(tokenizer, re.compile(r"|[0-9a-f]{32}").fullmatch, "a hash"))

    def _shards(self, manifest: Manifest) -> tuple[tuple[FileEntry, ...], ...]:
        # As many as there must be are counted on what is there: nothing is made for a number alone.
        layers = _list(self._body["shards"], "layers", manifest.layers)
        for layer in layers:
            _list(layer, "shards of a layer", manifest.blocks)
        sizes = [size_of([manifest.kv(block)]) for block in (0, manifest.blocks - 1)]
        found = []
        for index, layer in enumerate(layers):
            shards = (self._shard(v, index, b, sizes[b == manifest.blocks - 1]) for b, v in enumerate(layer))
            found.append(tuple(shards))
        return tuple(found)

    def _shard(self, value: Any, layer: int, block: int, size: int) -> FileEntry:
        return self._file(value, lambda stamp: shard_name(layer, block, stamp), size)

    def _points(self, length: int) -> tuple[PointEntry, ...]:
        found: list[PointEntry] = []
        for value in _list(self._body["points"], "checkpoints"):
            tokens, file, parts = _list(value, "entries of a checkpoint", 3)
            least = found[-1].tokens + 1 if found else 0
            tokens = _number(tokens, length, "the tokens of a checkpoint", least)
            entries = tuple(self._part(part) for part in _list(parts, "parts of a checkpoint", most=_MOST["parts"]))
            if len({entry.name for entry in entries}) != len(entries):
                raise ManifestError("names a part of a checkpoint twice")
            name = lambda stamp, tokens=tokens: point_name(tokens, stamp)  # noqa: E731
            found.append(PointEntry(tokens, self._file(file, name, size_of(entries)), entries))
        return tuple(found)

    def _part(self, value: Any) -> TensorEntry:
        name, dtype, shape = _list(value, "entries of a part", 3)
        numbers = [_number(n, _MOST["dimension"], "a dimension") for n in _list(shape, "dimensions", most=8)]
        checked = _text(name, _PART.fullmatch, "the name of a part")
        return TensorEntry(checked, _text(dtype, ITEMSIZE.__contains__, "the dtype of a part"), tuple(numbers))

    def _file(self, value: Any, name: Callable[[str], str], size: int) -> FileEntry:
        """A file whose name but for its stamp, and whose size, follow from what it holds."""
        given, bytes_, checksum = _list(value, "entries of a file", 3)
        stamp = given[-28:-12] if isinstance(given, str) else ""
        if not _STAMP.fullmatch(stamp) or given != name(stamp):
            raise ManifestError(f"names {str(given)[:60]!r} where {name('*')} belongs")
        if type(bytes_) is not int or bytes_ != size:
            raise ManifestError(f"gives {str(bytes_)[:40]!r} bytes for {given}, whose tensors take {size:,}")
        return FileEntry(given, bytes_, _text(checksum, _HASH.fullmatch, f"the checksum of {given}"))
