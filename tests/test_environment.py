"""The check of Python and MindSpore: before anything is imported, in one line, for every version there may be."""

import ast
import os
import shutil
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest

from mindsigma import environment
from mindsigma.environment import check_environment
from mindsigma.errors import MindSigmaError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def installed(monkeypatch):
    """installed(version) makes this the version of MindSpore that pip knows; an exception stands for none."""

    def install(version):
        def answer(name):
            assert name == "mindspore"
            if isinstance(version, Exception):
                raise version
            return version

        monkeypatch.setattr(metadata, "version", answer)

    return install


@pytest.mark.parametrize("python", [(2, 7), (3, 8), (3, 12), (4, 0)])
def test_python_without_mindspore_is_refused(installed, python):
    installed("2.7.1")
    with pytest.raises(MindSigmaError) as caught:
        check_environment(python=python)
    assert str(caught.value) == f"Python {python[0]}.{python[1]} has no MindSpore 2.7.1; use Python 3.9 to 3.11"


def test_python_comes_first(installed):
    installed(metadata.PackageNotFoundError("mindspore"))  # which this Python could not install
    with pytest.raises(MindSigmaError, match="Python 3.12"):
        check_environment(python=(3, 12))


@pytest.mark.parametrize("python", [(3, 9), (3, 10), (3, 11), (3, 11, 7)])
@pytest.mark.parametrize("version", ["2.7.1", "2.7.0", "2.7.0rc1", "2.7rc1", "2.8.0", "2.8.0.dev2025", "2.8rc1+cpu"])
def test_fitting_versions_pass_in_silence(installed, python, version):
    installed(version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_environment(python=python)


@pytest.mark.parametrize("version", ["2.6", "2.6.0", "2.2.14", "1.10.1", "2.6.0rc1"])
def test_old_mindspore_is_refused(installed, version):
    installed(version)
    with pytest.raises(MindSigmaError) as caught:
        check_environment(python=(3, 11))
    assert str(caught.value) == f"MindSpore {version} is too old; run: pip install mindspore==2.7.1"


@pytest.mark.parametrize("version", ["2.9", "2.9.0", "2.9.0.dev1", "2.10.1", "3.0rc1"])
def test_slow_mindspore_is_warned_of(installed, version):
    installed(version)
    with pytest.warns(UserWarning, match="250 times slower than 2.7.1") as caught:
        check_environment(python=(3, 11))
    assert len(caught) == 1


@pytest.mark.parametrize("version", ["master", "2", "", None])  # None: a damaged installation
def test_unknown_version_is_warned_of(installed, version):
    installed(version)
    with pytest.warns(UserWarning, match="unknown version"):
        check_environment(python=(3, 11))


def test_absent_mindspore_is_named(installed):
    installed(metadata.PackageNotFoundError("mindspore"))
    with pytest.raises(MindSigmaError) as caught:
        check_environment(python=(3, 11))
    assert str(caught.value) == "MindSpore is not installed; run: pip install -r requirements.txt"


def test_tested_version_is_the_required_one():
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    assert [line.strip() for line in lines if "mindspore==" in line] == [f'"mindspore=={environment.TESTED}",']


# What is imported before the check must import, and parse, where the check is to fail.


def probe(question):
    """Lines that environment_probe.py prints."""
    command = [sys.executable, Path(__file__).with_name("environment_probe.py"), question]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.skipif(sys.version_info < (3, 10), reason="needs sys.stdlib_module_names")
def test_nothing_but_python_is_imported_before_the_check():
    assert probe("imports") == ["mindsigma"]


@pytest.mark.parametrize(
    "file",
    [
        *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tools").glob("*.py")),
        *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "mindsigma" / "commands").glob("*.py")),
        *(f"mindsigma/{n}.py" for n in ["__init__", "command_line", "config_file", "environment", "errors", "foreign"]),
    ],
)
def test_older_python_can_parse_what_refuses_it(file):
    """Tools, and the commands that they import, before the check of the version, which is the first thing they do."""
    ast.parse((ROOT / file).read_text(), feature_version=(3, 6))


@pytest.mark.parametrize(
    ("tool", "version"),
    [*((path.stem, (3, 6)) for path in sorted((ROOT / "tools").glob("*.py"))), ("generate", (3, 8)), ("web", (3, 12))],
)
def test_a_tool_of_another_python_ends_in_one_line(tool, version):
    """As if this Python were of that version, without the modules that came later, before the tool is run."""
    file = ROOT / "tools" / f"{tool}.py"
    code = (
        f"import sys, runpy; sys.version_info = {version} + (0, 'final', 0); sys.argv = ['{tool}.py', 'x']; "
        f"sys.path.insert(0, {str(file.parent)!r}); sys.modules.update(dict.fromkeys(['dataclasses', 'numpy'])); "
        f"runpy.run_path({str(file)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2
    assert done.stderr == f"error: Python {version[0]}.{version[1]} has no MindSpore 2.7.1; use Python 3.9 to 3.11\n"


@pytest.mark.parametrize("version", ["3.7", "3.8", "3.12", "3.13"])
def test_other_pythons_are_refused_in_one_line(version):
    """As far as this machine has them."""
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"no Python {version}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [python, ROOT / "tools" / "generate.py", "x"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2
    assert done.stderr == f"error: Python {version} has no MindSpore 2.7.1; use Python 3.9 to 3.11\n"


def test_the_attribute_checks_before_it_imports():
    assert probe("too-old") == ["MindSpore 2.6.0 is too old; run: pip install mindspore==2.7.1", "False"]
