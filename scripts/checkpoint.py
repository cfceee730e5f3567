"""Look at checkpoints and export them: `python scripts/checkpoint.py --help`."""

from marco_train.commands.checkpoint import main

if __name__ == "__main__":
    main()
