"""So that `python -m llmlabel` and `accelerate launch -m llmlabel` work."""

from llmlabel.cli import main

if __name__ == "__main__":
    main()
