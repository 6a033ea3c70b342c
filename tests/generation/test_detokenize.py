"""Pieces of text: they make up the decoded whole wherever the answer ends, and come as soon as they can."""

import copy
import itertools
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_triforce.generation.detokenize import REPLACEMENT, Detokenizer, decode_text
from tests.tokenizer_kinds import BYTES, KINDS, SAMPLE

kind = cache(lambda name: KINDS[name]())
BYTE_KINDS = [
    "byte level",
    "byte level, merged",
    "bytes alone",
    "Llama 2",
    "Gemma",
    "Llama 2, GGUF",
    "Metaspace, bytes",
]
# Characters of several code points; accents apart from their letters; what is not text at all.
CLUSTERS = [
    "👩‍👩‍👧",
    "👍🏽",
    "🇩🇪🇫🇷",
    "e\u0301",
    "ﷺ",
    "नि",
    "สวัสดี",
    "你好",
    "a",
    " ",
    "\n",
    "    ",
    "x.",
    "don't",
    "\x00",
]
TEXTS = st.lists(st.sampled_from(CLUSTERS) | st.characters(exclude_categories=["Cs"]), max_size=8).map("".join)


def pieces(tokenizer, ids, sizes):
    """The pieces of a stream in which the passes bring so many tokens; every place in it is tried as its end."""
    spell, out, at = Detokenizer(tokenizer), [], 0
    for size in itertools.chain(sizes, itertools.repeat(1)):
        out.append(spell.push(ids[at : at + size]))
        at += size
        ended = copy.copy(spell)
        ended._tokens = list(spell._tokens)
        assert "".join(out) + ended.push([], last=True) == decode_text(tokenizer, ids[:at])
        if at >= len(ids):
            return [*out, spell.push([], last=True)]
    raise AssertionError


@st.composite
def token_lists(draw, tokenizer):
    """Texts in that tokenizer's tokens, whole and broken off, and tokens at random."""
    at_random = st.lists(st.integers(0, len(tokenizer) - 1), max_size=12)
    spelled = TEXTS.map(lambda text: tokenizer(text, add_special_tokens=False).input_ids)
    broken = st.builds(lambda ids, n, m: ids[n : len(ids) - m], spelled, st.integers(0, 3), st.integers(0, 3))
    special = st.lists(st.sampled_from(sorted(tokenizer.all_special_ids)), max_size=12)
    return list(itertools.chain(*draw(st.lists(at_random | broken | special, max_size=5))))


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pieces_make_up_the_text_at_every_cut(name, data):
    tokenizer = kind(name)
    ids = data.draw(token_lists(tokenizer))
    sizes = data.draw(st.lists(st.integers(0, 9), max_size=6))
    assert "".join(pieces(tokenizer, ids, sizes)) == decode_text(tokenizer, ids)


def byte_tokens(tokenizer):
    """Token of each byte. Byte-level vocabularies write the bytes that cannot be printed as characters from 256 on."""
    if tokenizer.convert_tokens_to_ids("<0xFF>") not in (None, tokenizer.unk_token_id):
        return [tokenizer.convert_tokens_to_ids(name) for name in BYTES]
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in shown)
    spelled = {**{b: chr(b) for b in shown}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}
    return [tokenizer.convert_tokens_to_ids(spelled[byte]) for byte in range(256)]


@pytest.mark.parametrize("name", BYTE_KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_nothing_is_held_back_that_is_certain(name, data):
    """Whatever is held back of a text that is cut anywhere, some next bytes would change its first character."""
    tokenizer = kind(name)
    byte = byte_tokens(tokenizer)
    ids = tokenizer(data.draw(TEXTS.filter(lambda text: REPLACEMENT not in text)), add_special_tokens=False).input_ids
    ids = ids[: data.draw(st.integers(0, len(ids)))]
    spell = Detokenizer(tokenizer)
    out = "".join(spell.push([token]) for token in ids)
    whole = decode_text(tokenizer, ids)
    if out == whole:
        return
    tails = itertools.chain([[0xFF]], *(itertools.product([0x80, 0x9F, 0xBF], repeat=n) for n in (1, 2, 3)))
    nexts = [[byte[b] for b in tail] for tail in tails]
    others = {decode_text(tokenizer, [*ids, *more])[len(out) : len(out) + 1] for more in nexts}
    assert others - {whole[len(out)]}


@pytest.mark.parametrize("name", [name for name in KINDS if name != "bytes alone"])
def test_plain_text_is_never_held_back(name):
    """Of tokens that are no bytes, each comes out in the pass that brings it."""
    tokenizer = kind(name)
    ids = [i for i in range(len(tokenizer)) if (text := decode_text(tokenizer, [i])).isascii() and text.isprintable()]
    ids = [i for i in ids if not tokenizer.convert_ids_to_tokens(i).startswith("<0x")]
    assert len(ids) > 3
    spell, out = Detokenizer(tokenizer), ""
    for count, token in enumerate(ids, 1):
        out += spell.push([token])
        assert out == decode_text(tokenizer, ids[:count])


def test_what_is_complete_does_not_wait_for_what_is_not():
    """A pass that ends inside of a character: all before it comes out."""
    tokenizer = kind("byte level")
    ids = tokenizer("It was 你好").input_ids
    assert Detokenizer(tokenizer).push(ids[:-1]) == "It was 你"


def test_byte_fallback_of_a_run_that_breaks_off():
    """What the decoder makes of it, and so what has to be held back: the whole run."""
    tokenizer = kind("bytes alone")
    ids = tokenizer("你好世界").input_ids
    assert decode_text(tokenizer, ids) == "你好世界"
    assert decode_text(tokenizer, ids[:-1]) == REPLACEMENT * 11
    spell = Detokenizer(tokenizer)
    assert [spell.push([token]) for token in ids] == [""] * 12
    assert spell.push([], last=True) == "你好世界"


def test_a_run_of_bytes_comes_out_with_the_token_after_it():
    tokenizer = kind("Llama 2")
    ids = tokenizer("x 🚀\n x").input_ids
    spell = Detokenizer(tokenizer)
    assert [spell.push([token]) for token in ids] == ["x", " ", "", "", "", "", "", "🚀\n ", "x"]


def test_answer_that_completes_a_character_of_the_prompt():
    """The text is that of the answer's tokens by themselves, as transformers decodes them."""
    tokenizer = kind("byte level")
    ids = tokenizer("你好").input_ids[1:]
    assert pieces(tokenizer, ids, []) == ["", "", "", "", f"{REPLACEMENT}{REPLACEMENT}好", ""]


def test_special_tokens_between_bytes():
    """They are left out before the bytes are put together; and a long row of them hides no space."""
    tokenizer = kind("Llama 2")
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    ids = tokenizer("x").input_ids + [turn] * 30 + tokenizer(" was").input_ids
    assert "".join(pieces(tokenizer, ids, [])) == decode_text(tokenizer, ids) == "x was"
    first, *rest = tokenizer("🚀").input_ids
    assert "".join(pieces(tokenizer, [first, turn, *rest], [])) == "🚀"


def test_work_does_not_grow_with_the_text(monkeypatch):
    """Tokens decoded per token, by count."""
    tokenizer = kind("Llama 2")
    counted = []
    monkeypatch.setattr(
        "offload_triforce.generation.detokenize.decode_text",
        lambda t, ids: counted.append(len(ids)) or decode_text(t, ids),
    )
    spell = Detokenizer(tokenizer)
    ids = tokenizer(SAMPLE * 5).input_ids
    for token in ids:
        spell.push([token])
    assert sum(counted) < 60 * len(ids)


@pytest.mark.parametrize("cut", range(0, 60, 7))
@pytest.mark.xdist_group("smollm2")
def test_real_tokenizer(smollm2, cut):
    """Of SmolLM2: no character of the sample is in its vocabulary that is not ASCII."""
    _, tokenizer = smollm2
    ids = tokenizer(SAMPLE).input_ids[cut:]
    assert "".join(pieces(tokenizer, ids, [3, 1, 4, 1, 5])) == decode_text(tokenizer, ids)
