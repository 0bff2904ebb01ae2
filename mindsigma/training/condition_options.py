"""Options that tell what the condition pictures of a ControlNet are made of."""

from mindsigma.choices import CONDITIONS


def add_condition(add, besides=""):
    """Add --condition and --condition-folder; `add`: add_argument of a parser or a group, `besides`: of the help."""
    add("--condition", metavar="KIND", help=f"of a ControlNet, computed of each image: {forms()}{besides}")
    add("--condition-folder", metavar="FOLDER", help="or pictures of any kind with the names of the images")


def forms():
    """The kinds as a user writes them, with their numbers' defaults."""
    numbers = [[kind, *(f"{default}" for default, _, _ in ranges.values())] for kind, ranges in CONDITIONS.items()]
    return ", ".join(f"{parts[0]} or {':'.join(parts)}" for parts in numbers)
