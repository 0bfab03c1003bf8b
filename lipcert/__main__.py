"""Run the command line as `python -m lipcert`."""

from lipcert.cli import main

if __name__ == "__main__":
    main()
