"""YAML files of options for the tools: known keys only, types checked, flags win."""

import argparse
from contextlib import contextmanager
from pathlib import Path

from mindsigma.errors import MindSigmaError


def parse_with_config(parser, argv=None):
    """Parse arguments; where --config names a YAML file, its keys (option names, - or _) become the defaults.

    A required option may come from the file. An unknown or doubled key, a value of the wrong kind or an unreadable
    file raises MindSigmaError.
    """
    # The parser itself finds --config, so that abbreviations and texts after `--` are understood the same way twice.
    with _nothing_required(parser):
        first, _ = parser.parse_known_args(argv)
    if first.config:
        values = _read(Path(first.config), parser)
        parser.set_defaults(**values)
        for action in parser._actions:
            action.required = action.required and action.dest not in values
    return parser.parse_args(argv)


@contextmanager
def _nothing_required(parser):
    required = [action for action in parser._actions if action.required]
    for action in required:
        action.required = False
    try:
        yield
    finally:
        for action in required:
            action.required = True


def _read(file, parser):
    """Values of a YAML file by destination, checked and converted as the parser would."""
    actions = {action.dest: action for action in parser._actions if action.default is not argparse.SUPPRESS}
    del actions["config"]
    result = {}
    for key, value in _load(file):
        action = actions.get(str(key).replace("-", "_"))
        if action is None:
            known = ", ".join(sorted(name.replace("_", "-") for name in actions))
            raise MindSigmaError(f"{file}: unknown key {key!r}; known: {known}")
        if action.dest in result:
            raise MindSigmaError(f"{file}: key {key!r} is given twice")
        result[action.dest] = _convert(file, key, value, action)
    return result


def _load(file):
    """List of (key, value) of a YAML file, where a key may stand twice, which yaml.safe_load would not tell."""
    import yaml  # not above: a Python without any of the requirements must get as far as check_environment

    try:
        loader = yaml.SafeLoader(file.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None or node.tag == "tag:yaml.org,2002:null":
            return []
        if not isinstance(node, yaml.MappingNode):
            raise MindSigmaError(f"{file}: expected `option: value` lines")
        return [tuple(loader.construct_object(part, deep=True) for part in pair) for pair in node.value]
    except MindSigmaError:
        raise
    except OSError as error:
        raise MindSigmaError(f"{file}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, a date or number beyond range
        raise MindSigmaError(f"{file}: not YAML ({' '.join(str(error).split())})") from None


def _convert(file, key, value, action):
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise MindSigmaError(f"{file}: {key} must be true or false, not {value!r}")
        return value
    if isinstance(action.nargs, int) and (not isinstance(value, list) or len(value) != action.nargs):
        raise MindSigmaError(f"{file}: {key} must be a list of {action.nargs}, not {value!r}")
    if action.nargs in ("*", "+") or isinstance(action.nargs, int) or isinstance(action, argparse._AppendAction):
        entries = value if isinstance(value, list) else [value]
        return [_convert_one(file, key, entry, action) for entry in entries]
    if value is None and action.default is None:
        return None
    return _convert_one(file, key, value, action)


def _convert_one(file, key, value, action):
    wrong = f"{file}: {key} has a value of the wrong kind: {value!r}"
    if value is None:
        raise MindSigmaError(f"{file}: {key} has no value")
    if isinstance(value, (dict, list, bool)):
        raise MindSigmaError(wrong)
    if action.type is None:
        if not isinstance(value, str):  # YAML reads 1.10 as 1.1, 0123 as 83, and 1:30 as 90: too late to undo
            raise MindSigmaError(f"{wrong}; write a text in quotes")
    else:
        try:
            value = action.type(str(value))
        except (TypeError, ValueError, argparse.ArgumentTypeError):
            raise MindSigmaError(wrong) from None
    if action.choices and value not in action.choices:
        raise MindSigmaError(f"{file}: {key} must be one of {', '.join(map(str, action.choices))}, not {value!r}")
    return value
