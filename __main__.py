"""`python -m tide`: the same as the command `tide`."""

from .cli import main

if __name__ == "__main__":
    main()
