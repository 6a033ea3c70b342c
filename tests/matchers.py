"""Matchers of a tiny grammar in the style of two libraries: nested brackets with letters inside, then an end."""

from __future__ import annotations

import numpy as np
import torch

OPEN, CLOSE, END = 5, 6, 2
LETTERS = range(10, 60)
DEPTH = 3


class Brackets:
    """Groups of up to four letters or groups in brackets, at most three deep; after the outermost one, the end."""

    def __init__(self, tokens):
        self.tokens, self.counts, self.over = tokens, [], False
        self.begun = False

    def next_tokens(self):
        if not self.begun:
            return {OPEN}
        if not self.counts:
            return {END}
        some = {CLOSE} if self.counts[-1] else set()
        if self.counts[-1] < 4:
            some |= set(LETTERS) | ({OPEN} if len(self.counts) < DEPTH else set())
        return some

    def take(self, token):
        if self.over or token not in self.next_tokens():
            return False
        if token == END:
            self.over = True
        elif token == CLOSE:
            self.counts.pop()
        else:
            if self.counts:
                self.counts[-1] += 1
            if token == OPEN:
                self.begun = True
                self.counts.append(0)
        return True

    def twin(self):
        other = type(self)(self.tokens)
        other.counts, other.over, other.begun = list(self.counts), self.over, self.begun
        return other

    def bits(self):
        words = np.zeros(-(-self.tokens // 32), dtype=np.uint32)
        for token in self.next_tokens():
            words[token // 32] |= np.uint32(1 << token % 32)
        return words


class FillingMatcher(Brackets):
    """As xgrammar has it."""

    def accept_token(self, token_id):
        return self.take(token_id)

    def fill_next_token_bitmask(self, bitmask, index=0):
        if self.over:
            raise RuntimeError("the matcher has terminated")
        bitmask[index] = torch.from_numpy(self.bits().view(np.int32))
        return True

    def is_terminated(self):
        return self.over

    def fork(self):
        return self.twin()


class EndingMatcher(FillingMatcher):
    """Knows which tokens end a text."""

    stop_token_ids = (END, 63)


class ComputingMatcher(Brackets):
    """As llguidance has it: after the end, the end token follows."""

    def consume_token(self, token):
        assert token in self.next_tokens(), "it is not told what it does not allow"
        return self.take(token)

    def next_tokens(self):
        return {END} if self.over else super().next_tokens()

    def compute_bitmask(self):
        return self.bits().tobytes()

    def is_stopped(self):
        return self.over

    def deep_copy(self):
        return self.twin()
