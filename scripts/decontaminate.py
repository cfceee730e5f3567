"""Look for benchmarks in rows: `python scripts/decontaminate.py rows.jsonl --against DIR`."""

from marco_train.commands.decontaminate import main

if __name__ == "__main__":
    main()
