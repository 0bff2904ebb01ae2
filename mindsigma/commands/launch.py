"""Start the processes of a tool with msrun, watch them, and start them again when one dies or hangs.

The launchers of tools/launch call it. msrun starts the processes and leaves them (--join=False); whoever asked for that
becomes their parent. So their ends are seen at once, where msrun's own waiting turns in a loop that takes a core, and
needs 40 s when one of them is killed.
"""

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mindsigma import command_line
from mindsigma.errors import MindSigmaError, one_line, say
from mindsigma.foreign import load_json, read_bytes
from mindsigma.heartbeat import FINISHED, FOLDER, LEAVE, REFUSED, RUNNING, last_beat

SAVES = ("train.py", "distill.py")  # tools that save when they are asked to end
LOOK_SECONDS = 0.1  # between two looks at the processes
LEAVE_SECONDS = 10  # for processes that have finished to end
MOST_NAMED = 4  # processes that a message names
INTERRUPTED = 130
PR_SET_CHILD_SUBREAPER = 36  # of prctl: orphans of this process's descendants become its children


def build_parser():
    """The options of the launcher; those of the tool follow after --."""
    parser = command_line.parser(__doc__.splitlines()[0], usage="%(prog)s [options] -- TOOL OPTIONS")
    add = parser.add_argument
    add("--processes", type=int, required=True, help="of this node")
    add("--nodes", type=int, default=1)
    add("--node-rank", type=int, default=0, help="number of this node")
    add("--address", default="127.0.0.1", help="of node 0")
    add("--port", type=int, default=8118, help="of node 0; a restart takes the next one")
    add("--timeout", type=int, default=600, help="seconds that nodes wait for each other")
    add("--logs", required=True, metavar="FOLDER", help="a log a process; of several nodes a folder that all share")
    add("--bind-cores", action="store_true", help="msrun gives each process cores of its own, near its card")
    add("--restarts", type=int, default=0, help="times that a run is started again after a process died or hung")
    add("--hang", type=int, default=1800, help="seconds without a step after which a process counts as hung")
    add("--then", type=int, nargs="+", default=[], metavar="N", help="processes of the restarts, one after the other")
    add("command", nargs=argparse.REMAINDER, metavar="TOOL", help="after --, with its options")
    return parser


def main():
    """Start, watch, restart; returns the exit code."""
    args = build_parser().parse_args()
    tool, *options = args.command[1:] if args.command[:1] == ["--"] else args.command
    if args.then and args.nodes > 1:
        raise MindSigmaError("--then is of one node: a restart with fewer nodes is another command on each")
    asked = command_line.asked_to_end()
    asked.saves = Path(tool).name in SAVES
    logs = Path(args.logs)
    logs.mkdir(parents=True, exist_ok=True)
    processes, micro_batches, more, others = args.processes, None, [], Others(logs, args)
    for attempt in range(args.restarts + 1):
        run = Run(args, processes, attempt, [tool, *options, *more], logs)
        asked.before_end = run.kill
        try:
            fault = run.watch(asked, others)
        finally:
            run.end()
        if asked.interrupted or fault is None:
            return INTERRUPTED if asked.interrupted else 0
        others.tell(attempt, fault)
        say(f"error: {fault.text}", to=sys.stderr)
        if asked() or not fault.mendable or attempt == args.restarts:
            return fault.code
        if args.then:
            micro_batches = micro_batches or micro_batches_of(options, processes)
            processes = args.then[min(attempt, len(args.then) - 1)]
            more = accumulation(micro_batches, processes)
        total = processes * args.nodes
        say(f"restart {attempt + 1} of {args.restarts} from the last checkpoint, with {total} processes")
    return 0


class Fault:
    """Why a run ended.

    Attributes:
        text: one line.
        mendable: whether a restart may mend it.
        code: exit code.
    """

    def __init__(self, text, mendable=True, code=1):
        self.text, self.mendable, self.code = one_line(text, 1000), mendable, code


class Others:
    """Faults that the launchers of several nodes tell each other, by files in their common folder of logs."""

    def __init__(self, logs, args):
        self._logs, self._several = logs, args.nodes > 1
        self._mine = logs / f"node-{args.node_rank}.started"
        if self._several:
            self._mine.write_text("")

    def _file(self, attempt):
        return self._logs / f"attempt-{attempt}.failed"

    def tell(self, attempt, fault):
        """Let the launchers of other nodes know of a fault."""
        if self._several:
            self._file(attempt).write_text(json.dumps({"text": fault.text, "mendable": fault.mendable}))

    def fault(self, attempt):
        """A Fault that another node told since this launcher began, or None."""
        try:
            if not self._several or self._file(attempt).stat().st_mtime < self._mine.stat().st_mtime:
                return None
            told = json.loads(self._file(attempt).read_text())
            return Fault(f"another node: {told['text']}", bool(told["mendable"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None


class Run:
    """The processes of one attempt.

    Args:
        args: of build_parser.
        processes: of this node.
        attempt: its number, from 0.
        command: list, a script and its arguments.
        logs: folder.
    """

    def __init__(self, args, processes, attempt, command, logs):
        self.args, self.attempt, self.count = args, attempt, processes
        self.folder = tempfile.mkdtemp(prefix="mindsigma-heartbeats-")
        self.first = args.node_rank * processes
        port = args.port + attempt
        self.scheduler, self.workers, self.tail = None, [], None
        self.left = None  # when all had finished
        self.stands = [(None, time.monotonic())] * processes  # what each told last, and when that was new
        options = {
            "worker_num": processes * args.nodes, "local_worker_num": processes, "master_addr": args.address,
            "master_port": port, "log_dir": logs, "cluster_time_out": args.timeout, "join": False,
            "bind_core": args.bind_cores,
        }  # fmt: skip
        if args.nodes > 1:
            options["node_rank"] = args.node_rank
        try:
            log = logs / f"msrun_{args.node_rank}.log"
            self.scheduler, self.workers = start(options, command, {**os.environ, FOLDER: self.folder}, log)
            if len(self.workers) != processes:
                raise MindSigmaError(f"msrun started {len(self.workers)} of {processes} processes; see {log}")
            self.tail = Tail(logs / "worker_0.log") if self.first == 0 else None
        except BaseException:
            self.end()
            raise

    def watch(self, asked, others):
        """Until all have ended, or one failed or hangs: None if the work was done, else a Fault."""
        handed_on = False
        while True:
            if self.tail:
                self.tail.copy()
            if asked() and not handed_on:
                handed_on = True
                self.signal(signal.SIGTERM)
            codes = [worker.poll() for worker in self.workers]
            told = [last_beat(self.folder, self.first + i) for i in range(self.count)]
            finished = [one is not None and one["state"] == FINISHED for one in told]
            if all(finished) and not self.left:
                self.left = time.monotonic()
                Path(self.folder, LEAVE).touch()
            if all(code == 0 or done for code, done in zip(codes, finished)) and (
                None not in codes or time.monotonic() - self.left > LEAVE_SECONDS
            ):
                return None
            fault = self._failure(codes, told, finished) or self._hang(codes, told) or others.fault(self.attempt)
            if fault:
                return fault
            time.sleep(LOOK_SECONDS)

    def _failure(self, codes, told, finished):
        """Fault of a process that has ended before its work was done."""
        failed = [i for i in range(self.count) if codes[i] not in (None, 0) and not finished[i]]
        if not failed:
            return None
        # One that was killed comes before those that fail as it is missing.
        i = min(failed, key=lambda i: codes[i])
        code, rank = codes[i], self.first + i
        if told[i] and told[i]["state"] == REFUSED:
            return Fault(f"process {rank}: {told[i]['message']}", False, code)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        if not told[i]:
            return Fault(f"process {rank} {how}; see worker_{rank}.log", False, max(code, 1))
        return Fault(f"process {rank} {how} after step {told[i]['step']} ({told[i]['doing']})", True, max(code, 1))

    def _hang(self, codes, told):
        """Fault of processes of which none has told anything new for too long."""
        now = time.monotonic()
        for i in range(self.count):
            if self.stands[i][0] != told[i]:
                self.stands[i] = told[i], now
        running = [i for i in range(self.count) if codes[i] is None and told[i] and told[i]["state"] == RUNNING]
        stood = {i: now - self.stands[i][1] for i in running}
        if not stood or max(stood.values()) < self.args.hang:
            return None
        longest = sorted(running, key=lambda i: -stood[i])[:MOST_NAMED]
        where = [f"process {self.first + i}: step {told[i]['step']}, {told[i]['doing']}" for i in longest]
        return Fault(f"no process took a step within {self.args.hang} s ({'; '.join(where)})")

    def signal(self, number):
        """Send a signal to all workers that run."""
        for worker in self.workers:
            if worker.poll() is None:
                worker.send_signal(number)

    def kill(self):
        """Kill what still runs."""
        for process in [*self.workers, self.scheduler]:
            if process and process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(os.getpgid(process.pid), signal.SIGKILL)

    def end(self):
        """Kill what still runs, and let go of everything."""
        self.kill()
        for process in [*self.workers, self.scheduler]:
            if process:
                process.wait()
        if self.tail:
            self.tail.copy()
            self.tail.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Tail:
    """Copies what is appended to a file to the standard output."""

    def __init__(self, path):
        self._file = open(path, "rb", buffering=0)

    def copy(self):
        """What is new."""
        text = self._file.read(1 << 16)
        while text:
            sys.stdout.buffer.write(text)
            text = self._file.read(1 << 16)
        sys.stdout.buffer.flush()

    def close(self):
        """Let go of the file."""
        self._file.close()


class Adopted:
    """A process that msrun started and left to this one; to be asked as a subprocess.Popen is."""

    def __init__(self, pid):
        self.pid, self.returncode = pid, None

    def poll(self):
        """Its exit code, minus the number of the signal that ended it; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self):
        """Until it has ended."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def send_signal(self, number):
        """Send it a signal."""
        if self.poll() is None:
            os.kill(self.pid, number)


def start(options, command, environment, log):
    """Start a command by msrun. Returns the scheduler, if this host is to have it, or None, and list of the workers.

    Args:
        options: dict of msrun's.
        command: list, a script and its arguments.
        environment: dict, of the processes.
        log: Path of what msrun says.

    Raises:
        MindSigmaError: if msrun is not there, or fails.
    """
    here = str(Path(sys.executable).parent)  # msrun starts the first `python` on the PATH
    environment["PATH"] = os.pathsep.join([here, environment.get("PATH", os.defpath)])
    msrun = shutil.which("msrun", path=environment["PATH"])
    if not msrun:
        raise MindSigmaError("msrun is not on the PATH; activate the environment that MindSpore is installed in")
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise MindSigmaError(f"this system hands no processes on to their launcher: {os.strerror(ctypes.get_errno())}")
    with open(log, "wb") as file:
        launcher = subprocess.Popen(
            [msrun, *(f"--{name}={value}" for name, value in options.items()), *command],
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            preexec_fn=_unblock,
        )  # fmt: skip
    if launcher.wait():
        raise MindSigmaError(f"msrun ended with code {launcher.returncode}; see {log}")
    scheduler, *_ = [*_children(lambda pid, session: session == launcher.pid), None]
    return scheduler, _children(lambda pid, session: session == pid)


def _children(wanted):
    """list of Adopted of this process's children whose number and session are `wanted`, the oldest first.

    msrun's scheduler is in msrun's own session, each worker leads one.
    """
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            # pid (name) state parent group session ...; the 22nd is when it was started
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            parent, session, begun = int(fields[1]), int(fields[3]), int(fields[19])
            if parent == os.getpid() and wanted(int(entry.name), session):
                found.append((begun, int(entry.name)))
    return [Adopted(pid) for _, pid in sorted(found)]


def _unblock():
    """In a new process: let signals come that this one waits for in a thread."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})


def micro_batches_of(options, processes):
    """Micro-batches of a step of all processes, of a training run that these options started once."""
    given = [option.partition("=")[2] or following for option, following in zip(options, [*options[1:], ""])
             if option.partition("=")[0] == "--output"]  # fmt: skip
    if not given:
        raise MindSigmaError("--then needs the --output of a training run on the command line")
    file = Path(given[-1]) / "options.json"
    return load_json(file, read_bytes(file), "the options of a run").get("accumulation", 1) * processes


def accumulation(micro_batches, processes):
    """Options of a training tool by which a step has so many micro-batches of all processes."""
    if micro_batches % processes:
        raise MindSigmaError(f"--then {processes}: a step has {micro_batches} micro-batches, which they cannot share")
    return ["--accumulation", str(micro_batches // processes)]


if __name__ == "__main__":
    command_line.run(main)
