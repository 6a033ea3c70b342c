"""How long it takes: the same plan that the pipeline executes, walked through with a clock instead of tensors.

Times in seconds, sizes in bytes, speeds in decimal GB/s. Nothing here knows a model: what the device has to do between
and at the tiles comes in as numbers.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from offload_triforce.scheduler.plan import TilePlan


@dataclass(frozen=True)
class Speeds:
    """What a card can do, and the shares of it that real kernels get.

    Attributes:
        memory_gbps: bandwidth of the card's own memory. tflops: dense, with 16-bit inputs.
        memory_share: of the bandwidth, for reading weights in small steps. flops_share: of the TFLOPS in a prefill.
        cc: compute capability, 89 for 8.9. sms: its multiprocessors.
    """

    memory_gbps: float
    tflops: float
    memory_share: float = 0.8
    flops_share: float = 0.5
    cc: int = 89
    sms: int = 60

    def seconds(self, size: float, flops: float = 0.0) -> float:
        """Time to read ``size`` bytes and compute ``flops`` on them, whichever takes longer."""
        reading = size / (self.memory_gbps * self.memory_share * 1e9)
        return max(reading, flops / (self.tflops * self.flops_share * 1e12))


@dataclass(frozen=True)
class LinkSpeed:
    """One direction of the link."""

    gbps: float
    latency_us: float = 0.0

    def seconds(self, size: int) -> float:
        """Time of one copy."""
        return self.latency_us * 1e-6 + size / (self.gbps * 1e9)


@dataclass(frozen=True)
class PassWork:
    """What a pass computes.

    Attributes:
        gaps: work before the tiles of each layer that has some, and after the last one's: one more than those layers.
        tile: work on one tile. decode: what is to be done before, to one that was fetched.
        issue_gap, issue_tile: the host's time to launch these; it launches ahead, and nothing starts before.
        issue_copy: what a tile that is fetched takes it beside that.
    """

    gaps: tuple[float, ...]
    tile: float
    issue_gap: float = 0.0
    issue_tile: float = 0.0
    issue_copy: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True)
class PassTime:
    """One pass: how long it takes, how long its copies take on the link alone, how long the device waits for them."""

    seconds: float
    link: float
    waited: float


def predict_pass(plan: TilePlan, tiles: int, link: LinkSpeed, work: PassWork) -> PassTime:
    """A pass over ``tiles`` whole tiles per layer, event by event, as ``TileStream`` runs it.

    A copy begins when the link is through with the one before it, its slot of the ring is free and the host has asked
    for it; the work on a tile begins when it has landed and the device is through with what came before.
    """
    todo, takes = plan.stream_order(tiles), link.seconds(plan.wire_bytes)
    free, landed = deque([0.0] * plan.ring), deque[float]()
    host = device = link_free = busy = waited = 0.0

    def run_ahead() -> None:
        nonlocal link_free, busy
        while free and next(todo, None) is not None:
            link_free = max(link_free, free.popleft(), host) + takes
            busy += takes
            landed.append(link_free)

    run_ahead()
    for layer in range(plan.layers):
        host += work.issue_gap
        device = max(device, host) + work.gaps[layer]
        for tile in range(tiles):
            host += work.issue_tile + (0.0 if plan.is_resident(layer, tile) else work.issue_copy)
            device = max(device, host)
            if plan.is_resident(layer, tile):
                device += work.tile
                continue
            arrived = landed.popleft()
            waited += max(0.0, arrived - device)
            device = max(device, arrived) + work.decode + work.tile
            free.append(device)
            run_ahead()
    return PassTime(max(device, host + work.issue_gap) + work.gaps[-1], busy, waited)


def predict_prefill(computing: list[float], copying: list[float], chunks: int) -> float:
    """Layer-major prefill: seconds of each layer's computation, and of its copy to the host beside the next layer.

    The next layer writes into the same buffer, so its last chunk of ``chunks`` waits for the copy's end.
    """
    computed = copied = 0.0
    for work, copy in zip(computing, copying, strict=True):
        computed = max(computed + work, copied + work / chunks)
        copied = max(computed, copied) + copy
    return max(computed, copied)


def chain(acceptance: float, drafted: int) -> float:
    """Tokens that one verification yields: draft tokens up to the first rejected one, and the verifier's own.

    Each draft token is taken to be accepted with the same probability, whatever came of the others: 1 + a + a^2 + ...
    """
    return float(drafted + 1) if acceptance == 1 else (1 - acceptance ** (drafted + 1)) / (1 - acceptance)


def rounds(tokens: int, gamma1: int, acceptance: float) -> float:
    """Expected steps of the retrieval level until it has ``tokens`` draft tokens, as by ``TreeDrafter.propose``.

    ``acceptance``: of a token of the drafter.
    """
    expected = [0.0]  # by the number of draft tokens that are wanted yet
    for wanted in range(1, tokens + 1):
        drafted, total, reached = min(gamma1, wanted - 1), 1.0, 1.0
        for accepted in range(drafted + 1):
            ends = reached if accepted == drafted else reached * (1 - acceptance)
            total += ends * expected[wanted - accepted - 1]
            reached *= acceptance
        expected.append(total)
    return expected[tokens]


@dataclass(frozen=True)
class RoundTime:
    """One round of the hierarchy: drafting, then a pass. Steps that a pass hides cost nothing."""

    pass_s: float
    step_s: float  # of the retrieval level
    draft_s: float  # of the draft, per step of the retrieval level
    steps: float  # of the retrieval level, per round, that no pass hides
    tokens: float  # per round
    hidden: float = 0.0  # steps per round beside those
    picked: float = 0.0  # draft tokens that the pass reads

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.pass_s + self.steps * (self.step_s + self.draft_s)

    @property
    def ms_per_token(self) -> float:
        """Milliseconds per new token."""
        return 1e3 * self.seconds / self.tokens
