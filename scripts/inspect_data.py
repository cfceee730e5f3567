"""Look at a data set: `python scripts/inspect_data.py rows.jsonl [--tokenizer DIR] [--json]`."""

from marco_train.commands.inspect_data import main

if __name__ == "__main__":
    main()
