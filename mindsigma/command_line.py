"""What every tool does at its start and end: checks the environment, turns errors into one line and an exit code."""

import _thread
import argparse
import contextlib
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from functools import lru_cache

from mindsigma import heartbeat
from mindsigma.environment import check_environment, end_on_wrong_python
from mindsigma.errors import LONGEST_MESSAGE, MindSigmaError, bounded, one_line
from mindsigma.foreign import last_opened

end_on_wrong_python()  # before what follows this import in a tool, which an older Python may not understand

TRACEBACK = "MINDSIGMA_TRACEBACK"  # 1: show where an error came from
SHELLS = ("bash", "zsh", "tcsh")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with defaults where there are some to tell; the example stands as it is written."""

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X", None: "TEXT"}.get(action.type) or super()._get_default_metavar_for_optional(
            action
        )

    def _get_help_string(self, action):
        nothing = action.default is None or action.default is False or action.default in ("", [], argparse.SUPPRESS)
        return action.help if nothing or "default" in (action.help or "") else super()._get_help_string(action)


class Version(argparse.Action):
    """--version: the versions of this project, of Python and of MindSpore, whether or not they fit each other."""

    def __call__(self, parser, namespace, values, option_string=None):
        print(versions())
        parser.exit()


class Completion(argparse.Action):
    """--print-completion SHELL: a script by which the shell completes this command's options, then the end."""

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            import shtab
        except ImportError:
            parser.error("--print-completion needs shtab: pip install 'mindsigma[completion]'")
        for action in parser._actions:
            kind = re.search("FILE|FOLDER|PATH", str(action.metavar))
            if kind and action.nargs is None:
                action.complete = shtab.DIRECTORY if kind[0] == "FOLDER" else shtab.FILE
        print(shtab.complete(parser, shell=values))
        parser.exit()


def parser(description, example=None, **options):
    """An ArgumentParser that knows --version and --print-completion; further options are its own.

    `example`: a whole command, shown at the end of the help.
    """
    import textwrap

    epilog = f"example:\n  {example}" if example else None
    options = {"formatter_class": Help, "epilog": epilog, **options}
    made = argparse.ArgumentParser(description=textwrap.fill(description, 100), **options)
    made.add_argument(
        "--version", action=Version, nargs=0, default=argparse.SUPPRESS, help="show the versions and exit"
    )
    made.add_argument(
        "--print-completion", action=Completion, choices=SHELLS, default=argparse.SUPPRESS,
        help="print a script by which the shell completes this command, and exit",
    )  # fmt: skip
    return made


def versions():
    """One line: the versions of this project, of Python and of MindSpore, which is not imported for it."""
    from importlib import metadata

    from mindsigma import __version__

    try:
        mindspore = metadata.version("mindspore")
    except metadata.PackageNotFoundError:
        mindspore = "not installed"
    return f"mindsigma {__version__} (Python {sys.version.split()[0]}, MindSpore {mindspore})"


def run(main):
    """Call main(); exit 2 with one line on stderr for whatever goes wrong, 130 when interrupted.

    An error that nobody turned into a MindSigmaError is told with the file that was read last, and with
    MINDSIGMA_TRACEBACK=1 where it came from.
    """
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's own warnings speak of its internals
    warnings.formatwarning = lambda message, *_, **__: f"warning: {bounded(message, LONGEST_MESSAGE)}\n"
    argparse.ArgumentParser.error = _refuse  # of every parser, which quotes what it was given as it is
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # not a stream of this process's own
            stream.reconfigure(errors="backslashreplace")  # names of files may hold what no encoding has
    try:
        check_environment()
        _keep_interrupts()
        _leave(main() or 0)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr, flush=True)
        os._exit(130)  # MindSpore's exit hooks crash after an interrupt
    except BrokenPipeError:  # who reads our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except Exception as error:
        if os.environ.get(TRACEBACK) == "1":
            traceback.print_exc()
        message = str(error) if isinstance(error, MindSigmaError) else _unexpected(error)
        print(f"error: {message}", file=sys.stderr)
        if isinstance(error, MindSigmaError):
            heartbeat.beat(heartbeat.REFUSED, message=message)
        _leave(2)


def _leave(code):
    """End the process."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.flush()
    if heartbeat.watched():
        heartbeat.leave(code)
    sys.exit(code)


def _unexpected(error):
    """One line about an error that is none of ours."""
    where = f"; the last file read was {last_opened()}" if last_opened() else ""
    what = one_line(f"{type(error).__name__}: {error}", 300)
    return bounded(f"unexpected {what}{where}; {TRACEBACK}=1 shows more", LONGEST_MESSAGE)


def _refuse(parser, message):
    """argparse's `error`: one line, bounded and printable, with the option or the choice that was probably meant."""
    parser.exit(2, f"error: {bounded(message, LONGEST_MESSAGE)}{_meant(parser, message)}; --help lists the options\n")


def _meant(parser, message):
    """A phrase that names what was probably meant where argparse knows an option or a choice not, or ""."""
    unknown = re.match(r"unrecognized arguments: .*?(?<!\S)(--[\w-]{1,80})", message[:1000])
    if unknown:
        return did_you_mean(unknown[1], [name for name in parser._option_string_actions if name.startswith("--")])
    choice = re.match(r"argument .*?: invalid choice: '(\w[^']{0,80})' \(choose from (.*)\)$", message[:2000])
    return did_you_mean(choice[1], re.findall("'([^']*)'", choice[2])) if choice else ""


def did_you_mean(given, known):
    """A phrase to end an error with, "; did you mean ...?", or "" where nothing known is alike."""
    import difflib

    near = difflib.get_close_matches(str(given)[:100], list(known), 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""


class EndRequest:
    """What SIGTERM and Ctrl-C ask of a tool that saves before it ends.

    Attributes:
        saves: whether there is something to save. As long as not, Ctrl-C ends the tool as it ends every other.
        interrupted: whether it was Ctrl-C that asked. A second one ends the process at once.
        before_end: function that is called before that.
    """

    def __init__(self):
        self._asked = threading.Event()
        self.saves = self.interrupted = False
        self.before_end = lambda: None

    def __call__(self):
        """Whether the tool was asked to end."""
        return self._asked.is_set()

    def terminate(self):
        """SIGTERM came."""
        self._asked.set()

    def interrupt(self):
        """Ctrl-C came; returns whether that was all that had to be done."""
        if not self.saves:
            return False
        if self.interrupted:
            print("\ninterrupted", file=sys.stderr, flush=True)
            self.before_end()
            os._exit(130)
        self.interrupted = True
        self._asked.set()
        print("\nends after this step, which is saved; Ctrl-C again ends at once", file=sys.stderr, flush=True)
        return True


END = EndRequest()


@lru_cache(maxsize=None)  # noqa: UP033, an older Python has to come as far as the check
def asked_to_end():
    """The EndRequest that SIGTERM reaches from now on, instead of ending the process; for tools that save first.

    As for Ctrl-C, the signal is blocked and waited for, since MindSpore replaces handlers.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait():
        signal.sigwait({signal.SIGTERM})
        END.terminate()

    threading.Thread(target=wait, daemon=True).start()
    return END


@lru_cache(maxsize=None)  # noqa: UP033, an older Python has to come as far as the check
def _keep_interrupts():
    """Let Ctrl-C raise KeyboardInterrupt in the main thread, or reach the EndRequest of a tool that saves first.

    MindSpore installs a handler of its own again and again, which ends the process without a word. So SIGINT is blocked
    for all threads, and one of ours waits for it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def wait():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # it began before `asked_to_end` blocked it for all
        while True:
            signal.sigwait({signal.SIGINT})
            if not END.interrupt():
                _thread.interrupt_main()

    threading.Thread(target=wait, daemon=True).start()
