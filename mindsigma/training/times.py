"""What a process spends its time with, and which process is the slowest: the others wait for it in every step."""

import json
import time

import numpy as np

from mindsigma.weights.formats.atomic import naming

PARTS = ("loader", "step", "collective")
FIELDS = {"loader": "loader", "step": "step_seconds", "collective": "collective"}  # of the file
SLOW = 1.2  # times the median of all processes: worth a line


class Times:
    """Seconds of the steps since the last report.

    Args:
        collectives: Collectives.
        path: Path of a file of JSON lines that the first process writes, where there are several.
        step: that the run goes on from.
    """

    def __init__(self, collectives, path, step=0):
        self.collectives, self.path = collectives, path
        self._sums, self._steps = dict.fromkeys(PARTS, 0.0), 0
        if collectives.ranks.first and not collectives.alone and step == 0:
            path.unlink(missing_ok=True)

    def of_loader(self, batches):
        """Iterate over batches and count the time that they are waited for."""
        batches = iter(batches)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self._sums["loader"] += time.perf_counter() - began
            yield batch

    def of_step(self, call, trainings, compiles):
        """(what call() returns, its seconds), counted unless it compiles.

        trainings: dict of the TrainingSteps that it runs; a step that is not one graph knows how long it waited for
        collectives.
        """
        began = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - began
        waited = sum(training.waited() for training in trainings.values())
        if not compiles:
            self._steps += 1
            self._sums["step"] += seconds
            self._sums["collective"] += waited
        return result, seconds

    def told(self, step):
        """Lines about the slowest process since the last call, none unless it stands out. Every process calls it."""
        ranks, mine = self.collectives.ranks, np.array([self._sums[part] for part in PARTS]) / max(self._steps, 1)
        counted, self._steps, self._sums = self._steps, 0, dict.fromkeys(PARTS, 0.0)
        if self.collectives.alone or not counted:
            return []
        table = np.zeros((ranks.count, len(PARTS)))
        table[ranks.rank] = mine
        table = np.reshape(self.collectives.total(table.ravel()), table.shape)
        own = table[:, 0] + table[:, 1] - table[:, 2]  # what the others wait for
        slowest, median = int(np.argmax(own)), float(np.median(own))
        parts = dict(zip(PARTS, table[slowest]))
        if ranks.first:
            rounded = {FIELDS[name]: round(float(value), 4) for name, value in parts.items()}
            line = {"step": step, "slowest": slowest, **rounded}
            with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({**line, "median": round(median, 4)}) + "\n")
        if own[slowest] < SLOW * median:
            return []
        spent = ", ".join(f"{name} {value:.2f} s" for name, value in parts.items())
        text = f"process {slowest} is the slowest, {own[slowest]:.2f} s a step, the median {median:.2f} ({spent})"
        return [f"step {step}: {text}"]
