"""A process that runs one tool after the other on hostile files, as its script does, and tells what each run did.

Reads a JSON object a line, {"tool", "cwd", "arguments", "compare"}, and answers with one: exit code, what stdout and
stderr held, CPU seconds, growth of resident memory, and what was done that no run may do. Started by fuzz_convert.py.
"""

import functools
import importlib
import json
import os
import resource
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "pickle.find_class",
    "socket.connect",
)
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")
ADDRESS_SPACE = 6 * 2**30  # beyond what the libraries map


class Watch:
    """Notes what a run does outside of its folder, and whatever starts a program."""

    def __init__(self):
        self.folder, self.found = None, []
        sys.addaudithook(self)

    def __call__(self, event, args):
        if self.folder is None:
            return
        if event in FORBIDDEN:
            self.found.append(f"{event} {args!r:.200}")
        elif event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self._path(event, args[0])
        elif event in CHANGES:
            for path in args[:2] if event in ("os.rename", "os.link", "os.symlink") else args[:1]:
                self._path(event, path)

    def _path(self, event, path):
        if isinstance(path, (str, bytes, os.PathLike)):
            full = os.path.realpath(os.path.dirname(os.path.abspath(os.fsdecode(path))))
            if full != self.folder and not full.startswith(self.folder + os.sep) and not full.startswith("/dev"):
                self.found.append(f"{event} {os.fsdecode(path)}")


def memory(field):
    """A size in /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def run(main, command_line, task, watch):
    """One run with its own streams; returns the answer."""
    os.chdir(task["cwd"])
    sys.argv = [f"tools/{task['tool']}.py", *task["arguments"]]
    log, out = (os.open(task[name], os.O_RDWR | os.O_CREAT | os.O_TRUNC) for name in ("log", "out"))
    kept = os.dup(1), os.dup(2)
    os.dup2(log, 2)
    os.dup2(out, 1)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
        resident = memory("VmRSS")
    except OSError:  # not everybody may: then growth beyond the peak of all runs before
        resident = memory("VmHWM")
    seconds = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    watch.found, watch.folder = [], os.path.realpath(task["cwd"])
    code, trace = None, ""
    try:
        command_line.run(main)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        code, trace = 1, traceback.format_exc()
    finally:
        watch.folder = None
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        os.close(kept[0])
        os.close(kept[1])
    said = [os.pread(descriptor, 10**6, 0).decode("utf-8", "replace") for descriptor in (log, out)]
    os.close(log)
    os.close(out)
    answer = {
        "code": code,
        "stderr": said[0],
        "stdout": said[1],
        "traceback": trace,
        "seconds": sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - seconds,
        "memory": memory("VmHWM") - resident,
        "forbidden": watch.found,
        "difference": "",
    }
    if code == 0 and task["compare"]:
        try:
            answer["difference"] = difference(**task["compare"])
        except Exception:
            answer["difference"] = traceback.format_exc()
    return answer


def difference(source, target, ema, without, **config):
    """Says how the tensors of a result differ from its source, both as the reader sees them; empty if they agree."""
    import numpy as np

    from mindsigma.conversion.component import open_source

    given = open_source(source, ema=ema, **config).components
    for one in given:
        if one.kind == "dit":  # what a bare file does not tell
            config = {name: getattr(one.config, name) for name in ("num_heads", "input_size", "pe_interpolation")}
    found = {one.kind: one for one in open_source(target, **config).components}
    for one in given:
        other = found.get(one.kind)
        if other is None:
            return f"no {one.kind} in the result"
        names, others = ({n for n in c.view.names() if not (without and without in n)} for c in (one, other))
        if names != others:
            return f"names differ: {sorted(names ^ others)[:3]}"
        for name in names:
            a, b = one.view.read(name), other.view.read(name)
            if a.dtype != b.dtype or a.shape != b.shape:
                return f"{name}: {a.dtype} {a.shape} became {b.dtype} {b.shape}"
            if np.ascontiguousarray(a).tobytes() != np.ascontiguousarray(b).tobytes():
                return f"{name} has other values"
    return ""


def resume():
    """Read a run as a start of tools/train.py does."""
    from mindsigma.distributed import Collectives, Ranks
    from mindsigma.training.checkpoints import RunCheckpoints, read_state
    from mindsigma.training.run_log import read_log

    folder = Path(sys.argv[1])
    read_log(folder / "log.jsonl")
    kept = RunCheckpoints(folder / "checkpoints", 3, Collectives(Ranks()))
    path = kept.latest()
    if path is not None:
        with kept.readable(path):
            read_state(path)
        kept.restore(path, held())
    kept.best()


@functools.cache
def held():
    """What runs are restored into."""
    from hostile.data_sources import contents

    return contents()


def options():
    """Read a file of options as tools/train.py does."""
    from mindsigma.config_file import parse_with_config
    from mindsigma.training.run_options import build_parser, check

    parser = build_parser()
    for action in parser._actions:
        action.required = False  # an empty file is as good as none: then the command line tells everything
    check(parse_with_config(parser, ["--config", sys.argv[1]]))


def main_of(tool):
    """The function that a command runs, with what it needs at hand, so that no case pays for it."""
    if tool == "resume":
        held()
    return {"resume": resume, "options": options}.get(tool) or importlib.import_module(
        f"mindsigma.commands.{tool}"
    ).main


def main():
    """Serve until stdin ends."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    from mindsigma import command_line
    from mindsigma.conversion import writing as convert  # noqa: F401  # so that no case pays for the imports
    from mindsigma.conversion.targets import prepare  # noqa: F401

    limit = memory("VmSize") + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch = Watch()
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps(run(main_of(task["tool"]), command_line, task, watch)), file=answers, flush=True)


if __name__ == "__main__":
    main()
