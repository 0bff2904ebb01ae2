r"""Patterns of module names in an adapter's config (peft's alpha_pattern): matched in bounded time, never by `re`.

peft takes a pattern as the regular expression `(.*\.)?(PATTERN)$`. Of that language this understands names, `.`, `\.`,
`\d`, `\w`, classes `[...]`, groups, `|`, `* + ?`, `{m,n}`, `^` and `$`; whatever else (look-around, back references) is
refused. A pattern is compiled to a small automaton whose states are followed side by side, so that the time is at most
states times characters, and all matching of one adapter has one budget.
"""

import string

from mindsigma.errors import MindSigmaError, one_line

LONGEST_PATTERN = 1000  # characters
MAX_STATES = 2000  # of one automaton
MAX_STEPS = 3_000_000  # of all matching with one Patterns; 600 modules of an XL/2 with ten patterns take a third
DIGITS, WORD = frozenset(string.digits), frozenset(string.ascii_letters + string.digits + "_")
CLASSES = {"d": (DIGITS, False), "w": (WORD, False), "D": (DIGITS, True), "W": (WORD, True)}
SPECIAL = "\\^$.|?*+()[]{}"
ANY = (frozenset(), True)  # every character but those of an empty set


class Patterns:
    """A table pattern -> value, asked as peft asks it: the first pattern that fits the end of a module's name.

    Args:
        path: of the file, for messages.
        table: dict[str, object], in the order in which the patterns are tried.
    """

    def __init__(self, path, table):
        self.path, self.table = path, dict(table)
        self._plain = {pattern for pattern in self.table if not set(pattern) & set(SPECIAL) - {"."}}
        self._steps, self._compiled = 0, {}

    def find(self, names, default):
        """The value of the first pattern that fits one of a module's names, or `default`.

        Raises MindSigmaError for a pattern that is not understood or takes too long.
        """
        for pattern, value in self.table.items():
            if any(self._fits(pattern, name) for name in names):
                return value
        return default

    def _fits(self, pattern, name):
        if pattern in self._plain:
            fits, steps = _ends(name, pattern), 1
        else:
            if pattern not in self._compiled:
                self._compiled[pattern] = self._automaton(pattern)
            fits, steps = self._compiled[pattern].fits(name)
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise self._wrong(pattern, "is too intricate")
        return fits

    def _automaton(self, pattern):
        if len(pattern) > LONGEST_PATTERN:
            raise self._wrong(pattern, "is too long")
        try:
            return _Automaton(pattern)
        except _Refused as error:
            raise self._wrong(pattern, str(error)) from None

    def _wrong(self, pattern, fault):
        return MindSigmaError(f"{self.path}: the pattern {one_line(repr(pattern))} {fault}; list the modules by name")


def _ends(name, pattern):
    """Whether a name ends, at a dot or its beginning, with a pattern whose one wildcard is the dot."""
    start = len(name) - len(pattern)
    if start < 0 or (start > 0 and name[start - 1] != "."):
        return False
    return all(theirs in (".", ours) for ours, theirs in zip(name[start:], pattern))


class _Refused(Exception):
    pass


class _Automaton:
    """States are ("char", set, negated, next), ("split", one, two), ("start" or "end", next) and ("match",)."""

    def __init__(self, pattern):
        self.text, self.at, self.depth, self.built = pattern, 0, 0, 0
        self.states = [("match",)]
        # built from the end to the beginning: every state knows the next
        tree = self._alternatives()
        if self.at < len(pattern):
            raise _Refused("has a ')' without '('")
        self.first = self._build(tree, 0)

    # parsing: a tree of ("char", set, negated), ("start",), ("end",), ("all", [...]), ("any", [...]), ("times", tree,
    # least, most or None)

    def _next(self):
        return self.text[self.at : self.at + 1]

    def _take(self):
        self.at += 1
        return self.text[self.at - 1 : self.at]

    def _alternatives(self):
        self.depth += 1
        if self.depth > 50:
            raise _Refused("is nested too deep")
        branches = [self._sequence()]
        while self._next() == "|":
            self._take()
            branches.append(self._sequence())
        self.depth -= 1
        return ("any", branches) if len(branches) > 1 else branches[0]

    def _sequence(self):
        parts = []
        while self._next() not in ("", "|", ")"):
            parts.append(self._repeated(self._one()))
        return ("all", parts)

    def _one(self):
        char = self._take()
        if char == "(":
            if self._next() == "?":
                if self.text[self.at : self.at + 2] != "?:":
                    raise _Refused("has a group of a kind that is not read")
                self.at += 2
            tree = self._alternatives()
            if self._take() != ")":
                raise _Refused("is no regular expression: a '(' is not closed")
            return tree
        if char == "[":
            return ("char", *self._class())
        if char == "\\":
            return ("char", *self._escaped())
        if char == ".":
            return ("char", *ANY)
        if char in "^$":
            return ("start",) if char == "^" else ("end",)
        if char in "*+?{":
            raise _Refused("is no regular expression: nothing stands before a repetition")
        return ("char", frozenset(char), False)

    def _escaped(self):
        char = self._take()
        if char in CLASSES:
            return CLASSES[char]
        if not char or char.isalnum():
            raise _Refused("has an escape that is not read")
        return frozenset(char), False

    def _class(self):
        negated = self._next() == "^"
        self.at += negated
        chars, first = set(), True
        while self._next() != "]" or first:
            first, low = False, self._take()
            if not low:
                raise _Refused("is no regular expression: a '[' is not closed")
            if low == "\\":
                found, opposite = self._escaped()
                if opposite:
                    raise _Refused("has an escape that is not read")
                chars |= found
            elif self._next() == "-" and self.text[self.at + 1 : self.at + 2] not in ("", "]"):
                self._take()
                high = self._take()
                if high == "\\" or not low <= high or ord(high) > 127:
                    raise _Refused("has a range of characters that is not read")
                chars |= {chr(code) for code in range(ord(low), ord(high) + 1)}
            else:
                chars.add(low)
        self._take()
        return frozenset(chars), negated

    def _repeated(self, tree):
        if not self._next() or self._next() not in "*+?{":
            return tree
        char = self._take()
        least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(char) or self._counts()
        if self._next() == "?":  # the shortest match: whether it matches is the same
            self._take()
        return ("times", tree, least, most)

    def _counts(self):
        end = self.text.find("}", self.at)
        low, comma, high = self.text[self.at : max(end, self.at)].partition(",")
        if end < 0 or not all(part.isascii() and part.isdigit() and len(part) < 4 for part in (low, high or "0")):
            raise _Refused("has a '{' that is no repetition")
        self.at = end + 1
        least, most = int(low), (int(high) if high else None) if comma else int(low)
        if most is not None and most < least:
            raise _Refused("has a repetition of more than its most")
        return least, most

    # building

    def _add(self, *state):
        if len(self.states) >= MAX_STATES:
            raise _Refused("is too intricate")
        self.states.append(state)
        return len(self.states) - 1

    def _build(self, tree, after):
        """Add the states of a tree that go on with state `after`; returns the first."""
        kind = tree[0]
        self.built += 1
        if self.built > 4 * MAX_STATES:  # a repeated group without a state
            raise _Refused("is too intricate")
        if kind in ("char", "start", "end"):
            return self._add(*tree, after)
        if kind == "all":
            for part in reversed(tree[1]):
                after = self._build(part, after)
            return after
        if kind == "any":
            first, *rest = [self._build(branch, after) for branch in tree[1]]
            for other in rest:
                first = self._add("split", first, other)
            return first
        _, inner, least, most = tree
        if most is None:
            loop = self._add("split", after, after)
            self.states[loop] = ("split", self._build(inner, loop), after)
            after = loop
        for _ in range((most or least) - least):
            after = self._add("split", self._build(inner, after), after)
        for _ in range(least):
            after = self._build(inner, after)
        return after

    def fits(self, name):
        """(whether the pattern fits `name` as a whole, or what follows one of its dots; states visited)."""
        steps, reached = 0, set()
        for at in range(len(name) + 1):
            if at == 0 or name[at - 1] == ".":
                reached.add(self.first)
            todo, seen = list(reached), set()
            reached = set()
            while todo:
                number = todo.pop()
                if number in seen:
                    continue
                seen.add(number)
                steps += 1
                state = self.states[number]
                if state[0] == "split":
                    todo += state[1:]
                elif state[0] == "start":
                    todo += [state[1]] if at == 0 else []
                elif state[0] == "end":
                    todo += [state[1]] if at == len(name) else []
                elif state[0] == "char":
                    if at < len(name) and (name[at] in state[1]) != state[2]:
                        reached.add(state[3])
                elif at == len(name):
                    return True, steps
        return False, steps
