"""A function that is killed at every instant at which it changes the file system, each time in a process of its own."""

import os
import signal
from unittest import mock

OPERATIONS = (os.replace, os.fsync, os.unlink, os.mkdir)


def killed_everywhere(function):
    """Run function() again and again, killed by SIGKILL at its first change of the file system, its second, ...

    Yields after each kill, and ends when a run was not killed. It must not use MindSpore: a fork would wait for it.
    """
    number = 0
    while True:
        child = os.fork()
        if not child:
            try:
                _die_at(number, function)
            finally:
                os._exit(9)
        code = os.waitpid(child, 0)[1]
        if os.WIFEXITED(code):
            assert os.WEXITSTATUS(code) == 0, "the function failed; its error stands above"
            return
        assert os.WTERMSIG(code) == signal.SIGKILL
        number += 1
        yield number


def _die_at(number, function):
    left = number

    def counted(operation):
        def wrapped(*arguments, **keywords):
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return operation(*arguments, **keywords)

        return wrapped

    real_open = open

    def opened(file, mode="r", *arguments, **keywords):
        if "x" not in mode and "w" not in mode:
            return real_open(file, mode, *arguments, **keywords)
        stream = counted(real_open)(file, mode, *arguments, **keywords)
        stream.write = counted(stream.write)
        return stream

    patches = [mock.patch.object(os, operation.__name__, counted(operation)) for operation in OPERATIONS]
    for patch in [*patches, mock.patch("builtins.open", opened)]:
        patch.start()
    function()
    os._exit(0)
