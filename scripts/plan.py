"""Plan a run: `python scripts/plan.py experiment=marco_mini_opd gpus=8 gpu=h100-80`."""

from marco_train.commands.plan import main

if __name__ == "__main__":
    main()
