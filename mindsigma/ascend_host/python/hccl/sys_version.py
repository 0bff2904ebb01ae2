"""The version of CANN that is stood in for."""

__sys_version__ = "8.3.RC1"
