"""Patterns of module names: what `re` finds, in bounded time, and nothing that `re` alone would understand."""

import random
import re
import time

import pytest

from mindsigma import MindSigmaError
from mindsigma.weights.adapters.module_patterns import Patterns

NAMES = [
    f"transformer_blocks.{i}.{part}"
    for i in (0, 1, 10, 27)
    for part in ("attn1.to_q", "attn2.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
] + ["proj_out", "pos_embed.proj", "caption_projection.linear_1", "adaln_single.linear"]

PATTERNS = [
    "to_q",
    "attn1.to_q",
    "transformer_blocks.1.attn1.to_q",
    "^transformer_blocks.1.attn1.to_q",
    "^attn1.to_q",
    "^proj_out$",
    "proj",
    "proj_out|linear_1",
    ".*attn[12].*",
    ".*\\.to_out\\.0",
    "transformer_blocks\\.(0|10)\\.attn2\\.to_v",
    "transformer_blocks\\.\\d+\\.ff\\.net\\.[0-9](\\.proj)?",
    "(?:.*)_blocks\\.[^1]{1,2}\\..*",
    "\\w+\\.\\d{2}\\.\\w+\\.to_\\D",
    "transformer_blocks.2?7.*?q",
    "[a-z_]+",
    "(to_|net.)+[q2]",
    "()",
    "a{0}to_v",
]


def expected(pattern, name):
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def found(pattern, name):
    return Patterns("p", {pattern: True}).find([name], False)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_as_peft_matches(pattern):
    assert [found(pattern, name) for name in NAMES] == [expected(pattern, name) for name in NAMES]


def test_as_peft_matches_drawn():
    """Random patterns of the understood language."""
    draw = random.Random(7)

    def one(depth):
        kind = draw.choice(["atom"] * 3 + ["group", "times", "any"] * (depth < 3))
        if kind == "atom":
            return draw.choice(["a", "b", ".", "\\.", "[ab]", "[^a]", "\\d", "1", "^", "$", ""])
        inner = "".join(one(depth + 1) for _ in range(draw.randrange(1, 4)))
        if kind == "any":
            return f"({inner}|{one(depth + 1)})"
        return f"({inner})" + (draw.choice(["*", "+", "?", "{2}", "{0,2}", "{1,}"]) if kind == "times" else "")

    names = ["".join(draw.choice("ab.1") for _ in range(draw.randrange(7))) for _ in range(30)]
    for _ in range(400):
        pattern = "".join(one(0) for _ in range(draw.randrange(1, 4)))
        assert [found(pattern, name) for name in names] == [expected(pattern, name) for name in names], pattern


def test_first_pattern_wins():
    table = Patterns("p", {"^.*ff.*": 1, "to_q": 2, "attn1.to_q": 3})
    assert [table.find([name], 0) for name in NAMES[:4]] == [2, 0, 0, 1]


@pytest.mark.parametrize(
    "pattern",
    ["(.*)*(.*)*(.*)*x", "(a|a)*b" * 30, "(a|a|b){0,900}", ".{400}.*{400}", "((a*)*)*" * 100, "(((){900}){900}){900}"],
)
def test_what_makes_re_hang(pattern):
    """No answer takes long: the pattern is refused, or found not to fit."""
    begin, table = time.process_time(), Patterns("file.json", {pattern: 1})
    try:
        for i in range(300):
            assert table.find([f"{i}." + "ab" * 90 + "!"], 0) == 0
    except MindSigmaError as error:
        assert "file.json" in str(error) and "list the modules by name" in str(error)
    assert time.process_time() - begin < 8


@pytest.mark.parametrize(
    "pattern", ["(", ")", "[a", "*a", "a**", "(?=a)", "(?P<n>a)", "(a)\\1", "\\b", "a{2", "[b-a]", "a" * 1001 + "*"]
)
def test_refused(pattern):
    with pytest.raises(MindSigmaError, match="list the modules by name"):
        found(pattern, "aa")
