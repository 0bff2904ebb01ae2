"""CANN's package hccl: MindSpore asks for its version when processes join."""

from . import sys_version  # noqa: F401
