"""CANN's package te as far as MindSpore needs it here: it asks for a version, and whether it may import the rest.

The rest, a compiler for NPUs, is not here. So the package is found whenever its version is asked for, and not found by
MindSpore's `_support_te`, which would import all of it.
"""

import sys
from types import SimpleNamespace

_frame = sys._getframe()
while _frame is not None:
    if _frame.f_code.co_name == "_support_te":
        raise ImportError("the Ascend host has only the version of te")
    _frame = _frame.f_back


def __getattr__(name):
    if name != "version":
        raise AttributeError(name)
    sys.modules.pop("te", None)  # so that the next one who imports it comes past the question above
    from hccl import sys_version

    return SimpleNamespace(version=sys_version.__sys_version__)
