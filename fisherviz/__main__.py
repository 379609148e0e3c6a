"""`python -m fisherviz` is the command `fisherviz`."""

from fisherviz.cli import main

if __name__ == "__main__":
    main()
