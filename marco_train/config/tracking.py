"""What of a run is printed and recorded, and where."""

from dataclasses import dataclass, field
from enum import Enum
from importlib.util import find_spec

from omegaconf import MISSING

from marco_train.errors import require, require_positive


class LoggingBackend(Enum):
    """Where metrics go beside the console and the files in the run's directory."""

    wandb = "wandb"
    tensorboard = "tensorboard"
    trackio = "trackio"


class WandbMode(Enum):
    """`offline` needs neither account nor network."""

    online = "online"
    offline = "offline"


@dataclass(kw_only=True)
class LoggingConfig:
    """What a person sees."""

    backends: list[LoggingBackend] = MISSING
    """Any number of them; [] is none. tensorboard and trackio are extras of their names."""
    console_every: int = 1
    """Steps between two printed lines, beside those with a held-out figure; `metrics.jsonl` has
    every step."""
    samples_every: int | None = 50
    """Steps between two sets of samples of distillation, in `samples.jsonl` and on W&B. None: no
    samples are kept."""
    num_samples: int = 4
    """Responses of a set, of as many categories as there are."""
    console_samples: bool = False
    """Whether they are printed too."""
    report: bool = True
    """Whether report.html is made at the end, in a second or so."""
    project: str = "marco_train"
    """Of W&B and trackio."""
    group: str | None = None
    """Of runs that belong together, on W&B. None: those of one `root`."""
    tags: list[str] = field(default_factory=list)
    """On W&B, beside the stage and its objective."""
    mode: WandbMode = WandbMode.offline

    def __post_init__(self) -> None:
        require_positive(
            "logging",
            console_every=self.console_every,
            samples_every=self.samples_every,
            num_samples=self.num_samples,
        )

    def check_installed(self) -> None:
        """Refuse backends that are not installed.

        Raises:
            InputError: Names the first, and how to install it.
        """
        for backend in self.backends:
            require(
                find_spec(backend.value) is not None,
                f"logging.backends names {backend.value}, which is not installed: "
                f"pip install 'marco-train[{backend.value}]', or leave it out",
            )
