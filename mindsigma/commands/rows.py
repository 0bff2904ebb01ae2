"""What is to be drawn, picture by picture: prompts of the command line and of files, each with the options it has."""

import argparse
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Tuple

from mindsigma.commands.prompt_file import read_prompt_file
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.pipeline.prompts import Prompt
from mindsigma.sampling.options import OPTION_NAMES


@dataclass
class Row:
    """A prompt with its options.

    Attributes:
        prompt: Prompt. args: namespace of all options, those of a file's line in their places.
        where: what names it in messages: file and line, or the prompt.
        sampling: SamplingOptions, set by `judge`.
    """

    prompt: Prompt
    args: argparse.Namespace
    where: str
    sampling: Any = None

    @property
    def lora(self):
        """tuple of adapters."""
        return tuple(self.args.lora or ())

    def judge(self):
        """Work out the SamplingOptions. Raises MindSigmaError for what no model could take."""
        from mindsigma.commands.generate_options import judged

        with self.naming():
            self.sampling = judged(self.args)

    @contextmanager
    def naming(self):
        """Let errors of the body begin with where the row stands, if that is a file."""
        try:
            yield
        except MindSigmaError as error:
            if not self.where or str(error).startswith(self.where):
                raise
            raise MindSigmaError(f"{self.where}: {error}") from error


@dataclass(frozen=True)
class Job:
    """One picture: its row, the number of the picture within the row, its seed, and the pixels asked for."""

    row: Row = field(compare=False)
    image: int
    seed: int
    size: Tuple = (None, None)  # height, width; None is the model's base resolution


def columns_of(parser):
    """dict name -> action: what a line of a prompt file may set, by every name that it has."""
    group = next(group for group in parser._action_groups if group.title == EACH_PICTURE)
    actions = {action.dest: action for action in group._group_actions}
    aliases = {field: actions[option] for field, option in OPTION_NAMES.items() if option in actions}
    return {**actions, **aliases}


EACH_PICTURE = "each picture (and the columns of a prompt file)"


def read_rows(args, parser):
    """list of Row of the command line and of --prompts-file, in this order. Raises MindSigmaError."""
    rows = []
    for text in args.prompt:
        if not _is_text(text):
            raise MindSigmaError(f"the prompt {text!r} is not UTF-8 text")
        rows.append(Row(Prompt.parse(text), args, ""))
    if args.prompts_file:
        rows += [row_of(args, *line) for line in read_prompt_file(args.prompts_file, columns_of(parser))]
    if not rows and not args.warm_up:
        raise MindSigmaError('nothing to draw; give a prompt, as in: tools/generate.py "a red apple"')
    return rows


def row_of(args, where, values):
    """Row of a line of a prompt file. Raises MindSigmaError."""
    row = Row(None, argparse.Namespace(**{**vars(args), **values}), where)
    with row.naming():
        row.prompt = Prompt.parse(values["prompt"])
    return row


def _is_text(value):
    """Whether an argument survived the terminal's encoding."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def jobs_of(rows):
    """list of Job, without sizes: image i of a row is drawn from its seed + i."""
    return [Job(row, i, row.args.seed + i) for row in rows for i in range(row.args.num_images)]


def batches_of(jobs, batch_size):
    """(start, stop) of the batches: neighbours that are drawn with the same options and size, at most so many."""
    start = 0
    for stop in range(1, len(jobs) + 1):
        if stop == len(jobs) or stop - start == batch_size or not _together(jobs[start], jobs[stop]):
            yield start, stop
            start = stop


def _together(one, other):
    if one.row is other.row:
        return True
    same = ("image", "mask", "lora", "control_image")
    return (
        one.size == other.size
        and one.row.sampling == other.row.sampling
        and all(getattr(one.row.args, name, None) == getattr(other.row.args, name, None) for name in same)
    )


def shown(prompt):
    """A prompt as messages quote it."""
    return one_line(prompt.text, 60)
