"""What is counted, in Prometheus' format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from offload_triforce.engine import TriForce
from offload_triforce.server.line import Line
from offload_triforce.speculation.stats import DecodeStats

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """Of one server; two in one process do not mix."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        about = {"registry": self._registry, "namespace": "offload_triforce"}
        self._requests = Counter("requests", "Answers by how they ended.", ["outcome"], **about)
        self._prompt = Counter("prompt_tokens", "Tokens of prompts.", **about)
        self._cached = Counter("cached_prompt_tokens", "Of them, held from before and not read again.", **about)
        self._new = Counter("new_tokens", "Tokens of answers.", **about)
        self._passes = Counter("passes", "Verification passes.", **about)
        self._accepted = Counter("accepted_draft_tokens", "Draft tokens that the target accepted.", **about)
        self._link = Counter("link_bytes", "Bytes over the link while decoding.", **about)
        self._first = Histogram(
            "first_token_seconds", "From an answer's turn to its first token.", buckets=SECONDS, **about
        )
        self._decode = Histogram("decode_seconds", "From there to its end.", buckets=SECONDS, **about)
        self._waiting = Gauge("waiting_requests", "Requests that wait for their turn.", **about)
        self._busy = Gauge("busy", "1 while there is an answer under way.", **about)
        self._parked = Gauge("parked_session_bytes", "Host memory of texts beside the one in the caches.", **about)

    def watch(self, line: Line, engine: TriForce) -> None:
        """Show how many wait, and what is kept for them."""
        self._parked.set_function(lambda: engine.parked_bytes)
        self._waiting.set_function(lambda: line.waiting)
        self._busy.set_function(lambda: int(line.busy))

    def answered(self, stats: DecodeStats) -> None:
        """An answer is complete."""
        self.ended("answered")
        self._prompt.inc(stats.prompt_tokens)
        self._cached.inc(stats.reused_tokens)
        self._new.inc(stats.new_tokens)
        self._passes.inc(stats.passes)
        self._accepted.inc(stats.retrieval.accepted)
        self._link.inc(stats.link_bytes + stats.prefill_link_bytes)
        self._first.observe(stats.ttft_s)
        self._decode.observe(stats.decode_s)

    def ended(self, outcome: str) -> None:
        """An answer has ended: "answered", "cancelled" or "failed"."""
        self._requests.labels(outcome).inc()

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._registry)
