"""What test_environment.py asks of a fresh Python: python environment_probe.py imports | too-old."""

import sys

BEFORE = {name.partition(".")[0] for name in sys.modules}  # which this Python's start may have imported

from pathlib import Path  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))


def imports():
    """Print the packages that are imported until options are parsed, beside Python's own."""
    from mindsigma.commands import generate

    generate.build_parser()
    foreign = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names) - BEFORE
    print(*sorted(foreign))


def too_old():
    """Print what the package's attribute says where MindSpore is too old, and whether that was imported."""
    from importlib import metadata

    metadata.version = lambda name: "2.6.0"

    try:
        from mindsigma import PixArtSigmaPipeline  # noqa: F401
    except ValueError as error:
        print(error)
    print("mindspore" in sys.modules)


if __name__ == "__main__":
    {"imports": imports, "too-old": too_old}[sys.argv[1]]()
