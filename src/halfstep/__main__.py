"""`python -m halfstep`: the command line."""

from halfstep.app.cli import main

if __name__ == "__main__":
    main()
