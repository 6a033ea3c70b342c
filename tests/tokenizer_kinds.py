"""One small tokenizer of every kind that language models have, with the decoder that transformers gives it."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from tests.byte_tokenizer import byte_tokenizer

SAMPLE = """It was the best of times, it was the worst of times; don't you think? def f(x):\n\treturn x  # naïve
Grüße aus Köln, 世界 你好世界 数据 こんにちは 안녕 สวัสดี नमस्ते 👩‍👩‍👧 👍🏽 🇩🇪🇫🇷 🚀 é ñ ﷽"""
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]
# What the vocabulary of Llama 2 is like: spaces and some words and characters, everything else in bytes.
PIECES = [
    "▁",
    "▁▁▁▁",
    "▁the",
    "▁was",
    "es",
    "x",
    "ï",
    "你",
    "好",
    ".",
    ",",
    "'",
    "n't",
    "\ufffd",
    "👍",
    "\u200d",
    "\u0301",
]


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken("<|turn|>", special=True)])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    known = {name: name for name in SPECIAL if tokenizer.token_to_id(name) is not None}
    names = {"<unk>": "unk_token", "<s>": "bos_token", "</s>": "eos_token"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{names[name]: name for name in known})


def byte_level_bpe() -> PreTrainedTokenizerFast:
    """GPT-2, Llama 3, Qwen: merges join bytes across the borders of characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SAMPLE] * 3, trainer)
    return wrap(tokenizer)


def byte_fallback_bpe(decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    """Llama 2, Mistral, Phi-3, Gemma: pieces, and bytes for what has none."""
    characters = sorted(set("".join(PIECES)) - set(PIECES))
    vocabulary = {name: i for i, name in enumerate([*SPECIAL, *BYTES, *PIECES, *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoder
    return wrap(tokenizer)


SPACES, STRIP = decoders.Replace("▁", " "), decoders.Strip(content=" ", left=1)


def bytes_alone() -> PreTrainedTokenizerFast:
    """Nothing but bytes, by the byte-fallback decoder."""
    vocabulary = {name: i for i, name in enumerate(["<unk>", *BYTES])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def llama2() -> PreTrainedTokenizerFast:
    return byte_fallback_bpe(decoders.Sequence([SPACES, decoders.ByteFallback(), decoders.Fuse(), STRIP]))


def gemma() -> PreTrainedTokenizerFast:
    return byte_fallback_bpe(decoders.Sequence([SPACES, decoders.ByteFallback(), decoders.Fuse()]))


def gguf_llama() -> PreTrainedTokenizerFast:
    """As read from a GGUF file: spaces come last."""
    return byte_fallback_bpe(decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), SPACES, STRIP]))


def metaspace_with_bytes() -> PreTrainedTokenizerFast:
    return byte_fallback_bpe(decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()]))


def unigram() -> PreTrainedTokenizerFast:
    """T5, XLNet."""
    pieces = [*SPECIAL, *PIECES, *sorted(set(SAMPLE.replace(" ", "▁")) - set(PIECES))]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return wrap(tokenizer)


def word_piece(cleanup: bool) -> PreTrainedTokenizerFast:
    """BERT; with ``cleanup``, spaces before points and short forms go."""
    words = [
        "do",
        "not",
        "n't",
        "'s",
        "'",
        ".",
        ",",
        "!",
        "?",
        "the",
        "世",
        "界",
        "\ufffd",
        "##x",
        "##世",
        "##.",
        "##'s",
    ]
    vocabulary = {name: i for i, name in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=cleanup)
    return wrap(tokenizer)


def word_ends() -> PreTrainedTokenizerFast:
    """GPT-1: the end of a word is marked, and is a space unless it is the last."""
    words = ["</w>", "a", "a</w>", "the</w>", ".</w>", "世</w>", "世", "b"]
    vocabulary = {name: i for i, name in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return wrap(tokenizer)


def without_decoder() -> PreTrainedTokenizerFast:
    """Words with spaces between."""
    vocabulary = {name: i for i, name in enumerate([*SPECIAL, "a", "b", "世"])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    return wrap(tokenizer)


class Stripping(PreTrainedTokenizer):
    """As transformers decodes a sentencepiece model in Python: white space goes at both ends."""

    PIECES = (*SPECIAL, *PIECES, "\n")

    def __init__(self) -> None:
        self._ids = {piece: i for i, piece in enumerate(self.PIECES)}
        super().__init__(unk_token="<unk>", bos_token="<s>", eos_token="</s>")

    @property
    def vocab_size(self) -> int:
        return len(self.PIECES)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._ids)

    def _tokenize(self, text: str) -> list[str]:
        return list(text.replace(" ", "▁"))

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self.PIECES[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens).replace("▁", " ").strip()


KINDS = {
    "byte level": byte_tokenizer,
    "byte level, merged": byte_level_bpe,
    "bytes alone": bytes_alone,
    "Llama 2": llama2,
    "Gemma": gemma,
    "Llama 2, GGUF": gguf_llama,
    "Metaspace, bytes": metaspace_with_bytes,
    "Unigram": unigram,
    "WordPiece": lambda: word_piece(cleanup=False),
    "WordPiece, cleanup": lambda: word_piece(cleanup=True),
    "word ends": word_ends,
    "words": without_decoder,
    "ByT5": ByT5Tokenizer,
    "stripping": Stripping,
}
