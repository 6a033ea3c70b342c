"""A matcher as a logits processor: its bits become -inf, its state follows the text, and forks go their own way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload_triforce import GrammarProcessor, InputError
from offload_triforce.speculation.grammar import allowed
from offload_triforce.speculation.processors import Kind, fork_of, kind_of
from tests.matchers import CLOSE, END, OPEN, ComputingMatcher, EndingMatcher, FillingMatcher

PROMPT = [3, 4, 5]
TOKENS, WIDTH = 66, 70

STYLES = pytest.mark.parametrize("matcher", [FillingMatcher, EndingMatcher, ComputingMatcher])
AFTER = {FillingMatcher: set(range(WIDTH)), EndingMatcher: {END, 63}, ComputingMatcher: {END}}


def open_to(processor, ids):
    """The tokens that a processor leaves after these ids."""
    scores = torch.arange(WIDTH, dtype=torch.float32)[None]
    got = processor(torch.tensor([PROMPT + ids]), scores.clone())
    left = got[0].isfinite()
    assert torch.equal(got[0, left], scores[0, left])
    return set(left.nonzero().flatten().tolist())


@STYLES
def test_it_follows_the_text(matcher):
    """From the end of the prompt on, whatever the prompt holds; some calls may be left out."""
    text = [OPEN, 10, OPEN, 11, CLOSE, CLOSE, END]
    processor, reference = GrammarProcessor(matcher(TOKENS), TOKENS), matcher(TOKENS)
    for length in range(len(text)):
        if length:
            reference.take(text[length - 1])
        if length != 3:
            assert open_to(processor, text[:length]) == reference.next_tokens()
    assert open_to(processor, text) == AFTER[matcher], "nothing is asked of what follows the end"
    assert open_to(processor, [*text, END]) == AFTER[matcher]


@STYLES
def test_forks_go_their_own_way(matcher):
    processor = GrammarProcessor(matcher(TOKENS), TOKENS)
    assert kind_of(processor) is Kind.FORKS
    open_to(processor, [])
    before = open_to(processor, [OPEN])
    twin = fork_of(processor)
    inside = open_to(twin, [OPEN, 10])
    assert CLOSE in inside
    assert OPEN in open_to(twin, [OPEN, 10, OPEN])
    assert CLOSE not in before
    assert open_to(processor, [OPEN, 11]) == inside
    assert open_to(processor, [OPEN, 11, CLOSE]) == {END}


@STYLES
def test_a_text_that_leaves_the_grammar_is_an_error(matcher):
    processor = GrammarProcessor(matcher(TOKENS), TOKENS)
    open_to(processor, [OPEN])
    for wrong in (CLOSE, TOKENS, 9999):
        with pytest.raises(InputError, match=f"the grammar does not allow token {wrong} at position 4 of the text"):
            open_to(fork_of(processor), [OPEN, wrong])


def test_one_text_only():
    processor = GrammarProcessor(FillingMatcher(TOKENS), TOKENS)
    open_to(processor, [OPEN, 10])
    with pytest.raises(InputError, match="serves one text from its prompt to its end; make a new one"):
        open_to(processor, [])
    with pytest.raises(InputError, match="serves one text"):
        GrammarProcessor(FillingMatcher(TOKENS), TOKENS)(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, WIDTH))


def test_a_grammar_that_leads_nowhere_is_an_error():
    class Dead(FillingMatcher):
        def next_tokens(self):
            return set()

    with pytest.raises(InputError, match="the grammar allows no token after the first 3"):
        open_to(GrammarProcessor(Dead(TOKENS), TOKENS), [])


@pytest.mark.parametrize("missing", ["accept_token", "fill_next_token_bitmask", "is_terminated", "fork"])
def test_what_is_no_matcher_is_refused(missing):
    methods = {name: lambda self: None for name in vars(FillingMatcher) if not name.startswith("_") and name != missing}
    with pytest.raises(InputError, match=f"Partial is no matcher of a grammar: it has no {missing} or"):
        GrammarProcessor(type("Partial", (), methods)(), TOKENS)


@given(st.sets(st.integers(0, 95)), st.integers(1, 96), st.integers(1, 130))
def test_bits_by_brute_force(bits, tokens, width):
    """Also bit 31, the sign; bits of padding behind the vocabulary do not count."""
    words = np.zeros(3, dtype=np.uint32)
    for bit in bits:
        words[bit // 32] |= np.uint32(1 << bit % 32)
    got = allowed(torch.from_numpy(words.view(np.int32))[None], tokens, width)
    assert got.tolist() == [[token in bits and token < tokens for token in range(width)]]
