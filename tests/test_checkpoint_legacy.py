"""Files that torch.save wrote before PyTorch 1.6: what PyTorch reads from them, and nothing is run."""

import pickle
import struct

import numpy as np
import pytest
from conftest import GOLDEN

from mindsigma.errors import MindSigmaError
from mindsigma.weights.formats.reader import open_checkpoint
from mindsigma.weights.formats.torch_legacy import MAGIC

FILE = GOLDEN / "legacy" / "torch_legacy.pth"


def test_tensors_are_those_that_pytorch_saved():
    source, wanted = open_checkpoint(FILE), np.load(GOLDEN / "legacy" / "torch_legacy.npz")
    assert sorted(source.names()) == sorted(wanted.files) and source.extra == {"epoch": 3}
    for name in source.names():
        assert np.array_equal(np.asarray(source.read(name), np.float32), wanted[name]), name
    assert [str(source.dtype(name)) for name in ("half", "bf", "count", "flags")] == [
        "float16",
        "bfloat16",
        "int64",
        "bool",
    ]


def test_damage_is_refused_or_changes_numbers_alone(tmp_path):
    data, path = FILE.read_bytes(), tmp_path / "a.pth"
    random, refusals = np.random.default_rng(0), 0
    for case in range(250):
        changed = bytearray(data)
        if case % 2:
            changed[random.integers(len(data))] ^= 1 << random.integers(8)
        else:
            del changed[random.integers(len(data)) :]
        path.write_bytes(changed)
        try:
            source = open_checkpoint(path)
            for name in source.names():
                source.read(name)
        except MindSigmaError as error:
            assert str(error).isprintable() and str(path) in str(error)
            refusals += 1
    assert refusals > 150


def test_programs_are_refused(tmp_path):
    """The same file with a pickle that names what it must not, and with storages that are not there."""
    number = pickle.dumps(1001, protocol=2) + pickle.dumps({"little_endian": True}, protocol=2)
    reference = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04NtQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + b"K\x00(K\x04t(K\x01t\x89}tR"
    state = b"\x80\x02}X\x01\x00\x00\x00a" + tensor + b"s."
    keys, values = pickle.dumps(["0"], protocol=2), struct.pack("<q4f", 4, 1, 2, 3, 4)
    path = tmp_path / "a.pth"

    def refused(match, *parts):
        path.write_bytes(MAGIC + number + b"".join(parts))
        with pytest.raises(MindSigmaError, match=match):
            open_checkpoint(path)

    path.write_bytes(MAGIC + number + state + keys + values)
    assert np.asarray(open_checkpoint(path).read("a")).tolist() == [1, 2, 3, 4]
    refused("posix.system", b"\x80\x02cposix\nsystem\n(X\x02\x00\x00\x00idtR.", keys, values)
    refused("list of storages", state, pickle.dumps(["1"], protocol=2), values)
    refused("list of storages", state, pickle.dumps([["0"]], protocol=2), values)
    refused("length that its tensors tell", state, keys, struct.pack("<q4f", 2**40, 1, 2, 3, 4))
    refused("is cut off", state, keys, values[:-1])
    refused("malformed", state[:-1])
    number = pickle.dumps(1001, protocol=2) + pickle.dumps({"little_endian": False}, protocol=2)
    refused("byte order", state, keys, values)


def test_files_of_python_2(tmp_path):
    """As lpips has them: strings of bytes, an OrderedDict made of a list of pairs, tensors as before PyTorch 0.4."""
    path, keys, values = tmp_path / "a.pth", b"\x80\x02]U\x0212a.", struct.pack("<q4f", 4, 1, 2, 3, 4)
    number = b"\x80\x02M\xe9\x03." + b"\x80\x02}U\x0dlittle_endian\x88s."
    storage = b"(U\x07storagectorch\nFloatStorage\nU\x0212U\x06cuda:0K\x04NtQ"
    old = b"ctorch._utils\n_rebuild_tensor\n(" + storage + b"K\x00(K\x02K\x02t(K\x02K\x01ttR"

    def written(state):
        path.write_bytes(MAGIC + number + b"\x80\x02" + state + b"." + keys + values)
        return open_checkpoint(path)

    def ordered(*pairs):
        return b"ccollections\nOrderedDict\n](" + b"".join(b"](" + pair + b"e" for pair in pairs) + b"e\x85R"

    assert written(ordered(b"U\x01a" + old)).read("a").tolist() == [[1, 2], [3, 4]]
    long_string = b"T\x01\x00\x00\x00a"
    assert written(b"}" + long_string + old + b"s").read("a").tolist() == [[1, 2], [3, 4]]
    for state, match in (
        (ordered(b"U\x01a" + old + b"K\x01"), "malformed"),
        (ordered(old), "malformed"),
        (b"ccollections\nOrderedDict\n" + ordered(b"U\x01a" + old) + b"\x85R", "malformed"),
        (ordered(b"U\x01\xff" + old), "malformed"),
        (ordered(b"U\x01acposix\nsystem\n"), "posix.system"),
        (ordered(b"U\x01actorch._utils\n_rebuild_tensor\n"), "_rebuild_tensor"),
        (ordered(b"U\x01a" + old.replace(b"ttR", b"t\x89tR")), "malformed"),
        (ordered(b"U\x01a" + old.replace(storage, b"K\x01")), "malformed"),
    ):
        with pytest.raises(MindSigmaError, match=match):
            written(state)
