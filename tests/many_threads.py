"""The test of threads, over and over: ``python -m tests.many_threads TIMES``.

Each time: two engines of one model in two threads, and one engine in two threads, 60 greedy tokens each, while a third
thread runs plain ``generate``; each answer is compared with ``generate``, and the model is looked at afterwards.
"""

from __future__ import annotations

import sys
import time

import torch

from offload_triforce import TriForce
from tests.generation.test_turn import all_at_once, assert_untouched
from tests.tiny import greedy, prompt_ids, tiny_model

PROMPT, NEW = prompt_ids(150), 60
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


def main(times: int) -> int:
    torch.set_num_threads(1)  # several threads of ours are enough for two cores
    model = tiny_model("llama")
    plain = [greedy(model, PROMPT, NEW), greedy(model, prompt_ids(70), 24)]
    engines = [TriForce(model, context=300) for _ in range(2)]
    wrong, started = 0, time.monotonic()
    for number in range(times):
        for pair in (engines, engines[:1] * 2):
            works = [lambda engine=e: engine.generate(PROMPT, **GREEDY).token_ids for e in pair]
            answers = all_at_once(*works, lambda: greedy(model, PROMPT, NEW))
            wrong += sum(answer != plain[0] for answer in answers)
        assert_untouched(model, plain[1])
        if (number + 1) % 10 == 0:
            print(f"{number + 1} times, {wrong} wrong answers, {time.monotonic() - started:.0f} s", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])) > 0)
