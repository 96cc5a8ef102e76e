"""``python -m freegrad_fx`` is the command line ``freegrad-fx``."""

from .cli import main

if __name__ == "__main__":
    main()
