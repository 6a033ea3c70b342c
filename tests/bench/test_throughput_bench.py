"""``bench throughput``: what it counts is right, what it emulates says so, and mistakes are told before the work."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from offload_triforce import cli
from offload_triforce.bench import answering, stage, throughput
from offload_triforce.bench.answering import Case, Read
from offload_triforce.bench.ballast import BallastDevice, drag
from offload_triforce.bench.contenders import (
    OURS,
    WAYS,
    Outcome,
    _beside_link,
    answer_ours,
    settings_for,
    streamed_bytes,
)
from offload_triforce.bench.slow_motion import card_pass, compare
from offload_triforce.config import Settings, replace_settings
from offload_triforce.engine import TriForce
from offload_triforce.errors import InputError, MemoryLimitError, TriForceError
from offload_triforce.machine.hardware import Machine
from offload_triforce.model.layout import probe
from offload_triforce.model.shape import shape_of_loaded
from offload_triforce.planner.predict import resident_step
from offload_triforce.scheduler.emulated import EmulatedDevice
from offload_triforce.scheduler.simulate import Speeds
from tests.byte_tokenizer import save_tiny_llama
from tests.scheduler.fake_cuda import FakeCuda, FakeCudaDevice
from tests.scheduler.test_chaos import EXPECTED, KINDS, run
from tests.tiny import greedy, prompt_ids, tiny_model

pytestmark = pytest.mark.xdist_group("throughput")  # by one worker: what was measured is for several tests
NEW = 12
FIGURES = {"ms_per_token", "tokens_per_s", "ttft_s", "tokens_per_pass", "host_peak_bytes", "device_peak_bytes"}


def call(*arguments):
    return CliRunner().invoke(cli.app, ["bench", "throughput", *map(str, arguments)])


@pytest.fixture(scope="module", autouse=True)
def no_gpu():
    """These tests are about machines without one, and about stand-ins."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tokens are bytes; more of them than there are bytes, for steps are timed with numbers up to 1000."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"), vocab_size=1000)


@pytest.fixture(scope="module")
def measured(folder, tmp_path_factory):
    """Two contexts behind a link of 0.5 GB/s: the report, and where it was kept and drawn."""
    place = tmp_path_factory.mktemp("out")
    files = ["--out", place / "t.json", "--png", place / "t.png"]
    result = call(
        "--model",
        folder,
        "--context",
        300,
        "--context",
        700,
        "--new-tokens",
        NEW,
        "--link",
        "0.5GB/s",
        "--json",
        *files,
    )
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), place


def test_report(measured):
    report, place = measured
    assert {"machine", "emulated", "rows", "limits", "notes", "link", "dtype"} <= set(report)
    assert report["emulated"] is None
    assert report["link"] == {"gbps": 0.5, "what": "emulated"}
    assert [(row["context"], row["way"]) for row in report["rows"]] == [(c, w) for c in (300, 700) for w in WAYS]
    for row in report["rows"]:
        if row["skipped"]:
            assert not FIGURES & set(row), "no figure without a measurement"
            continue
        assert set(row) >= FIGURES
        assert row["new_tokens"] == NEW
        assert row["tokens_per_s"] == pytest.approx(1e3 / row["ms_per_token"])
        assert row["ttft_s"] >= row["prefill_s"] > 0
        assert row["card_ms_per_token"] is None
    assert json.loads((place / "t.json").read_text()) == report
    assert (place / "t.png").read_bytes().startswith(b"\x89PNG")


def test_all_say_the_same(measured):
    rows = [row for row in measured[0]["rows"] if not row["skipped"]]
    assert [row["way"] for row in rows] == [*OURS, "transformers-cpu"] * 2
    assert all(row["differs_at"] is None for row in rows)


def test_bytes_of_plain_decoding(measured):
    """By hand: 2 layers, K and V, 2 heads of 16, 4 bytes: 512 a token. 73 tokens stay on the device.

    Prompts are the text, 2 line feeds and a question of 50 letters: 351 and 751 tokens are held. A quarter of 364 and
    764 tokens, as a power of two, makes tiles of 64 and 128.
    """
    report = measured[0]
    expected = [(351 - 73) // 64 * 64 * 512, (751 - 73) // 128 * 128 * 512]
    plain = [row for row in report["rows"] if row["way"] == "plain"]
    assert [row["prompt_tokens"] for row in plain] == [352, 752]
    assert [limit["bytes"] for limit in report["limits"]] == expected
    assert [limit["ms_per_token"] for limit in report["limits"]] == pytest.approx([b / 0.5e9 * 1e3 for b in expected])
    for row, size in zip(plain, expected, strict=True):
        assert (row["passes"], row["tokens_per_pass"]) == (NEW, 1.0)
        assert row["link_bytes_per_token"] == size
        assert row["limit_ms_per_token"] == pytest.approx(size / 0.5e9 * 1e3)
        assert row["link_gbps"] == pytest.approx(size / row["ms_per_token"] / 1e6)
        assert row["link_gbps"] <= 0.5


def test_nothing_claims_a_gpu(measured):
    report = measured[0]
    assert report["device"] == "cpu"
    assert "gpu" not in report["machine"]
    assert all(row.get("device_peak_bytes") is None for row in report["rows"])
    offloaded = [row for row in report["rows"] if row["way"] == "transformers-offloaded"]
    assert all("there is none here" in row["skipped"] for row in offloaded)


def test_a_card_in_slow_motion(folder, tmp_path):
    """Whatever the clock says, proportions hold, and every output says what it is."""
    arguments = ["--model", folder, "--context", 300, "--new-tokens", 4, "--ways", "plain", "--emulate", "rtx 4090"]
    out = tmp_path / "t.json"
    result = call(*arguments, "--out", out)
    assert result.exit_code == 0, result.stderr
    report = json.loads(out.read_text())
    slow, (row,), (limit,) = report["emulated"], report["rows"], report["limits"]
    assert (slow["card"], slow["card_link_gbps"]) == ("RTX 4090", 25)
    assert slow["link_gbps"] == pytest.approx(25 / slow["factor"])
    took, card = slow["measured_ms"], slow["card_ms"]
    assert slow["factor"] == pytest.approx(max(took[work] / card[work] for work in took))
    assert report["link"]["gbps"] == slow["link_gbps"]
    assert row["card_ms_per_token"] == pytest.approx(row["ms_per_token"] / slow["factor"])
    assert limit["card_ms_per_token"] == pytest.approx(limit["bytes"] / 25e9 * 1e3)
    assert limit["ms_per_token"] == pytest.approx(limit["card_ms_per_token"] * slow["factor"])
    fitted = {f"step of {n}" for n in ("1 token", "12 tokens")}
    fitted |= {f"pass of {n}" for n in ("1 token", "13 tokens", "193 tokens")}
    assert set(took) == set(card) == fitted
    assert set(slow["proportions"]) == fitted | {"step of 6 tokens", "pass of 48 tokens"}
    said = " ".join(result.stdout.split())
    assert "RTX 4090 EMULATED in slow motion" in said
    assert "not measured on that card" in said
    assert "emulated, not measured on the RTX 4090" in said
    assert f"{slow['factor']:,.1f} times slower" in said


LAYER, HEAD = 24_704, 259 * 64  # parameters: 4 projections of 64x64 and 64x32, 3 of 64x64, 2 norms; output embedding


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    model = TriForce.load(str(save_tiny_llama(tmp_path_factory.mktemp("bytes"))), device="cpu").model
    return shape_of_loaded(model, probe(model))


def test_factor_by_hand(shape):
    """A card of 100 GB/s behind 10 GB/s. A step reads the head and, twice, weights, 80 tokens and 4 chunks of 8."""
    machine, settings = Machine("made up", 0, 10.0, Speeds(100, 1e9, 1.0, 1.0)), Settings(budget=104, bits=16)
    step = (2 * (4 * LAYER + 80 * 256 + 2 * 4 * 2 * 8 * 16 * 4) + 4 * HEAD) / 100e9
    passing = (2 * (4 * LAYER + 1.5 * 1000 * 256) + 4 * HEAD) / 100e9
    took = {("step", 1): 500 * step, ("step", 12): 1000 * step, ("pass", 1): 250 * passing}
    slow = compare(took, shape, machine, settings, 1000)
    assert slow.factor == pytest.approx(1000)
    assert slow.widest == ("step", 12)
    assert slow.gbps == pytest.approx(10 / 1000)
    expected = {("step", 1): 500 * step, ("step", 12): 0.0, ("pass", 1): 750 * passing}
    assert slow.pauses == pytest.approx(expected, abs=1e-12)


def test_a_card_bound_by_its_flops(shape):
    """4 heads of 16: two products with each key, and half as many again to score; two for each parameter."""
    speeds, settings = Speeds(1e9, 1.0, 1.0, 1.0), Settings(budget=104)
    products = 2 * (2 * LAYER + HEAD) * 7 / 1e12
    attention = 2 * 1.5 * 4 * 4 * 16 * 1000 * 7 / 1e12
    assert card_pass(shape, settings, 1000, speeds, 7) == pytest.approx(products + attention)
    assert resident_step(shape, settings, 1000, speeds, 7) == pytest.approx(products, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3"])
def test_our_ways_decode_what_the_model_says(family):
    model, prompt = tiny_model(family), prompt_ids(300)
    engine, case = TriForce(model), Case(prompt[0].tolist(), NEW)
    read, expected = Read.of(engine, case.prompt), greedy(model, prompt, NEW)
    for way in OURS:
        for given in (read, None):  # read once for all, or by each for itself
            found = answer_ours(engine, way, case, given, lambda: EmulatedDevice(5.0))
            assert found.tokens == expected, way
            assert found.figures["new_tokens"] == NEW
    if family == "llama":  # read.size: 3 layers, K and V, one head of 12, 4 bytes, 299 tokens
        assert read.size == 3 * 2 * 12 * 4 * 299


def test_a_device_is_closed_where_the_caches_do_not_fit(monkeypatch):
    """It may hold pinned memory, which must not be freed before CUDA has let go of it."""
    model = tiny_model("llama")
    devices = []

    class Device(EmulatedDevice):
        def __init__(self):
            super().__init__(5.0)
            self.closed = False
            devices.append(self)

        def close(self):
            super().close()
            self.closed = True

    monkeypatch.setattr("offload_triforce.planner.sizes.free_on_host", lambda: 0)
    with pytest.raises(MemoryLimitError):
        answer_ours(TriForce(model), "plain", Case(prompt_ids(300)[0].tolist(), NEW), None, Device)
    assert [device.closed for device in devices] == [True]


def test_on_a_card_the_rest_of_it_is_filled(monkeypatch):
    """What the engine would choose is what the ways are run with, and what the limit is reckoned from."""
    engine = TriForce(tiny_model("llama"))
    case = Case(prompt_ids(700)[0].tolist(), NEW)
    full = answer_ours(engine, "plain", case, None, lambda: EmulatedDevice(5.0)).figures
    limit = streamed_bytes(engine, case.capacity, len(case.prompt) - 1)
    assert full["link_bytes_per_token"] == limit

    def half(model, layout, settings, context):
        return replace_settings(settings, {"resident": 0.5})

    monkeypatch.setattr("offload_triforce.bench.contenders.choose_for_loaded", half)
    filled = answer_ours(engine, "plain", case, None, lambda: EmulatedDevice(5.0)).figures
    assert (full["resident"], filled["resident"]) == (0.0, 0.5)
    less = streamed_bytes(engine, case.capacity, len(case.prompt) - 1)
    assert filled["link_bytes_per_token"] == less < 0.65 * limit


@pytest.mark.parametrize("gamma", [0, 8])
def test_on_cuda_every_shape_of_a_step_is_warmed_up(gamma, monkeypatch):
    """A capture in the middle of what is timed would take as long as many tokens."""
    engine, scored, answered = TriForce(tiny_model("llama"), draft="none"), [], []
    runtime = engine._texts.ensure(300).runtime

    class Level:
        def __init__(self, *_):
            self.pending = 0

        def score(self, nodes, before):
            assert not self.pending
            self.pending = len(nodes)
            scored.append(len(nodes))

        def keep(self, kept):
            self.pending = len(kept)

    monkeypatch.setattr(answering, "RetrievalLevel", Level)
    monkeypatch.setattr(answering, "on", lambda device: nullcontext())
    settings = Settings(gamma=gamma, width=3, gamma1=2)
    here = SimpleNamespace(model=engine.model, caches=runtime.caches, graphs=None, settings=settings)
    here.layout = SimpleNamespace(device=torch.device("cuda"))
    work = SimpleNamespace(
        session=SimpleNamespace(runtime=here),
        case=Case(list(range(20)), NEW),
        answer=lambda *asked: answered.append(asked),
    )
    answering._warm_up(work)
    assert scored == ([n for n in range(1, 6) for _ in range(3)] if gamma else [])
    assert answered == [()], "and then the whole answer"
    engine.close()


def test_settings():
    """Head dimension 128. 8192 tokens in 4 bits are 1015 chunks of 1312 bytes, or 325 of 4096; the paper takes 4096."""
    layout = SimpleNamespace(full=[0], attention=[SimpleNamespace(head_dim=128)])
    assert settings_for("plain", layout, 131_072) == Settings(gamma=0)
    assert settings_for("best", layout, 131_072) == Settings()
    assert settings_for("triforce", layout, 131_072) == Settings.triforce(budget=4096)
    # 1000 tokens in 4 bits are 116 chunks, or 37 in 16: more than the paper's share of 125 tokens.
    assert settings_for("triforce", layout, 4000) == Settings.triforce(budget=72 + 37 * 8)
    assert settings_for("triforce", layout, 100) == Settings.triforce(budget=80)


def test_prefill_beside_a_slow_link():
    """By hand: two layers of 1 s each, whose KV takes 3 s: 1, then 3 beside which the second waits, 1 and 3."""
    layers = [SimpleNamespace(kv=torch.zeros(3000, dtype=torch.uint8))] * 2
    read = Read(SimpleNamespace(layers=layers, tokens=range(500)), 2.0)
    device = SimpleNamespace(gbps=1e-6)
    runtime = SimpleNamespace(device=device, layout=SimpleNamespace(full=[0, 1]), settings=Settings())
    assert _beside_link(read, runtime) == pytest.approx(8.0)
    device.gbps = None
    assert _beside_link(read, runtime) == 2.0


def test_our_ways_must_agree():
    here = SimpleNamespace(engine=SimpleNamespace(layout=SimpleNamespace(dtype=torch.float32)), gbps=None, slow=None)
    throughput._judge(here, {"plain": [1, 2, 3], "best": [1, 2, 3]})
    with pytest.raises(TriForceError, match="best and plain differ from new token 1 on"):
        throughput._judge(here, {"plain": [1, 2, 3], "best": [1, 9, 3]})
    here.engine.layout.dtype = torch.bfloat16  # a near tie may turn
    throughput._judge(here, {"plain": [1, 2, 3], "best": [1, 9, 3]})
    found = throughput._compared(here, Outcome([1, 9], {"ms_per_token": 1.0}), [1, 2])
    assert found == {"limit_ms_per_token": None, "card_ms_per_token": None, "differs_at": 1}
    assert throughput._difference([1, 2], [1, 2, 3]) == 2


def test_a_mismatch_ends_the_command(folder, monkeypatch):
    answer = throughput.answer_ours

    def wrong(engine, way, *rest):
        found = answer(engine, way, *rest)
        return Outcome([*found.tokens[:-1], 0], found.figures) if way == "best" else found

    monkeypatch.setattr(throughput, "answer_ours", wrong)
    result = call("--model", folder, "--context", 300, "--new-tokens", 4, "--ways", "plain", "--ways", "best")
    assert result.exit_code == 2
    assert "best and plain differ from new token 3 on" in result.stderr


def test_what_does_not_fit_is_skipped(folder, monkeypatch):
    monkeypatch.setattr(throughput, "free_on_host", lambda: 1000)
    result = call("--model", folder, "--context", 300, "--ways", "transformers-cpu", "--json")
    assert result.exit_code == 0, result.stderr
    (row,) = json.loads(result.stdout)["rows"]
    assert "GB of host memory" in row["skipped"]
    assert "ms_per_token" not in row


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ways", "plain", "--ways", "vllm"], "unknown way 'vllm'; known are plain, triforce, best"),
        (["--emulate", "RTX 4O90"], "unknown card 'RTX 4O90'; nearest are RTX 4090"),
        (["--emulate", "RTX 4090", "--vram", "24GB"], "--vram caps a real card's memory"),
        (["--vram", "24GB"], "--vram caps the memory of a CUDA device, and there is none here"),
        (["--vram", "lots"], "--vram 'lots' is not a size"),
        (["--link", "fast"], "--link 'fast' is not a bandwidth"),
        (["--link", "0GB/s"], "--link"),
        (["--context", "9"], "at least 64 tokens"),
        (["--context", "5000"], "context 5,000 exceeds the model's 4,096 positions by 904"),
        (["--context", "4090"], "exceed the model's positions, 4,096"),
        (["--png", "/no/such/folder/t.png"], "the folder of /no/such/folder/t.png does not exist"),
    ],
)
def test_mistakes(folder, arguments, words):
    result = call("--model", folder, *arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr.replace("\n", " ")
    assert "reading" not in result.stderr


@pytest.fixture
def big_card(monkeypatch):
    """A stand-in for CUDA, as far as it is asked before anything runs: 80 GB, 50 GB/s in and 40 out. Returns caps."""
    caps = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 10**9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", caps.append)
    monkeypatch.setattr(stage, "link_ceiling", lambda device, size: {"h2d_gbps": 50.0, "d2h_gbps": 40.0})
    monkeypatch.setattr(stage, "free_memory", lambda: None)
    monkeypatch.setattr(stage.TriForce, "load", lambda source, draft, device: SimpleNamespace(device=device))
    return caps


def test_a_big_card_stands_in_for_a_small_one(folder, big_card):
    asked = stage.ThroughputQuery(str(folder), [300], vram=24 * 10**9, link=25.0)
    stage.check(asked)
    found = stage.set_up(asked, lambda line: None)
    assert big_card == [0.3]
    assert (found.gbps, found.link, found.h2d, found.d2h) == (25.0, "capped", 50.0, 40.0)
    assert found.engine.device == "cuda"


def test_a_card_as_it_is(folder, big_card):
    found = stage.set_up(stage.ThroughputQuery(str(folder), [300]), lambda line: None)
    assert (found.gbps, found.link, found.h2d) == (50.0, "measured", 0.0)
    assert big_card == []
    emulated = stage.set_up(stage.ThroughputQuery(str(folder), [300], card="RTX 4090"), lambda line: None)
    assert (emulated.engine.device, emulated.h2d) == ("cpu", 0.0)


def test_a_small_card_does_not_stand_in_for_a_big_one(folder, big_card):
    with pytest.raises(InputError, match=r"--vram 96\.0GB is more than the card's 80\.0GB"):
        stage.check(stage.ThroughputQuery(str(folder), vram=96 * 10**9))
    with pytest.raises(InputError, match=r"--link 60GB/s is more than the 50\.0 GB/s that this link gives"):
        stage.set_up(stage.ThroughputQuery(str(folder), [300], link=60.0), lambda line: None)


class FakeBallastDevice(FakeCudaDevice, BallastDevice):
    """A link of 20 GB/s in and 10 out, slowed to 5."""

    def __init__(self, cuda):
        self.cuda = cuda
        BallastDevice.__init__(self, torch.device("cpu"), 5.0, 20.0, 10.0)

    def _pin(self, buffer):
        self.pinned = True

    def _unpin(self, buffer):
        self.pinned = False


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_ballast_changes_no_number(monkeypatch, seed, kind):
    """In every order that streams and events allow."""
    device = FakeBallastDevice(FakeCuda(monkeypatch, seed))
    assert run(device, kind) == EXPECTED[kind]
    assert device.incoming.moved > 0
    assert device.incoming.ballast == 3 * device.incoming.moved
    assert device.outgoing.ballast == device.outgoing.moved
    device.close()
    assert not device.pinned


def test_a_copy_has_landed_when_its_ballast_has(monkeypatch):
    """16 MiB at a time: 12 MiB, and 36 MiB of ballast, are four copies."""
    cuda = FakeCuda(monkeypatch, 0)
    lane = FakeBallastDevice(cuda).incoming
    landed = lane.submit(torch.zeros(12 << 20, dtype=torch.uint8), torch.ones(12 << 20, dtype=torch.uint8))
    copies = [i for i, (_, work) in enumerate(lane._stream.queue) if "real_copy" in work.__code__.co_freevars]
    assert len(copies) == 4
    while len(lane._stream.queue) > 1:
        lane._stream.queue.pop(0)[1]()
        assert not landed.event.over
    cuda.drain()
    assert landed.event.over


def test_drag():
    assert drag(25.0, 50.0) == 1.0
    assert drag(25.0, 20.0) == 0.0
