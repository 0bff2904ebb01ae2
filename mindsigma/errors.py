"""The one exception a user can mend, and foreign text made fit for its message."""

LONGEST_MESSAGE = 1200  # characters; what is longer quotes something foreign and is cut in its middle


class MindSigmaError(ValueError):
    """What the user can mend; its message is one line naming the file, key or flag and the remedy.

    The message is made one printable line of at most LONGEST_MESSAGE characters here, so that no caller can forget it:
    names of files, keys and tensors come from strangers.
    """

    def __init__(self, message=""):
        text = printable(message)
        if len(text) > LONGEST_MESSAGE:
            half = LONGEST_MESSAGE // 2 - 2
            text = f"{text[:half]} ... {text[-half:]}"
        super().__init__(text)


def one_line(text, limit=120):
    """Text from a foreign file, made fit for a one-line message: escaped where unprintable, cut at `limit`."""
    text = str(text)
    return printable(text if len(text) <= limit else text[:limit] + "...")


def printable(text):
    r"""Text with every unprintable character (line breaks, controls, surrogates, bidi marks) as an escape like \n."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
