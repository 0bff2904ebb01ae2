"""The one exception a user can mend."""


class MindSigmaError(ValueError):
    """What the user can mend; its message is one line naming the file, key or flag and the remedy."""
