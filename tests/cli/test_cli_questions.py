"""``generate`` with several questions: each as if asked alone, and what they share is read once."""

import json

from tests.cli.calling import FEW, generate, refused

ASKS = ("Who was it?", "When?\nAnd where?", "Why was it so, and what came of it in the end, after all those years?")


def several(*args):
    asks = [part for ask in ASKS for part in ("--ask", ask)]
    result = generate(*args, *asks)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_each_answer_is_the_one_it_has_alone(model, book, tmp_path):
    args = ("--model", model, "--prompt-file", book, "--temperature", "0.8", "--seed", "3", *FEW)
    alone = [json.loads(generate(*args, "--ask", ask, "--json").stdout) for ask in ASKS]
    found = json.loads(several(*args, "--json"))["answers"]
    assert [each["ask"] for each in found] == list(ASKS)
    assert [each["prompt_ids"] for each in found] == [each["prompt_ids"] for each in alone]
    assert [each["token_ids"] for each in found] == [each["token_ids"] for each in alone]
    common = 12 * 53  # the book, a byte a token
    assert [each["reused_tokens"] for each in alone] == [0, 0, 0]
    assert found[0]["reused_tokens"] == 0
    assert all(each["reused_tokens"] >= common for each in found[1:])
    headings = ("> Who was it?", "> When?\n> And where?", f"> {ASKS[2]}")
    text = "".join(f"{head}\n\n{each['text']}\n\n" for head, each in zip(headings, found, strict=True))
    assert several(*args) == text
    assert several(*args, "--output", str(tmp_path / "a")) == ""
    assert (tmp_path / "a").read_text(encoding="utf-8") == text.removesuffix("\n")


def test_all_are_checked_before_the_first_is_answered(model, book):
    args = ("--model", model, "--prompt-file", book, *FEW)
    refused("generate", *args, "--ask", "Who?", "--ask", "x" * 4000, words="exceed the model's positions, 4,096, by")
    refused("generate", *args, "--ask", "Who?", "--ask", " ", words="one --ask of several is empty")


def test_the_chat_format_can_be_insisted_on(model, chatting):
    refused("generate", "--model", model, "--prompt", "Hi", "--chat", *FEW, words="this model has no chat template")
    chat, plain = (
        json.loads(generate("--model", chatting, "--prompt", "Hi", flag, *FEW, "--json").stdout)
        for flag in ("--chat", "--raw")
    )
    assert len(chat["prompt_ids"]) == len("<user>Hi<assistant>")
    assert len(plain["prompt_ids"]) == len("Hi")
