"""Make a sparse MoE model from a dense Qwen3."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from marco_train.errors import InputError, require
from marco_train.hub import fetch, is_hub_id
from marco_train.models.upcycle import UPCYCLING, Scaling, UpcycleConfig, is_upcycled, upcycle


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, upcycle, report."""
    args = _parser().parse_args(arguments)
    cfg = UpcycleConfig(
        num_experts=args.num_experts,
        expert_width=args.expert_width,
        top_k=args.top_k,
        drop_ratio=args.drop_ratio,
        share_indices=args.indices == "shared",
        scaling=Scaling(args.scaling),
        router_std=args.router_std,
        seed=args.seed,
    )

    start = time.perf_counter()

    def show(done: int, total: int) -> None:
        left = (time.perf_counter() - start) / done * (total - done)
        print(f"layer {done}/{total}, {left:.0f} s left", flush=True)

    try:
        is_noted = not args.overwrite and (args.out / UPCYCLING).is_file()
        require(
            is_noted or args.overwrite or not args.out.exists() or not any(args.out.iterdir()),
            f"--out: {args.out} holds something already: choose another directory, or give "
            "--overwrite to replace it",
        )
        dense, name = Path(args.dense), args.dense
        if is_hub_id(args.dense):
            dense = fetch(args.dense)
            name = f"{args.dense.partition('@')[0]}@{dense.name}"
        if is_noted:
            require(
                is_upcycled(args.out, dense, cfg),
                f"--out: {args.out} was upcycled from another model or otherwise, as "
                f"{args.out / UPCYCLING} says: choose another directory, or give --overwrite to "
                "replace it",
            )
            print(f"{args.out}: already upcycled from {args.dense}")
            return
        tokenizer = dense if (dense / "tokenizer.json").is_file() else None
        found = upcycle(dense, args.out, cfg, tokenizer, show, name)
    except InputError as error:
        sys.exit(f"error: {error}")
    architecture = found.architecture
    for scaling, errors in found.split_errors.items():
        chosen = " (chosen)" if scaling is cfg.scaling else ""
        print(
            f"{scaling.value} scaling{chosen}: with every slice active and nothing dropped, off "
            f"the dense MLP by {min(errors):.2g} to {max(errors):.2g} of its output, by layer"
        )
    print(
        f"{args.out}: {architecture.num_experts} experts of width "
        f"{architecture.moe_intermediate_size}, top-{architecture.num_experts_per_tok}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="marco-train upcycle",
        description="Make a sparse MoE model from a dense Qwen3: every MLP is cut into slices of "
        "an expert's width, each slice is copied, and part of each copy is drawn anew "
        "(Marco-MoE section 2.2, arXiv 2604.25578).",
    )
    parser.add_argument(
        "--dense",
        required=True,
        help="directory of a dense Qwen3, or org/name[@revision] of the hub",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="directory that the MoE model is written to; one that holds this very model stays as "
        "it is, and one that holds something else is refused without --overwrite",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the model that lies in --out"
    )
    parser.add_argument(
        "--num-experts",
        type=int,
        required=True,
        help="experts of each layer: a multiple of the slices that the dense MLP is cut into",
    )
    parser.add_argument(
        "--expert-width",
        type=int,
        required=True,
        help="inner width of an expert: a divisor of the dense model's intermediate_size, and a "
        "multiple of 8",
    )
    parser.add_argument(
        "--top-k", type=int, required=True, help="experts that a token is sent to in each layer"
    )
    parser.add_argument(
        "--drop-ratio",
        type=float,
        default=0.5,
        help="share of each expert's inner width that is drawn anew, from 0 to below 1, so that "
        "copies of a slice can grow apart (0.5, the best in Drop-Upcycling, arXiv 2502.19261)",
    )
    parser.add_argument(
        "--indices",
        choices=["shared", "own"],
        default="shared",
        help="whether an expert's three matrices lose the same inner neurons, or each its own "
        "(shared)",
    )
    parser.add_argument(
        "--scaling",
        choices=[scaling.value for scaling in Scaling],
        default="paper",
        help="what makes up for the split into N slices; paper: all three matrices by N^(1/3); "
        "exact: up and down by N^(1/2), the gate not at all, with which nothing dropped and one "
        "copy of each slice active is the dense layer (paper)",
    )
    parser.add_argument(
        "--router-std",
        type=float,
        default=0.0,
        help="spread of the router's weights; 0, the paper's, sends every token to the first "
        "experts until training breaks the tie (0)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is dropped and drawn anew (0)")
    return parser
