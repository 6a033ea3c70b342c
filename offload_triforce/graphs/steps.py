"""Forward steps that are captured once per shape and replayed from then on.

A small step is a few hundred kernels of microseconds each, and launching them one by one takes longer than running
them. A CUDA graph launches them all at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from offload_triforce.cache.static import StaticView
from offload_triforce.graphs import capture
from offload_triforce.graphs.capture import Capture, FixedWork, Step
from offload_triforce.kernels import ops
from offload_triforce.model.adapter import View, forward, run
from offload_triforce.model.embeddings import host_table
from offload_triforce.model.layout import ModelLayout

# Shapes captured at most: (tokens, logits kept) are few, since both are bounded by the draft tokens per round.
MOST_GRAPHS = 16


def make_graphs(
    model: PreTrainedModel, layout: ModelLayout, make_view: Callable[[int], StaticView], most_tokens: int
) -> StepGraphs | None:
    """Graphs of a model's steps over a cache; None where steps are better run one operation at a time.

    Args:
        model, layout: the model.
        make_view: makes the view of a step of that many tokens.
        most_tokens: longer steps are not captured.
    """
    if layout.longrope_switch is not None:  # its frequencies change with the length, on the host in some versions
        return None
    if any(weight.device != layout.device for weight in model.parameters()):  # brought in by hooks, step by step
        return None
    how = capture.find_capture(layout.device)
    return None if how is None else StepGraphs(model, make_view, how, most_tokens)


class StepInputs(NamedTuple):
    """What changes from step to step, see ``StepGraphs``."""

    tokens: Sequence[int]
    positions: Sequence[int]
    depths: Sequence[int]
    seen: np.ndarray


class StepGraphs:
    """Stands in for ``adapter.run``: the same steps, over static views.

    A shape is captured when it comes for the second time, and its first replay is compared with the model itself:
    whatever a graph may have missed shows there, since by then everything has moved on. Where capturing
    fails, steps go on as they were, for good. What comes out is good until the next step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        make_view: Callable[[int], StaticView],
        capture: Capture,
        most_tokens: int,
        most_graphs: int = MOST_GRAPHS,
    ) -> None:
        self.model, self.most_tokens, self.most_graphs = model, most_tokens, most_graphs
        self.graphs: dict[tuple[int, int], StepGraph] = {}  # by (tokens, keep)
        self._make_view = make_view
        self._capture: Capture | None = capture
        self._seen: set[tuple[int, int]] = set()

    def __call__(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        view: View,
        keep: int,
        seen: np.ndarray,
        depths: Sequence[int],
    ) -> Tensor:
        """One forward step, see ``adapter.run``; ``view`` is what it attends over when it is not replayed.

        Args:
            tokens: T. positions: in the text. view, keep: as for ``run``.
            seen: bool [T, P], which of the newest P tokens (the step's own last) each new one sees.
            depths: T places behind the committed tokens.
        """
        inputs = StepInputs(tokens, positions, depths, seen)
        shape = len(tokens), keep
        graph = self.graphs.get(shape)
        if graph is None:
            logits = self._captured(shape, inputs)
            if logits is None:
                return run(self.model, tokens, positions, view, keep)
            _tell(view, self.graphs[shape])
            return logits
        logits = graph(inputs)
        if graph.trusted:
            _tell(view, graph)
            return logits
        expected = run(self.model, tokens, positions, view, keep)
        graph.trusted = alike(logits, expected)
        if not graph.trusted:
            self.graphs.clear()
            self._give_up("a graph computed something else than the model")
        return expected

    def _captured(self, shape: tuple[int, int], inputs: StepInputs) -> Tensor | None:
        """Capture a shape if its time has come: the logits of this step, or None."""
        if self._capture is None or shape[0] > self.most_tokens or len(self.graphs) >= self.most_graphs:
            return None
        if shape not in self._seen:
            self._seen.add(shape)
            return None
        graph = StepGraph(self.model, self._make_view(shape[0]), shape[1])
        graph.load(inputs)
        try:
            logits = graph.capture(self._capture)
        except Exception as error:  # whatever it was: if the model itself is at fault, its plain step will raise it too
            self._give_up(str(error).partition("\n")[0] or type(error).__name__)
            return None
        self.graphs[shape] = graph
        return logits

    def _give_up(self, reason: str) -> None:
        self._capture = None
        warnings.warn(
            f"{type(self.model).__name__} is run without CUDA graphs from here on, which is slower: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )


class StepGraph:
    """Steps of one shape: T tokens in, ``keep`` logits out, and the places where a step finds what changes."""

    def __init__(self, model: PreTrainedModel, view: StaticView, keep: int) -> None:
        self.trusted = False  # a replay has been compared with the model
        self._model, self._view, self._keep = model, view, keep
        tokens, device = view.tokens, model.device
        self._sizes = [tokens, tokens, tokens, sum(view.sizes), tokens * view.sight]
        self._inputs = torch.zeros(sum(self._sizes), dtype=torch.long, device=device)
        # All that changes travels at once, behind no tile that is under way; nobody waits for it but the next step.
        self._staging = torch.zeros(sum(self._sizes), dtype=torch.long, device="cpu", pin_memory=device.type == "cuda")
        self._table = host_table(model)
        self._rows = self._staged_rows = None
        if self._table is not None:  # the tokens' embeddings come up as the other inputs do
            shape, dtype = (tokens, self._table.embedding_dim), self._table.weight.dtype
            self._rows = torch.zeros(shape, dtype=dtype, device=device)
            self._staged_rows = torch.zeros(shape, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
        self._fetched = torch.cuda.Event() if device.type == "cuda" else None
        self._replay: Step | None = None

    def load(self, inputs: StepInputs) -> None:
        """Put the inputs of a step where it finds them.

        Raises:
            IndexError: the tokens do not fit the caches.
        """
        held, view = self._view.held(), self._view
        mask = np.ones((view.tokens, view.sight), dtype=np.int64)
        mask[:, view.sight - inputs.seen.shape[1] :] = inputs.seen
        if self._fetched is not None:
            self._fetched.synchronize()
        values = self._staging.numpy()
        np.concatenate([inputs.tokens, inputs.positions, inputs.depths, held, mask.ravel()], out=values)
        ops.fetch(self._inputs, self._staging)
        if self._table is not None:
            ops.fetch(self._rows, self._table.rows(inputs.tokens, out=self._staged_rows))
        if self._fetched is not None:
            torch.cuda.current_stream(self._inputs.device).record_event(self._fetched)

    def capture(self, capture: Capture) -> Tensor:
        """Capture the step that is loaded, which computes it as well: its logits."""
        with fixed_experts(self._model):
            with FixedWork(self._inputs.device):
                logits = self._step()
            self._replay = capture(self._step)
        return logits

    def __call__(self, inputs: StepInputs) -> Tensor:
        """Replay: logits [keep, V], good until the next replay."""
        self.load(inputs)
        return self._replay()

    @property
    def hidden(self) -> Tensor | None:
        """Hidden states [T, width] of the newest step, where the model tells them; good until the next one."""
        return self._view.hidden

    def _step(self) -> Tensor:
        ids, positions, depths, held, mask = self._inputs.split(self._sizes)
        self._view.begin(held, mask.view(self._view.tokens, self._view.sight).bool(), depths)
        return forward(self._model, ids, positions, self._view, self._keep, self._rows)


def _tell(view: View, graph: StepGraph) -> None:
    """What the model would have told the view, had it been run over it."""
    see = getattr(view, "see", None)
    if see is not None and graph.hidden is not None:
        see(graph.hidden)


@contextmanager
def fixed_experts(model: PreTrainedModel) -> Iterator[None]:
    """Let a mixture of experts do the same work whichever experts are chosen, as far as transformers knows how to."""
    before = model.get_experts_implementation() if hasattr(model, "get_experts_implementation") else {}
    fixed = {part: "batched_mm" if kind in ("eager", "grouped_mm") else kind for part, kind in before.items()}
    if fixed == before:
        yield
        return
    try:
        model.set_experts_implementation(fixed)
        yield
    finally:
        model.set_experts_implementation(before)


def alike(logits: Tensor, expected: Tensor) -> bool:
    """Whether two ways to the same logits differ by no more than rounding does, through many layers."""
    tolerance = 0.005 if expected.dtype == torch.float32 else 0.1
    seen = expected > -1e4  # a model may rule tokens out
    one, other = (x.float().where(seen, 0.0) for x in (logits, expected))
    spread = (other - other.sum(dim=-1, keepdim=True) / seen.sum(dim=-1, keepdim=True)).where(seen, 0.0)
    return bool((one - other).norm() <= tolerance * spread.norm())
