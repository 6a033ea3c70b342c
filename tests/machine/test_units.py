"""How sizes, speeds and numbers of tokens are read: one way, whatever the option."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_triforce.errors import InputError
from offload_triforce.machine.units import MOST_TOKENS, parse_bytes, parse_speed, parse_tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("128K", 131072),
        ("131072", 131072),
        ("131,072", 131072),
        ("131_072", 131072),
        ("1,048,576", 2**20),
        ("1m", 2**20),
        (" 0.5M ", 2**19),
        ("128 K", 131072),
        ("100k", 102400),
        ("0", 0),
    ],
)
def test_tokens(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("24G", 24 * 10**9),
        ("24gb", 24 * 10**9),
        ("24 GiB", 24 * 2**30),
        ("24Gi", 24 * 2**30),
        ("1.5gb", 1_500_000_000),
        ("1,500 MB", 1_500_000_000),
        ("2T", 2 * 10**12),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text, "--vram") == size


@pytest.mark.parametrize(
    ("text", "gbps"),
    [
        ("25GB/s", 25.0),
        ("25 GB/s", 25.0),
        ("25G/s", 25.0),
        ("25GBps", 25.0),
        ("1008 gb/s", 1008.0),
        ("1,008 GB/s", 1008.0),
        ("500MB/s", 0.5),
        ("1GiB/s", 1.073741824),
        ("25Gb/s", 3.125),
        ("25 Gbit/s", 3.125),
        ("25gbit/s", 3.125),
        ("25Gbps", 3.125),
    ],
)
def test_speeds(text, gbps):
    assert parse_speed(text, "--link") == pytest.approx(gbps)


def test_a_bare_number_is_in_gb_per_second_where_the_options_name_says_so():
    assert parse_speed("0.2", "--link-gbps", bare=True) == 0.2
    assert parse_speed("25Gb/s", "--link-gbps", bare=True) == 3.125
    with pytest.raises(InputError, match="--link '25' is not a bandwidth"):
        parse_speed("25", "--link")


@pytest.mark.parametrize("text", ["", "many", "12Q", "-5", "K", "131.072", "12,34", "1,0000", "128KB", "4/s", "1e5"])
def test_no_tokens(text):
    with pytest.raises(InputError, match=r"--context .*128K"):
        parse_tokens(text, "--context")


def test_more_tokens_than_there_are():
    assert parse_tokens("1,048,576M") == MOST_TOKENS
    with pytest.raises(InputError, match="more than any text has"):
        parse_tokens("1,048,577M")


@pytest.mark.parametrize("text", ["", "24", "24GB/s", "big", "24,5GB", "24XB"])
def test_no_size(text):
    with pytest.raises(InputError, match=r"--vram .* is not a size"):
        parse_bytes(text, "--vram")


def test_more_bytes_than_there_are():
    """A slip: it would end as an overflow far from here."""
    assert parse_bytes("1000TB") == 10**15
    with pytest.raises(InputError, match=r"--ram '9{400}GB' is more than any machine has"):
        parse_bytes("9" * 400 + "GB", "--ram")


@pytest.mark.parametrize("text", ["24Gb", "24 Gbit", "24Mb"])
def test_bits_are_no_size(text):
    with pytest.raises(InputError, match="is in bits; write bytes with a capital, as 24"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["25GB", "25", "fast/s", "/s"])
def test_no_speed(text):
    with pytest.raises(InputError, match=r"--link .* is not a bandwidth"):
        parse_speed(text, "--link")


@pytest.mark.parametrize("text", ["0", "-1", "0.0"])
def test_nothing_and_less(text):
    for parse, unit in ((parse_bytes, "GB"), (parse_speed, "GB/s")):
        with pytest.raises(InputError, match=f"^--option must be greater than 0, not {text}{unit}$"):
            parse(text + unit, "--option")
    with pytest.raises(InputError, match=f"^--option must be greater than 0, not {text}$"):
        parse_speed(text, "--option", bare=True)


def test_what_may_be_bytes_or_bits_is_asked_back():
    with pytest.raises(InputError, match="may mean bytes or bits"):
        parse_speed("25gbps", "--link")


@given(st.integers(0, 10**9))
def test_every_way_to_write_a_count_is_the_same(tokens):
    assert parse_tokens(str(tokens)) == parse_tokens(f"{tokens:,}") == parse_tokens(f" {tokens:_} ") == tokens
    assert parse_tokens(f"{tokens // 1024}K") == tokens // 1024 * 1024


@given(st.integers(1, 10**6), st.sampled_from(["", "k", "M", "g", "T"]), st.sampled_from(["", "i"]))
def test_a_size_per_second_is_that_size_in_a_second(number, prefix, binary):
    unit = f"{prefix}{binary if prefix else ''}B"
    assert parse_speed(f"{number}{unit}/s") * 1e9 == pytest.approx(parse_bytes(f"{number} {unit}"))


@given(st.text(max_size=12))
def test_whatever_is_written_is_read_or_refused_in_one_sentence(text):
    for parse in (parse_tokens, parse_bytes, parse_speed):
        said = ""
        try:
            assert parse(text, "--option") >= 0
        except InputError as error:
            said = str(error)
        assert not said or (said.startswith("--option ") and "\n" not in said)
