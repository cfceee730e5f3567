"""Rollouts of random tokens."""

import torch

from marco_train.types import FinishReason, Prompt, Rollout


def rollouts() -> list[Rollout]:
    """Five, of prompts and responses of many lengths."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 1), (17, 9), (1, 4), (30, 2), (8, 12)]  # tokens of prompt and response
    made = []
    for index, (num_prompt, num_response) in enumerate(shapes):
        ids = torch.randint(3, 320, (num_prompt + num_response,), generator=generator).tolist()
        prompt = Prompt(index, ids[:num_prompt], "s", "c", "en")
        response = ids[num_prompt:]
        likeliest = torch.stack([torch.randperm(320, generator=generator)[:5] for _ in response])
        made.append(
            Rollout(
                prompt,
                0,
                response,
                [-1.0] * num_response,
                likeliest.tolist(),
                FinishReason.length,
                weight_version=0,
            )
        )
    return made
