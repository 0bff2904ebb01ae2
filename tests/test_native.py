"""The native CPU kernels against float64 and against the mathematics they replace, and how they are built."""

import os
import shutil
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from conftest import relative_error
from mindspore import Tensor, ops

from mindsigma.errors import MindSigmaError
from mindsigma.ops import attention, functional, linear_chains
from mindsigma.ops.kernels import MATH, NATIVE, resolve_kernels
from mindsigma.ops.native import library
from mindsigma.ops.native import operations as native

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 2e-6  # against float64

needs_library = pytest.mark.skipif(not native.load(), reason="no C++ compiler, or MINDSIGMA_NATIVE=0")


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def gelu(x):
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def normalised(x, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


@needs_library
@pytest.mark.parametrize(
    "shape", [(2, 1, 8, 3), (2, 37, 50, 33), (1, 130, 801, 100), (3, 9, 48, 97), (2, 64, 1250, 40), (2, 100, 31, 16)]
)
def test_linear_maps_with_all_that_comes_with_them(shape):
    batch, length, inner, outer = shape
    x, weight, bias = drawn(0, batch, length, inner) + 0.5, drawn(1, outer, inner) / inner**0.5, drawn(2, outer)
    before, after = drawn(3, batch, 6, inner), drawn(4, batch, 6, outer)
    residual, norm_weight = drawn(5, batch, length, outer), drawn(6, inner)
    t = {name: Tensor(value) for name, value in locals().items() if isinstance(value, np.ndarray)}
    x64, w64 = x.astype(np.float64), weight.astype(np.float64).T

    plain = native.linear(t["x"], t["weight"], t["bias"])
    assert relative_error(plain.asnumpy(), x64 @ w64 + bias) < LIMIT
    modulated = normalised(x64, 1e-6) * before[:, 4:5] + before[:, 3:4]
    found = linear_chains.modulated_linear_gelu(t["x"], t["before"], 3, 1e-6, NATIVE, t["weight"], t["bias"])
    assert relative_error(found.asnumpy(), gelu(modulated @ w64 + bias)) < LIMIT
    found = linear_chains.add_gated_linear(t["residual"], t["x"], t["after"], 5, NATIVE, t["weight"], t["bias"])
    assert relative_error(found.asnumpy(), residual + after[:, 5:6] * (x64 @ w64 + bias)) < LIMIT
    one = normalised(x64, 1e-6) * before[:1, 4:5] + before[:1, 3:4]  # a row for all
    found = linear_chains.modulated_linear(t["x"], t["before"][:1], 3, 1e-6, NATIVE, t["weight"], t["bias"])
    assert relative_error(found.asnumpy(), one @ w64 + bias) < LIMIT
    found = linear_chains.add_linear(t["residual"], t["x"], NATIVE, t["weight"], None)
    assert relative_error(found.asnumpy(), residual + x64 @ w64) < LIMIT
    rms = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6) * norm_weight
    found = linear_chains.rms_gated_linear(t["x"], t["norm_weight"], 1e-6, t["weight"], t["weight"], ms.float32, NATIVE)
    assert relative_error(found.asnumpy(), gelu(rms @ w64) * (rms @ w64)) < LIMIT


@needs_library
def test_pointwise_functions_over_their_whole_range():
    """GELU through an identity, SiLU through a norm of two values; what is not a number stays none."""
    x = np.concatenate([np.linspace(-100, 100, 4001), [0.0, 1e-30, -1e-30]]).astype(np.float32).reshape(1, -1, 1)
    one = Tensor(np.ones((1, 1), np.float32))
    found = native.linear(Tensor(x), one, gelu=True).asnumpy().astype(np.float64)
    expected = gelu(x.astype(np.float64))
    assert np.abs(found - expected).max() < 1e-6 * 5
    near = np.abs(x) < 3
    assert (np.abs(found - expected)[near] <= 1e-6 * np.abs(expected[near]) + 1e-12).all()
    x[0, 7, 0] = np.nan
    assert np.isnan(native.linear(Tensor(x), one, gelu=True).asnumpy()[0, 7, 0])


def attended(q, k, v, heads, scale, kept=None, bias=None):
    """Attention in float64."""
    batch, length, channels = q.shape
    q, k, v = (t.astype(np.float64).reshape(batch, t.shape[1], heads, -1).transpose(0, 2, 1, 3) for t in (q, k, v))
    scores = q @ k.transpose(0, 1, 3, 2) * scale
    if kept is not None:
        scores = np.where(kept[:, None, None] > 0, scores, -np.inf)
    scores = scores if bias is None else scores + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = weights / weights.sum(-1, keepdims=True) @ v
    return out.transpose(0, 2, 1, 3).reshape(batch, length, channels)


@needs_library
@pytest.mark.parametrize(
    "queries, keys, heads, width", [(1, 1, 1, 8), (65, 300, 2, 72), (13, 401, 3, 20), (9, 50, 1, 130)]
)
def test_attention(queries, keys, heads, width):
    channels = heads * width
    q, k, v = drawn(0, 2, queries, channels) * 3, drawn(1, 2, keys, channels), drawn(2, 2, keys, channels)
    kept = np.zeros((2, keys), np.float32)
    kept[0, keys // 2] = 1  # all but one are dropped
    kept[1, : keys - keys // 3] = 1
    for mask in (None, kept):
        prepared = attention.prepare_keys(Tensor(k), Tensor(v), None if mask is None else Tensor(mask), heads, NATIVE)
        found = attention.attend(Tensor(q), *prepared, heads, NATIVE).asnumpy()
        assert relative_error(found, attended(q, k, v, heads, width**-0.5, mask)) < LIMIT
    bias = drawn(3, 1, heads, queries, keys)
    bias[..., : keys // 2] = -1e9
    found = attention.attention_with_bias(Tensor(q), Tensor(k), Tensor(v), Tensor(bias), heads, NATIVE).asnumpy()
    assert relative_error(found, attended(q, k, v, heads, 1.0, bias=bias)) < LIMIT


@needs_library
def test_attention_of_qkv_is_that_of_its_parts():
    qkv = drawn(0, 2, 77, 3 * 144)
    found = attention.attend_qkv(Tensor(qkv), 2, NATIVE).asnumpy()
    assert relative_error(found, attended(*np.split(qkv, 3, -1), 2, 72**-0.5)) < LIMIT
    assert relative_error(found, attention.attend_qkv(Tensor(qkv), 2, MATH).asnumpy()) < 1e-5


@needs_library
@pytest.mark.parametrize("height, width", [(5, 50), (7, 97)])
def test_group_norm(height, width):
    x, weight, bias = drawn(0, 2, 6, height, width) + 2, drawn(1, 6), drawn(2, 6)
    for silu in (False, True):
        found = native.group_norm(Tensor(x), 3, Tensor(weight), Tensor(bias), 1e-6, silu).asnumpy()
        expected = normalised(x.astype(np.float64).reshape(2, 3, -1), 1e-6).reshape(x.shape)
        expected = expected * weight[:, None, None] + bias[:, None, None]
        expected = expected / (1 + np.exp(-expected)) if silu else expected
        assert relative_error(found, expected) < LIMIT
        last = Tensor(x)
        over = native.group_norm(last, 3, Tensor(weight), Tensor(bias), 1e-6, silu, last_use=True)
        assert over is last and (over.asnumpy() == found).all()
        turned = Tensor(np.ascontiguousarray(x.transpose(0, 1, 3, 2))).transpose(0, 1, 3, 2)  # not in one piece
        over = native.group_norm(turned, 3, Tensor(weight), Tensor(bias), 1e-6, silu, last_use=True)
        assert (over.asnumpy() == found).all()


def convolved(x, kernel, bias, residual):
    """Convolution in float64 that keeps the size."""
    side = kernel.shape[-1]
    border = side // 2
    padded = np.pad(x, ((0, 0), (0, 0), (border, border), (border, border))).astype(np.float64)
    result = residual + bias[:, None, None].astype(np.float64)
    for i in range(side):
        for j in range(side):
            shifted = padded[:, :, i : i + x.shape[2], j : j + x.shape[3]]
            result = result + np.einsum("oi,nihw->nohw", kernel[:, :, i, j], shifted)
    return result


# The last four are computed by Winograd's filtering: whole tiles, parts of tiles, one row of tiles, several images.
@needs_library
@pytest.mark.parametrize("enlarge", [False, True])
@pytest.mark.parametrize(
    "images, inner, outer, height, width, side",
    [
        (2, 6, 11, 2, 2, 3), (2, 6, 11, 6, 50, 3), (2, 40, 11, 8, 98, 3), (2, 6, 11, 6, 50, 1), (1, 300, 9, 4, 98, 1),
        (1, 16, 16, 64, 64, 3), (1, 19, 21, 62, 118, 3), (1, 16, 18, 4, 1200, 3), (3, 200, 24, 46, 52, 3),
    ],
)  # fmt: skip
def test_convolutions(images, inner, outer, height, width, side, enlarge):
    kernel, bias = drawn(3, outer, inner, side, side), drawn(4, outer)
    x = drawn(0, images, inner, height // 2, width // 2) if enlarge else drawn(0, images, inner, height, width)
    residual = drawn(5, images, outer, height, width)
    found = native.convolution(Tensor(x), Tensor(kernel), Tensor(bias), Tensor(residual), enlarge).asnumpy()
    big = x.repeat(2, 2).repeat(2, 3) if enlarge else x
    assert relative_error(found, convolved(big, kernel, bias, residual)) < LIMIT
    found = native.convolution(Tensor(x), Tensor(kernel), Tensor(bias), None, enlarge).asnumpy()
    assert relative_error(found, convolved(big, kernel, bias, 0)) < LIMIT


@needs_library
def test_other_dtypes_take_the_mathematics():
    x, weight = Tensor(drawn(0, 2, 5, 8), ms.float16), Tensor(drawn(1, 4, 8), ms.float16)
    found = linear_chains.plain_linear(x, NATIVE, weight, Tensor(np.zeros(4), ms.float16))
    assert found.dtype == ms.float16
    assert (found == functional.linear(x, weight)).all()


THREADS = """
    import sys; sys.path.insert(0, {root!r})
    import hashlib, numpy as np
    from mindspore import Tensor
    from mindsigma.ops.native import operations as native
    assert native.load()
    draw = np.random.default_rng(0).standard_normal
    x, weight = Tensor(draw((2, 200, 144), np.float32)), Tensor(draw((432, 144), np.float32))
    out = native.attention_of_qkv(native.linear(x, weight), 2, 0.1)
    found = [out.asnumpy()]
    row = Tensor(draw(32, np.float32))
    for outer, height, width in ((8, 20, 60), (16, 64, 128)):
        image, kernel = Tensor(draw((1, 32, height, width), np.float32)), Tensor(draw((outer, 32, 3, 3), np.float32))
        image = native.group_norm(image, 4, row, row, 1e-6, True)
        found.append(native.convolution(image, kernel, row[:outer]).asnumpy())
    print(hashlib.sha256(b"".join(array.tobytes() for array in found)).hexdigest())
"""


def run(code, **variables):
    code = textwrap.dedent(code).format(root=str(ROOT))
    environment = {**os.environ, "GLOG_v": "3", **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@needs_library
def test_results_do_not_depend_on_the_number_of_threads():
    one, many = run(THREADS, MINDSIGMA_THREADS="1"), run(THREADS, MINDSIGMA_THREADS="64")
    assert one.returncode == many.returncode == 0, one.stderr + many.stderr
    assert one.stdout == many.stdout


@needs_library
@pytest.mark.parametrize("guided", [True, False])
def test_solver_update(guided):
    images, scale = 3, 4.5
    latents, history, numbers = drawn(0, images, 4, 6, 10), drawn(1, 2, images, 4, 6, 10), drawn(2, 6) + 3
    prediction = drawn(3, 2 * images if guided else images, 8, 6, 10)  # noise and variance
    arguments = (latents, history, numbers, np.float32(scale), prediction)
    found, kept = native.solver_update(*map(Tensor, arguments), guided)
    noise = prediction[:, :4].astype(np.float64)
    if guided:
        noise = noise[:images] + scale * (noise[images:] - noise[:images])
    alpha, sigma, keep, *weights = numbers.astype(np.float64)
    clean = (latents - sigma * noise) / alpha
    expected = keep * latents + weights[0] * clean + weights[1] * history[0] + weights[2] * history[1]
    assert relative_error(found.asnumpy(), expected) < 1e-6
    assert relative_error(kept.asnumpy(), np.stack([clean, history[0]])) < 1e-6


@needs_library
def test_equal_halves_are_computed_once():
    """In the first block, with the bits of each half alone."""
    from mindsigma.models.dit import DiT, DiTConfig

    dit = DiT(DiTConfig(input_size=16, hidden_size=96, depth=3, num_heads=3, caption_channels=32), kernels=NATIVE)
    for i, parameter in enumerate(dit.get_parameters()):
        parameter.set_data(Tensor(drawn(i, *parameter.shape) * np.float32(0.1)))
    latents, caption, rows = drawn(0, 2, 4, 16, 16), Tensor(drawn(1, 4, 9, 32)), dit.modulations(Tensor([300.0]))
    position, keys = dit.position(latents.shape), dit.encode_caption(caption)
    both = dit.denoise(Tensor(np.concatenate([latents, latents])), rows, keys, position).asnumpy()
    for half in (slice(0, 2), slice(2, 4)):
        of_half = tuple((k[half], v[half]) for k, v in keys)
        assert (dit.denoise(Tensor(latents), rows, of_half, position).asnumpy() == both[half]).all()
    assert (both[:2] != both[2:]).any()


PRODUCTS = """
    import sys; sys.path.insert(0, {root!r})
    import numpy as np
    from mindspore import Tensor
    from mindsigma.ops.native import direct, operations as native
    assert native.load()
    draw = np.random.default_rng(0).standard_normal
    worst = 0.0
    shapes = ((64, 32, 32), (100, 45, 77), (130, 801, 100), (65, 1153, 49), (300, 2400, 640), (1200, 2400, 40))
    for rows, inner, outer in shapes:
        x, weight = draw((1, rows, inner), np.float32), draw((outer, inner), np.float32)
        x *= np.exp2(np.linspace(-20, 20, inner, dtype=np.float32))  # of all sizes
        weight *= np.exp2(np.linspace(20, -20, inner, dtype=np.float32))
        found = native.linear(Tensor(x), Tensor(weight)).asnumpy()
        expected = x.astype(np.float64) @ weight.astype(np.float64).T
        worst = max(worst, np.linalg.norm(found - expected) / np.linalg.norm(expected))
    print(direct.uses_amx(), worst, found[0, 0, 0].tobytes().hex())
"""


@needs_library
def test_products_by_amx_are_those_of_fp32():
    """And can be switched off; without them both runs are the same."""
    runs = [run(PRODUCTS, MINDSIGMA_AMX=value) for value in ("0", "1")]
    assert [done.returncode for done in runs] == [0, 0], runs[0].stderr + runs[1].stderr
    (off, of_vectors, _), (on, of_tiles, _) = (done.stdout.split() for done in runs)
    assert off == "False"
    assert float(of_vectors) < 5e-7 and float(of_tiles) < 5e-7
    known = [os.environ.get("CXX", "g++"), "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    if "__AMX_BF16__" in subprocess.run(known, capture_output=True, text=True).stdout:
        assert on == "True"
        assert runs[0].stdout.split()[2] != runs[1].stdout.split()[2]  # summed in another order


def fake_compiler(folder, script):
    path = folder / "compiler"
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder; what `library` found before is forgotten."""
    monkeypatch.setenv(library.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(library.SWITCH, raising=False)
    library.library.cache_clear()
    yield tmp_path
    library.library.cache_clear()


def test_without_a_compiler_there_is_a_note_and_mathematics(fresh, monkeypatch, capsys):
    monkeypatch.setenv("CXX", str(fresh / "absent"))
    assert resolve_kernels() == MATH
    assert resolve_kernels() == MATH
    assert capsys.readouterr().err.count("note: no native kernels") == 1
    with pytest.raises(MindSigmaError, match="kernels native"):
        resolve_kernels(NATIVE)


def test_a_failing_compiler_leaves_nothing_behind(fresh, monkeypatch, capsys):
    script = 'test "$1" = --version && exit 0\necho "x.cpp:1: error: unknown flag" >&2\nexit 1\n'
    monkeypatch.setenv("CXX", fake_compiler(fresh, script))
    assert resolve_kernels() == MATH
    assert "unknown flag" in capsys.readouterr().err
    assert [path.name for path in (fresh / "cache").iterdir()] == [".native.lock"]


def test_an_unwritable_cache_is_named(fresh, monkeypatch, capsys):
    monkeypatch.setenv("CXX", fake_compiler(fresh, "exit 0\n"))
    (fresh / "cache").write_text("a file")
    assert resolve_kernels() == MATH
    assert library.CACHE in capsys.readouterr().err


@pytest.mark.parametrize("folder, white_list, words", [("a:b", None, "colon"), ("a", "/elsewhere", "WHITE_LIST")])
def test_a_folder_that_mindspore_refuses_is_named(fresh, monkeypatch, capsys, folder, white_list, words):
    monkeypatch.setenv("CXX", fake_compiler(fresh, "exit 0\n"))
    monkeypatch.setenv(library.CACHE, str(fresh / folder))
    if white_list is not None:
        monkeypatch.setenv("MS_CUSTOM_AOT_WHITE_LIST", white_list)
    assert resolve_kernels() == MATH
    assert words in capsys.readouterr().err


def test_the_switch_needs_no_words(fresh, monkeypatch, capsys):
    monkeypatch.setenv(library.SWITCH, "0")
    assert resolve_kernels() == MATH
    assert capsys.readouterr().err == ""


def test_two_processes_compile_once(fresh, monkeypatch):
    """The stand-in of a compiler notes each call and takes its time."""
    script = f"""
test "$1" = --version && exit 0
echo >> {fresh}/calls
sleep 1
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""
    compiler = fake_compiler(fresh, script)
    code = "import sys; sys.path.insert(0, {root!r})\nfrom mindsigma.ops.native.library import build; print(build())"
    command = [sys.executable, "-c", code.format(root=str(ROOT))]
    environment = {**os.environ, "CXX": compiler, "GLOG_v": "3"}
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate()[0].strip() for process in processes}
    assert len(paths) == 1
    assert Path(paths.pop()).read_text() == "library\n"
    assert (fresh / "calls").read_text() == "\n"


STAND_IN = """
test "$1" = --version && exit 0
echo >> "{calls}"
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""


def rebuilt(fresh, monkeypatch, change):
    """Whether `change(path, checksum file)` of a library in the cache makes the next process compile it again."""
    calls = fresh / "calls"
    monkeypatch.setenv("CXX", fake_compiler(fresh, STAND_IN.format(calls=calls)))
    path = library.build()
    assert (path.read_text(), calls.read_text()) == ("library\n", "\n")
    assert library.build() == path and calls.read_text() == "\n"
    change(path, path.with_name(f"{path.name}.sha256"))
    assert library.build() == path
    assert path.read_text() == "library\n" and path.lstat().st_mode & 0o777 == 0o755
    assert sorted(p.name for p in path.parent.iterdir()) == [".native.lock", path.name, f"{path.name}.sha256"]
    count = calls.read_text()
    assert library.build() == path and calls.read_text() == count
    return count == "\n\n"


SPOILT = {
    "truncated": lambda path, checksum: os.truncate(path, 3),
    "empty": lambda path, checksum: os.truncate(path, 0),
    "of somebody else's": lambda path, checksum: path.write_text("another"),
    "without a checksum": lambda path, checksum: checksum.unlink(),
    "another's checksum": lambda path, checksum: checksum.write_text("0" * 64),
    "a checksum of a gigabyte": lambda path, checksum: os.truncate(checksum, 2**30),
    "a library of a terabyte": lambda path, checksum: os.truncate(path, 2**40),
    "a link": lambda path, checksum: (
        path.rename(path.parents[1] / "x"),
        path.symlink_to(path.parents[1] / "x"),
    ),
    "a pipe": lambda path, checksum: (path.unlink(), os.mkfifo(path)),
    "checksum a pipe": lambda path, checksum: (checksum.unlink(), os.mkfifo(checksum)),
    "writable by a group": lambda path, checksum: path.chmod(0o775),
    "checksum writable by all": lambda path, checksum: checksum.chmod(0o666),
    "leftovers of a kill": lambda path, checksum: (
        path.unlink(),
        (path.parent / ".native-x.so.1.part").write_text("x"),
    ),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_spoilt_library_is_compiled_again(fresh, monkeypatch, fault):
    assert rebuilt(fresh, monkeypatch, SPOILT[fault])


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
@pytest.mark.parametrize("which", [0, 1])
def test_another_users_library_is_not_trusted(fresh, monkeypatch, which):
    assert rebuilt(fresh, monkeypatch, lambda *files: os.chown(files[which], 65534, 65534))


def test_a_folder_that_others_can_write_to(fresh, monkeypatch, capsys):
    """The library is compiled for this process alone, with a note; not where a sticky bit protects it."""
    monkeypatch.setenv("CXX", fake_compiler(fresh, STAND_IN.format(calls=fresh / "calls")))
    cache = fresh / "cache"
    for mode, words in ((0o777, f"other users can write to {cache}"), (0o775, "other users can write"), (0o1777, "")):
        shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir()
        cache.chmod(mode)
        path = library.build()
        note = capsys.readouterr().err
        assert (path.parent == cache) == (not words)
        assert words in note and (words != "") == ("for this process alone" in note)
        assert path.parent.stat().st_mode & 0o777 in (0o700, 0o777)
    (fresh / "open").mkdir()
    (fresh / "open").chmod(0o777)  # somebody could put another folder in the place of ours
    monkeypatch.setenv(library.CACHE, str(fresh / "open" / "cache"))
    assert library.build().parent not in (fresh / "open" / "cache", cache)
    assert f"other users can write to {fresh / 'open'}" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder away")
def test_another_users_folder_is_not_trusted(fresh, monkeypatch, capsys):
    monkeypatch.setenv("CXX", fake_compiler(fresh, STAND_IN.format(calls=fresh / "calls")))
    (fresh / "cache").mkdir()
    os.chown(fresh / "cache", 65534, 65534)
    assert library.build().parent != fresh / "cache"
    assert "belongs to another user" in capsys.readouterr().err
    assert list((fresh / "cache").iterdir()) == []


def test_our_own_folder_is_closed(fresh, monkeypatch):
    """~/.cache/mindsigma that a lax umask left open to the group is mended; a new one is this user's alone."""
    monkeypatch.setenv("CXX", fake_compiler(fresh, STAND_IN.format(calls=fresh / "calls")))
    monkeypatch.delenv(library.CACHE)
    monkeypatch.setenv("HOME", str(fresh))
    folder = fresh / ".cache" / "mindsigma"
    assert library.build().parent == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o775)
    assert library.build().parent == folder
    assert folder.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("what", ["link", "pipe"])
def test_a_lock_that_is_none(fresh, monkeypatch, capsys, what):
    """A link is not followed, a pipe not waited for."""
    monkeypatch.setenv("CXX", fake_compiler(fresh, STAND_IN.format(calls=fresh / "calls")))
    (fresh / "cache").mkdir(mode=0o700)
    (fresh / "precious").write_text("x")
    lock = fresh / "cache" / ".native.lock"
    lock.symlink_to(fresh / "precious") if what == "link" else os.mkfifo(lock)
    assert library.library() is None  # what the compiler's stand-in writes is no library, either
    assert capsys.readouterr().err.count("\n") <= 2
    assert (fresh / "precious").read_text() == "x"


def test_what_cannot_be_loaded_is_a_note(fresh, monkeypatch, capsys):
    monkeypatch.setenv("CXX", fake_compiler(fresh, STAND_IN.format(calls=fresh / "calls")))
    assert resolve_kernels() == MATH
    assert "note: no native kernels" in capsys.readouterr().err


def test_another_compiler_makes_another_library(fresh, monkeypatch):
    made = set()
    for version in ("1", "2"):
        script = f'test "$1" = --version && echo {version} && exit 0\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"\n'
        monkeypatch.setenv("CXX", fake_compiler(fresh, script))
        made.add(library.build())
    assert len(made) == 2
    os.chmod(next(iter(made)), 0o777)  # anyone could have written it: made again
    assert all(library.build() in made for _ in range(2))


@needs_library
def test_graphs_of_operations_are_called_as_they_are():
    """Uncompiled, with the bits of the compiled graph; half precision is compiled."""
    from mindsigma.models.vae import norm_silu_conv_add
    from mindsigma.ops.shared_graph import SharedGraph, compiled_graphs

    shapes = ((8,), (8,), (5, 8, 3, 3), (5,))
    weights = [ms.Parameter(Tensor(drawn(i, *shape)), name=f"w{i}") for i, shape in enumerate(shapes)]
    residual, found = Tensor(drawn(8, 2, 5, 9, 20)), {}

    def image():
        return Tensor(drawn(7, 2, 8, 9, 20))  # which is overwritten

    for direct in (True, False):
        graph = SharedGraph(norm_silu_conv_add, weights, (4, NATIVE), of_operations=direct)
        before = compiled_graphs()
        found[direct] = graph(image(), residual).asnumpy()
        assert compiled_graphs() - before == (0 if direct else 1)
    assert (found[True] == found[False]).all()
    columns = image().transpose(0, 1, 3, 2).transpose(0, 1, 3, 2)[:, :, :, ::1]  # views of the same values
    assert (SharedGraph(norm_silu_conv_add, weights, (4, NATIVE), of_operations=True)(columns, residual).asnumpy()
            == found[True]).all()  # fmt: skip
    halves = [ms.Parameter(weight.astype(ms.float16), name=weight.name) for weight in weights]
    graph = SharedGraph(norm_silu_conv_add, halves, (4, NATIVE), of_operations=True)
    before = compiled_graphs()
    half = graph(image().astype(ms.float16), residual.astype(ms.float16)).asnumpy()
    assert compiled_graphs() == before + 1 and relative_error(half, found[True]) < 0.01


@needs_library
def test_in_training_what_has_a_gradient_is_computed():
    """A block on the native kernels has the gradients of the same block on the mathematics."""
    from mindsigma.ops.gradients import value_and_gradients
    from mindsigma.ops.shared_graph import SharedGraph

    weight = ms.Parameter(Tensor(drawn(1, 6, 8)), name="weight")
    x = Tensor(drawn(0, 2, 5, 8))
    found = []
    for kernels in (NATIVE, MATH):
        graph = SharedGraph(squares_of_gelu, (weight,), (kernels,))
        if kernels == NATIVE:
            native_loss = float(graph(x))
        (loss, _), (gradient,) = value_and_gradients(partial(twice, graph), [weight], (x,))
        found.append((float(loss), gradient.asnumpy()))
    assert found[0][0] == pytest.approx(native_loss, rel=1e-5)
    assert found[1][0] == pytest.approx(native_loss, rel=1e-5)
    assert relative_error(*(gradient for _, gradient in found)) < 1e-5
    assert np.abs(found[0][1]).max() > 0


def twice(graph, x):
    loss = graph(x)
    return loss, loss


def squares_of_gelu(x, kernels, weight):
    y = linear_chains.linear_gelu(x, kernels, weight, ops.zeros((6,), ms.float32))
    return (y * y).sum()
