"""Top-p without sorting the vocabulary, wherever the outcome is certain to be that of transformers' own warper."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.generation import TopPLogitsWarper

# So many of the likeliest tokens are looked at.
MOST = 1024
# transformers adds up float32 probabilities from the least likely on, in four lanes or more. Each addition rounds to 24
# bits of what the lane holds by then, and over all additions that comes to no more than this times the mean rank of a
# token drawn (1 for the likeliest). Where a token is as near to the limit as that, rounding decides whether it stays.
ROUNDING = 2.0**-26
EXPONENTIALS = 2.0**-17  # and theirs


class QuickTopP:
    """Stands in for a ``TopPLogitsWarper`` over rows, and says for which of them it can.

    It cannot where the likeliest tokens do not add up to top_p, where rounding decides, and where the least likely
    token that stays ties with one that goes: then sorting decides which of them that is.
    """

    def __init__(self, warper: TopPLogitsWarper) -> None:
        self._top_p, self._filler, self._least = warper.top_p, warper.filter_value, warper.min_tokens_to_keep

    def __call__(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [T, V] float32 -> the warper's own [T, V], and for which rows that is certain, bool [T].

        The host waits for nothing. Rows that are not certain mean nothing.
        """
        vocabulary = scores.shape[1]
        count = min(MOST, vocabulary)
        best = scores.topk(count, dim=1).values
        total = (scores - best[:, :1]).exp().sum(dim=1, keepdim=True, dtype=torch.float64)
        shares = (best - best[:, :1]).exp().double() / total
        together = shares.cumsum(dim=1)
        likelier = together - shares  # than the token at each rank, all together
        ranks = torch.arange(1, count + 1, device=scores.device)
        rest = (1.0 - together[:, -1:]).clamp(min=0.0)  # which is the less likely the further down
        mean_rank = (shares * ranks).sum(dim=1, keepdim=True) + rest * (count + vocabulary) / 2
        near = ROUNDING * mean_rank + EXPONENTIALS
        # Written so that what is no number is not clear.
        clear = ((likelier - self._top_p).abs() > near)[:, self._least :].all(dim=1)
        stay = (likelier < self._top_p).sum(dim=1, keepdim=True).clamp(min=self._least).clamp(max=count)
        last = best.gather(1, stay - 1)
        apart = (last > best.gather(1, stay.clamp(max=count - 1))) | (stay == vocabulary)
        return scores.masked_fill(scores < last, self._filler), clear & apart[:, 0]
