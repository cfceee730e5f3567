"""Make one HTML page of a run: `python scripts/report.py outputs/quickstart/opd`."""

import sys

from marco_train.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
