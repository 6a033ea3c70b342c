"""Parts of OpenAI's answers that chat and completions share."""

from __future__ import annotations

import secrets
from typing import Any

from offload_triforce.server.reporter import Progress
from offload_triforce.speculation.stats import DecodeStats


def new_id(kind: str) -> str:
    """A name for an answer."""
    return f"{kind}-{secrets.token_hex(12)}"


def usage(stats: DecodeStats) -> dict[str, Any]:
    """Tokens of prompt and answer; what was held from before, and what drafting brought."""
    accepted, read = stats.retrieval.accepted, stats.draft_tokens
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.new_tokens,
        "total_tokens": stats.prompt_tokens + stats.new_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.reused_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": max(0, read - accepted),
        },
    }


def progress(event: Progress) -> dict[str, Any]:
    """As llama.cpp's server tells it, which says ``cache`` for ``cached``."""
    told = {"total": event.total, "cached": event.cached, "cache": event.cached, "processed": event.processed}
    return {**told, "time_ms": round(event.time_ms, 3)}
