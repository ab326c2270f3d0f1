"""`python -m rlscale`, where the command itself is not on the path."""

from rlscale.cli import main

if __name__ == "__main__":
    main()
