"""How far a work is: a bar on a terminal, plain lines in a file; times as people say them."""

import sys
import time

from mindsigma.errors import say

QUIET_SECONDS = 5.0  # between two lines in a file
DELAY_SECONDS = 0.5  # bars of shorter works are not shown at all, where that is asked for


def duration(seconds):
    """A time in words: "0.4 s", "12 s", "4 min 05 s", "1 h 03 min", "2 d 4 h"."""
    if seconds < 1:
        return f"{max(seconds, 0.0):.1f} s"
    seconds = round(seconds)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {seconds % 60:02d} s" if minutes else f"{seconds} s"


class Estimate:
    """Time that is left, from the works done after the first, whose time is that of compilation or of a first read."""

    def __init__(self, total):
        self.total, self.began, self.first = total, time.perf_counter(), None

    def left(self, done):
        """Text such as "3 s left", "" where nothing can be said yet."""
        now = time.perf_counter()
        if self.first is None:
            self.first = (done, now) if done else None
            return ""
        before, then = self.first
        if done <= before or not self.total or done >= self.total:
            return ""
        return f"{duration((self.total - done) * (now - then) / (done - before))} left"


class Lines:
    """A bar for files: a line now and then, one when all is done. What is used of tqdm's interface is there."""

    def __init__(self, total, desc, unit, unit_scale=False, delay=0.0):
        self.total, self.desc, self.unit, self.scale, self.delay = total, desc, unit, unit_scale, delay
        self.n, self.estimate = 0, Estimate(total)
        self._said = self.estimate.began

    def update(self, n=1):
        """`n` more works are done."""
        self.n += n
        left, now = self.estimate.left(self.n), time.perf_counter()
        if now - self._said >= QUIET_SECONDS and self.n < (self.total or 0):
            self._said = now
            self._say(f", {left}" if left else "")

    def _say(self, tail):
        amounts = (f"{amount / 1e9:.2f}" for amount in (self.n, self.total)) if self.scale else (self.n, self.total)
        share = f"{self.n / self.total:.0%} " if self.total else ""
        unit = f"G{self.unit}" if self.scale else f"{self.unit}s"
        say(f"{self.desc}: {share}{'/'.join(map(str, amounts))} {unit}{tail}", to=sys.stderr)

    def close(self):
        """Say that it is over, if it came to its end."""
        spent = time.perf_counter() - self.estimate.began
        if self.total and self.n >= self.total and spent >= self.delay:
            self._say(f" in {duration(spent)}")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            self.close()


def bar(total, desc, unit, unit_scale=False, delay=0.0, disable=False):
    """A context manager with update(n): a bar if stderr is a terminal, else Lines.

    Args:
        total: number of works. unit: what one is called ("step"); unit_scale: in units of 10^3, 10^6 ... (bytes).
        delay: seconds that a work must take to be shown.
        disable: show nothing.
    """
    from tqdm import tqdm

    if not disable and not sys.stderr.isatty():
        return Lines(total, desc, unit, unit_scale, delay)

    estimate = Estimate(total)

    class Bar(tqdm):
        """tqdm with times in words, and the time that is left without that of the first work."""

        def update(self, n=1):
            estimate.left(self.n + n)  # also where the bar itself is not drawn anew
            return super().update(n)

        @property
        def format_dict(self):
            spent = time.perf_counter() - estimate.began
            left = estimate.left(self.n)
            return {**super().format_dict, "spent": duration(spent), "left": f", {left}" if left else ""}

    form = "{l_bar}{bar}| {n_fmt}/{total_fmt} {unit}, {spent} spent{left}{postfix}"
    return Bar(
        total=total, desc=desc, unit=unit, unit_scale=unit_scale, delay=delay, disable=disable, bar_format=form,
        dynamic_ncols=True,
    )  # fmt: skip
