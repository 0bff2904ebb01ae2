"""What every tool does at its start and end: checks the environment, turns errors into one line and an exit code."""

import _thread
import argparse
import contextlib
import os
import signal
import sys
import threading
import traceback
import warnings
from functools import lru_cache

from mindsigma.environment import check_environment
from mindsigma.errors import LONGEST_MESSAGE, MindSigmaError, bounded, one_line
from mindsigma.foreign import last_opened

TRACEBACK = "MINDSIGMA_TRACEBACK"  # 1: show where an error came from


def parser(description, **options):
    """An ArgumentParser that knows --version; options are its own."""
    from mindsigma import __version__

    made = argparse.ArgumentParser(description=description, **options)
    made.add_argument("--version", action="version", version=f"mindsigma {__version__}")
    return made


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
        code = main()
        sys.stdout.flush()
        sys.exit(code)
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
        sys.exit(2)


def _unexpected(error):
    """One line about an error that is none of ours."""
    where = f"; the last file read was {last_opened()}" if last_opened() else ""
    what = one_line(f"{type(error).__name__}: {error}", 300)
    return bounded(f"unexpected {what}{where}; {TRACEBACK}=1 shows more", LONGEST_MESSAGE)


def _refuse(parser, message):
    """argparse's `error`: one line, bounded and printable."""
    parser.exit(2, f"error: {bounded(message, LONGEST_MESSAGE)}; --help lists the options\n")


@lru_cache(maxsize=None)  # noqa: UP033, an older Python has to come as far as the check
def asked_to_end():
    """A threading.Event that SIGTERM sets from now on, instead of ending the process; for tools that save first.

    As for Ctrl-C, the signal is blocked and waited for, since MindSpore replaces handlers.
    """
    asked = threading.Event()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait():
        signal.sigwait({signal.SIGTERM})
        asked.set()

    threading.Thread(target=wait, daemon=True).start()
    return asked


@lru_cache(maxsize=None)  # noqa: UP033, an older Python has to come as far as the check
def _keep_interrupts():
    """Let Ctrl-C raise KeyboardInterrupt in the main thread.

    MindSpore installs a handler of its own again and again, which ends the process without a word. So SIGINT is blocked
    for all threads, and one of ours waits for it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def wait():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # it began before `asked_to_end` blocked it for all
        while True:
            signal.sigwait({signal.SIGINT})
            _thread.interrupt_main()

    threading.Thread(target=wait, daemon=True).start()
