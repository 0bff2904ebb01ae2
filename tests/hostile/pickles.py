"""Programs in the pickle of a PyTorch file: calls, absurd tensors, recursion, bombs. A call would make `executed`."""

import pickletools
import struct

from hostile.encoding import Call, Name, Raw, Ref, encode, unzipped, zipped

COMMAND = "touch executed"


def _program(edit):
    """The opcodes of data.pkl edited."""

    def change(rng, data):
        members = unzipped(data)
        members = [(n, edit(rng, c) if n.endswith("/data.pkl") else c) for n, c in members]
        return zipped(members)

    return change


def _whole(value):
    """Another program altogether."""
    return _program(lambda rng, program: b"\x80\x02" + encode(value) + b".")


def _injected(value, start=False):
    """Opcodes between two of the program's own, where they leave nothing on the stack."""

    def edit(rng, program):
        places = [place for opcode, _, place in pickletools.genops(program) if opcode.name != "PROTO"]
        at = places[0] if start else places[int(rng.integers(len(places)))]
        return program[:at] + encode(value) + program[at:]

    return _program(edit)


def _replaced(old, new, count=1):
    return _program(lambda rng, program: program.replace(old, new, count))


def _beside(value):
    """A state dict with one sound-looking entry more."""

    def edit(rng, program):
        inner = program[2:-1]
        return b"\x80\x02}(" + encode("state_dict") + inner + encode("hook") + encode(value) + b"u."

    return _program(edit)


def _number(place, number):
    """The number of elements that a drawn persistent id announces, or the n-th number before it, replaced."""

    def edit(rng, program):
        found = [at for opcode, _, at in pickletools.genops(program) if opcode.name == "BINPERSID"]
        at = found[int(rng.integers(len(found)))]
        before = [
            (o, p) for o, _, p in pickletools.genops(program[:at] + b".") if o.name.startswith(("BININT", "LONG"))
        ]
        after = [(o, p) for o, _, p in pickletools.genops(program) if o.name.startswith(("BININT", "LONG")) and p > at]
        opcode, start = before[-1] if place == 0 else after[min(place, len(after)) - 1]
        ends = [p for _, _, p in pickletools.genops(program) if p > start]
        return program[:start] + encode(number) + program[ends[0] :]

    return _program(edit)


def _tensor(key="0", shape=(2, 3), strides=(3, 1), offset=0, count=6, kind="torch.FloatStorage"):
    storage = Ref(("storage", Name(kind), key, "cpu", count))
    return Call("torch._utils._rebuild_tensor_v2", storage, offset, shape, strides, False, {})


def _memo_bomb():
    """Lists of lists of the same list: 10 to the 30th items if anyone walked them."""
    program = b"]q\x00"
    for i in range(30):
        program += b"](" + b"h%c" % i * 10 + b"eq%c" % (i + 1)
    return Raw(program)


def _itself():
    return Raw(b"]q\x00h\x00a")


CALLS = {
    "os.system": Call("os.system", COMMAND),
    "posix.system": Call("posix.system", COMMAND),
    "subprocess": Call("subprocess.getoutput", COMMAND),
    "eval": Call("builtins.eval", f"__import__('os').system({COMMAND!r})"),
    "exec": Call("__builtin__.exec", f"import os; os.system({COMMAND!r})"),
    "getattr": Call("builtins.getattr", Name("os.path"), "os"),
    "open": Call("builtins.open", "executed", "w"),
    "pathlib": Call("pathlib.Path", "executed"),
    "torch.load": Call("torch.load", "executed"),
    "numpy reconstruct": Call("numpy.core.multiarray._reconstruct", Name("numpy.ndarray"), (0,), b"b"),
    "runpy": Call("runpy.run_path", "executed"),
    "stack global": Raw(encode("os") + encode("system") + b"\x93" + encode((COMMAND,)) + b"R"),
    "stack global of parts": Raw(encode("torch._utils.os") + encode("system") + b"\x93" + encode((COMMAND,)) + b"R"),
    "dotted attribute": Raw(encode("torch._utils") + encode("_rebuild_tensor_v2.__globals__") + b"\x93"),
    "instance": Raw(b"(" + encode(COMMAND) + b"ios\nsystem\n"),
    "object": Raw(b"(" + encode(Name("os.system")) + encode(COMMAND) + b"o"),
    "new object": Raw(encode(Name("os.system")) + encode((COMMAND,)) + b"\x81"),
    "new object with keys": Raw(encode(Name("os.system")) + encode((COMMAND,)) + b"}\x92"),
    "build with state": Raw(encode(Name("torch.FloatStorage")) + encode({"__setstate__": 1}) + b"b"),
    "build of a class": Raw(encode(Call("collections.OrderedDict")) + encode({"update": Name("os.system")}) + b"b"),
    "extension 1": Raw(b"\x82\x01"),
    "extension 2": Raw(b"\x83\x01\x00"),
    "extension 4": Raw(b"\x84\x01\x00\x00\x00"),
    "persistent text": Raw(b"Pos.system\n"),
    "persistent call": Ref(("storage", Name("os.system"), COMMAND, "cpu", 1)),
    "next buffer": Raw(b"\x97"),
    "allowed, called wrongly": Call("torch.Size", COMMAND),
    "dtype called": Raw(b"ctorch\nfloat32\n" + encode((COMMAND,)) + b"R"),
    "rebuild with a hook": Call("torch._utils._rebuild_parameter", _tensor(), True, Name("os.system")),
    "ordered dict of a call": Call("collections.OrderedDict", Call("os.system", COMMAND)),
}

PROGRAMS = {
    "no stop": Raw(b"}" * 5),
    "underflow": Raw(b"\x85\x86\x87"),
    "marks": Raw(b"(" * 100_000),
    "deep tuple": Raw(b")" + b"\x85" * 100_000),
    "deep list": Raw(b"]" * 100_000 + b"a" * 99_999),
    "memo bomb": _memo_bomb(),
    "list in itself": _itself(),
    "absent memo": Raw(b"h\xff"),
    "memo of 4 GB": Raw(b"Nr\xff\xff\xff\xff"),
    "text of 4 GB": Raw(b"X\xff\xff\xff\xff"),
    "text of 8 EB": Raw(b"\x8d" + struct.pack("<Q", 2**63 - 1)),
    "text not UTF-8": Raw(b"X\x02\x00\x00\x00\xff\xfe"),
    "bytes of 4 GB": Raw(b"B\xff\xff\xff\xff"),
    "long of 2 GB": Raw(b"\x8b\xff\xff\xff\x7f"),
    "negative long": Raw(b"\x8b\xff\xff\xff\xff"),
    "frame of 8 EB": Raw(b"\x95" + struct.pack("<Q", 2**63 - 1)),
    "decimal long": Raw(b"L" + b"9" * 100_000 + b"L\n"),
    "float text": Raw(b"F1e999\n"),
    "protocol 255": Raw(b"\x80\xff"),
    "unknown opcode": Raw(b"\xfe"),
    "unhashable key": Raw(b"}]Ns"),
    "odd items": Raw(b"}(Nu"),
    "items of a tensor": Raw(encode(_tensor()) + b"NNs"),
    "a set": Raw(b"\x8f(K\x01\x90"),
    "a tensor": _tensor(),
    "a list": [_tensor()],
    "a number": 7,
    "numbered tensors": {0: _tensor()},
    "nested state dict": {"state_dict": {"state_dict": {"x": _tensor()}}},
    "no tensor": {},
    "empty name": {"": _tensor()},
    "newline in a name": {"x\nerror: no": _tensor()},
    "far block": {"x_embedder.proj.weight": _tensor(), "blocks.999999999.attn.qkv.weight": _tensor()},
    "negative stride": {"a": _tensor(strides=(-3, 1))},
    "beyond the storage": {"a": _tensor(offset=10**6)},
    "beyond by stride": {"a": _tensor(strides=(2**62, 2**62))},
    "absurd shape": {"a": _tensor(shape=(2**40, 2**40), strides=(0, 0))},
    "spread": {"a": _tensor(shape=(2**40,), strides=(0,))},
    "negative shape": {"a": _tensor(shape=(-2, -3))},
    "storage of a path": {"a": _tensor(key="../../../../../../etc/passwd")},
    "storage of another type": {"a": _tensor(kind="torch.DoubleStorage")},
    "absurd storage": {"a": _tensor(count=2**62)},
    "negative storage": {"a": _tensor(count=-1)},
}

MUTATIONS = {
    **{f"{name} before": _injected(value, start=True) for name, value in CALLS.items()},
    **{f"{name} within": _injected(value) for name, value in list(CALLS.items())[:12]},
    **{f"{name} beside": _beside(value) for name, value in list(CALLS.items())[:4]},
    **{name: _whole(value) for name, value in PROGRAMS.items()},
    **{f"{name} beside": _beside(value) for name, value in list(PROGRAMS.items())[:9]},
    "global replaced": _replaced(b"torch._utils\n_rebuild_tensor_v2", b"torch._utils\n_rebuild_tensor_v3"),
    "global with blanks": _replaced(b"collections\nOrderedDict", b"collections \n OrderedDict"),
    "storage class replaced": _replaced(b"torch\nFloatStorage", b"torch\nBoolStorage"),
    "half for float": _replaced(b"torch\nHalfStorage", b"torch\nBFloat16Storage"),
    "storage key replaced": _replaced(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009"),
    "one storage for two": _replaced(b"X\x01\x00\x00\x001", b"X\x01\x00\x00\x000"),
    "device": _replaced(b"X\x03\x00\x00\x00cpu", b"X\x04\x00\x00\x00cuda", -1),
    "names replaced": _replaced(b"weight", b"w\nigh\0", -1),
    "stop early": _program(lambda rng, program: program[: len(program) // 2] + b"."),
    "cut": _program(lambda rng, program: program[: int(rng.integers(len(program)))]),
    "doubled": _program(lambda rng, program: program[:-1] + program[2:]),
    "program after stop": _program(lambda rng, program: program + b"cos\nsystem\n(S'touch executed'\ntR."),
    "count absurd": _number(0, 2**62),
    "count negative": _number(0, -1),
    "count smaller": _number(0, 1),
    "count of 2000 bits": _number(0, 2**2000),
    "offset": _number(1, 1),
    "offset negative": _number(1, -5),
    "offset of 2000 bits": _number(1, 2**2000),
    "shape negative": _number(2, -72),
    "shape absurd": _number(2, 2**50),
    "shape zero": _number(2, 0),
    "shape other": _number(2, 7),
    "stride": _number(3, 2**40),
}
