"""A step of the GPU list that takes as long as it is told, fails or writes its file."""

import sys
import time
from pathlib import Path

if __name__ == "__main__":
    what, output = sys.argv[1], Path(sys.argv[3])
    time.sleep(30 if what == "sleep" else 0)
    if what == "fail":
        sys.exit("no such kernel")
    output.write_text("{}")
