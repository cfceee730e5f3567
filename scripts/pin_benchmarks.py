"""Pin the sets of benchmarks: `python scripts/pin_benchmarks.py`, where the hub is reached."""

from marco_train.commands.pin_benchmarks import main

if __name__ == "__main__":
    main()
