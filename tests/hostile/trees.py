"""Folders that are not what they seem: links out of them, loops, devices, pipes, absent and ambiguous files."""

import os

from hostile.sources import SOURCES, kind_of_file

WEIGHTS = ("safetensors", "torch", "mindspore")


def applies(name, source):
    """Whether a mutation suits a source: those of folders want one, those of configs want a config.json."""
    files = SOURCES[source].files
    if name.startswith("config"):
        return "config.json" in files
    if name.startswith("folder"):
        return SOURCES[source].entry == "."
    if name.startswith("part"):
        return "pipeline" in source
    return True


def _weights(rng, folder):
    files = sorted(f for f in folder.rglob("*") if f.is_file() and kind_of_file(f.name) in WEIGHTS)
    return files[int(rng.integers(len(files)))]


def _config(rng, folder):
    files = sorted(folder.rglob("config.json"))
    return files[int(rng.integers(len(files)))]


def _tokenizer(rng, folder):
    return next((folder / "tokenizer").iterdir())


def _replaced(find, make):
    """A file removed and something else made at its place."""

    def change(rng, folder, path):
        file = find(rng, folder)
        content = file.read_bytes()
        file.unlink()
        make(file, content, folder)

    return change


def _link_out(file, content, folder):
    """The file stands outside and a link to it within: the tree would be read, though it does not belong to it."""
    outside = folder.parent / f"{folder.name} outside"
    outside.write_bytes(content)
    file.symlink_to(outside)


def _sparse(file, content, folder):
    """A terabyte that takes no space."""
    file.write_bytes(content)
    os.truncate(file, 2**40)


def _full_link(file, content, folder):
    file.symlink_to("/dev/full")


def _folder(file, content, folder):
    file.mkdir()
    (file / file.name).write_bytes(content)


def _hidden(rng, folder, path):
    file = _weights(rng, folder)
    file.rename(file.with_name(f".{file.name}"))


def _ambiguous(rng, folder, path):
    file = _weights(rng, folder)
    for name in ("one", "two"):
        file.with_name(name + file.suffix).write_bytes(file.read_bytes())


def _renamed_config(rng, folder, path):
    file = _config(rng, folder)
    file.rename(file.with_name("config.yaml"))


def _part(make):
    def change(rng, folder, path):
        parts = sorted(entry for entry in folder.iterdir() if entry.is_dir())
        make(parts[int(rng.integers(len(parts)))], parts)

    return change


def _empty(part, parts):
    for file in part.iterdir():
        file.unlink()


def _swapped(part, parts):
    other = next(p for p in parts if p != part)
    part.rename(part.with_name("x"))
    other.rename(part)
    part.with_name("x").rename(other)


def _linked_to_itself(part, parts):
    part.rename(part.with_name("x"))
    part.symlink_to(part.name)


def _a_file(part, parts):
    part.rename(part.with_name("x"))
    part.write_bytes(b"x")


MUTATIONS = {
    "weights a link to nowhere": _replaced(_weights, lambda file, content, folder: file.symlink_to("absent")),
    "weights a loop": _replaced(_weights, lambda file, content, folder: file.symlink_to(file.name)),
    "weights a folder": _replaced(_weights, _folder),
    "weights a pipe": _replaced(_weights, lambda file, content, folder: os.mkfifo(file)),
    "weights /dev/zero": _replaced(_weights, lambda file, content, folder: file.symlink_to("/dev/zero")),
    "weights /dev/full": _replaced(_weights, _full_link),
    "weights /etc/passwd": _replaced(_weights, lambda file, content, folder: file.symlink_to("/etc/passwd")),
    "weights lost": _replaced(_weights, lambda file, content, folder: None),
    "weights of a terabyte": _replaced(_weights, _sparse),
    "folder: link out": _replaced(_weights, _link_out),
    "folder: hidden weights": _hidden,
    "folder: two candidates": _ambiguous,
    "config lost": _replaced(_config, lambda file, content, folder: None),
    "config a link to nowhere": _replaced(_config, lambda file, content, folder: file.symlink_to("absent")),
    "config a loop": _replaced(_config, lambda file, content, folder: file.symlink_to(file.name)),
    "config a folder": _replaced(_config, _folder),
    "config a pipe": _replaced(_config, lambda file, content, folder: os.mkfifo(file)),
    "config /dev/zero": _replaced(_config, lambda file, content, folder: file.symlink_to("/dev/zero")),
    "config /etc/passwd": _replaced(_config, lambda file, content, folder: file.symlink_to("/etc/passwd")),
    "config link out": _replaced(_config, _link_out),
    "part: tokenizer link out": _replaced(_tokenizer, _link_out),
    "part: tokenizer /etc/passwd": _replaced(_tokenizer, lambda file, content, folder: file.symlink_to("/etc/passwd")),
    "part: tokenizer of a terabyte": _replaced(_tokenizer, _sparse),
    "config of a terabyte": _replaced(_config, _sparse),
    "config of another name": _renamed_config,
    "part empty": _part(_empty),
    "part swapped": _part(_swapped),
    "part linked to itself": _part(_linked_to_itself),
    "part a file": _part(_a_file),
}
