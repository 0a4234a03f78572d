"""What may be wrong with a file, and what is wrong with the machine instead."""

import errno

# The machine's trouble, not the file's: never a reason to call a file bad.
OUR_FAULT = {errno.ENOSPC, errno.ENOMEM, errno.EMFILE, errno.ENFILE}


class BadFile(Exception):
    """The file (or this window of it) cannot be used; the message is the reason, without the path.

    ``path`` names the file where a clip is made of several; empty: the one that was asked for.
    """

    def __init__(self, reason: str, path: str = ""):
        super().__init__(reason)
        self.path = path


class Unreachable(Exception):
    """A server of shards does not answer, after retries. Neither an OSError nor a BadFile, so that no clip is blamed for it."""
