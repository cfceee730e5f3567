"""Make a sparse mixture from a dense Qwen3: `python scripts/upcycle.py --help`."""

import argparse
import sys
import time
from pathlib import Path

from marco_train.errors import InputError
from marco_train.models.upcycle import Scaling, UpcycleConfig, upcycle


def main() -> None:
    """Read the command line, upcycle, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dense", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--out", type=Path, required=True, help="where the mixture goes")
    parser.add_argument("--num-experts", type=int, required=True)
    parser.add_argument("--expert-width", type=int, required=True)
    parser.add_argument("--top-k", type=int, required=True)
    parser.add_argument("--drop-ratio", type=float, default=0.5, help="drawn anew of each expert")
    parser.add_argument(
        "--indices",
        choices=["shared", "own"],
        default="shared",
        help="whether an expert's three matrices lose the same inner neurons, or each its own",
    )
    parser.add_argument("--scaling", choices=[s.value for s in Scaling], default="paper")
    parser.add_argument("--router-std", type=float, default=0.0, help="0: the paper's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
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
    tokenizer = args.dense if (args.dense / "tokenizer.json").is_file() else None

    start = time.perf_counter()

    def show(done: int, total: int) -> None:
        left = (time.perf_counter() - start) / done * (total - done)
        print(f"layer {done}/{total}, {left:.0f} s left", flush=True)

    try:
        found = upcycle(args.dense, args.out, cfg, tokenizer, show)
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


if __name__ == "__main__":
    main()
