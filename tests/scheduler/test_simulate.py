"""The cost model against closed forms, against the pipeline itself on the emulated device, and its speed."""

import time

import pytest
import torch

from offload_triforce.scheduler.emulated import EmulatedDevice
from offload_triforce.scheduler.pipeline import TileStream
from offload_triforce.scheduler.plan import TilePlan
from offload_triforce.scheduler.simulate import (
    LinkSpeed,
    PassWork,
    RoundTime,
    Speeds,
    chain,
    predict_pass,
    predict_prefill,
    rounds,
)
from offload_triforce.scheduler.store import TileStore

COPY = 0.008  # seconds of one tile on the emulated link: far above the clock's noise


def make_plan(layers=3, tiles=5, ring=2, resident=0.0):
    return TilePlan(layers, 2, 4, 4, tile_tokens=64, tiles=tiles, ring=ring, resident=resident)


def link_for(plan, latency_us=0.0):
    return LinkSpeed(plan.tile_bytes / COPY / 1e9, latency_us)


def work_for(plan, gap, tile):
    return PassWork((gap,) * (plan.layers + 1), tile)


def test_a_pass_that_the_link_bounds():
    """The device works on the last tile when the link has brought all."""
    plan = make_plan(ring=4)
    told = predict_pass(plan, 5, link_for(plan), work_for(plan, 0.0, COPY / 4))
    assert told.link == pytest.approx(15 * COPY)
    assert told.seconds == pytest.approx(15 * COPY + COPY / 4)


def test_a_pass_that_the_computation_bounds():
    """Only the first tile is waited for, and not even that if the first gap is longer than its copy."""
    plan = make_plan(ring=4)
    told = predict_pass(plan, 5, link_for(plan), work_for(plan, COPY, 2 * COPY))
    assert told.seconds == pytest.approx(4 * COPY + 15 * 2 * COPY)
    assert told.waited == 0


def test_one_slot_means_one_after_the_other():
    plan = make_plan(ring=1)
    told = predict_pass(plan, 5, link_for(plan), work_for(plan, 0.0, COPY))
    assert told.seconds == pytest.approx(15 * 2 * COPY)


def test_resident_tiles_cost_no_link():
    plan = make_plan(resident=1.0)
    told = predict_pass(plan, 5, link_for(plan), work_for(plan, 0.0, COPY))
    assert (told.link, told.seconds) == (0.0, pytest.approx(15 * COPY))
    half = predict_pass(make_plan(resident=0.5), 5, link_for(plan), work_for(plan, 0.0, 0.0))
    assert half.link == pytest.approx(8 * COPY)


def test_a_slow_host_bounds_a_pass():
    """Nothing begins before it has been launched."""
    plan = make_plan(ring=4)
    work = PassWork((0.0,) * 4, 0.0, issue_gap=COPY, issue_tile=3 * COPY)
    assert predict_pass(plan, 5, link_for(plan), work).seconds >= 4 * COPY + 15 * 3 * COPY


def test_only_what_is_fetched_has_to_be_asked_for():
    for resident, fetched in ((0.0, 15), (0.4, 9), (1.0, 0)):
        plan = make_plan(ring=4, resident=resident)
        work = PassWork((0.0,) * 4, 0.0, issue_tile=COPY, issue_copy=5 * COPY)
        fast = LinkSpeed(1e9)
        assert predict_pass(plan, 5, fast, work).seconds == pytest.approx((15 + 5 * fetched) * COPY)


def test_no_tiles_yet():
    plan = make_plan()
    assert predict_pass(plan, 0, link_for(plan), work_for(plan, COPY, COPY)).seconds == pytest.approx(4 * COPY)


class Emulated:
    """The real pipeline over a slow link; the computation only takes its time."""

    def __init__(self, plan, link):
        self.plan = plan
        self.device = EmulatedDevice(link.gbps, link.latency_us)
        self.stream = TileStream(TileStore(plan, torch.float32, self.device), self.device, torch.float32)

    def seconds(self, tiles, work):
        started = due = time.perf_counter()
        self.stream.begin(tiles)
        for layer in range(self.plan.layers):
            due = self._work(due, work.gaps[layer])
            for _ in self.stream.tiles(layer):
                due = self._work(max(due, time.perf_counter()), work.tile)
        self._work(due, work.gaps[-1])
        return time.perf_counter() - started

    def _work(self, begun, seconds):
        """Until when it takes; late awakenings do not add up."""
        if (left := begun + seconds - time.perf_counter()) > 0:
            time.sleep(left)
        return begun + seconds


@pytest.mark.slow  # a matter of time: on a machine that is busy with other things it is later
@pytest.mark.parametrize("resident", [0.0, 0.4])
@pytest.mark.parametrize("ring", [1, 2, 4])
@pytest.mark.parametrize(("gap", "tile", "latency_us"), [(0.0, 0.2, 0.0), (1.5, 0.6, 2000.0), (0.5, 1.5, 0.0)])
def test_the_pipeline_takes_as_long_as_predicted(resident, ring, gap, tile, latency_us):
    """Within 5 %, at any ratio of link to computation. The best of some runs: a busy machine only adds time."""
    plan = make_plan(ring=ring, resident=resident)
    link, work = link_for(plan, latency_us), work_for(plan, gap * COPY, tile * COPY)
    expected = predict_pass(plan, 5, link, work).seconds
    emulated = Emulated(plan, link)
    try:
        best = float("inf")
        for _ in range(12):
            best = min(best, emulated.seconds(5, work))
            if best <= 1.04 * expected:
                break
    finally:
        emulated.device.close()
    assert 0.95 * expected <= best <= 1.05 * expected


def test_prefill_is_bound_by_the_computation_or_by_the_copies():
    assert predict_prefill([2.0] * 4, [1.0] * 4, 8) == pytest.approx(4 * 2 + 1)
    assert predict_prefill([1.0] * 4, [3.0] * 4, 10) == pytest.approx(1 + 4 * 3 + 3 * 0.1)
    assert predict_prefill([1.0] * 4, [0.0] * 4, 8) == 4


def test_chain_is_the_sum_of_its_powers():
    for acceptance, drafted in ((0.0, 5), (0.5, 3), (0.944, 12), (1.0, 7)):
        assert chain(acceptance, drafted) == pytest.approx(sum(acceptance**i for i in range(drafted + 1)))


@pytest.mark.parametrize(("gamma", "gamma1", "acceptance"), [(12, 4, 0.6), (5, 2, 0.9), (7, 0, 0.5), (1, 4, 0.5)])
def test_rounds_against_a_simulation(gamma, gamma1, acceptance):
    """As ``TreeDrafter.propose`` does it, with dice."""
    chance = torch.Generator().manual_seed(0)
    total, runs = 0, 4000
    for _ in range(runs):
        done = 0
        while done < gamma:
            total += 1
            drafted = min(gamma1, gamma - done - 1)
            verdicts = torch.rand(drafted, generator=chance) < acceptance
            done += 1 + int(verdicts.long().cumprod(0).sum())
    assert rounds(gamma, gamma1, acceptance) == pytest.approx(total / runs, rel=0.03)


def test_a_round_adds_up():
    timing = RoundTime(pass_s=2.0, step_s=0.02, draft_s=0.01, steps=10, tokens=8)
    assert timing.ms_per_token == pytest.approx(1e3 * 2.3 / 8)


def test_roofline():
    speeds = Speeds(1000, 100, memory_share=0.8, flops_share=0.5)
    assert speeds.seconds(8e9) == pytest.approx(0.01)
    assert speeds.seconds(8e9, 1e12) == pytest.approx(0.02)


def test_128k_of_32_layers_is_predicted_in_a_moment():
    plan = TilePlan(32, 32, 128, 2, tile_tokens=512, tiles=256, ring=16, resident=0.07)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        predict_pass(plan, 255, LinkSpeed(25.0), PassWork((1e-4,) * 33, 2e-5))
        best = min(best, time.perf_counter() - started)
    assert best < 0.2
