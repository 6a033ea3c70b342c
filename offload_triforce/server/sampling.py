"""How an answer is drawn: parameters of the API, checked, and as the engine takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from transformers import GenerationConfig

from offload_triforce.server.bodies import Body, Texts
from offload_triforce.server.errors import invalid, quote
from offload_triforce.server.penalties import CountPenalty, LogitBias

MOST_STOPS, MOST_STOP = 16, 1000  # texts, characters of each
LEAST = 1e-30  # of temperatures and penalties but 0: single precision holds what scores become by them
DEFAULT_TEMPERATURE = 1.0  # OpenAI's, where neither the request nor the model says anything

Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]

# Parameters that change nothing here, whatever they are set to.
HARMLESS = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    | {"prediction", "cache_prompt", "id_slot", "timings_per_token", "session_id", "include_reasoning", "request_id"}
)


def _check_tiny(value: float) -> float:
    if 0 < value < LEAST:
        raise ValueError(f"{value:g} is too small; the least that is not 0 is {LEAST:g}")
    return value


def _check_bias(bias: dict[str, Any]) -> dict[str, float]:
    for name, value in bias.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -100 <= value <= 100:
            raise ValueError(f"the bias of {quote(name)} must be a number from -100 to 100, not {quote(value)}")
    return bias


class Sampling(Body):
    """Parameters of the draws, the same for all ways to ask."""

    model: str | None = None
    stream: bool | None = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    temperature: Annotated[float, Field(ge=0, le=100), AfterValidator(_check_tiny)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int | None, Field(ge=-1, lt=2**31)] = None
    min_p: Share | None = None
    max_tokens: Annotated[int | None, Field(ge=1, lt=2**40)] = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100), AfterValidator(_check_tiny)] | None = None
    logit_bias: Annotated[dict[str, Any], AfterValidator(_check_bias)] | None = None
    stop: str | Texts | None = None
    n: int | None = None

    def stops(self) -> list[str]:
        """Texts that end an answer.

        Raises:
            ApiError: an empty one, or too many.
        """
        return check_stops("stop", [self.stop] if isinstance(self.stop, str) else self.stop or [])

    def check_one(self) -> None:
        """Refuse several answers to one request.

        Raises:
            ApiError: so many.
        """
        if self.n not in (None, 1):
            raise invalid(f"n must be 1, not {quote(self.n)}: one answer at a time is what this server gives", "n")

    def options(self, defaults: GenerationConfig, prompt_tokens: int, vocabulary: int) -> dict[str, Any]:
        """Keywords for the engine: the draws, and the logits processors for what transformers has none for.

        Args:
            defaults: the model's own. prompt_tokens: of the prompt. vocabulary: ids below this number exist.

        Raises:
            ApiError: a token that does not exist.
        """
        options: dict[str, Any] = {}
        if self.temperature is not None:
            options["temperature"] = self.temperature
        elif defaults.do_sample:
            options["do_sample"] = True  # and the rest is the model's own
        else:
            options["temperature"] = DEFAULT_TEMPERATURE
        if self.top_k is not None:
            options["top_k"] = max(0, self.top_k)
        for name in ("top_p", "min_p", "repetition_penalty"):
            if (value := getattr(self, name)) is not None:
                options[name] = value
        options["logits_processor"] = self._processors(prompt_tokens, vocabulary)
        return options

    def _processors(self, prompt_tokens: int, vocabulary: int) -> list[Any]:
        processors: list[Any] = []
        if self.presence_penalty or self.frequency_penalty:
            penalty = CountPenalty(prompt_tokens, self.presence_penalty or 0.0, self.frequency_penalty or 0.0)
            processors.append(penalty)
        if self.logit_bias:
            processors.append(LogitBias({_token(name, vocabulary): bias for name, bias in self.logit_bias.items()}))
        return processors


def check_stops(name: str, stops: Sequence[str]) -> list[str]:
    """Texts that end an answer, if they can. ``name``: of the parameter.

    Raises:
        ApiError: an empty one, a long one, or too many.
    """
    if len(stops) > MOST_STOPS:
        raise invalid(f"{name} has {len(stops):,} texts, and at most {MOST_STOPS} are possible", name)
    if "" in stops:
        raise invalid(f"{name} holds an empty text, after which there would be nothing; leave it out", name)
    if (longest := max(map(len, stops), default=0)) > MOST_STOP:
        raise invalid(f"{name} holds a text of {longest:,} characters, and {MOST_STOP:,} are the most", name)
    return list(stops)


def _token(name: str, vocabulary: int) -> int:
    token = int(name) if name.isdecimal() and len(name) < 12 else -1
    token = token if str(token) == name else -1  # no other spelling: two of them would be one token
    if not 0 <= token < vocabulary:
        raise invalid(f"logit_bias: {quote(name)} is no token id; the model has 0 to {vocabulary - 1:,}", "logit_bias")
    return token
