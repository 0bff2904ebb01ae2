"""Damage that knows nothing of a format: what disks, networks and editors do to a file."""


def _place(rng, data, head=None):
    return int(rng.integers(max(1, min(len(data), head or len(data)))))


def _flip(count, head=None):
    def change(rng, data):
        data = bytearray(data)
        for _ in range(count):
            data[_place(rng, data, head)] ^= 1 << int(rng.integers(8))
        return bytes(data)

    return change


def _overwrite(make, head=None):
    """Replace as many bytes as `make` gives."""

    def change(rng, data):
        at, content = _place(rng, data, head), make(rng)
        return data[:at] + content + data[at + len(content) :]

    return change


def _insert(make, head=None):
    def change(rng, data):
        at = _place(rng, data, head)
        return data[:at] + make(rng) + data[at:]

    return change


def _noise(count):
    return lambda rng: rng.bytes(count)


def _cut_out(rng, data):
    one, two = sorted((_place(rng, data), _place(rng, data)))
    return data[:one] + data[two + 1 :]


def _double(rng, data):
    one, two = sorted((_place(rng, data), _place(rng, data)))
    return data[:two] + data[one:two] + data[two:]


def _swap(rng, data):
    """Two blocks in each other's place."""
    size = max(1, len(data) // 8)
    one, two = sorted((_place(rng, data), _place(rng, data)))
    a, b = data[one : one + size], data[two : two + size]
    result = bytearray(data)
    result[one : one + size], result[two : two + size] = b[: len(a)].ljust(len(a), b"\0"), a[: len(b)].ljust(len(b))
    return bytes(result)


MUTATIONS = {
    "empty": lambda rng, data: b"",
    "one byte": lambda rng, data: data[:1],
    "truncated": lambda rng, data: data[: _place(rng, data)],
    "truncated early": lambda rng, data: data[: _place(rng, data, 200)],
    "last byte lost": lambda rng, data: data[:-1],
    "first byte lost": lambda rng, data: data[1:],
    "half twice": lambda rng, data: data[: len(data) // 2] * 2,
    "twice": lambda rng, data: data * 2,
    "bit flipped": _flip(1),
    "bit of the head flipped": _flip(1, 512),
    "bit of the start flipped": _flip(1, 32),
    "eight bits flipped": _flip(8),
    "many bits of the head flipped": _flip(40, 1024),
    "bytes overwritten": _overwrite(_noise(16)),
    "head overwritten": _overwrite(_noise(4), 256),
    "page of zeros": _overwrite(lambda rng: bytes(4096)),
    "zeros in the head": _overwrite(lambda rng: bytes(8), 256),
    "all ones": _overwrite(lambda rng: b"\xff" * 8, 256),
    "noise inserted": _insert(_noise(7)),
    "noise inserted early": _insert(_noise(3), 128),
    "newlines": _insert(lambda rng: b"\r\n", 512),
    "noise appended": lambda rng, data: data + rng.bytes(33),
    "zeros appended": lambda rng, data: data + bytes(512),
    "noise before": lambda rng, data: rng.bytes(5) + data,
    "noise alone": lambda rng, data: rng.bytes(2000),
    "range cut out": _cut_out,
    "range doubled": _double,
    "blocks swapped": _swap,
    "reversed": lambda rng, data: data[::-1],
    "text mode": lambda rng, data: data.replace(b"\n", b"\r\n"),
    "high bits lost": lambda rng, data: bytes(byte & 127 for byte in data),
    "as UTF-8": lambda rng, data: data.decode("latin-1").encode("utf-8"),
    "wrong magic": lambda rng, data: b"\x7fELF" + data[4:],
    "Git LFS pointer": lambda rng, data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "page of a site": lambda rng, data: b"<!DOCTYPE html>\n<html><body>404 not found</body></html>\n",
    "old pickle": lambda rng, data: b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03." + data,
    "pickle of a call": lambda rng, data: b"cos\nsystem\n(S'touch executed'\ntR.",
    "protocol 0": lambda rng, data: b"(dp0\nS'a'\np1\nI1\ns.",
    "gzip": lambda rng, data: b"\x1f\x8b\x08\x00" + data,
    "HDF5": lambda rng, data: b"\x89HDF\r\n\x1a\n" + data,
}
