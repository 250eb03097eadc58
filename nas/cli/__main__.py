"""`python -m nas.cli`, as torchrun starts it."""

from nas.cli import main

if __name__ == "__main__":
    main()
