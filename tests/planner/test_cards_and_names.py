"""How cards and models are found by name, and what is said of those that are not."""

import re

import pytest

from offload_triforce.errors import InputError
from offload_triforce.machine.cards import CARDS, LINK_GBPS, find_card
from offload_triforce.planner.models import find_shape


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 Laptop"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060 12GB"),
        ("geforce rtx 3090 ti", "RTX 3090 Ti"),
        ("A4000", "RTX A4000"),
        ("NVIDIA RTX 4000 Ada Generation", "RTX 4000 Ada"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000 Blackwell"),
        ("NVIDIA GeForce RTX 4070", "RTX 4070"),
        ("RTX 4070 Laptop", "RTX 4070 Laptop"),
    ],
)
def test_cards_by_the_names_that_people_and_drivers_use(name, card):
    assert find_card(name).name == card


def test_every_card_is_found_by_its_own_name():
    assert [find_card(card.name) for card in CARDS] == list(CARDS)


@pytest.mark.parametrize(
    ("name", "memory", "card"),
    [
        ("NVIDIA GeForce RTX 4060 Ti", 15.55 * 2**30, "RTX 4060 Ti 16GB"),
        ("NVIDIA GeForce RTX 4060 Ti", 7.6 * 2**30, "RTX 4060 Ti 8GB"),
        ("NVIDIA GeForce RTX 3080", 9.77 * 2**30, "RTX 3080 10GB"),
        ("NVIDIA GeForce RTX 3080", 11.75 * 2**30, "RTX 3080 12GB"),
    ],
)
def test_memory_tells_cards_of_one_name_apart(name, memory, card):
    assert find_card(name, int(memory)).name == card


# Memory that torch reports (GiB), from error messages in public issues, and dense TFLOPS (16-bit inputs, 32-bit sums)
# from the maker's papers and data sheets: neither is in the table.
@pytest.mark.parametrize(
    ("name", "gib", "tflops"),
    [
        ("RTX 3090", 23.69, 71.0),
        ("RTX 4090", 23.65, 165.2),
        ("RTX 5090", 31.37, 209.5),
        ("RTX A4000", 15.61, 76.7),
        ("A40", 44.35, 149.7),
        ("L40S", 44.53, 362.0),
        ("A100 80GB", 79.15, 312.0),
        ("H100 SXM", 79.11, 989.0),
    ],
)
def test_memory_and_tflops_against_other_sources(name, gib, tflops):
    card = find_card(name)
    assert card.memory_bytes <= gib * 2**30 <= 1.035 * card.memory_bytes
    assert card.tflops == pytest.approx(tflops, rel=0.09)


def test_every_card_has_its_page_and_memory_that_its_name_says():
    assert len({card.page for card in CARDS}) == len(CARDS)
    for card in CARDS:
        assert re.fullmatch(r"[a-z0-9-]+\.c\d{4}", card.page)
        assert card.generation in LINK_GBPS
        if (said := re.search(r"(\d+)GB", card.name)) is not None:
            assert card.gib == int(said[1])


@pytest.mark.parametrize(
    ("name", "near"),
    [("RTX 4900", "RTX 4090"), ("A100", "A100 80GB"), ("abacus", "plan --list"), ("RTX 4060 Ti", "4060 Ti 16GB")],
)
def test_unknown_cards_get_the_nearest(name, near):
    with pytest.raises(InputError, match=near) as error:
        find_card(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Lama-3.1-8", "nearest are llama-3.1-8b"),
        ("qwen3-31b", "qwen3-32b"),
        ("xyzzy", "offload-triforce models"),
        ("./nowhere", "no such file or folder"),
        ("nowhere.gguf", "no such file"),
    ],
)
def test_unknown_models_get_the_nearest(name, words):
    with pytest.raises(InputError, match=words) as error:
        find_shape(name)
    assert "\n" not in str(error.value)


def test_a_folder_that_holds_no_configuration(tmp_path):
    with pytest.raises(InputError, match="holds no configuration") as error:
        find_shape(str(tmp_path))
    assert "\n" not in str(error.value)
