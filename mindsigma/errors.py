"""The one exception a user can mend, and foreign text made fit for its message and for the terminal."""

LONGEST_MESSAGE = 1200  # characters; what is longer quotes something foreign and is cut in its middle
LONGEST_LINE = 5000  # characters of a line on the terminal; no path is longer


class MindSigmaError(ValueError):
    """What the user can mend; its message is one line naming the file, key or flag and the remedy.

    The message is made one printable line of at most LONGEST_MESSAGE characters here, so that no caller can forget it:
    names of files, keys and tensors come from strangers.
    """

    def __init__(self, message=""):
        super().__init__(bounded(message, LONGEST_MESSAGE))


def one_line(text, limit=120):
    """Text from a foreign file, made fit for a one-line message: escaped where unprintable, cut at `limit`."""
    text = str(text)
    return printable(text if len(text) <= limit else text[:limit] + "...")


def say(*lines, to=None):
    """Print each text as one printable, bounded line, at once. Every tool speaks through this: names are foreign.

    `to`: the stream, by default standard output.
    """
    for line in lines:
        print(bounded(line, LONGEST_LINE), file=to, flush=True)


def bounded(text, limit):
    """Printable text of at most `limit` characters; what is longer is cut in its middle."""
    text = str(text)
    if len(text) > limit:
        text = f"{text[: limit // 2]} ... {text[-(limit // 2) :]}"  # before it is escaped: it may be very long
    text = printable(text)
    if len(text) > limit:
        half = limit // 2 - 3
        text = f"{text[:half]} ... {text[-half:]}"
    return text


def printable(text):
    r"""Text with every unprintable character (line breaks, controls, surrogates, bidi marks) as an escape like \n."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
