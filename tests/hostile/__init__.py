"""Broken and malicious checkpoints, made from small real ones: every case is (source, mutation, seed), reproducible.

    sources.build_all(pristine)
    for case in cases(seed):
        path = make(case, pristine, folder)

A source is added in sources.py, a mutation in the module of what it changes.
"""

import shutil
import zlib
from typing import NamedTuple

import numpy as np

from hostile import archives, blind, configs, headers, messages, pickles, trees, vocabularies
from hostile.sources import SOURCES, kind_of_file

TABLES = (
    ("safetensors", headers.MUTATIONS),
    ("torch", archives.MUTATIONS),
    ("torch", pickles.MUTATIONS),
    ("mindspore", messages.MUTATIONS),
    ("index", configs.INDEX),
    ("config", configs.CONFIG),
    ("tokenizer", vocabularies.MUTATIONS),
    ("", blind.MUTATIONS),
)


class Case(NamedTuple):
    """One hostile input: name of the source, of the mutation, and the seed of what the mutation draws."""

    source: str
    mutation: str
    seed: int

    def __str__(self):
        return f"{self.source}/{self.mutation}/{self.seed}"

    def rng(self):
        """Generator of this case alone."""
        return np.random.default_rng([self.seed, zlib.crc32(f"{self.source}/{self.mutation}".encode())])


def mutations_of(source):
    """dict mutation name -> function of a source: (rng, folder, path) changes the files below `folder` in place."""
    kinds = {kind_of_file(name) for name in SOURCES[source].files}
    found = {f"tree: {name}": change for name, change in trees.MUTATIONS.items() if trees.applies(name, source)}
    for kind, table in TABLES:
        if not kind or kind in kinds:
            found.update({f"{kind or 'blind'}: {name}": _on_a_file(kind, change) for name, change in table.items()})
    return found


def cases(seed):
    """List of every mutation of every source, once; their order is drawn."""
    found = [Case(source, mutation, seed) for source in SOURCES for mutation in mutations_of(source)]
    np.random.default_rng(seed).shuffle(found)
    return [Case(*case[:2], seed) for case in found]


def selection(seed, count):
    """`count` of these cases, among them every mutation on a drawn source."""
    everything = cases(seed)
    chosen = list({case.mutation: case for case in everything}.values())
    taken = set(chosen)
    return chosen + [case for case in everything if case not in taken][: count - len(chosen)]


def make(case, pristine, folder):
    """Build a case below `folder` (a new path) from the built sources in `pristine`; returns the path to convert."""
    shutil.copytree(pristine / case.source, folder, symlinks=True)
    path = folder / SOURCES[case.source].entry
    mutations_of(case.source)[case.mutation](case.rng(), folder, path)
    return path


def _on_a_file(kind, change):
    """A change of bytes as a change of one file of the kind, drawn among those of the source."""

    def mutate(rng, folder, path):
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        chosen = [file for file in files if kind in ("", kind_of_file(file.name))]
        file = chosen[int(rng.integers(len(chosen)))]
        file.write_bytes(change(rng, file.read_bytes()))

    return mutate
