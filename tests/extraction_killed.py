"""tools/extract_features.py, which kills itself in the middle of its eighth file of tensors."""

import os
import runpy
import signal
import sys
from pathlib import Path
from unittest import mock

from mindsigma.weights.formats import safetensors_writer as writer

if __name__ == "__main__":
    write, written = writer.write_pieces, []

    def dying(file, *rest):
        written.append(file)
        if len(written) == 8:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return write(file, *rest)

    mock.patch.object(writer, "write_pieces", dying).start()
    sys.argv[0] = str(Path(__file__).parents[1] / "tools" / "extract_features.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
