"""`python -m edgekit`, as torchrun starts it."""

from edgekit.cli import main

if __name__ == "__main__":
    main()
