"""Lay out a project of runs on W&B: `python scripts/wandb_workspace.py PROJECT [--save]`."""

import sys

from marco_train.commands.wandb_workspace import main

if __name__ == "__main__":
    sys.exit(main())
