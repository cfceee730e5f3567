"""Compare two reports: `python scripts/compare_benchmarks.py A B`, of directories of benchmarks."""

from marco_train.commands.compare_benchmarks import main

if __name__ == "__main__":
    main()
