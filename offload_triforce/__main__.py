"""``python -m offload_triforce``: the command line, where its script is not on the path."""

from offload_triforce.cli import main

if __name__ == "__main__":
    main()
