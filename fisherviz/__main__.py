"""`python -m fisherviz` is the command `fisherviz`."""

import os
import sys

# Python puts the current directory before its own library; a stray file there would be imported in a library's place
if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
    sys.path.append(sys.path.pop(0))

from fisherviz.cli import main

if __name__ == "__main__":
    main()
