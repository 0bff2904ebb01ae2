"""Written checkpoints: read back by our reader and by MindSpore, laid out as PyTorch does, whole or not there."""

import json
import os
import pickletools
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import mindspore as ms
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from mindsigma.errors import MindSigmaError
from mindsigma.weights import open_checkpoint
from mindsigma.weights.formats import exchange, mindspore_writer, tensor_stream, torch_writer
from mindsigma.weights.formats.mindspore_writer import write_mindspore_ckpt
from mindsigma.weights.formats.safetensors_shards import write_sharded_safetensors
from mindsigma.weights.formats.safetensors_writer import write_safetensors
from mindsigma.weights.formats.tensor_stream import TensorSpec, pieces, release
from mindsigma.weights.formats.torch_writer import write_torch

BF16 = np.dtype(ml_dtypes.bfloat16)
WRITERS = {"safetensors": write_safetensors, "pth": write_torch, "ckpt": write_mindspore_ckpt}


def draw(shape, dtype, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * 8).astype(dtype)


def samples():
    """Every kind of tensor; the half-precision one of odd length comes first, so that nothing is aligned by luck."""
    arrays = {"half.w": draw((3,), np.float16), "single.w": draw((3, 5), np.float32), "brain.w": draw((2, 3), BF16)}
    arrays |= {"long": np.arange(-2, 3), "none": np.zeros((0, 4), np.float32), "one": np.array(2.5, np.float32)}
    arrays |= {"brain.one": np.array(-3, BF16), "flag": np.array([True, False, True])}
    strided = draw((6, 8), np.float32, 1)
    return arrays | {"transposed": strided.T, "sliced": strided[::2, 1::3], "reversed": strided[::-1]}


def specs_of(arrays):
    return [TensorSpec(name, array.dtype, array.shape) for name, array in arrays.items()]


def same(found, expected, ordered=True):
    assert list(found) == list(expected) if ordered else set(found) == set(expected)
    for name, array in expected.items():
        read = found[name]
        assert (read.dtype, read.shape) == (array.dtype, array.shape), name
        assert read.tobytes() == array.tobytes(), name


def contents(path):
    source = open_checkpoint(path)
    return {name: source.read(name) for name in source}


def crcs_of(arrays):
    return {name: zlib.crc32(array.tobytes()) for name, array in arrays.items()}


def fails(*words):
    class Caught:
        def __enter__(self):
            self.context = pytest.raises(MindSigmaError)
            self.error = self.context.__enter__()

        def __exit__(self, *exception):
            result = self.context.__exit__(*exception)
            message = str(self.error.value)
            assert message.isprintable()
            assert len(message) < 500
            assert all(str(word) in message for word in words), message
            return result

    return Caught()


@pytest.fixture(params=WRITERS)
def kind(request):
    return request.param


# round trips


def test_round_trip(tmp_path, kind):
    arrays, told = samples(), []
    path = tmp_path / f"w.{kind}"
    crcs = WRITERS[kind](path, specs_of(arrays), arrays.__getitem__, progress=told.append)
    assert crcs == crcs_of(arrays)
    assert list(crcs) == list(arrays)
    assert sum(told) == sum(array.nbytes for array in arrays.values())
    same(contents(path), arrays, ordered=kind != "safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    WRITERS[kind](tmp_path / "again", iter(specs_of(arrays)), contents(path).__getitem__)  # mapped
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_round_trip_in_small_pieces(tmp_path, kind, monkeypatch):
    """Pieces and slices of a few bytes: the cuts a tensor of gigabytes goes through."""
    monkeypatch.setattr(tensor_stream, "PIECE", 24)
    monkeypatch.setattr(mindspore_writer, "SLICE", 28)
    arrays, told = samples() | {"cube": draw((4, 3, 5), np.float32).transpose(2, 0, 1)}, []
    path = tmp_path / f"w.{kind}"
    assert WRITERS[kind](path, specs_of(arrays), arrays.__getitem__, progress=told.append) == crcs_of(arrays)
    assert max(told) <= 24
    same(contents(path), arrays, ordered=kind != "safetensors")
    if kind == "ckpt":
        assert path.read_bytes().count(b"\x04cube") == 9  # 240 bytes by 28
        assert not open_checkpoint(path).read("cube").flags.writeable
        same_as_mindspore(ms.load_checkpoint(str(path)), arrays)


def test_pieces_are_the_bytes_in_order(monkeypatch):
    monkeypatch.setattr(tensor_stream, "PIECE", 20)
    for array in samples().values():
        found = list(pieces(array))
        assert b"".join(piece.tobytes() for piece in found) == array.tobytes()
        assert all(0 < piece.size <= 20 for piece in found)


def test_a_stream_keeps_one_tensor(tmp_path, kind):
    """No tensor is alive when the second after it is asked for."""
    import gc
    import weakref

    alive = []

    def read(name):
        gc.collect()
        assert sum(ref() is not None for ref in alive) <= 1
        array = np.ones((64, 64), np.float32)
        alive.append(weakref.ref(array))
        return array

    WRITERS[kind](tmp_path / "w", [TensorSpec(f"t{i}", np.float32, [64, 64]) for i in range(5)], read)
    assert len(alive) == 5


def test_released_pages_can_be_read_again(tmp_path):
    arrays = samples()
    write_safetensors(tmp_path / "w", specs_of(arrays), arrays.__getitem__)
    mapped = contents(tmp_path / "w")
    for array in [*mapped.values(), mapped["single.w"].T[1:]]:
        release(array)
    release(np.ones(3))
    private = np.memmap(tmp_path / "w", np.uint8, mode="c")
    private[:] = 7
    release(private[3:])
    assert (private == 7).all()
    same(mapped, arrays, ordered=False)


# the formats


def test_safetensors_as_the_reference_implementation_reads_it(tmp_path):
    arrays, path = samples(), tmp_path / "w.safetensors"
    del arrays["brain.w"], arrays["brain.one"]
    write_safetensors(path, specs_of(arrays), arrays.__getitem__, {"format": "pt", "source": "é"})
    found = load_file(path)
    same(found, arrays, ordered=False)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt", "source": "é"} == open_checkpoint(path).metadata
    assert set(header) == set(arrays)
    ends = [0, *(entry["data_offsets"][1] for entry in header.values())]
    assert [entry["data_offsets"][0] for entry in header.values()] == ends[:-1]
    assert all(header[name]["data_offsets"][0] % array.itemsize == 0 for name, array in arrays.items())


def same_as_mindspore(parameters, arrays):
    assert set(parameters) == set(arrays)
    for name, array in arrays.items():
        value = parameters[name]
        assert str(value.dtype).lower() == str(array.dtype).lower() or array.dtype == np.bool_
        assert value.shape == array.shape
        number = value.float() if array.dtype == BF16 else value
        np.testing.assert_array_equal(number.asnumpy(), array.astype(np.float32) if array.dtype == BF16 else array)


def test_mindspore_reads_what_is_written(tmp_path):
    arrays = samples()
    write_mindspore_ckpt(tmp_path / "w.ckpt", specs_of(arrays), arrays.__getitem__)
    same_as_mindspore(ms.load_checkpoint(str(tmp_path / "w.ckpt")), arrays)
    write_safetensors(tmp_path / "w.safetensors", specs_of(arrays), arrays.__getitem__, {"format": "ms"})
    same_as_mindspore(ms.load_checkpoint(str(tmp_path / "w.safetensors"), format="safetensors"), arrays)


def mindspore_saved(path, **options):
    arrays = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in samples().items() if name != "none"}
    saved = [
        {"name": n, "data": ms.Tensor(a.astype(np.float32)).bfloat16() if a.dtype == BF16 else ms.Tensor(a)}
        for n, a in arrays.items()
    ]
    ms.save_checkpoint(saved, str(path), **options)
    return arrays


def test_what_mindspore_writes_is_read(tmp_path):
    arrays = mindspore_saved(tmp_path / "w.safetensors", format="safetensors")
    same(contents(tmp_path / "w.safetensors"), arrays, ordered=False)
    arrays = mindspore_saved(tmp_path / "w.ckpt", append_dict={"epoch": 3, "note": "é!"})
    source = open_checkpoint(tmp_path / "w.ckpt")
    assert source.metadata == {"note": "é!"}
    assert (source.read("epoch"), source.dtype("epoch"), source.shape("epoch")) == (3, np.int64, ())
    same({name: source.read(name) for name in source if name != "epoch"}, arrays)
    assert not source.read("single.w").flags.writeable
    arrays = mindspore_saved(tmp_path / "crc.ckpt", crc_check=True)
    same(contents(tmp_path / "crc.ckpt"), arrays)


def test_a_slice_is_put_together_only_when_read(tmp_path, monkeypatch):
    monkeypatch.setattr(mindspore_writer, "SLICE", 28)
    arrays = {"cut": draw((9, 4), np.float32), "b": draw((2,), BF16)}
    write_mindspore_ckpt(tmp_path / "w.ckpt", specs_of(arrays), arrays.__getitem__)
    source = open_checkpoint(tmp_path / "w.ckpt")
    with monkeypatch.context() as patch:
        patch.setattr(np, "concatenate", None)
        assert (source.shape("cut"), source.dtype("cut")) == ((9, 4), np.float32)
    same({name: source.read(name) for name in source}, arrays)


def test_torch_layout(tmp_path, monkeypatch):
    arrays, path = samples(), tmp_path / "w.pth"
    extra = {"epoch": 3, "step": -(2**40), "args": {"lr": 1e-4, "sizes": (1, [2, None, True])}, "note": "é"}
    for threshold in (2**30, 0):  # with 0 every member gets the zip64 field
        monkeypatch.setattr(torch_writer, "ZIP64_FROM", threshold)
        write_torch(path, specs_of(arrays), arrays.__getitem__, extra)
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            names = [info.filename for info in archive.infolist()]
            storages = [f"archive/data/{i}" for i in range(len(arrays))]
            assert names == ["archive/data.pkl", "archive/byteorder", *storages, "archive/version"]
            assert archive.read("archive/version") == b"3\n"
            assert archive.read("archive/byteorder") == b"little"
            program = archive.read("archive/data.pkl")
            content = path.read_bytes()
            for info in archive.infolist():
                assert (info.compress_type, info.flag_bits, info.extra) == (zipfile.ZIP_STORED, 0, b"")
                at = info.header_offset
                start = at + 30 + sum(int.from_bytes(content[at + i : at + i + 2], "little") for i in (26, 28))
                assert start % 64 == 0
                assert content[start : start + info.file_size] == archive.read(info)
        same(contents(path), arrays)
    named = {arg.replace(" ", ".") for opcode, arg, _ in pickletools.genops(program) if opcode.name == "GLOBAL"}
    kinds = {f"torch.{kind}Storage" for kind in ("Float", "Half", "BFloat16", "Long", "Bool")}
    assert named == {"collections.OrderedDict", "torch._utils._rebuild_tensor_v2", *kinds}
    opcodes = [opcode for opcode, _, _ in pickletools.genops(program)]
    assert {opcode.proto for opcode in opcodes} <= {0, 1, 2}
    assert not {"INST", "OBJ", "NEWOBJ", "STACK_GLOBAL"} & {opcode.name for opcode in opcodes}
    pickletools.dis(program, out=open(os.devnull, "w"))  # raises where the stack does not come out even
    assert open_checkpoint(path).extra == {"epoch": 3, "step": -(2**40), "note": "é"}
    write_torch(path, specs_of(arrays), arrays.__getitem__, flat=True)
    same(contents(path), arrays)


# what cannot be written


def test_a_bad_tensor_ends_the_writing(tmp_path, kind):
    path = tmp_path / "w"
    path.write_bytes(b"old and good")
    a = np.ones((2, 3), np.float32)
    good = TensorSpec("a", np.float32, (2, 3))
    for specs, words in [
        ([good, good], "comes twice"),
        ([TensorSpec("", np.float32, (2, 3))], "empty or unprintable"),
        ([TensorSpec("a\nb", np.float32, (2, 3))], "empty or unprintable"),
        ([TensorSpec("a", np.float32, (-2, 3))], "impossible shape (-2, 3)"),
        ([TensorSpec("a", np.dtype(">f4"), (2, 3))], "cannot hold"),
        ([TensorSpec("a", np.dtype("O"), (2, 3))], "cannot hold"),
        ([good, TensorSpec("b", np.float32, (3, 2))], "arrives as float32 (2, 3) where float32 (3, 2)"),
        ([good, TensorSpec("b", np.float16, (2, 3))], "where float16 (2, 3) was announced"),
        ([], "no tensor to write"),
    ]:
        with fails(path, words):
            WRITERS[kind](path, specs, lambda name: a)
    with fails(path, "arrives as float"):
        WRITERS[kind](path, [good], lambda name: 1.0)
    assert path.read_bytes() == b"old and good"
    assert os.listdir(tmp_path) == ["w"]


def test_what_one_format_cannot_hold(tmp_path):
    path, one = tmp_path / "w", TensorSpec("a", np.float32, (1,))
    with fails(path, "shape (0,)"):
        write_mindspore_ckpt(path, [TensorSpec("a", np.float32, (0,))], None)
    with fails(path, "__metadata__"):
        write_safetensors(path, [TensorSpec("__metadata__", np.float32, (1,))], None)
    with fails(path, "metadata are texts, not int"):
        write_safetensors(path, [one], None, {"epoch": 3})
    for value in (np.float32(1), [Path()], {(1,): 2}, b"", 2**70):
        with fails(path, "'args' is more than"):
            write_torch(path, [one], None, {"args": value})
    nested = []
    nested.append(nested)
    with fails(path, "'args' is nested more than 20 deep"):
        write_torch(path, [one], None, {"args": nested})
    with fails(path, "bare state dict has no place for epoch"):
        write_torch(path, [one], None, {"epoch": 3}, flat=True)
    with fails(path, "uint16, which a PyTorch file cannot hold"):
        write_torch(path, [TensorSpec("a", np.uint16, (1,))], None)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("error", [KeyError("k"), KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_interrupted_writing_leaves_nothing(tmp_path, kind, error):
    path, arrays = tmp_path / "w", samples()
    WRITERS[kind](path, specs_of(arrays), arrays.__getitem__)
    old, asked = path.read_bytes(), []

    def read(name):
        asked.append(name)
        if len(asked) == 4:
            assert any(entry.endswith(".part") for entry in os.listdir(tmp_path))
            raise error
        return arrays[name]

    expected = MindSigmaError if isinstance(error, OSError) else type(error)
    for target in (path, tmp_path / "new"):
        asked.clear()
        with pytest.raises(expected) as caught:
            WRITERS[kind](target, specs_of(arrays), read)
        assert os.listdir(tmp_path) == ["w"]
        assert path.read_bytes() == old
        if expected is MindSigmaError:
            assert f"'{asked[-1]}' cannot be read from its source (Input/output error)" in str(caught.value)


def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "w").write_bytes(b"old and good")
    command = [sys.executable, str(Path(__file__).with_name("writers_full_disk.py")), str(tmp_path / "w")]
    root = Path(__file__).parents[1]
    run = subprocess.run(command, capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    assert run.stderr == ""
    lines = run.stdout.splitlines()
    assert len(lines) == 16
    for line in lines:
        assert line.startswith(str(tmp_path / "w"))
        assert line.endswith("cannot be written (File too large); free some space, or choose another target")
    assert os.listdir(tmp_path) == ["w"]
    assert (tmp_path / "w").read_bytes() == b"old and good"


def test_a_target_that_cannot_be_written(tmp_path, kind):
    arrays = {"a": np.ones(3, np.float32)}
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for place, words in {"absent/w": "No such file", "file/w": "Not a directory", "folder": "Is a directory"}.items():
        with fails(tmp_path / place, "cannot be written", words):
            WRITERS[kind](tmp_path / place, specs_of(arrays), arrays.__getitem__)
    if os.geteuid():
        (tmp_path / "folder").chmod(0o500)
        with fails("Permission denied; check the folder"):
            WRITERS[kind](tmp_path / "folder" / "w", specs_of(arrays), arrays.__getitem__)
    with fails(tmp_path / "file", "cannot be written"):
        write_sharded_safetensors(tmp_path / "file", "w", specs_of(arrays), arrays.__getitem__, {}, 10)
    assert not os.listdir(tmp_path / "folder")


def test_leftovers_of_a_kill_are_cleared(tmp_path, kind):
    process = subprocess.Popen(["true"])
    process.wait()
    old, young, other = (
        tmp_path / name for name in (f".w.{process.pid}.part", f".w.{os.getppid()}.part", f".v.{process.pid}.part")
    )
    (tmp_path / f".w.{os.getpid()}.part").symlink_to(tmp_path / "elsewhere")
    for file in (old, young, other):
        file.write_bytes(b"x")
        os.utime(file, (time.time() - 7200,) * 2)
    arrays = {"a": np.ones(3, np.float32)}
    WRITERS[kind](tmp_path / "w", specs_of(arrays), arrays.__getitem__)
    assert set(tmp_path.iterdir()) == {tmp_path / "w", young, other}


# shards


def shard_arrays(seed=0):
    return {f"layer.{i}.w": draw((4, 8), np.float32, seed + i) for i in range(6)} | {"z": draw((40, 8), BF16)}


def write_shards(folder, arrays, limit=300, fingerprint="1", stop_at=None):
    """Returns the names that were asked for; with `stop_at` the writing is cut short there."""
    asked = []

    def read(name):
        asked.append(name)
        if name == stop_at:
            raise KeyboardInterrupt
        return arrays[name]

    told = []
    try:
        arguments = (folder, "model", specs_of(arrays), read, {"format": "pt", "fingerprint": fingerprint}, limit)
        assert write_sharded_safetensors(*arguments, progress=told.append) == crcs_of(arrays)
        assert sum(told) == sum(array.nbytes for array in arrays.values())
    except KeyboardInterrupt:
        assert stop_at
    return asked


SHARDS = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
INDEX = "model.safetensors.index.json"


def test_shards_and_index(tmp_path):
    arrays, folder = shard_arrays(), tmp_path / "new" / "folder"
    assert write_shards(folder, arrays) == list(arrays)
    assert sorted(os.listdir(folder)) == [*SHARDS, INDEX]
    same(contents(folder), arrays)
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(array.nbytes for array in arrays.values())}
    assert list(index["weight_map"]) == list(arrays)
    assert [len(load_file(folder / name)) for name in SHARDS[:3]] == [2, 2, 2]
    assert open_checkpoint(folder).metadata == {"format": "pt", "fingerprint": "1"}
    write_shards(tmp_path / "one", arrays, sum(array.nbytes for array in arrays.values()))
    assert os.listdir(tmp_path / "one") == ["model.safetensors"]
    same(contents(tmp_path / "one"), arrays)


def test_shards_are_resumed(tmp_path):
    arrays = shard_arrays()
    assert write_shards(tmp_path, arrays, stop_at="layer.5.w") == list(arrays)[:6]
    assert sorted(os.listdir(tmp_path)) == SHARDS[:2]
    assert write_shards(tmp_path, arrays) == ["layer.4.w", "layer.5.w", "z"]
    same(contents(tmp_path), arrays)
    assert write_shards(tmp_path, arrays) == []
    os.truncate(tmp_path / SHARDS[1], (tmp_path / SHARDS[1]).stat().st_size - 1)
    assert write_shards(tmp_path, arrays) == ["layer.2.w", "layer.3.w"]
    assert write_shards(tmp_path, arrays, fingerprint="2") == list(arrays)
    single = tmp_path / "single"
    assert write_shards(single, arrays, 10**6) == list(arrays)
    assert write_shards(single, arrays, 10**6) == []


def test_an_older_checkpoint_stays_whole_until_the_new_one_is(tmp_path, monkeypatch):
    old, new = shard_arrays(), shard_arrays(100)
    write_shards(tmp_path, old)
    assert write_shards(tmp_path, new, fingerprint="2", stop_at="z") == list(new)
    same(contents(tmp_path), old)
    for killed in (False, True):  # while the shards move in
        with monkeypatch.context() as patch:
            replace, moved = os.replace, []

            def dies(source, target, replace=replace, moved=moved):
                if str(source).endswith(".staged"):
                    moved.append(source)
                    if len(moved) == 3:
                        raise KeyboardInterrupt
                replace(source, target)

            patch.setattr(os, "replace", dies)
            if killed:
                patch.setattr(exchange, "_undo", lambda *_: None)
            assert write_shards(tmp_path, new, fingerprint="2", stop_at="never") == ([] if killed else ["z"])
        if not killed:
            same(contents(tmp_path), old)
    with fails("ended while its files moved in"):  # neither the old nor a mixture of both
        open_checkpoint(tmp_path)
    assert write_shards(tmp_path, new, fingerprint="2") == []
    same(contents(tmp_path), new)
    assert sorted(os.listdir(tmp_path)) == [*SHARDS, INDEX]


def test_stale_files_of_the_stem_go_last(tmp_path):
    old, new = shard_arrays(), shard_arrays(100)
    keep = ["model-00001-of-00009.bin", "model.fp16.safetensors", "other-00001-of-00002.safetensors"]
    for name in keep:
        (tmp_path / name).write_bytes(b"x")
    write_shards(tmp_path, old, 10**6)
    write_shards(tmp_path, new, 700, stop_at="layer.5.w")
    assert {"model.safetensors"} <= set(os.listdir(tmp_path))
    write_shards(tmp_path, new, 700)
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(os.listdir(tmp_path)) == sorted([*keep, *shards, INDEX])
    same(contents(tmp_path), new)
    write_shards(tmp_path, old, 300, stop_at="z")
    same(contents(tmp_path), new)
    write_shards(tmp_path, old, 300)
    assert sorted(os.listdir(tmp_path)) == sorted([*keep, *SHARDS, INDEX])
    write_shards(tmp_path, new, 10**6)
    assert sorted(os.listdir(tmp_path)) == sorted([*keep, "model.safetensors"])
    same(contents(tmp_path / "model.safetensors"), new)


# damaged .ckpt files


def field(number, content):
    return mindspore_writer._field(number, content)


def value(tag=b"a", dims=(2,), kind=b"Float32", content=bytes(8), more=b""):
    sizes = b"".join(b"\x08" + mindspore_writer._varint(n) for n in dims)
    return field(1, field(1, tag) + field(2, sizes + field(2, kind) + field(3, content) + more))


BAD_CKPT = {
    "twice": (value() + value(b"b") + value(), "two values are named 'a'"),
    "too much": (value() + value(), "16 bytes where its shape and type need 8"),
    "slices unlike": (value() + value(dims=(4,)), "two values are named 'a'"),
    "too little": (value(dims=(3,)), "8 bytes where its shape and type need 12"),
    "negative": (value(dims=(2**64 - 2,)), "impossible shape"),
    "absurd": (value(dims=(2**40, 2**40, 0), content=b""), "impossible shape"),
    "rank": (value(dims=(1,) * 40), "more than 32 dimensions"),
    "packed rank": (value(dims=(), more=field(1, b"\1" * 100_000)), "more than 32 dimensions"),
    "type": (value(kind=b"Int4"), "unknown type Int4"),
    "type no text": (value(kind=b"\xff\xfe"), "not ascii"),
    "no type": (value(kind=b""), "a tag or type of 0 bytes"),
    "two contents": (value(more=field(3, b"")), "field 3 is unknown, or comes twice"),
    "unknown": (value(more=field(7, b"")), "field 7 is unknown"),
    "group": (value() + b"\x0b\x00", "wire type 3"),
    "fixed": (value() + b"\x0d\0\0\0\0", "wire type 5"),
    "other field": (value() + field(2, b""), "field 2 where a value"),
    "number": (value() + b"\x08\x01", "field 1 where a value"),
    "map": (value() + field(1, field(1, b"m") + field(3, b"")), "'m' is a MapParameter"),
    "no tensor": (value() + field(1, field(1, b"m")), "'m' has no tensor"),
    "no content": (value() + field(1, field(1, b"m") + field(2, field(2, b"Bool"))), "'m' has no content"),
    "no tag": (value() + field(1, field(2, b"")), "a tag or type of 0 bytes"),
    "tag no text": (value() + value(b"\xff"), "not utf-8"),
    "newline in a tag": (value() + value(b"a\nb"), r"'a\nb' is empty or unprintable"),
    "long number": (value() + b"\n" + b"\xff" * 12, "more than 10 bytes"),
    "long": (value() + b"\n\x7f\0", "truncated: 127 bytes are expected where 1 are left"),
    "cut": (value() + b"\n", "truncated within a number"),
    "text": (value(b"t", (0,), b"str", b"abc"), "is not UTF-32"),
    "texts only": (value(b"t", (0,), b"str", "x".encode("utf-32-le")), "without a tensor"),
}


@pytest.mark.parametrize("case", BAD_CKPT)
def test_ckpt_is_refused(tmp_path, case):
    content, words = BAD_CKPT[case]
    (tmp_path / "w").write_bytes(content)
    with fails(tmp_path / "w", words):
        open_checkpoint(tmp_path / "w")


def test_ckpt_of_other_writers(tmp_path):
    """A scalar of older versions has dims [0]; protobuf lets dims be packed."""
    (tmp_path / "w").write_bytes(
        value(b"s", (0,), content=np.float32(3).tobytes())
        + value(b"none", (0,), content=b"")
        + value(b"p", (), b"Int8", b"abcdef", field(1, b"\2\3"))
    )
    found = contents(tmp_path / "w")
    assert {name: array.shape for name, array in found.items()} == {"s": (), "none": (0,), "p": (2, 3)}
    assert found["s"] == 3


def test_damaged_ckpt_is_refused_or_reads_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(mindspore_writer, "SLICE", 40)
    arrays, path = samples(), tmp_path / "sound"
    write_mindspore_ckpt(path, specs_of(arrays), arrays.__getitem__)
    content, rng, refusals = path.read_bytes(), np.random.default_rng(3), 0
    for attempt in range(300):
        damaged = bytearray(content)
        if attempt < 100:
            del damaged[int(rng.integers(len(content))) :]
        else:
            damaged[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        (tmp_path / "w").write_bytes(damaged)
        try:
            found = contents(tmp_path / "w")
        except MindSigmaError as error:
            assert str(error).isprintable()
            refusals += 1
            continue
        if attempt < 100:  # cut between two values, which the format cannot tell
            same(found, dict(list(arrays.items())[: len(found)]))
        else:  # without a checksum another name, or another number, is as good
            assert sum(a != b for a, b in zip(found, arrays)) <= 1
            assert [(a.dtype, a.size) for a in found.values()] == [(a.dtype, a.size) for a in arrays.values()]
    assert refusals > 150
