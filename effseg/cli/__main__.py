"""`python -m effseg.cli` is `effseg`."""

from effseg.cli.application import main

if __name__ == "__main__":
    main()
