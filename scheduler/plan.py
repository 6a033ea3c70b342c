"""What streams when, and what stays on the device: decided in pure Python, before any tensor exists."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class TilePlan:
    """Where the tiles of a full cache lie and in which order a pass reads them.

    Args:
        layers: layers with a full cache (sliding-window layers are not counted).
        kv_heads: K. head_dim: D.
        itemsize: bytes of one element.
        tile_tokens: tokens per tile.
        tiles: tiles per layer at the full context.
        ring: staging buffers on the device, each one tile.
        resident: share of all tiles that lies on the device while decoding, 0 to 1.
        late: of these resident tiles, how many come up only when the prompt has been read. They are in host memory too.
        coded_bytes: of one tile as it lies in host memory and crosses the link, see ``codec``; 0: as it is, raw.
    """

    layers: int
    kv_heads: int
    head_dim: int
    itemsize: int
    tile_tokens: int
    tiles: int
    ring: int
    resident: float = 0.0
    late: int = 0
    coded_bytes: int = 0

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.itemsize

    @property
    def tile_bytes(self) -> int:
        """Bytes of one tile on the device, raw."""
        return self.token_bytes * self.tile_tokens

    @property
    def wire_bytes(self) -> int:
        """Bytes of one tile in host memory and on the link."""
        return self.coded_bytes or self.tile_bytes

    @property
    def wire_ratio(self) -> float:
        """Raw bytes over wire bytes; 1 where tiles are not coded."""
        return self.tile_bytes / self.wire_bytes

    def is_resident(self, layer: int, tile: int) -> bool:
        """Whether this tile lies on the device while decoding.

        Resident tiles are spread evenly over the order of a pass, so that while the device works
        on them the link goes on filling the ring.
        """
        index = layer * self.tiles + tile
        return int((index + 1) * self.resident) > int(index * self.resident)

    def is_late(self, layer: int, tile: int) -> bool:
        """Whether it is a resident tile that comes up when the prompt has been read. They are spread evenly as well."""
        if not self.late or not self.is_resident(layer, tile):
            return False
        before = int((layer * self.tiles + tile) * self.resident)  # resident tiles before this one
        return (before + 1) * self.late // self.residents > before * self.late // self.residents

    def resident_tiles(self) -> list[tuple[int, int]]:
        """All (layer, tile) that lie on the device while decoding."""
        if not self.resident:
            return []
        return [(la, t) for la in range(self.layers) for t in range(self.tiles) if self.is_resident(la, t)]

    def stream_order(self, tiles: int) -> Iterator[tuple[int, int]]:
        """The (layer, tile) that a pass fetches, in order, when each layer has ``tiles`` whole tiles, late ones up."""
        return ((la, t) for la in range(self.layers) for t in range(tiles) if not self.is_resident(la, t))

    def streamed_bytes(self, tiles: int) -> int:
        """Wire bytes that a pass fetches when each layer has ``tiles`` whole tiles."""
        return sum(1 for _ in self.stream_order(tiles)) * self.wire_bytes

    @property
    def residents(self) -> int:
        """How many tiles lie on the device while decoding, at the full context."""
        return int(self.layers * self.tiles * self.resident)

    @property
    def resident_bytes(self) -> int:
        """Device bytes of all resident tiles at the full context."""
        return self.residents * self.tile_bytes

    @property
    def late_bytes(self) -> int:
        """Device bytes of those of them that come up late."""
        return self.late * self.tile_bytes

    @property
    def host_bytes(self) -> int:
        """Host bytes of all other tiles, and of the late ones, at the full context."""
        return (self.layers * self.tiles - self.residents + self.late) * self.wire_bytes

    @property
    def ring_bytes(self) -> int:
        """Device bytes of the ring. A tile that could not be coded passes through it raw, so it holds at least one."""
        size = self.ring * self.wire_bytes
        return max(size, aligned(self.tile_bytes)) if self.coded_bytes else size

    @property
    def coding_bytes(self) -> int:
        """Device bytes that coding takes: a decoded tile, and a coded one on its way in each direction."""
        return self.tile_bytes + 2 * self.coded_bytes if self.coded_bytes else 0


def aligned(size: int) -> int:
    """Bytes that a tile takes in the ring beside coded ones, whose sizes are multiples of 256."""
    return -(-size // 256) * 256


# A tile is large enough that issuing its copy and up to three kernels from Python (see ``planner.host_work``) stays far
# below its time on the link (16 MB take 300 microseconds at 55 GB/s), and small, since every layer's tail is up to one
# tile of device memory.
TILE_BYTES = 16 << 20
# The ring covers the time in which the device works on other things than tiles, at most about one layer's
# projections and MLP: 2 ms at 55 GB/s. Never more than RING_LIMIT.
RING_BYTES = 128 << 20
SLOTS = 3  # chunks of hidden states on the device, of those that wait in host memory
RING_LIMIT = 512 << 20
RING_TILES = 64


def choose_tile(token_bytes: int, context: int, multiple: int) -> int:
    """Tokens per tile when the user does not say: about TILE_BYTES, and at least four tiles per layer.

    ``token_bytes``: of one token's K and V in one layer. ``multiple``: what the tile must be a multiple of.
    """
    tokens = min(TILE_BYTES // token_bytes, context // 4)
    power = 1 << max(0, tokens.bit_length() - 1)
    return max(multiple, power // multiple * multiple)


def choose_ring(tile_bytes: int, covered: float = RING_BYTES) -> int:
    """Staging buffers when the user does not say: at least RING_BYTES, 4 to RING_TILES tiles, within RING_LIMIT.

    ``covered``: bytes that the link brings while the device works on something else.
    """
    wanted = min(max(4, math.ceil(max(RING_BYTES, covered) / tile_bytes)), RING_TILES)
    return max(1, min(wanted, RING_LIMIT // tile_bytes))
