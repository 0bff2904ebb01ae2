"""Checkpoint files: real ones give the weights they were saved with; damaged or hostile ones give one clear error."""

import json
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hostile.encoding import Call, Name, Raw, Ref, encode, write_zip
from safetensors.numpy import save_file

from mindsigma.errors import MindSigmaError
from mindsigma.weights import open_checkpoint
from mindsigma.weights.formats import torch_file
from mindsigma.weights.formats.torch_file import read_torch

GOLDEN = Path(__file__).parent / "golden"
BF16 = np.dtype(ml_dtypes.bfloat16)


def refused(path, *words, **kwargs):
    """The MindSigmaError of one line that opening `path` must end in, checked for `words`."""
    with pytest.raises(MindSigmaError) as caught:
        open_checkpoint(path, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < 800
    for word in words:
        assert word in message
    return message


def snapshot(source):
    return {name: (source.dtype(name), source.shape(name), source.read(name).tobytes()) for name in source}


def tensor(key="0", shape=(2, 3), strides=(3, 1), offset=0, count=6, kind="torch.FloatStorage"):
    storage = Ref(("storage", Name(kind), key, "cpu", count))
    return Call(
        "torch._utils._rebuild_tensor_v2", storage, offset, shape, strides, False, Call("collections.OrderedDict")
    )


SIX = np.arange(1, 7, dtype=np.float32) * 1.5


def write_torch(path, saved, storages=None, byteorder=b"little", compress=(), more=()):
    """A zip as torch.save writes it; by default with one storage of six numbers."""
    return write_zip(path, saved, {"0": SIX.tobytes()} if storages is None else storages, byteorder, compress, more)


def write_safetensors(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin=0, end=24, dtype="F32", shape=(2, 3)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "weights"  # no extension: content alone tells what it is


# real files


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.pth")), ids=lambda path: path.stem)
def test_golden_file_is_mapped_read_only(path):
    source = open_checkpoint(path)
    assert source.path == path
    assert len(source.names()) > 50
    for name in source:
        array = source.read(name)
        assert type(array) is np.ndarray
        assert not array.flags.writeable
        assert np.isfinite(array.astype(np.float32)).all()


def test_golden_weights_are_those_drawn_from_the_seed():
    source, case = open_checkpoint(GOLDEN / "ms_kv_conv.pth"), np.load(GOLDEN / "ms_kv_conv.npz")
    assert "blocks.1.attn.sr.weight" in source
    for name in set(source) - {"pos_embed"}:
        shape = source.shape(name)
        drawn = np.random.default_rng([int(case["seed"]), zlib.crc32(name.encode())]).standard_normal(shape)
        drawn = drawn.astype(np.float32) / np.float32((shape[-1] if len(shape) > 1 else 8) ** 0.5)
        np.testing.assert_array_equal(source.read(name), drawn + np.float32(name.endswith("norm.weight")), err_msg=name)


def test_safetensors_written_by_the_reference_implementation(file):
    kinds = ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8")
    arrays = {f"t.{kind}": np.arange(6).reshape(2, 3).astype(kind) for kind in kinds}
    arrays |= {"b": np.array([True, False]), "none": np.zeros((0, 4), np.float32), "one": np.array(3, np.float32)}
    save_file(arrays, file, metadata={"format": "np"})
    source = open_checkpoint(file)
    assert source.metadata == {"format": "np"}
    assert source.extra == {}
    assert sorted(source.names()) == sorted(arrays)
    for name, array in arrays.items():
        assert (source.dtype(name), source.shape(name)) == (array.dtype, array.shape)
        np.testing.assert_array_equal(source.read(name), array)
        assert not source.read(name).flags.writeable
    with pytest.raises(MindSigmaError, match="holds no tensor 'absent'"):
        source.shape("absent")


def test_safetensors_bfloat16(file):
    values = np.array([1.5, -2, 0.25], BF16)
    source = open_checkpoint(write_safetensors(file, {"w": entry(0, 6, "BF16", (3,))}, values.tobytes()))
    assert source.dtype("w") == BF16
    np.testing.assert_array_equal(source.read("w"), values)


def test_a_tensor_is_not_read_before_it_is_used(file):
    size = 8 * 2**30
    write_safetensors(file, {"w": entry(0, size, "U8", (size,))})
    os.truncate(file, file.stat().st_size + size)  # sparse
    assert open_checkpoint(file).read("w")[-1] == 0


# safetensors, refused

F32_6 = SIX.tobytes()
BAD_HEADERS = {
    "not JSON": (b"{oops", "not valid JSON"),
    "not an object": (b"[1]    ", "neither"),
    "not UTF-8": (b'{"\xff": 1}', "not valid JSON"),
    "nested deeply": (b'{"a":' + b"[" * 100_000, "not valid JSON"),
    "key twice": (b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2), "key 'a' twice"),
    "field twice": (b'{"a": {"dtype": "F32", "dtype": "F32"}}', "key 'dtype' twice"),
    "long number": (b'{"a": {"shape": [%s]}}' % (b"9" * 5000), "number of 5000 digits"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [6]}}, "'a' is not described"),
    "no table": ({"a": 3}, "'a' is not described"),
    "unknown dtype": ({"a": entry(dtype="F4")}, "unknown dtype F4"),
    "list dtype": ({"a": entry(dtype=["F32"])}, "unknown dtype"),
    "negative shape": ({"a": entry(shape=(-2, -3))}, "impossible shape [-2, -3]"),
    "fractional shape": ({"a": entry(shape=(2.0, 3))}, "impossible shape"),
    "boolean shape": ({"a": entry(shape=(True, 6))}, "impossible shape"),
    "huge shape": ({"a": entry(0, 0, shape=(0, 10**18, 10**18))}, "impossible shape"),
    "rank": ({"a": entry(shape=[1] * 40)}, "impossible shape"),
    "shape no list": ({"a": {**entry(), "shape": 6}}, "impossible shape"),
    "negative offset": ({"a": entry(-24, 0)}, "impossible data_offsets"),
    "three offsets": ({"a": {**entry(), "data_offsets": [0, 24, 24]}}, "impossible data_offsets"),
    "length": ({"a": entry(shape=(2, 2))}, "spans 24 bytes where its shape and dtype need 16"),
    "overlap": ({"a": entry(0, 16, shape=(4,)), "b": entry(12, 24, shape=(3,))}, "'b' overlaps"),
    "hole": ({"a": entry(0, 8, shape=(2,)), "b": entry(12, 24, shape=(3,))}, "'b' leaves a hole of 4 bytes"),
    "late start": ({"a": entry(4, 24, shape=(5,))}, "hole of 4 bytes"),
    "outside": ({"a": entry(0, 48, shape=(12,))}, "24 bytes of tensor data found, 48 expected"),
    "rest": ({"a": entry(0, 20, shape=(5,))}, "24 bytes of tensor data found, 20 expected"),
    "metadata": ({"a": entry(), "__metadata__": {"epoch": 3}}, "__metadata__"),
    "metadata no map": ({"a": entry(), "__metadata__": "x"}, "__metadata__"),
    "newline in a name": ({"a\nb": entry()}, r"'a\nb' is empty or unprintable"),
    "surrogate in a name": (b'{"\\ud800": %b}' % json.dumps(entry()).encode(), r"'\ud800' is empty or unprintable"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_safetensors_header_is_refused(file, case):
    header, words = BAD_HEADERS[case]
    refused(write_safetensors(file, header, F32_6), str(file), words)


def test_safetensors_header_length_is_bounded(tmp_path):
    file = tmp_path / "w.safetensors"
    file.write_bytes((10**9).to_bytes(8, "little") + b"{}")
    refused(file, "claims 1000000000 bytes")
    file.write_bytes((1000).to_bytes(8, "little") + b"{}")
    refused(file, "truncated: 10 bytes found, at least 1008 expected")


# PyTorch files


def test_torch_dtypes_views_and_containers(file):
    flat = np.arange(24)
    kinds = {"Float": "f4", "Half": "f2", "Double": "f8", "Long": "i8", "Int": "i4", "Short": "i2", "Char": "i1"}
    kinds = {f"torch.{k}Storage": np.dtype(v) for k, v in kinds.items()}
    kinds |= {"torch.ByteStorage": np.dtype("u1"), "torch.BoolStorage": np.dtype("?"), "torch.BFloat16Storage": BF16}
    storages = {kind: flat.astype(dtype).tobytes() for kind, dtype in kinds.items()}
    saved = {kind: tensor(kind, (4, 6), (6, 1), 0, 24, kind) for kind in kinds}
    f4 = {"key": "torch.FloatStorage", "count": 24}
    saved["transposed"] = tensor(shape=(6, 4), strides=(1, 6), **f4)
    saved["sliced"] = tensor(shape=(2, 3), strides=(6, 2), offset=6, **f4)
    saved["expanded"] = tensor(shape=(5, 2), strides=(0, 1), offset=3, **f4)
    saved["scalar"] = tensor(shape=(), strides=(), offset=23, **f4)
    saved["empty"] = tensor(shape=(0, 3), strides=(3, 1), **f4)
    saved["parameter"] = Call("torch._utils._rebuild_parameter", tensor(shape=(24,), strides=(1,), **f4), True, {})
    source = open_checkpoint(write_torch(file, saved, storages))
    grid = flat.astype(np.float32).reshape(4, 6)
    expected = {kind: flat.astype(dtype).reshape(4, 6) for kind, dtype in kinds.items()}
    expected |= {"transposed": grid.T, "sliced": grid[1:3, :6:2], "expanded": np.tile(np.float32([3, 4]), (5, 1))}
    expected |= {"scalar": np.float32(23), "empty": np.zeros((0, 3), np.float32), "parameter": grid.reshape(24)}
    assert source.names() == list(expected)
    for name, array in expected.items():
        assert source.dtype(name) == array.dtype
        np.testing.assert_array_equal(source.read(name), array)
        assert not source.read(name).flags.writeable


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_torch_plain_values_and_their_sharing(file, protocol):
    shared = [1, -70000, 2**40]
    value = {"a": shared, "b": (shared, 0.5, None, True, False), 3: "é" * 300, "d": [()], "e": ((1,), (1, 2, 3))}
    if protocol > 2:  # before, bytes are a call of _codecs.encode
        value["c"] = b"x"
    saved = pickle.dumps(value, protocol=protocol)
    read = read_torch(write_torch(file, Raw(saved[2:-1])))
    assert read == value
    assert read["b"][0] is read["a"]


def test_torch_inert_globals(file):
    ordered = encode(Call("collections.OrderedDict")) + b"(" + encode("n") + encode(1) + b"u"
    with_attribute = Raw(ordered + encode({"_metadata": {}}) + b"b")
    saved = {"o": with_attribute, "s": Call("torch.Size", (2, 3)), "d": Name("torch.bfloat16")}
    assert read_torch(write_torch(file, saved)) == {"o": {"n": 1}, "s": (2, 3), "d": "torch.bfloat16"}


@pytest.mark.parametrize(
    "saved",
    [
        lambda command: Call("os.system", command),
        lambda command: Call("posix.system", command),
        lambda command: Raw(encode("os") + encode("system") + b"\x93" + encode((command,)) + b"R"),  # STACK_GLOBAL
        lambda command: {"state_dict": {"a": tensor()}, "hook": Call("subprocess.getoutput", command)},
        lambda command: Call("builtins.eval", f"__import__('os').system({command!r})"),
        lambda command: Raw(encode(Name("os.system")) + encode((command,)) + b"\x81"),  # NEWOBJ
        lambda command: Raw(b"(" + encode(command) + b"ios\nsystem\n"),  # INST
        lambda command: Raw(b"(" + encode(Name("os.system")) + encode(command) + b"o"),  # OBJ
    ],
)
def test_a_foreign_callable_is_not_called(tmp_path, file, saved):
    marker = tmp_path / "marker"
    refused(write_torch(file, saved(f"touch {marker}")), str(file), "safetensors where you trust it")
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "argparse.Namespace",
        "torch.storage.UntypedStorage",
        "torch._utils._rebuild_tensor_v3",
        "torch.load",
    ],
)
def test_a_foreign_global_is_refused_by_its_full_name(file, name):
    refused(write_torch(file, {"state_dict": {"a": tensor()}, "args": Name(name)}), f"reference to {name} in {file};")


BAD_TENSORS = {
    "negative stride": (tensor(strides=(-3, 1), offset=5), "impossible offset"),
    "negative offset": (tensor(offset=-1), "impossible offset"),
    "negative shape": (tensor(shape=(-2, -3)), "impossible offset"),
    "boolean shape": (tensor(shape=(True, 3)), "impossible offset"),
    "beyond by offset": (tensor(offset=1), "reaches element 6 of 6"),
    "beyond by stride": (tensor(strides=(4, 1)), "reaches element 6 of 6"),
    "beyond by far": (tensor(shape=(2,), strides=(2**2000,)), "reaches element"),
    "beyond an empty storage": (tensor("e", (1,), (1,), count=0), "reaches element 0 of 0"),
    "spread": (tensor(shape=(2**40,), strides=(0,)), "spreads 6 elements"),
    "absurd count": (tensor(shape=(2**50, 2**50), strides=(0, 0)), "impossible offset"),
    "absurd empty": (tensor(shape=(0, 2**61), strides=(0, 0)), "impossible offset"),
    "rank": (tensor(shape=(1,) * 40, strides=(1,) * 40), "impossible offset"),
    "unlike ranks": (tensor(strides=(1,)), "malformed"),
    "shape no tuple": (tensor(shape=[2, 3]), "malformed"),
    "storage larger": (tensor(count=5), "has 24 bytes where 5 x float32"),
    "storage smaller": (tensor(count=7), "has 24 bytes where 7 x float32"),
    "storage of another dtype": (tensor(kind="torch.HalfStorage"), "has 24 bytes where 6 x float16"),
    "negative storage": (tensor(count=-6), "has 24 bytes where -6"),
    "absent storage": (tensor("9"), "storage 9 is absent"),
    "no storage": (Call("torch._utils._rebuild_tensor_v2", 1, 0, (), (), False, {}), "malformed"),
    "few arguments": (Call("torch._utils._rebuild_tensor_v2", 1), "malformed"),
    "parameter of nothing": (Call("torch._utils._rebuild_parameter", 1, True, {}), "malformed"),
    "storage called": (Call("torch.FloatStorage", 6), "malformed"),
    "reference": (Ref(("module", Name("torch.FloatStorage"), "0", "cpu", 6)), "malformed"),
    "reference to a callable": (Ref(("storage", Name("torch.Size"), "0", "cpu", 6)), "malformed"),
    "arguments to OrderedDict": (Call("collections.OrderedDict", [["a", 1]]), "malformed"),
    "stack underflow": (Raw(b"\x85" * 9), "malformed"),
    "no mark": (Raw(b"ttt"), "malformed"),
    "absent memo": (Raw(b"h\x09"), "malformed"),
    "unknown opcode": (Raw(b"\xff"), "malformed"),
    "items for a number": (Raw(b"K\x01K\x02K\x03s"), "malformed"),
    "append to a dict": (Raw(b"}K\x02a"), "malformed"),
    "state for a number": (Raw(b"K\x01}b"), "malformed"),
    "unhashable key": (Raw(encode({"a": 1})[:-1] + b"]K\x01u"), "malformed"),
    "key nested deeply": (Raw(b"})" + b"\x85" * 200_000 + b"K\x01s"), "malformed"),
    "global of no text": (Raw(b"])\x93"), "malformed"),
    "extension": (Raw(b"\x82\x01"), "instruction EXT1"),
    "loose storage": (Ref(("storage", Name("torch.FloatStorage"), "0", "cpu", 6)), "no named tensors: 'a'"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_torch_tensor_is_refused(file, case):
    value, words = BAD_TENSORS[case]
    refused(write_torch(file, {"a": value}, {"0": F32_6, "e": b""}), str(file), words)


def test_deep_nesting_harms_nobody(file):
    write_torch(file, {"state_dict": {"a": tensor()}, "deep": Raw(b")" + b"\x85" * 200_000)})
    assert open_checkpoint(file).names() == ["a"]


def test_torch_pickle_is_bounded(file, monkeypatch):
    write_torch(file, {"a": tensor()})
    monkeypatch.setattr(torch_file, "MAX_OPCODES", 5)
    refused(file, "its pickle is too long")
    monkeypatch.setattr(torch_file, "MAX_PICKLE", 50)
    refused(file, "over the limit of 50")


def test_torch_archive_is_refused(file):
    good = {"a": tensor()}
    for member in ("data.pkl", "data/0", "version"):
        refused(write_torch(file, good, compress=[member]), f"archive/{member} is compressed")
    refused(write_torch(file, good, more=[("data/0", F32_6)]), "two members are named archive/data/0")
    refused(write_torch(file, good, more=[("x/../../data.pkl", b"")], storages={}), "storage 0 is absent")
    refused(write_torch(file, good, byteorder=b"big"), "byte order is 'big'")
    refused(write_torch(file, good, byteorder=b"\n"), "byte order is '\\n'")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("weights.npy", b"1")
    refused(file, "not one of torch.save")


def patched(file, signature, member, offset, layout, *values):
    """Overwrite fields of the header of `member` that starts with `signature`."""
    content = bytearray(file.read_bytes())
    name_at = 30 if signature == b"PK\x03\x04" else 46
    name = f"archive/{member}".encode()
    at = next(
        i for i in range(len(content)) if content[i : i + 4] == signature and content[i + name_at :].startswith(name)
    )
    struct.pack_into(layout, content, at + offset, *values)
    file.write_bytes(content)
    return file


def test_torch_zip_headers_are_not_believed(file):
    central, local = b"PK\x01\x02", b"PK\x03\x04"

    def fresh():
        return write_torch(file, {"a": tensor()})

    refused(patched(fresh(), central, "data/0", 8, "<H", 1), "archive/data/0 is encrypted")
    refused(patched(fresh(), local, "data/0", 6, "<H", 1), "archive/data/0 differs")
    refused(patched(fresh(), local, "data/0", 8, "<H", 8), "archive/data/0 differs")
    refused(patched(fresh(), local, "data/0", 30, "<1s", b"x"), "archive/data/0 differs")
    refused(patched(fresh(), local, "data/0", 28, "<H", 1), "archive/data/0 overlaps")
    refused(patched(fresh(), central, "version", 20, "<II", 2**31, 2**31), "archive/version overlaps")
    refused(patched(fresh(), central, "data/0", 20, "<II", 20, 20), "archive/data/0 does not end where")
    refused(patched(fresh(), central, "data/0", 42, "<I", 2**31), "damaged PyTorch file")
    refused(patched(fresh(), central, "data/0", 42, "<I", 0), "damaged PyTorch file")


# damage to either format


def sound_files(folder):
    write_safetensors(
        folder / "safetensors", {"__metadata__": {"k": "v"}, "first": entry(), "second": entry(24, 48)}, F32_6 * 2
    )
    write_torch(folder / "torch", {"first": tensor(), "second": tensor("1")}, {"0": F32_6, "1": F32_6})
    return {"safetensors": folder / "safetensors", "torch": folder / "torch", "golden": GOLDEN / "ms_kv_conv.pth"}


@pytest.mark.parametrize("kind", ["safetensors", "torch", "golden"])
def test_truncated_file_is_refused(tmp_path, kind):
    content = sound_files(tmp_path)[kind].read_bytes()
    for length in np.linspace(0, len(content) - 1, 60).astype(int):
        (tmp_path / "cut").write_bytes(content[:length])
        message = refused(tmp_path / "cut", "cut")
        assert length < 16 or "truncated" in message


@pytest.mark.parametrize("kind", ["safetensors", "torch", "golden"])
def test_flipped_bit_changes_nothing_or_is_refused(tmp_path, kind):
    path = sound_files(tmp_path)[kind]
    sound, content = snapshot(open_checkpoint(path)), path.read_bytes()
    payload = set()  # bytes of tensors, which no format guards
    if kind == "golden":
        payload.update(range(12_000, content.index(b"PK\x01\x02")))
    else:
        start = -1
        while (start := content.find(F32_6, start + 1)) >= 0:
            payload.update(range(start, start + len(F32_6)))
    structure = [i for i in range(len(content)) if i not in payload]
    rng, flipped, refusals = np.random.default_rng(5), tmp_path / "flipped", 0
    for place, bit in zip(rng.choice(structure, 200), rng.integers(0, 8, 200)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(bit)
        flipped.write_bytes(damaged)
        try:
            read = snapshot(open_checkpoint(flipped))
        except MindSigmaError as error:
            assert "\n" not in str(error)
            refusals += 1
            continue
        if kind == "safetensors":  # without a checksum, a tensor's new name is as good as its old one
            assert [read[name] for name in read] == list(sound.values())
            assert sum(name not in sound for name in read) <= 1
        elif kind == "torch":
            assert read == sound
        else:
            assert {k: v[:2] for k, v in read.items()} == {k: v[:2] for k, v in sound.items()}
    assert refusals > 60


# which file, which tensors


def test_other_kinds_of_file_are_named(tmp_path, file):
    refused(tmp_path / "absent.pth", "absent.pth: no such file")
    for content, words in {
        b"": "the file is empty",
        b"hello, weights": "neither a safetensors file",
        b"\n.\n\x03a.w\x12'\x08\x02\x08\x03\x12\x07Float32": "damaged MindSpore checkpoint: truncated",
        b"\n\n\nfoo": "neither a safetensors file",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0": "git lfs pull",
        pickle.dumps({"a": 1}, protocol=2): "an old PyTorch pickle; re-save",
        b"{}": "without the weight_map",
        b'{"weight_map": {"a": 3}}': "without the weight_map",
        b'{"weight_map": {"a": "x", "a": "y"}}': "key 'a' twice",
        b'{"weight_map"': "not valid JSON",
        b"PK\x03\x04": "truncated",
    }.items():
        file.write_bytes(content)
        refused(file, str(file), words)
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file")


def test_state_dict_is_found(file):
    a, b = tensor(shape=(6,), strides=(1,)), tensor()
    both = {
        "state_dict": {"a": a},
        "state_dict_ema": {"b": b},
        "epoch": 3,
        "lr": 0.5,
        "note": None,
        "optimizer": {"x": 1},
    }
    source = open_checkpoint(write_torch(file, both))
    assert (source.names(), source.extra) == (["a"], {"epoch": 3, "lr": 0.5, "note": None})
    assert open_checkpoint(file, ema=True).names() == ["b"]
    assert open_checkpoint(write_torch(file, {"model": {"a": a}, "step": 7})).extra == {"step": 7}
    assert open_checkpoint(write_torch(file, {"a": a, "model": b})).names() == ["a", "model"]
    refused(file, "no state_dict_ema", ema=True)
    only = open_checkpoint(write_torch(file, {"state_dict_ema": {"b": b}}))
    assert only.names() == ["b"] and only.averaged and "state_dict_ema" in only.notes[0]
    refused(write_torch(file, {"state_dict": {"a": a, "scale": 0.5}}), "no named tensors: 'scale'")
    refused(write_torch(file, {"a": a, "epoch": 3}), "no named tensors: 'epoch'")
    refused(write_torch(file, {"state_dict": {1: a}}), "no named tensors: '1'")
    refused(write_torch(file, {"state_dict": {}}), "is empty")
    refused(write_torch(file, [a]), "holds a list")
    refused(write_torch(file, b), "holds a ndarray")
    refused(write_safetensors(file, {"a": entry()}, F32_6), "open it without EMA", ema=True)


# folders and shards


@pytest.fixture
def sharded(tmp_path):
    """A folder with an index and two shards, one of either format."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(folder / "s-1.safetensors", {"__metadata__": {"format": "pt"}, "a": entry()}, F32_6)
    write_torch(folder / "s-2.bin", {"b": tensor(), "c": tensor()})
    write_index(folder, {"c": "s-2.bin", "a": "s-1.safetensors", "b": "s-2.bin"})
    return folder


def write_index(folder, places):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_shards_are_one_source(sharded):
    for path in (sharded, sharded / "model.safetensors.index.json"):
        source = open_checkpoint(path)
        assert (source.path, source.names(), source.metadata) == (path, ["c", "a", "b"], {"format": "pt"})
        np.testing.assert_array_equal(source.read("b"), SIX.reshape(2, 3))


@pytest.mark.parametrize("shard", ["../s.safetensors", "/etc/s", "sub/s", "..", ".", "", "sub\\s", "C:s", "s\0"])
def test_shard_elsewhere_is_refused(sharded, shard):
    write_index(sharded, {"a": shard})
    refused(sharded, "no plain file name")


def test_index_and_shards_must_agree(sharded):
    write_index(sharded, {"a": "s-1.safetensors", "b": "s-3.safetensors"})
    refused(sharded, "s-3.safetensors: the shard is absent")
    write_index(sharded, {"a": "s-1.safetensors", "b": "s-2.bin"})
    refused(sharded, "s-2.bin: holds tensor 'c'")
    write_index(sharded, {"a": "s-1.safetensors", "b": "s-2.bin", "c": "s-2.bin", "d": "s-2.bin"})
    refused(sharded, "s-2.bin: lacks tensor 'd'")
    write_index(sharded, {"a": "model.safetensors.index.json"})
    refused(sharded, "a shard must hold weights")


def test_symlinks_stay_in_the_folder_or_in_the_hub_cache(tmp_path):
    outside = write_safetensors(tmp_path / "outside", {"a": entry()}, F32_6)
    blobs, snapshots = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "main" / "transformer"
    blobs.mkdir(parents=True)
    snapshots.mkdir(parents=True)
    (blobs / "0123").write_bytes(outside.read_bytes())
    link = snapshots / "s.safetensors"
    write_index(snapshots, {"a": "s.safetensors"})
    link.symlink_to("../../../blobs/0123")
    assert open_checkpoint(snapshots).names() == ["a"]
    for target in ("../../../../outside", outside, "s.safetensors"):
        link.unlink()
        link.symlink_to(target)
        refused(snapshots, "symlink")
    link.unlink()
    (snapshots / "inside").write_bytes(outside.read_bytes())
    link.symlink_to("inside")
    assert open_checkpoint(snapshots).names() == ["a"]


def test_folder_must_hold_one_choice(tmp_path):
    refused(tmp_path, str(tmp_path), "holds no weights; expected")
    write_torch(tmp_path / "epoch_1_step_9.pth", {"torch": tensor()})
    assert open_checkpoint(tmp_path).names() == ["torch"]
    write_safetensors(tmp_path / "w.fp16.safetensors", {"fp16": entry()}, F32_6)
    assert open_checkpoint(tmp_path).names() == ["fp16"]
    write_safetensors(tmp_path / "w.safetensors", {"w": entry()}, F32_6)
    refused(tmp_path, "2 files could be meant (w.fp16.safetensors, w.safetensors)")
    write_safetensors(tmp_path / "model.safetensors", {"usual": entry()}, F32_6)
    assert open_checkpoint(tmp_path).names() == ["usual"]
