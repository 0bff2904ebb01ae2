"""A tar that grows member by member and goes on after a kill: half a member at its end is cut off."""

import contextlib
import os
import tarfile

from mindsigma.data.tar_index import BLOCK, members
from mindsigma.errors import MindSigmaError
from mindsigma.weights.formats.atomic import naming, sync_entries

PARTIAL = ".growing"


class GrowingTar:
    """A tar that takes the place of `path` (Path) when it is complete; until then it is `path` with PARTIAL behind.

    One process at a time may have it open (`shares.claim`).

    Attributes:
        members: list of (name, offset, bytes) of what is there, whole, of an earlier process; also of a complete tar.
    """

    def __init__(self, path):
        self.path, self._partial = path, path.with_name(path.name + PARTIAL)
        with naming(self._partial):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():  # complete, but not of what is wanted now
                os.replace(path, self._partial)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._file = open(os.open(self._partial, flags, 0o666), "r+b")
            self.members = []
            with contextlib.suppress(MindSigmaError):  # cut off behind these
                self.members.extend(members(self._file))

    def read(self, offset, length):
        """bytes within the tar."""
        self._file.seek(offset)
        return self._file.read(length)

    def keep(self, count):
        """Go on behind the first `count` of the members."""
        end = 0
        if count:
            _, offset, length = self.members[count - 1]
            end = offset + _padded(length)
        with naming(self._partial):
            self._file.truncate(end)
            self._file.seek(end)

    def add(self, name, *pieces):
        """Append a member of these bytes, one after the other; returns where they begin."""
        info = tarfile.TarInfo(name)
        info.size = sum(memoryview(piece).nbytes for piece in pieces)
        with naming(self._partial):
            self._file.write(info.tobuf(tarfile.PAX_FORMAT))
            offset = self._file.tell()
            for piece in pieces:
                self._file.write(piece)
            self._file.write(b"\0" * (_padded(info.size) - info.size))
        return offset

    def sync(self):
        """Bring what was added to the disk."""
        with naming(self._partial):
            self._file.flush()
            os.fsync(self._file.fileno())

    def complete(self):
        """Nothing more comes: the tar gets its name."""
        with naming(self.path):
            self._file.write(b"\0" * (2 * BLOCK))
            self.sync()
            self._file.close()
            os.replace(self._partial, self.path)
            sync_entries(self.path.parent)

    def close(self):
        """Leave the tar as it is, to be gone on with."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _padded(length):
    return -(-length // BLOCK) * BLOCK
