"""The last pass of a device: cut out right, written down only while somebody looks."""

from types import SimpleNamespace

import torch

from offload_triforce.scheduler.device import COMPUTE, DRAFT, H2D, VERIFY
from offload_triforce.scheduler.emulated import EmulatedDevice
from offload_triforce.scheduler.last_pass import LEASE, LastPass, last_pass
from offload_triforce.scheduler.trace import Span, Trace


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_from_the_pass_before_to_its_own_end():
    first, tile = Span(VERIFY, "", 0.0, 1.0), Span(H2D, "", 0.5, 0.9)
    draft, late = Span(DRAFT, "", 1.1, 1.4), Span(H2D, "", 0.9, 1.2)
    second, inside, after = Span(VERIFY, "", 1.5, 2.5), Span(COMPUTE, "", 2.0, 2.2), Span(DRAFT, "", 2.6, 2.7)
    spans = sorted([first, tile, draft, late, second, inside, after], key=lambda span: span.start)
    assert last_pass(spans) == [late, draft, second, inside]
    assert last_pass([first, tile]) == [first, tile]
    assert last_pass([draft, late]) == []


def test_nothing_is_written_down_until_somebody_looks_and_after_they_have_gone():
    clock, device = Clock(), EmulatedDevice()
    watch = LastPass(device, clock=clock)
    assert device.trace is None
    assert watch.look() == []
    with device.span(VERIFY, "1 token"):
        device.incoming.submit(torch.zeros(5), torch.ones(5)).wait()
    assert {(span.track, span.size) for span in watch.look()} == {(VERIFY, 0), (H2D, 20)}
    clock.now += LEASE - 1
    assert watch.look(), "looking again keeps it going"
    clock.now += LEASE - 1
    with device.span(VERIFY, "another"):
        pass
    assert [span.name for span in watch.look()] == ["another"]
    clock.now += LEASE + 1
    with device.span(VERIFY, "unseen"):
        pass
    assert device.trace is None, "the device is left alone"
    assert watch.look() == [], "what lies long back is not shown as the last pass"
    assert device.trace is watch
    device.close()


def test_what_the_device_is_not_through_with_is_asked_for_later():
    device, over = SimpleNamespace(trace=None), []
    watch = LastPass(device)
    watch.look()

    def span():
        if not over:
            raise RuntimeError("not ready")
        return Span(VERIFY, "", 1.0, 2.0)

    device.trace.add_later(span)
    assert watch.look() == []
    over.append(True)
    assert watch.look() == watch.look() == [Span(VERIFY, "", 1.0, 2.0)]


def test_it_keeps_only_the_newest_and_leaves_other_traces_alone():
    device = SimpleNamespace(trace=None)
    watch = LastPass(device, most=3)
    watch.look()
    for i in range(9):
        device.trace.add(Span(VERIFY, str(i), i, i + 1))
    assert [span.name for span in watch.spans()] == ["6", "7", "8"]
    device.trace = other = Trace()
    watch.look()
    assert device.trace is other
