"""The configuration of a GPT-2 whose structure plain GPT-2 cannot express."""

from __future__ import annotations

from transformers import GPT2Config


class GPT2CompressedConfig(GPT2Config):
    """GPT-2's configuration plus what the rewrites changed.

    ffn_groups: one entry per FFN shared by several layers, in the order of the trunk's bank:
        {"layers": [4, 5, 6, 7], "start": 4, "rank": 8, "bias": "per_layer" | "shared"}; rank 0 means no delta;
        "start" is the group's first layer in the model that it was made from.
    compression: the rewrites that made the model, as records of their fields.
    """

    model_type = "gpt2_compressed"

    ffn_groups: list | None = None
    compression: list | None = None
