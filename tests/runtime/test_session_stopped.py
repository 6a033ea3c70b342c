"""A prefill that is stopped anywhere goes on there, and what comes of it is bit for bit what it would have been."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import cache

import pytest
import torch

from offload_triforce.config import Settings, replace_settings
from offload_triforce.errors import InputError, MemoryLimitError
from offload_triforce.model.adapter import attached
from offload_triforce.model.layer_view import LayerView
from offload_triforce.model.layers import layers_of
from offload_triforce.model.layout import probe
from offload_triforce.planner import sizes
from offload_triforce.runtime.held import HeldText, KVShape
from offload_triforce.runtime.ids import common_prefix
from offload_triforce.runtime.prefix import Start
from offload_triforce.runtime.runtime import PREFILL_QUERIES, Runtime
from offload_triforce.runtime.session import Session
from offload_triforce.runtime.session_check import verify_text
from offload_triforce.runtime.session_folder import load_manifest
from offload_triforce.scheduler.states import DeviceStates
from tests.runtime import test_pipeline_exact as pipeline
from tests.runtime.saved_texts import check_same, reopen, save
from tests.scheduler.devices import EagerDevice, LateDevice, chaotic
from tests.tiny import prompt_ids, tiny_model

SETTINGS = replace_settings(pipeline.SETTINGS, {"tile": 4})
GROUP, TEXT = 40, prompt_ids(72)[0]  # a group of four chunks, and one of three
FAMILIES = ("llama", "gemma3", "qwen3.5", "qwen3-moe", "gemma4-shared", "gpt-oss")


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch):
    monkeypatch.setattr(sizes, "GROUP", GROUP)
    monkeypatch.setattr(sizes, "MARKED_GROUP", GROUP)


@cache
def model_of(family):
    model = tiny_model(family)
    return model, probe(model)


class Steps:
    """Progress of a prefill, stopped when so many steps are through; counts what was computed."""

    def __init__(self, stop=None):
        self.stop, self.seen = stop, []

    def __call__(self, done, total):
        self.seen.append((done, total))
        if len(self.seen) == self.stop:
            raise KeyboardInterrupt


@contextlib.contextmanager
def session_of(family, device=None, **changes):
    model, layout = model_of(family)
    settings = Settings(**{**vars(SETTINGS), **changes})
    runtime = Runtime(model, layout, settings, 160, device=device or EagerDevice(), keep_hidden=True)
    try:
        with attached(model), torch.no_grad():
            yield Session(runtime, keep=True)
    finally:
        runtime.close()


def contents(session):
    """All that caches hold of a text."""
    caches = session.runtime.caches
    caches.still()
    snapshot = caches.snapshot()
    if caches.retrieval is not None:  # slots that are not in use hold anything
        snapshot["retrieval.chunks"] = caches.retrieval.store.kv[..., : caches.retrieval.filled, :, :].clone()
    del snapshot["hidden.rows"], snapshot["hidden.numbers"]  # not all of its memory is in use
    hidden = caches.hidden
    snapshot["hidden"] = hidden.rows(range(hidden.oldest, hidden.length)).clone()
    if caches.full is not None:
        count = len(session.ids)
        snapshot |= {
            f"kv {i}": caches.full.copy_out(i, 0, count).clone() for i in range(caches.full.stream.plan.layers)
        }
    return {"ids": session.ids.clone(), **snapshot}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def plain(family, *prompts, **changes):
    """What is held after these prompts, none of which was stopped; and the steps of the last."""
    with session_of(family, **changes) as session:
        for prompt in prompts:
            steps = Steps()
            session.prepare(prompt, steps)
        return contents(session), steps.seen


def stop(session, prompt, after):
    """Read a prompt until so many steps are through."""
    steps = Steps(after)
    with pytest.raises(KeyboardInterrupt):
        session.prepare(prompt, steps)
    assert len(steps.seen) == after
    return steps.seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", [{}, {"hidden_states": "host"}], ids=["device", "host"])  # all of them; some
def test_every_step_is_computed_once(family, changes):
    """Stopped after each step there is: of each chunk, in each layer, in both groups."""
    expected, whole = plain(family, TEXT, **changes)
    with session_of(family, **changes) as session:
        for after in range(1, len(whole), 3 if changes else 1):
            before, rest = stop(session, TEXT, after), Steps()
            session.prepare(TEXT, rest)
            assert missing(before + rest.seen) == missing(whole)
            assert_same(contents(session), expected)
            assert session.part is None
            session.forget()


def missing(seen):
    """Steps that were still to be computed after each one: the same, however often it was stopped."""
    return [total - done for done, total in seen]


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3.5"])
def test_stopped_again_and_again(family):
    """Every three steps; and an interruption before the first new step loses nothing."""
    expected, whole = plain(family, TEXT)
    with session_of(family) as session:
        for _ in range(3, len(whole), 3):
            stop(session, TEXT, 3)
            assert session.runtime.caches.length in (0, GROUP)
            part = session.part
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(LayerView, "put_back", _interrupted)
                patch.setattr(LayerView, "begin", _interrupted)
                with pytest.raises(KeyboardInterrupt):
                    session.prepare(TEXT)
            assert session.part is part
        rest = Steps()
        session.prepare(TEXT, rest)
        assert 0 < len(rest.seen) <= 3
        assert_same(contents(session), expected)


def _interrupted(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3.5"])
@pytest.mark.parametrize(
    "changes", [{"resident": 0.7, "prefill_resident": 0.2}, {"hidden_states": "host"}], ids=["late", "host"]
)
def test_under_adversarial_delays(family, changes, seed):
    expected, whole = plain(family, TEXT, **changes)
    device = LateDevice() if seed is None else chaotic(seed, longest_ms=0.3)
    with session_of(family, device, **changes) as session:
        for after in range(5 + (seed or 0), len(whole), 6):
            session.prepare(prompt_ids(72, seed=8)[0])  # what lies about is not this text's
            session.forget()
            stop(session, TEXT, after)
            session.prepare(TEXT)
            assert_same(contents(session), expected)
            session.forget()


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3.5"])
def test_a_longer_prompt_goes_on_too(family):
    """Behind the group as it was cut, as after a prompt that was read to its end."""
    expected, whole = plain(family, TEXT[:30], TEXT)
    layers = len(model_of(family)[1].layers)
    with session_of(family) as session:
        for after in (1, 4, 3 * layers):
            stop(session, TEXT[:30], after)
            rest = Steps()
            assert session.prepare(TEXT, rest) == Start(0, None, max(1, after * 13 // layers))
            assert missing(rest.seen)[3 * layers - after :] == missing(whole)
            assert_same(contents(session), expected)
            session.forget()


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3.5"])
@pytest.mark.parametrize("held", [0, 25])
def test_another_prompt_finds_what_was_held_before(family, held):
    """One that parts within the group, or ends there, drops the part, as if it had never been begun; where all that is
    kept can be cut, it goes on with the whole chunks that both begin with."""
    first = [TEXT[:held]] if held else []
    parting = [torch.cat([TEXT[:same], TEXT[:40]]) for same in (held + 38, held + 1, 20)]
    for prompt in (*parting, TEXT[: held + 39], TEXT[: held + 10]):
        same = common_prefix(prompt, TEXT) - max(0, held - 1)
        chunks = max(0, min(same, len(prompt) - max(1, held) - PREFILL_QUERIES)) // 13 if family == "llama" else 0
        cut = [TEXT[: max(0, held - 1) + 13 * chunks + 1]] if chunks else []
        expected, whole = plain(family, *first, *cut, prompt)
        with session_of(family) as session:
            for each in first:
                session.prepare(each)
            stop(session, TEXT, 6)
            rest = Steps()
            session.prepare(prompt, rest)
            done = min(4, chunks) + min(2, chunks)  # four through the first layer, two through the second
            assert missing(rest.seen)[3 * chunks - done if chunks else 0 :] == missing(whole)
            assert_same(contents(session), expected)
            assert session.part is None


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3.5"])
@pytest.mark.parametrize("held", [0, 25])
def test_a_part_is_parked_with_its_text(family, held):
    """And taken back into caches that have held another text since."""
    first = [TEXT[:held]] if held else []
    expected, whole = plain(family, *first, TEXT)
    expected.pop("hidden")  # those of a text that was parked are not known any more
    with session_of(family) as session:
        for each in first:
            session.prepare(each)
        before = stop(session, TEXT, 7)
        parked = HeldText.copy(session.source())
        session.prepare(prompt_ids(90, seed=3)[0])
        assert_taken_up(session, parked, before, whole, expected)


def assert_taken_up(session, parked, before, whole, expected):
    """A text that was stopped after the steps ``before`` is taken into the caches, and read to its end as if never."""
    checkpoint = parked.checkpoints[-1] if parked.checkpoints else None
    session.take(parked, Start(len(parked.tokens), checkpoint, session.part_worth(parked.part)))
    rest = Steps()
    session.prepare(TEXT, rest)
    assert missing(before + rest.seen) == missing(whole)
    found = contents(session)
    assert_same({name: found[name] for name in expected}, expected)


def struck(session, prompt, calls, where):
    """Interrupted at the call of that number of what ``where`` replaces; returns whether it came to that."""
    count = 0

    def strike():
        nonlocal count
        count += 1
        if count == calls:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        where(session, patch, strike)
        try:
            session.prepare(prompt)
        except KeyboardInterrupt:
            return True
    return False


def _before_or_after(patch, owner, name, strike, after):
    own = getattr(owner, name)

    def watched(*args, **kwargs):
        if after:
            made = own(*args, **kwargs)
            strike()
            return made
        strike()
        return own(*args, **kwargs)

    patch.setattr(owner, name, watched)


def in_a_layer(session, patch, strike):
    for layer in layers_of(session.runtime.model.get_decoder()):
        _before_or_after(patch, layer.mlp, "forward", strike, after=True)


def behind_an_attention(session, patch, strike):
    _before_or_after(patch, LayerView, "attend", strike, after=True)


def as_a_layer_is_handed_on(session, patch, strike):
    _before_or_after(patch, session.runtime.caches, "fill", strike, after=False)


def behind_a_layer_that_was_handed_on(session, patch, strike):
    _before_or_after(patch, session.runtime.caches, "fill", strike, after=True)


def as_a_group_ends(session, patch, strike):
    _before_or_after(patch, session.runtime.caches, "end_fill", strike, after=False)


PLACES = (in_a_layer, behind_an_attention, as_a_layer_is_handed_on, behind_a_layer_that_was_handed_on, as_a_group_ends)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3.5"])
@pytest.mark.parametrize("where", PLACES)
def test_interrupted_within_a_step(family, where):
    """Between any two steps of the computation, as Ctrl-C is: no step is lost but the one that it strikes."""
    expected, whole = plain(family, TEXT)
    with session_of(family) as session:
        for calls in range(1, len(whole) + 1, 2 if where in (as_a_layer_is_handed_on, as_a_group_ends) else 5):
            if not struck(session, TEXT, calls, where):
                break
            rest = Steps()
            session.prepare(TEXT, rest)
            if where is in_a_layer:
                assert missing(rest.seen) == missing(whole)[calls - 1 :]
            assert_same(contents(session), expected)
            session.forget()


@pytest.mark.parametrize("after", [False, True])
def test_what_is_struck_between_two_changes_of_one_step_is_read_again(after):
    """Hidden states that are those of the next step already, or may be, are not those of this one."""

    def as_it_is_put(session, patch, strike):
        _before_or_after(patch, DeviceStates, "put", strike, after)

    expected, whole = plain("llama", TEXT)
    with session_of("llama") as session:
        assert struck(session, TEXT, 4 + 6, as_it_is_put)
        assert session.part is None
        rest = Steps()
        session.prepare(TEXT, rest)
        assert rest.seen == whole
        assert_same(contents(session), expected)


def test_a_layer_that_changes_its_input_is_not_stopped_in_its_middle():
    """It is not known then what there was."""

    def in_place(session, patch, strike):
        for layer in layers_of(session.runtime.model.get_decoder()):
            own = layer.forward

            def changed(hidden_states, *args, own=own, **kwargs):
                if "triforce" in kwargs and len(hidden_states[0]) == 13:
                    hidden_states.add_(0.0)
                strike()
                return own(hidden_states, *args, **kwargs)

            patch.setattr(layer, "forward", changed)

    with session_of("llama") as session:
        assert struck(session, TEXT, 4 * 3 + 8, in_place)
        assert session.part is None


def test_a_fault_is_no_stop(monkeypatch):
    """What it leaves is not trusted."""
    with session_of("llama") as session:
        monkeypatch.setattr(LayerView, "halted", lambda self: pytest.fail("asked"))
        _before_or_after(monkeypatch, DeviceStates, "take", _fault(), after=True)
        with pytest.raises(RuntimeError, match="a fault"):
            session.prepare(TEXT)
        assert session.part is None


def test_a_part_that_cannot_be_gone_on_with_is_tried_once():
    """Whatever it is that is wrong with it, the prompt is read anew the next time."""
    expected, _ = plain("llama", TEXT)
    with session_of("llama") as session:
        stop(session, TEXT, 7)
        assert session.part is not None
        with pytest.MonkeyPatch.context() as patch:
            _before_or_after(patch, DeviceStates, "take", _fault(), after=True)
            with pytest.raises(RuntimeError, match="a fault"):
                session.prepare(TEXT)
        assert session.part is None
        session.prepare(TEXT)
        assert_same(contents(session), expected)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", ["begin_fill", "restore"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_no_part_follows_a_text_that_is_gone(family, name, again):
    """Struck as the caches change: before a group, or as they are rolled back after it was stopped."""
    with session_of(family) as session:
        session.prepare(TEXT[:26])
        if again:
            stop(session, TEXT, 7)
            assert session.part.held == 25

        def where(session, patch, strike):
            _before_or_after(patch, session.runtime.caches.full, name, strike, after=True)
            if name == "restore":
                patch.setattr(LayerView, "settle", _interrupted)

        assert struck(session, TEXT, 1, where)
        assert session.part is None or session.part.held == len(session.ids)
        assert session.worth >= len(session.ids)
        if not session.runtime.caches.whole:
            assert (session.worth, session.part) == (0, None)
        expected, _ = plain(family, TEXT)
        session.prepare(TEXT)
        found = contents(session)
        assert_same({key: found[key] for key in expected}, expected)


def _fault():
    calls = iter([None] * 5)

    def strike():
        if next(calls, 0) == 0:
            raise RuntimeError("a fault")

    return strike


def test_where_memory_is_short_nothing_is_kept():
    asked = []
    with session_of("llama") as session:
        session.room = lambda size: asked.append(size) or len(asked) > 2
        for _ in range(2):
            stop(session, TEXT, 7)
            assert session.part is None
        stop(session, TEXT, 7)
        assert session.part.size <= asked[-1] <= 2 * session.part.size
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(session.runtime.caches, "land_fill", _refused)
            session.room = lambda size: True
            kept = session.part
            stop(session, TEXT, 3)
            assert session.part is kept


def _refused():
    raise MemoryLimitError("no")


def _one_chunk_late(part):
    return replace(part, done=part.done + 1)


def _one_chunk_early(part):
    return replace(part, done=part.done - 1)


def _one_layer_late(part):
    return changed(replace(part, layer=part.layer + 1), **{"kv.2": part.tensors["kv.1"]}, of="1", to="2")


def _a_stale_state(part):
    """Of the first chunk, as if it had not come through the layer."""
    states = part.tensors["states"].clone()
    states[:13] = states[13:26]
    return changed(part, states=states)


def _a_layer_that_is_not_its_own(part):
    return changed(part, **{"kv.0": part.tensors["kv.0"].flip(2)})


def _other_queries(part):
    return changed(part, **{"queries.0": part.tensors["queries.0"].flip(0)})


def changed(part, of=None, to=None, **tensors):
    more = {n.replace(f".{of}", f".{to}"): tensor for n, tensor in part.tensors.items() if n.endswith(f".{of}")}
    return replace(part, tensors={**part.tensors, **more, **tensors})


MUTATIONS = (_one_chunk_late, _one_chunk_early, _one_layer_late, _a_stale_state, _a_layer_that_is_not_its_own)


@pytest.mark.parametrize("mutation", [*MUTATIONS, _other_queries])
def test_a_wrong_place_shows(mutation):
    expected, _ = plain("llama", TEXT)
    with session_of("llama") as session:
        stop(session, TEXT, 4 * 3 + 3 + 2)  # two of three chunks are through the second layer
        session._part = mutation(session.part)
        try:
            session.prepare(TEXT)
        except (RuntimeError, IndexError):
            return
        with pytest.raises(AssertionError):
            assert_same(contents(session), expected)


def test_a_step_that_was_struck_must_not_count(monkeypatch):
    """Were its keys and values counted where the layer was stopped, those of its chunk would be there twice."""

    def unmarked(self):
        self._settled = self.length, self.queries, self.state, self.tail
        return halted(self)

    halted, (expected, _) = LayerView.halted, plain("llama", TEXT)
    monkeypatch.setattr(LayerView, "halted", unmarked)
    with session_of("llama") as session:
        assert struck(session, TEXT, 4 + 3, behind_an_attention)
        try:
            session.prepare(TEXT)
        except (RuntimeError, IndexError):
            return
        with pytest.raises(AssertionError):
            assert_same(contents(session), expected)


@pytest.mark.parametrize(("family", "tokens", "after"), [("gemma3", 72, 4 * 3 + 3 * 2 + 1), ("llama", 10, 2)])
def test_copies_are_of_memory_of_their_own(family, tokens, after):
    """A part holds nothing of the caches, which go on with other texts. A short one lies in the tail alone."""
    with session_of(family) as session:
        stop(session, TEXT[:tokens], after)
        part = session.part
        kept = {name: tensor.clone() for name, tensor in part.tensors.items()}
        session.prepare(prompt_ids(100, seed=5)[0])
        assert_same(part.tensors, kept)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3.5", "gemma4-shared", "gpt-oss"])
@pytest.mark.parametrize("held", [0, 25])
def test_a_part_lies_on_disk_with_its_text(family, held, tmp_path):
    """And what is saved when it has been read leaves nothing of it there."""
    first = [TEXT[:held]] if held else []
    expected, whole = plain(family, *first, TEXT)
    expected.pop("hidden")
    shape = KVShape.of(model_of(family)[1])
    with session_of(family) as session:
        for each in first:
            session.prepare(each)
        before = stop(session, TEXT, 7)
        parked = HeldText.copy(session.source())
        save(tmp_path / "s", session.source())
    assert verify_text(tmp_path / "s").length == max(0, held - 1)
    found = reopen(tmp_path / "s", parked)
    check_same(found, parked)
    with session_of(family) as session:
        assert_taken_up(session, found, before, whole, expected)
        save(tmp_path / "s", session.source())
    assert load_manifest(tmp_path / "s").part is None
    assert not list((tmp_path / "s").glob("part-*"))
    assert shape == found.shape


def _without(name):
    return lambda tensors: {n: tensor for n, tensor in tensors.items() if n != name}


WRONG = {
    "a layer missing": _without("kv.0"),
    "no hidden states": _without("states"),
    "of another width": lambda tensors: {**tensors, "states": tensors["states"][:, 1:]},
    "of fewer tokens": lambda tensors: {**tensors, "kv.0": tensors["kv.0"][:, :, 1:]},
    "a layer too many": lambda tensors: {**tensors, "kv.9": tensors["kv.0"]},
    "handed on, where no layer asks": lambda tensors: {**tensors, "handed.99999999.a.0": torch.zeros(0)},
    "a drafter's without its numbers": lambda tensors: {**tensors, "hidden.rows": torch.zeros(2, 2)},
    "whole numbers": lambda tensors: {**tensors, "kv.0": tensors["kv.0"].int()},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_part_of_something_else_is_refused(wrong):
    """Whatever its checksums say: before anything is done with it."""
    with session_of("llama") as session:
        stop(session, TEXT, 7)
        parked = HeldText.copy(session.source())
        parked.part = replace(parked.part, tensors=WRONG[wrong](parked.part.tensors))
        with pytest.raises(InputError, match=r"^what was read in part of 40 tokens is not of this model \("):
            session.take(parked, Start(0, None, 1))
        for place in ({"layer": 3, "done": 1}, {"layer": 9}, {"done": 5}, {"layer": 0, "done": 0}):
            parked.part = replace(session.part or parked.part, **place)
            with pytest.raises(InputError):
                session.take(parked, Start(0, None, 1))
