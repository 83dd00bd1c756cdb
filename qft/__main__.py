"""`python -m qft`, the same as `qft`."""

from qft.cli import main

if __name__ == "__main__":
    main()
