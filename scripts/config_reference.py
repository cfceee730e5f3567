"""Write every key of the config: `python scripts/config_reference.py [--check]`."""

from marco_train.commands.config_reference import main

if __name__ == "__main__":
    main()
