"""The entry point: compose the config, check it, run the stage it names."""

import os
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from marco_train.architecture import InputError
from marco_train.config import StageKind, TrainConfig, is_finished, register_schemas

PACKAGE = Path(__file__).resolve().parent
# Beside the package in a checkout, inside it in a wheel; absolute, so that the console script
# works from any directory.
CONFIG_DIR = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"

register_schemas()


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train")
def main(composed: DictConfig) -> None:
    """Run one stage; see `configs/experiment/`."""
    try:
        cfg: TrainConfig = OmegaConf.to_object(composed)  # type: ignore[assignment]
        if is_finished(cfg):
            if os.environ.get("RANK", "0") == "0":
                print(f"{cfg.name}: already finished in {cfg.output_dir}", flush=True)
            return
        run_stage(cfg)
    except InputError as error:
        sys.exit(f"error: {error}")


def run_stage(cfg: TrainConfig) -> None:
    """Join the other ranks and run the stage; heavy libraries are imported from here on."""
    from marco_train import distributed

    distributed.start()
    match cfg.stage.kind:
        case StageKind.sft:
            from marco_train.stages.sft import run_sft

            run_sft(cfg)
        case StageKind.opd:
            from marco_train.stages.opd import run_opd

            run_opd(cfg)
        case StageKind.evaluate:
            from marco_train.stages.evaluate import run_evaluate

            run_evaluate(cfg)
    distributed.stop()


if __name__ == "__main__":
    main()
