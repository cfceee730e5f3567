"""Check a run: `python scripts/doctor.py experiment=quickstart_opd [overrides]`."""

from marco_train.commands.doctor import main

if __name__ == "__main__":
    main()
