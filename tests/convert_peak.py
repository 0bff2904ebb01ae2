"""tools/convert.py, with the peak of the process's memory in KB as the last line."""

import resource
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.argv[0] = str(Path(__file__).parents[1] / "tools" / "convert.py")
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
