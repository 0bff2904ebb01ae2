"""Operators of the networks, and attention heads in the width that Ascend takes."""
