"""A session that is saved and loaded says what one says that was never away, in full, sliding and hybrid models."""

import pytest

from offload_triforce import TriForce
from offload_triforce.errors import InputError
from offload_triforce.runtime.held import KVShape
from tests.tiny import prompt_ids, tiny_model

SMALL = {"budget": 96, "tile": 32, "draft_cache": 32}
FAMILIES = ["llama", "qwen2-sliding", "gemma3", "qwen3.5", "qwen3-moe", "mistral-sliding"]


def engine_of(family, **changes):
    return TriForce(tiny_model(family), draft="ngram", **{**SMALL, **changes})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampled", [False, True])
def test_saved_and_loaded(family, sampled, tmp_path):
    """Another engine, as in another process, goes on with it; so does a third with what that one saved."""
    options = {"max_new_tokens": 12, "seed": 3, "temperature": 0.8 if sampled else 0.0}
    first = prompt_ids(170)[0].tolist()
    with engine_of(family) as engine, engine.session() as session:
        asked = first + session.generate(first, **options).token_ids + prompt_ids(9, seed=1)[0].tolist()
        session.save(tmp_path / "s")
        held = session.tokens.tolist()
    with engine_of(family) as engine:
        wanted = engine.generate(asked, **options).token_ids
    with engine_of(family) as engine:
        assert KVShape.of(engine.layout) == engine.load_session(tmp_path / "s")._texts.pool._texts[0].parked.shape
        session = engine.load_session(tmp_path / "s")
        assert session.tokens.tolist() == held
        answer = session.generate(asked, **options)
        assert answer.token_ids == wanted
        assert answer.stats.reused_tokens >= 170 - 1
        again = asked + wanted + prompt_ids(5, seed=2)[0].tolist()
        session.save(tmp_path / "s")
    with engine_of(family) as engine:
        expected = engine.generate(again, **options).token_ids
    with engine_of(family, gamma=3, budget=128) as engine:  # other settings: the caches are of other sizes
        answer = engine.load_session(tmp_path / "s").generate(again, **options)
        assert answer.stats.reused_tokens > 170
        if not sampled:
            assert answer.token_ids == expected
        assert KVShape.of(engine.layout) == engine._texts.session.source().shape


def test_of_another_model_is_refused_and_nothing_is_read(tmp_path):
    with engine_of("llama") as engine, engine.session() as session:
        with pytest.raises(InputError, match="nothing to save"):
            session.save(tmp_path / "s")
        session.generate(prompt_ids(40)[0].tolist(), max_new_tokens=3)
        session.save(tmp_path / "s")
    with TriForce(tiny_model("llama", seed=1), **SMALL) as other, pytest.raises(InputError, match="other weights"):
        other.load_session(tmp_path / "s")
    with TriForce(tiny_model("qwen3"), **SMALL) as other, pytest.raises(InputError, match="KV heads"):
        other.load_session(tmp_path / "s")


def test_an_answer_that_was_broken_off_is_saved(tmp_path):
    prompt = prompt_ids(90)[0].tolist()
    with engine_of("qwen2-sliding") as engine:
        session = engine.session()
        with session.stream(prompt, max_new_tokens=40) as stream:
            next(iter(stream), None)
        session.save(tmp_path / "s")
    with engine_of("qwen2-sliding") as engine:
        wanted = engine.generate(prompt, max_new_tokens=20).token_ids
        answer = engine.load_session(tmp_path / "s").generate(prompt, max_new_tokens=20)
        assert answer.token_ids == wanted
