"""OpenAI's chat and completions, by OpenAI's own client."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from tests.model.test_lock import until

TOKENS = 24


def said(text):
    return [{"role": "user", "content": text}]


def ids_of(engine, messages):
    return engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def own(engine, messages, seed, **options):
    """The engine's own answer."""
    options = {"temperature": 1.0, "max_new_tokens": TOKENS, **options}
    return engine.generate(ids_of(engine, messages), seed=seed, **options)


def ask(client, messages, seed=1, **options):
    options = {"temperature": 1.0, "max_tokens": TOKENS, **options}
    return client.chat.completions.create(model="tiny", messages=messages, seed=seed, **options)


def streamed(chunks):
    """(text, last finish reason, usage) of a stream."""
    text, reason, usage = "", None, None
    for chunk in chunks:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
        usage = chunk.usage or usage
    return text, reason, usage


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny", "other"]
    assert client.models.retrieve("other").id == "other"
    with pytest.raises(openai.NotFoundError, match="'gpt-7' is not served here; there is 'tiny', 'other'"):
        client.models.retrieve("gpt-7")


@pytest.mark.parametrize("seed", [1, 2])
def test_an_answer_is_the_engines_own(client, engine, seed):
    answer, expected = ask(client, said("Hello there"), seed), own(engine, said("Hello there"), seed)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason == "length"
    assert answer.usage.prompt_tokens == len(expected.prompt_ids)
    assert answer.usage.completion_tokens == TOKENS
    assert answer.usage.total_tokens == len(expected.prompt_ids) + TOKENS


def test_a_stream_is_the_same_answer(client, engine):
    chunks = ask(client, said("Hello there"), 3, stream=True, stream_options={"include_usage": True})
    text, reason, usage = streamed(chunks)
    expected = own(engine, said("Hello there"), 3)
    assert text == expected.text
    assert (reason, usage.completion_tokens) == (expected.finish_reason, len(expected.token_ids))


def test_greedy(client, engine):
    expected = engine.generate(ids_of(engine, said("Greedy")), do_sample=False, max_new_tokens=TOKENS)
    assert ask(client, said("Greedy"), temperature=0).choices[0].message.content == expected.text


def test_completions_count_their_prompt(client):
    """For its limits, and for penalties, which are about the answer alone."""
    with pytest.raises(openai.BadRequestError, match="3,000 prompt tokens"):
        client.completions.create(model="tiny", prompt="x" * 3000)
    how = {"model": "tiny", "seed": 4, "temperature": 0, "max_tokens": 1, "prompt": "abcdefgh" * 20}
    plain = client.completions.create(**how).choices[0].text
    assert client.completions.create(**how, frequency_penalty=2.0, presence_penalty=2.0).choices[0].text == plain


@pytest.mark.parametrize(
    "options",
    [{"top_p": 0.7}, {"top_k": 5}, {"min_p": 0.2}, {"repetition_penalty": 1.5}],
    ids=lambda options: next(iter(options)),
)
def test_sampling_parameters(client, engine, options):
    native = {name: value for name, value in options.items() if name == "top_p"}
    extra = {name: value for name, value in options.items() if name != "top_p"}
    answer = ask(client, said("Draw"), 5, extra_body=extra, **native)
    assert answer.choices[0].message.content == own(engine, said("Draw"), 5, **options).text


def test_completions(client, engine):
    expected = engine.generate("def f(x):", seed=4, temperature=1.0, max_new_tokens=TOKENS)
    how = {"model": "tiny", "prompt": "def f(x):", "seed": 4, "temperature": 1.0, "max_tokens": TOKENS}
    answer = client.completions.create(**how)
    assert answer.choices[0].text == expected.text
    pieces = list(client.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for piece in pieces for choice in piece.choices) == expected.text
    assert pieces[-1].usage.completion_tokens == TOKENS
    ids = engine.tokenizer("def f(x):").input_ids
    assert client.completions.create(**{**how, "prompt": ids}).choices[0].text == expected.text


def test_stop_strings_are_not_part_of_the_answer(client, engine):
    whole = own(engine, said("Stop"), 6).text
    stop = whole[9:11]
    answer = ask(client, said("Stop"), 6, stop=[stop])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    text, reason, _ = streamed(ask(client, said("Stop"), 6, stop=stop, stream=True))
    assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_penalties_and_bias_are_those_of_plain_decoding(client, engine):
    """By a model without drafts, and a processor that is written out."""
    ids = ids_of(engine, said("Again"))
    presence, frequency, bias = 1.5, 0.75, {"70": 4.0, "80": -100.0}

    def penalise(seen, scores):
        scores = scores.clone()
        for token in seen[0, len(ids) :].unique().tolist():
            scores[0, token] -= presence + frequency * int((seen[0, len(ids) :] == token).sum())
        for token, value in bias.items():
            scores[0, int(token)] += value
        return scores

    with type(engine)(engine.model, engine.tokenizer, gamma=0) as plain:
        how = {"seed": 7, "temperature": 1.0, "max_new_tokens": TOKENS, "logits_processor": [penalise]}
        expected = plain.generate(ids, **how)
    options = {"presence_penalty": presence, "frequency_penalty": frequency, "logit_bias": bias}
    answer = ask(client, said("Again"), 7, **options)
    assert answer.choices[0].message.content == expected.text
    assert expected.text != own(engine, said("Again"), 7).text


def test_logprobs_are_the_models_own(client, engine):
    """Against one plain forward over prompt and answer, at each place."""
    answer = ask(client, said("Odds"), 8, logprobs=True, top_logprobs=3, temperature=0.7)
    expected = own(engine, said("Odds"), 8, temperature=0.7)
    ids = torch.tensor([expected.prompt_ids + expected.token_ids])
    with torch.no_grad():
        rows = torch.log_softmax(engine.model(ids).logits[0, len(expected.prompt_ids) - 1 : -1].float(), dim=-1)
    told = answer.choices[0].logprobs.content
    assert len(told) == TOKENS
    for row, token, entry in zip(rows, expected.token_ids, told, strict=True):
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
    chunks = list(ask(client, said("Odds"), 8, logprobs=True, top_logprobs=3, temperature=0.7, stream=True))
    entries = [e for c in chunks for choice in c.choices if choice.logprobs for e in choice.logprobs.content]
    assert [entry.logprob for entry in entries] == pytest.approx([entry.logprob for entry in told], abs=1e-3)


def test_logprobs_of_completions(client, engine):
    """In their older shape, whole and streamed."""
    how = {"model": "tiny", "prompt": "Odds of", "seed": 8, "temperature": 0.7, "max_tokens": TOKENS, "logprobs": 2}
    expected = engine.generate("Odds of", seed=8, temperature=0.7, max_new_tokens=TOKENS)
    ids = torch.tensor([expected.prompt_ids + expected.token_ids])
    with torch.no_grad():
        rows = torch.log_softmax(engine.model(ids).logits[0, len(expected.prompt_ids) - 1 : -1].float(), dim=-1)
    own_logprobs = rows.gather(1, ids[0, len(expected.prompt_ids) :, None])[:, 0].tolist()
    told = client.completions.create(**how).choices[0].logprobs
    assert told.token_logprobs == pytest.approx(own_logprobs, abs=1e-3)
    assert [max(top.values()) for top in told.top_logprobs] == pytest.approx(rows.max(dim=1).values.tolist(), abs=1e-3)
    assert told.text_offset[0] == 0
    assert told.text_offset == sorted(told.text_offset)
    assert told.tokens == [engine.tokenizer.decode([token]) for token in expected.token_ids]
    chunks = [c.choices[0].logprobs for c in client.completions.create(**how, stream=True) if c.choices]
    assert [each for part in chunks for each in part.token_logprobs] == pytest.approx(own_logprobs, abs=1e-3)


def test_the_second_turn_of_a_chat_reads_only_what_is_new(client):
    first = said("A question about something long. " * 6)
    answer = ask(client, first, 9)
    again = [*first, {"role": "assistant", "content": answer.choices[0].message.content}, *said("And then?")]
    later = ask(client, again, 9)
    held = answer.usage.prompt_tokens - 1  # bytes that are no text are not read back as they were said
    assert later.usage.prompt_tokens_details.cached_tokens >= held
    assert answer.usage.prompt_tokens_details.cached_tokens < held


def test_a_second_client_with_the_same_system_prompt_reuses_it(client):
    system = {"role": "system", "content": "You are a careful assistant who checks every line twice. " * 12}
    ask(client, [system, *said("One")], 1)
    other = ask(client, [system, *said("Two, of another kind")], 2)
    assert other.usage.prompt_tokens_details.cached_tokens >= len(system["content"])


def test_progress_of_the_prefill(client):
    text = "".join(chr(97 + i * i % 26) for i in range(500))
    chunks = list(ask(client, said(text), 1, stream=True, extra_body={"return_progress": True}))
    told = [chunk.model_extra["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk.model_extra]
    assert told
    processed = [each["processed"] for each in told]
    assert processed == sorted(processed)
    assert processed[-1] == told[-1]["total"]
    assert {each["cached"] for each in told} == {told[0]["cached"]}
    used = ask(
        client,
        said(text + " and more of it, which is new to the engine" * 5),
        1,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_progress": True},
    )
    chunks = list(used)
    told = [chunk.model_extra["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk.model_extra]
    assert told[0]["cached"] == chunks[-1].usage.prompt_tokens_details.cached_tokens > 400


def test_20_clients_at_once_are_not_mixed_up(client, engine):
    texts = [f"Client {number} asks about {chr(65 + number) * number}" for number in range(20)]
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda number: ask(client, said(texts[number]), number), range(20)))
    for number, answer in enumerate(answers):
        assert answer.choices[0].message.content == own(engine, said(texts[number]), number).text


def test_a_client_that_goes_away_frees_the_engine(client, service):
    before = service.metrics._requests.labels("cancelled")._value.get()
    stream = ask(client, said("For ever"), 1, max_tokens=1900, stream=True)
    for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    stream.close()
    deadline = time.monotonic() + 20
    while service.line.busy and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not service.line.busy
    assert service.metrics._requests.labels("cancelled")._value.get() == before + 1
    assert service.stats.new_tokens < 1900


def test_what_was_read_for_a_client_that_goes_away_is_not_read_again(client, engine, service):
    """In its first prefill: the next one goes on at the very chunk, in the very layer."""
    messages, seen, reached = said("What was read is kept. " * 40), [], threading.Event()

    def watch(*_):
        seen.append(None)
        if len(seen) == 5:
            reached.set()
            until(lambda: engine._turns._queue[0].cancelled)

    hook = engine.model.model.layers[0].mlp.register_forward_pre_hook(watch)
    try:
        gone = threading.Thread(target=lambda: _give_up_at(client, messages, reached))
        gone.start()
        gone.join()
        until(lambda: not service.line.busy)
        assert len(seen) == 5
        answer = ask(client, messages)
    finally:
        hook.remove()
    assert service.stats.resumed_tokens == 5 * 64 // len(engine.layout.layers)
    assert answer.choices[0].message.content == own(engine, messages, 1).text


def _give_up_at(client, messages, reached):
    stream = ask(client, messages, stream=True)
    assert reached.wait(20)
    stream.close()


def test_one_that_waits_and_goes_away_leaves_the_line(client, service):
    stream = ask(client, said("For ever"), 1, max_tokens=1900, stream=True)
    next(iter(stream))
    gone = threading.Thread(target=lambda: _give_up(client))
    gone.start()
    gone.join()
    deadline = time.monotonic() + 20
    while service.line.waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    assert service.line.waiting == 0
    stream.close()


def _give_up(client):
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.2), said("Too late"), 1)
