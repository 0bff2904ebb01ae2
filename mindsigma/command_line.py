"""What every tool does at its start and end: checks the environment, turns errors into one line and an exit code."""

import _thread
import os
import signal
import sys
import threading
import warnings
from functools import cache

from mindsigma.environment import check_environment
from mindsigma.errors import MindSigmaError


def run(main):
    """Call main(); exit 2 with one line on stderr for what the user can mend, 130 when interrupted."""
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's own warnings speak of its internals
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        check_environment()
        _keep_interrupts()
        sys.exit(main())
    except MindSigmaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr, flush=True)
        os._exit(130)  # MindSpore's exit hooks crash after an interrupt


@cache
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


@cache
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
