"""Arrays of .npz files that strangers wrote: headers are checked before memory is taken, nothing is unpickled."""

import zipfile

import numpy as np

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import open_regular, understanding

LARGEST = 1 << 33  # bytes of an array


def read_arrays(path, names=None):
    """dict name -> ndarray of an .npz file (Path): of those `names` that it holds, or of all. Raises MindSigmaError."""
    arrays = {}
    with open_regular(path) as file, understanding(path):
        try:
            archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, NotImplementedError):
            raise MindSigmaError(f"{path}: not an .npz file, or a damaged one; make or download it again") from None
        with archive:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if names is None or name in names:
                    arrays[name] = _read(path, archive, info)
    return arrays


def _read(path, archive, info):
    name = one_line(info.filename)
    try:
        with archive.open(info) as member:
            version = np.lib.format.read_magic(member)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = header(member)
            if dtype.hasobject or dtype.kind not in "fiu":
                raise MindSigmaError(f"{path}: {name} holds {one_line(dtype)}, not numbers; make the file again")
            size = dtype.itemsize
            for side in shape:
                size *= side
            if size > LARGEST or member.tell() + size != info.file_size:
                raise MindSigmaError(f"{path}: {name} is damaged: its size is not that of its shape {one_line(shape)}")
            data = member.read(size)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:  # compressed oddly, encrypted, damaged
        raise MindSigmaError(f"{path}: {name} cannot be read ({one_line(error)}); make the file again") from None
    array = np.frombuffer(data, dtype)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
