"""YAML files of options for the tools: known keys only, types checked, flags win."""

import argparse
from contextlib import contextmanager
from pathlib import Path

from mindsigma.command_line import did_you_mean
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import RAISED, read_text

LARGEST = 256 << 10  # bytes of a file
DEEPEST = 4  # lists within lists; no option takes more than one
LONGEST_NUMBER = 40  # characters; YAML's own reading of longer ones takes its time
LONGEST_QUOTE = 100  # characters of a value in a message


def parse_with_config(parser, argv=None, weaker=lambda first: {}):
    """Parse arguments; where --config names a YAML file, its keys (option names, - or _) become the defaults.

    A required option may come from the file. An unknown or doubled key, a value of the wrong kind or an unreadable
    file raises MindSigmaError.

    Args:
        weaker: function of the namespace of the flags alone that returns values, by destination, which the file and the
            flags override.
    """
    # The parser itself finds --config, so that abbreviations and texts after `--` are understood the same way twice.
    with _nothing_required(parser):
        first, _ = parser.parse_known_args(argv)
    values = weaker(first)
    if first.config:
        values.update(_read(Path(first.config), parser))
    parser.set_defaults(**values)
    for action in parser._actions:
        action.required = action.required and action.dest not in values
    return parser.parse_args(argv)


def given_value(file, key):
    """What a YAML file gives for a key, unchecked, or None. Raises MindSigmaError for a file that cannot be read."""
    return dict(_load(Path(file))).get(key)


class Unnamed(str):
    """A default of --model: the bundled model, as nobody named one."""


def require_model(args):
    """Raise MindSigmaError if there is a config and nobody named a model: the default would be none that it is for."""
    if args.config and isinstance(args.model, Unnamed):
        raise MindSigmaError(
            f"{args.config}: names no model; add a line such as `model: sigma-mini`, the bundled one, or give --model"
        )


def convert_value(where, value, action):
    """What an argparse action makes of a value from a file, as strict as for a config. Raises MindSigmaError.

    Args:
        where: what names the value in messages: file, line, key.
        value: text, number, bool, None or a list of them.
    """
    return _convert_at(where, value, action)


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
            meant = did_you_mean(str(key).replace("_", "-"), known.split(", "))
            raise MindSigmaError(f"{file}: unknown key {_quoted(key)}; known: {known}{meant}")
        if action.dest in result:
            raise MindSigmaError(f"{file}: key {_quoted(key)} is given twice")
        result[action.dest] = _convert(file, key, value, action)
    return result


def _load(file):
    """List of (key, value) of a YAML file, where a key may stand twice, which yaml.safe_load would not tell.

    A number is a `_Number`. Anchors, aliases (a few of them make gigabytes) and tags are refused.
    """
    import yaml  # not above: a Python without any of the requirements must get as far as check_environment

    text = read_text(file, LARGEST)
    try:
        loader = yaml.SafeLoader(text)
        pairs = _pairs(file, _composed(loader), loader)
    except MindSigmaError:
        raise
    except (yaml.YAMLError, *RAISED) as error:  # a date beyond range, a tag that does not fit
        fault = one_line(" ".join(str(error).split()), 300)
        raise MindSigmaError(f"{file}: not YAML ({fault})") from None
    return pairs


def _composed(loader):
    """The only document of a YAML file as nodes, or None."""
    import yaml

    class Refused(yaml.YAMLError):
        pass

    depth, compose = 0, loader.compose_node

    def compose_node(parent, index):
        nonlocal depth
        event = loader.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise Refused(f"line {event.start_mark.line + 1}: anchors and aliases are not read; write the value out")
        if event.tag is not None:
            raise Refused(f"line {event.start_mark.line + 1}: tags are not read; leave out {event.tag}")
        if depth == DEEPEST:
            raise Refused(f"line {event.start_mark.line + 1}: nested more than {DEEPEST} deep")
        depth += 1
        node = compose(parent, index)
        depth -= 1
        return node

    loader.compose_node = compose_node
    return loader.get_single_node()


def _pairs(file, node, loader):
    """What `_load` returns, from the file's node."""
    import yaml

    def value_of(node):
        if isinstance(node, yaml.SequenceNode):
            return [value_of(part) for part in node.value]
        if isinstance(node, yaml.MappingNode):
            return {str(value_of(key)): value_of(value) for key, value in node.value}
        if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and len(node.value) <= LONGEST_NUMBER:
            return _Number(node.value, loader.construct_object(node))
        if node.tag == "tag:yaml.org,2002:merge":  # <<, as it was written
            return node.value
        return loader.construct_object(node) if len(node.value) <= LONGEST_NUMBER or _is_text(node) else node.value

    if node is None or node.tag == "tag:yaml.org,2002:null":
        return []
    if not isinstance(node, yaml.MappingNode):
        raise MindSigmaError(f"{file}: expected `option: value` lines")
    return [(value_of(key), value_of(value)) for key, value in node.value]


def _is_text(node):
    return node.tag == "tag:yaml.org,2002:str"


class _Number:
    """A number as it was written, and what YAML takes it for: 010 is 8, 1:30 is 90."""

    def __init__(self, text, value):
        self.text, self.value = text, value

    def __repr__(self):
        return self.text

    __str__ = __repr__


def _quoted(value):
    return one_line(repr(value), LONGEST_QUOTE)


def _convert(file, key, value, action):
    return _convert_at(f"{file}: {one_line(key, LONGEST_QUOTE)}", value, action)


def _convert_at(where, value, action):
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise MindSigmaError(f"{where} must be true or false, not {_quoted(value)}")
        return value
    if isinstance(action.nargs, int) and (not isinstance(value, list) or len(value) != action.nargs):
        raise MindSigmaError(f"{where} must be a list of {action.nargs}, not {_quoted(value)}")
    if action.nargs in ("*", "+") or isinstance(action.nargs, int) or isinstance(action, argparse._AppendAction):
        entries = value if isinstance(value, list) else [value]
        return [_convert_one(where, entry, action) for entry in entries]
    if value is None and action.default is None:
        return None
    return _convert_one(where, value, action)


def _convert_one(where, value, action):
    wrong = f"{where} has a value of the wrong kind: {_quoted(value)}"
    if value is None:
        raise MindSigmaError(f"{where} has no value")
    if isinstance(value, (dict, list, bool)):
        raise MindSigmaError(wrong)
    if action.type is None:
        if not isinstance(value, str):  # 1.10 may be meant as a text or as 1.1
            raise MindSigmaError(f"{wrong}; write a text in quotes")
        if "\0" in value or not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise MindSigmaError(f"{wrong}; it holds a character that no text has")
    else:
        written = value
        try:
            value = action.type(str(value))
        except (TypeError, ValueError, ArithmeticError, argparse.ArgumentTypeError):
            raise MindSigmaError(wrong) from None
        if isinstance(written, _Number) and isinstance(value, (int, float)) and not _equal(value, written.value):
            raise MindSigmaError(f"{wrong}, which YAML takes for {written.value}; write a decimal number")
    if action.choices and value not in action.choices:
        choices = ", ".join(map(str, action.choices))
        raise MindSigmaError(f"{where} must be one of {choices}, not {_quoted(value)}")
    return value


def _equal(one, other):
    return one == other or (one != one and other != other)
