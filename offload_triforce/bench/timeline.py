"""One pass as a time line: a Chrome/Perfetto trace, and a picture of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from transformers import PreTrainedModel

from offload_triforce.bench.figures import new_figure, save
from offload_triforce.bench.subject import Subject
from offload_triforce.model.layers import layers_of
from offload_triforce.scheduler.device import COMPUTE, D2H, H2D, Device
from offload_triforce.scheduler.trace import Span, Trace, busy

LAYERS = "layers"
# From the top of the picture down.
TRACKS = {H2D: "tab:blue", COMPUTE: "tab:orange", LAYERS: "tab:gray", D2H: "tab:green"}
LABELS = {H2D: "copies to the device", COMPUTE: "attention over tiles", LAYERS: "layers", D2H: "copies to the host"}


def trace_pass(subject: Subject, queries: int) -> Trace:
    """The time line of one pass with so many queries; another one before it warms up."""
    subject.verify(queries)
    trace = subject.device.trace = Trace()
    try:
        with _layer_spans(subject.model, subject.device):
            subject.verify(queries)
        trace.spans()  # settled while the device is there to ask
    finally:
        subject.device.trace = None
    return trace


@contextmanager
def _layer_spans(model: PreTrainedModel, device: Device) -> Iterator[None]:
    """Trace when each decoder layer works: attention, projections and MLP together."""
    with ExitStack() as hooks:
        spans = {}
        for index, layer in enumerate(layers_of(model.get_decoder())):

            def enter(_module: object, _args: object, index: int = index) -> None:
                spans[index] = device.span(LAYERS, f"layer {index}")
                spans[index].__enter__()

            def leave(_module: object, _args: object, _output: object, index: int = index) -> None:
                spans.pop(index).__exit__(None, None, None)

            hooks.callback(layer.register_forward_pre_hook(enter).remove)
            hooks.callback(layer.register_forward_hook(leave).remove)
        yield


def utilisation(spans: list[Span]) -> float:
    """Share of the time from the first copy to the device to the end of the last in which one was under way."""
    copies = [span for span in spans if span.track == H2D]
    if not copies:
        return 0.0
    return busy(spans, H2D) / (max(span.end for span in copies) - min(span.start for span in copies))


def draw(trace: Trace, path: Path, title: str) -> None:
    """The time line as a picture.

    Raises:
        InputError: matplotlib is not there.
    """
    spans = trace.spans()
    origin = min(span.start for span in spans)
    tracks = [track for track in TRACKS if any(span.track == track for span in spans)]
    figure = new_figure(10, 0.8 + 0.7 * len(tracks))
    axes = figure.subplots()
    for row, track in enumerate(reversed(tracks)):
        bars = [((s.start - origin) * 1e3, (s.end - s.start) * 1e3) for s in spans if s.track == track]
        edge = {"edgecolor": "white", "linewidth": 0.3} if track in (H2D, LAYERS) else {}
        axes.broken_barh(bars, (row - 0.35, 0.7), facecolors=TRACKS[track], **edge)
    axes.set_yticks(range(len(tracks)), [LABELS[track] for track in reversed(tracks)])
    axes.set_xlabel("ms since the pass began")
    axes.set_xlim(left=0)
    axes.set_title(f"{title}; link busy {utilisation(spans):.1%} of the time", fontsize=10)
    save(figure, path)
