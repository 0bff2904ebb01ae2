"""Times in words, and bars that write plain lines into files."""

import pytest

from mindsigma import progress


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"), (0.44, "0.4 s"), (1, "1 s"), (12.4, "12 s"), (59.6, "1 min 00 s"), (245, "4 min 05 s"),
        (3599.7, "1 h 00 min"), (3780, "1 h 03 min"), (86399, "23 h 59 min"), (187200, "2 d 4 h"),
    ],
)  # fmt: skip
def test_duration(seconds, text):
    assert progress.duration(seconds) == text


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds): let so much time pass."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_lines_in_a_file(clock, capsys):
    """The first step, with its compilation, does not count for the estimate."""
    with progress.bar(10, "denoise", "step") as done:
        for seconds in (60, *[2] * 9):
            clock(seconds)
            done.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "denoise: 10% 1/10 steps",
        "denoise: 40% 4/10 steps, 12 s left",
        "denoise: 70% 7/10 steps, 6 s left",
        "denoise: 100% 10/10 steps in 1 min 18 s",
    ]


def test_what_ends_early_or_soon_says_nothing(clock, capsys):
    with progress.bar(1, "load", "B", unit_scale=True, delay=2.0) as done:
        done.update()
    with pytest.raises(ValueError), progress.bar(2, "x", "step") as done:
        done.update()
        raise ValueError
    with progress.bar(2, "x", "step", disable=True) as done:
        done.update(2)
    assert capsys.readouterr().err == ""


def test_bytes(clock, capsys):
    with progress.bar(int(19e9), "load T5", "B", unit_scale=True) as done:
        clock(6)
        done.update(int(9.5e9))
        clock(6)
        done.update(int(9.5e9))
    assert capsys.readouterr().err.splitlines() == [
        "load T5: 50% 9.50/19.00 GB",
        "load T5: 100% 19.00/19.00 GB in 12 s",
    ]


def test_a_bar_on_a_terminal(clock, monkeypatch, capsys):
    import io
    import sys

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress.bar(4, "denoise", "step") as done:
        done.update()
        clock(3700)
        done.update()
    assert "2/4 step, 1 h 01 min spent, 2 h 03 min left" in screen.getvalue()
