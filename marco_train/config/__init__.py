"""What a run is: dataclasses, filled by the YAML under `configs/`, and the checks between fields.

Imports no tensor library, so that a run is composed, printed and refused in well under a second.
"""

from marco_train.config.run import TrainConfig, to_run

__all__ = ["TrainConfig", "to_run"]
