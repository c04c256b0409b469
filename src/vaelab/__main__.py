"""``python -m vaelab``."""

import os
import sys

from vaelab.cli import main

if __name__ == "__main__":
    code = main()
    if "RANK" in os.environ:
        # Of the processes that torchrun starts, one whose gloo threads outlive the interpreter is aborted now and then
        # (pytorch/pytorch#179291), and takes a finished training down with it. All files are written: just leave.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
