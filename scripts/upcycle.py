"""Make a sparse MoE model from a dense Qwen3: `python scripts/upcycle.py --help`."""

from marco_train.commands.upcycle import main

if __name__ == "__main__":
    main()
