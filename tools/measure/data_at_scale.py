"""Measure data sets by their size: opening, memory, the order of an epoch, resumption, and reading of features.

    python tools/measure/data_at_scale.py index scratch/ --rows 30000000 --processes 1 8
    python tools/measure/data_at_scale.py order scratch/ --rows 30000000
    python tools/measure/data_at_scale.py start scratch/ --rows 1000 10000 100000
    python tools/measure/data_at_scale.py features scratch/ --rows 600 --processes 1 2
    python tools/measure/data_at_scale.py prompts scratch/ --rows 2 1000000

`index` makes an index of drawn captions and sizes over sparse shards. `order` walks through an epoch of such an index,
of which it makes sizes and order by ratio alone: all that the order follows from. `start` makes shards of tiny images
and opens them with and without an index. `features` makes shards of 512 px features of T5-XXL's width. `prompts` lists
prompts of which all shards but the last, of two prompts, count as drawn, and starts tools/generate.py --shard-prompts
on them. What was made is kept. Every measurement is a process of its own; seconds are of its processor where it says.
"""

import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from mindsigma import command_line
from mindsigma.commands import generate_options
from mindsigma.commands.prompt_lines import PromptLines
from mindsigma.commands.rows import columns_of
from mindsigma.data import BucketSampler, Loader, Resolution, open_data
from mindsigma.data.columns import ENDS, merge, text_arrays
from mindsigma.data.feature_shards import FeatureShards
from mindsigma.data.features import MOMENTS, STATES
from mindsigma.data.index import BAD, FILES, ROWS, is_index
from mindsigma.data.index_building import Building, describe_part, write_version
from mindsigma.data.record import Record
from mindsigma.data.shards import Section
from mindsigma.errors import MindSigmaError, say
from mindsigma.foreign import open_regular

CHUNK = 1 << 18  # rows made at once
SHARD_ROWS, IMAGE_BYTES = 10_000, 100_000  # of the sparse shards
WORDS = ("a", "red", "small", "old", "apple", "cat", "rocket", "house", "on", "under", "the", "table", "photo")
RESOLUTION, BATCH = Resolution(1024, True), 2048
STEPS = 21  # that a rank reads
DRAWN_PROMPTS, LEFT = 1000, 2  # prompts of a shard of pictures; of the last one
DRAWN_SMALL = ("--steps", "1", "--height", "64", "--width", "64", "--no-resolution-binning", "--guidance-scale", "1")
WIDTH, TOKENS = 4096, (20, 300)  # of T5-XXL's states; of a caption, least and most
# mindone's README for PixArt-Sigma, MindSpore 2.5.0 on four 910* cards: images a second of all, T5 and VAE included.
PUBLISHED = {256: 96.5 / 4, 512: 39.7 / 4, 1024: 9.3 / 4}


def build_parser():
    """The options of this tool."""
    parser = command_line.parser(__doc__.splitlines()[0], "python tools/measure/data_at_scale.py index scratch")
    add = parser.add_argument
    add("what", choices=("index", "order", "start", "features", "prompts"), help="what is measured")
    add("scratch", help="folder for what is made")
    add("--rows", type=int, nargs="+", default=[100_000], help="records")
    add("--processes", type=int, nargs="+", default=[1], help="processes at the same time")
    return parser


# What is made.


def _digits(rows, random):
    digits = (rows[:, None] // 10 ** np.arange(8, -1, -1)) % 10 + ord("0")
    return {"key": digits.astype(np.uint8).reshape(-1), "key" + ENDS: np.arange(1, len(rows) + 1, dtype=np.int64) * 9}


def _captions(rows, random):
    texts = [" ".join(np.random.default_rng(i).choice(WORDS, 3 + i % 6)) for i in range(500)]
    return text_arrays("prompt", [texts[i] for i in random.integers(0, 500, len(rows)).tolist()])


def _sizes(rows, random):
    width = random.integers(512, 4096, len(rows))
    height = np.maximum(1, width * np.exp(random.normal(0, 0.4, len(rows))).clip(0.23, 4.4))
    return {"size": np.stack([height, width], 1).astype(np.int32)}


COLUMNS = {  # name: function of the rows and of a generator that gives its tensors
    "key": _digits,
    "prompt": _captions,
    "long_prompt": lambda rows, random: text_arrays("long_prompt", [""] * len(rows)),
    "size": _sizes,
    "file": lambda rows, random: {"file": (rows // SHARD_ROWS).astype(np.int32)},
    "place": lambda rows, random: {
        "place": np.stack([rows % SHARD_ROWS * IMAGE_BYTES, np.full(len(rows), IMAGE_BYTES)], 1)
    },
    "digest": lambda rows, random: {"digest": random.integers(0, 2**64, (len(rows), 2), np.uint64)},
}


class Chunk:
    """Some rows of a synthetic index; a column is drawn when it is asked for, the same every time.

    Args:
        rows: their numbers. files: names of the shards, of the first chunk.
    """

    def __init__(self, rows, files):
        self._rows, self.arrays = rows, self
        self._others = {**text_arrays("files", files), "stamp": np.zeros((len(files), 2), np.int64)}
        for kind in BAD:
            self._others.update(text_arrays(kind.name, []))

    def __getitem__(self, name):
        column = name.removesuffix(ENDS)
        if column in COLUMNS:
            return COLUMNS[column](self._rows, np.random.default_rng([int(self._rows[0]), len(column)]))[name]
        return self._others[name]


class Chunks:
    """All rows; stands for columns.Parts."""

    tables = (ROWS, FILES, BAD)

    def __init__(self, rows):
        self._rows = rows

    def __iter__(self):
        names = [f"{i:05d}.tar" for i in range(-(-self._rows // SHARD_ROWS))]
        for first in range(0, self._rows, CHUNK):
            yield Chunk(np.arange(first, min(first + CHUNK, self._rows)), [] if first else names)


def synthetic_index(folder, rows):
    """Path of an index of so many drawn rows over sparse shards."""
    path, shards = folder / f"index-{rows}", folder / f"shards-{rows}"
    if is_index(path):
        return path
    shards.mkdir(parents=True, exist_ok=True)
    path.mkdir(parents=True, exist_ok=True)
    for number in range(-(-rows // SHARD_ROWS)):
        with open(shards / f"{number:05d}.tar", "wb") as file:
            file.truncate(SHARD_ROWS * IMAGE_BYTES)
    chunks, began = Chunks(rows), time.perf_counter()
    ratios = np.concatenate([chunk["size"][:, 0] / chunk["size"][:, 1] for chunk in chunks])
    merge(path / "part-0001.safetensors", chunks, {"by_ratio": np.argsort(ratios, kind="stable").astype(np.int32)})
    source = str(shards.resolve())
    task = {"source": source, "root": source, "layout": "webdataset", "max_ratio": 4.5}
    columns = time.perf_counter() - began
    write_version(path, 1, [describe_part(path, "part-0001.safetensors", task)])
    size, hashing = (path / "part-0001.safetensors").stat().st_size, time.perf_counter() - began - columns
    say(f"made {path}: {size / 1e9:.2f} GB, columns {columns:.0f} s, hashing {hashing:.0f} s")
    return path


class Sizes:
    """What the order of an epoch reads of an index: sizes and the rows by height / width, mapped from files.

    Args:
        path: folder of `drawn_sizes`.
    """

    def __init__(self, path):
        self.sizes, self._by_ratio = (np.load(path / f"{name}.npy", mmap_mode="r") for name in ("size", "by_ratio"))

    def __len__(self):
        return len(self.sizes)

    def by_ratio(self):
        """See data/index.py."""
        return [(0, self._by_ratio)]


def drawn_sizes(folder, rows):
    """Path of a folder with the sizes of `synthetic_index` and their order by ratio."""
    path = folder / f"sizes-{rows}"
    if (path / "by_ratio.npy").is_file():
        return path
    path.mkdir(parents=True, exist_ok=True)
    sizes = np.concatenate([chunk["size"] for chunk in Chunks(rows)])
    np.save(path / "size.npy", sizes)
    np.save(path / "by_ratio.npy", np.argsort(sizes[:, 0] / sizes[:, 1], kind="stable").astype(np.int32))
    return path


def tiny_shards(folder, rows):
    """Path of a folder of shards of images of some hundred bytes, real in every other way."""
    path = folder / f"tiny-{rows}"
    if path.is_dir():
        return path
    path.mkdir(parents=True)
    images = []
    for i in range(40):
        file = io.BytesIO()
        Image.new("RGB", (16 + i, 32), (6 * i, 80, 90)).save(file, "PNG")
        images.append(file.getvalue())
    for first in range(0, rows, 1000):
        with tarfile.open(path / f"{first // 1000:05d}.tar", "w") as tar:
            for i in range(first, min(first + 1000, rows)):
                for name, data in ((f"{i:09d}.png", images[i % 40]), (f"{i:09d}.txt", f"picture number {i}".encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return path


def feature_shards(folder, rows):
    """Path of features of noise, as an extraction at 512 px with T5-XXL and fp16 writes them."""
    path = folder / f"features-{rows}"
    config = {
        "resolution": Resolution(512).as_dict(), "max_length": TOKENS[1], "latent_channels": 4, "downsampling": 8,
        "state_width": WIDTH,
    }  # fmt: skip
    records = [Record(f"{i:09d}.jpg", f"picture {i}", "", 512, 512, f"{i:09d}.jpg") for i in range(rows)]
    writer, random = FeatureShards(path, config, records, 100), np.random.default_rng(0)
    noise = random.standard_normal((TOKENS[1], WIDTH), np.float32).astype(np.float16)
    if not writer.has_null_caption():
        writer.write_null_caption(noise.astype(np.float32), 1)
    for number in range(writer.count):
        with writer.open_shard(number, [[i] for i in writer.share(number)]) as shard:
            for (i,) in shard.left:
                moments = random.standard_normal((8, 64, 64), np.float32).astype(np.float16)
                tokens = int(random.integers(TOKENS[0], TOKENS[1] + 1))
                shard.write(records[i], {MOMENTS: moments, STATES: noise[:tokens]}, {"stamp": "none", "digest": "none"})
            shard.complete()
    if writer.count:
        writer.finish()
    return path


def prompt_lines(folder, rows):
    """Path of a text of drawn prompts, each another."""
    path = folder / f"prompts-{rows}.txt"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(0)
        texts = [" ".join(random.choice(WORDS, 8)) for _ in range(500)]
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(f"{texts[i % 500]}, number {i}\n" for i in range(rows))
    return path


# What is measured, in processes of their own.


def memory():
    """dict of megabytes of this process: proportional share (PSS), and of that what is no page of a file."""
    table = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        table[name] = int(value.split()[0]) / 1e3
    return {"pss": table["Pss"], "anonymous": table["Pss_Anon"]}


def cpu_seconds():
    """Seconds of the processor that this process took."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Clock:
    """Seconds of the wall and of the processor since it was made."""

    def __init__(self):
        self.wall, self.cpu = time.perf_counter(), cpu_seconds()

    def read(self):
        """dict of both."""
        return {"seconds": time.perf_counter() - self.wall, "cpu": cpu_seconds() - self.cpu}


def together():
    """Wait until all processes of a measurement are here, so that pages are shared when memory is read."""
    print("ready", flush=True)
    sys.stdin.readline()


def opened(path):
    """The data set, index or Sizes of a path."""
    if (Path(path) / "by_ratio.npy").is_file():
        return Sizes(Path(path))
    return open_data(path, **({} if is_index(path) else {"progress": False}))


def worker(name, path, rank, ranks):
    """One measurement; returns a dict."""
    before, clock = memory(), Clock()
    if name == "lines":
        prompts = PromptLines(path, columns_of(generate_options.build_parser()))
        return {"list": clock.read(), "prompts": len(prompts), "memory before": before, "memory listed": memory()}
    source = opened(path)
    found = {"open": clock.read(), "records": len(source), "memory before": before}
    if name == "features":
        sampler = BucketSampler(source, 16 * ranks, Resolution(512))
        loader = Loader(source, sampler, rank, ranks, max_length=TOKENS[1], threads=1)
        list(loader.batches(0, len(sampler)))  # so that the files are in memory
        together()
        clock, count, data = Clock(), 0, 0
        for batch in loader.batches(0, 2 * len(sampler)):
            count, data = count + len(batch.draws), data + batch.moments.nbytes // 2 + int(batch.mask.sum()) * 2 * WIDTH
        return {**found, "load": clock.read(), "samples": count, "bytes": data}
    clock = Clock()
    sampler = BucketSampler(source, BATCH if len(source) >= BATCH else 16, RESOLUTION)
    found["sampler"] = clock.read()
    together()
    found["memory opened"] = memory()
    if name == "epoch":
        clock, seen = Clock(), np.zeros(len(source), np.uint8)
        for step in range(len(sampler)):
            if step == len(sampler) // 2:  # here the run ends, and another goes on
                source = opened(path)
                sampler = BucketSampler(source, BATCH, RESOLUTION)
            np.add.at(seen, sampler.batch(step)[1], 1)
        found["epoch"] = {**clock.read(), "steps": len(sampler), "least": int(seen.min()), "most": int(seen.max())}
        found["again"], found["repeated"] = int((seen > 1).sum()), sampler.summary().repeated
        found["memory read"] = memory()
        return found
    clock, share = Clock(), slice(rank * sampler.batch_size // ranks, (rank + 1) * sampler.batch_size // ranks)
    found["resumed batch"] = sampler.batch(3 * len(sampler) // 2)[1][:4].tolist()
    found["resume"] = clock.read()
    clock, count = Clock(), 0
    for step in range(min(STEPS, len(sampler))):
        for index in sampler.batch(step)[1][share]:
            record = source[index]
            count += bool(record.caption(True))
    found["rows"] = {**clock.read(), "count": count}
    if name == "index":
        with open_regular(record.file) as file:
            assert len(Section(file, record.offset, record.length).read(IMAGE_BYTES)) == IMAGE_BYTES
    together()
    found["memory read"] = memory()
    together()
    return found


def measured(name, path, processes):
    """list of the dicts of `worker` of so many processes at the same time."""
    if Path(path).is_dir() and is_index(path):
        for file in Path(path).glob("part-*"):  # out of memory: what is opened comes from the disk
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    running = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", name, str(path), str(rank), str(processes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    results = [None] * processes
    while None in results:
        lines = [process.stdout.readline().strip() for process in running]
        for i, line in enumerate(lines):
            if line != "ready":
                results[i] = json.loads(line)
        for process, line in zip(running, lines):
            if line == "ready":
                process.stdin.write("\n")
                process.stdin.flush()
    for process in running:
        process.wait()
    return results


def tell_index(path, processes):
    """Measure an index and print it."""
    for count in processes:
        found = measured("index", path, count)
        one = found[0]
        say(
            f"{one['records']} records, {count} processes at once:",
            f"  opened in {1e3 * max(f['open']['seconds'] for f in found):.0f} ms, buckets found in "
            f"{1e3 * max(f['sampler']['seconds'] for f in found):.0f} ms, first batch of a resumed run in "
            f"{1e3 * max(f['resume']['seconds'] for f in found):.0f} ms",
        )
        for when in ("before", "opened", "read"):
            told = [f[f"memory {when}"] for f in found]
            pss, own = (sum(t[name] for t in told) for name in ("pss", "anonymous"))
            say(f"  memory {when}: PSS {pss:.0f} MB over all, of which {own:.0f} MB are no pages of files")
        rows = [f["rows"] for f in found]
        each = sum(r["cpu"] for r in rows) / sum(r["count"] for r in rows)
        say(f"  a record with its caption: {1e6 * each:.0f} us of a processor, {sum(r['count'] for r in rows)} records")
        assert len({tuple(f["resumed batch"]) for f in found}) == 1
    tell_order(path)


def tell_order(path):
    """Walk through an epoch of an index or of `drawn_sizes` and print what was taken."""
    (found,) = measured("epoch", path, 1)
    epoch, pss = found["epoch"], found["memory read"]["pss"]
    say(
        f"order of an epoch, resumed half way: {epoch['steps']} steps of {BATCH} in {epoch['cpu']:.0f} s of a "
        f"processor, {1e3 * epoch['cpu'] / epoch['steps']:.2f} ms a step; every record {epoch['least']} to "
        f"{epoch['most']} times, {found['again']} more than once, {found['repeated']} to fill batches; PSS {pss:.0f} MB"
    )


def tell_start(folder, rows):
    """Measure starts with and without an index and print them."""
    heads = ("records", "read directly, s", "PSS, MB", "index built, s", "index opened, s", "PSS, MB")
    say(f"| {' | '.join(heads)} |", "|---" * len(heads) + "|")
    for count in rows:
        source = tiny_shards(folder, count)
        clock = Clock()
        Building(source, folder / f"tiny-index-{count}").run()
        built = clock.read()["cpu"]
        direct, index = (measured("rows", path, 1)[0] for path in (source, folder / f"tiny-index-{count}"))
        cells = [f"{count:,}"]
        for found in (direct, index):
            start = found["open"]["cpu"] + found["sampler"]["cpu"]
            growth = found["memory opened"]["pss"] - found["memory before"]["pss"]
            cells += [f"{start:.3f}", f"{growth:.1f}"]
        say(f"| {' | '.join([*cells[:3], f'{built:.2f}', *cells[3:]])} |")


def tell_features(path, processes):
    """Measure the loader on feature shards and print it."""
    for count in processes:
        found = measured("features", path, count)
        samples, cpu = (sum(get(f) for f in found) for get in (lambda f: f["samples"], lambda f: f["load"]["cpu"]))
        seconds, data = max(f["load"]["seconds"] for f in found), sum(f["bytes"] for f in found)
        say(
            f"{count} processes: {samples / seconds:.0f} samples a second of the clock, "
            f"{1e3 * cpu / samples:.2f} ms of a processor each ({samples / cpu:.0f} a second and core), "
            f"{data / samples / 1e6:.2f} MB each from the file"
        )
    cards = ", ".join(f"{rate:.1f} at {pixels} px" for pixels, rate in PUBLISHED.items())
    say(f"a 910* card takes {cards} images a second (mindone's README, training of PixArt-Sigma)")


def started(path, out):
    """(seconds, of a processor, peak MB, output) of tools/generate.py on a list of prompts, process start to end."""
    tool, count = Path(__file__).parents[1] / "generate.py", str(DRAWN_PROMPTS)
    command = [sys.executable, tool, "--prompts-file", path, "--shard-prompts", count, "--out", out, *DRAWN_SMALL]
    clock, process = time.perf_counter(), subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise MindSigmaError(f"tools/generate.py failed: {said[-300:]}")
    return time.perf_counter() - clock, used.ru_utime + used.ru_stime, used.ru_maxrss / 1e3, said


def tell_prompts(folder, rows):
    """Measure starts with lists of prompts whose shards are drawn but for the last."""
    path, out = prompt_lines(folder, rows // DRAWN_PROMPTS * DRAWN_PROMPTS + LEFT), folder / f"drawn-{rows}"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for number in range(rows // DRAWN_PROMPTS):
        (out / f"{number:05d}.tar").touch()
    seconds, cpu, peak, said = started(path, out)
    assert f"{rows // DRAWN_PROMPTS:05d}.tar: {LEFT} pictures" in said and "complete" in said, said
    listed = measured("lines", path, 1)[0]
    growth = listed["memory listed"]["pss"] - listed["memory before"]["pss"]
    say(
        f"{listed['prompts']} prompts, {rows // DRAWN_PROMPTS} shards drawn before: {seconds:.1f} s and {cpu:.1f} s of "
        f"a processor from start to end, with {LEFT} pictures; peak {peak:.0f} MB",
        f"  of it the list: {listed['list']['cpu']:.1f} s of a processor, PSS {growth:.0f} MB more",
    )


def main():
    """Parse, make, measure; returns the exit code."""
    args = build_parser().parse_args()
    folder = Path(args.scratch)
    if args.what == "start":
        tell_start(folder, args.rows)
    for rows in args.rows if args.what != "start" else ():
        if args.what == "prompts":
            tell_prompts(folder, rows)
        elif args.what == "order":
            tell_order(drawn_sizes(folder, rows))
        elif args.what == "index":
            tell_index(synthetic_index(folder, rows), args.processes)
        else:
            tell_features(feature_shards(folder, rows), args.processes)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        name, path, rank, ranks = sys.argv[2:]
        print(json.dumps(worker(name, path, int(rank), int(ranks))), flush=True)
    else:
        command_line.run(main)
