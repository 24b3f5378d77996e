"""The configuration of a GPT-2 whose structure plain GPT-2 cannot express."""

from __future__ import annotations

from transformers import GPT2Config


class GPT2CompressedConfig(GPT2Config):
    """GPT-2's configuration plus what the rewrites changed.

    ffn_groups: one entry per FFN shared by several layers, in the order of the trunk's bank:
        {"layers": [4, 5, 6, 7], "start": 4, "rank": 8, "bias": "per_layer" | "shared"}; rank 0 means no delta;
        "start" is the group's first layer in the model that it was made from.
    tversky: one entry per tversky rewrite (modeling/tversky_layers.py):
        {"feature_key": "features", "groups": [[0, 1], [2, 3]], "targets": ["q", "c_fc", ...],
        "share": "none" | "layer" | "window" | "global", "features": {"768": 384, ...},
        "prototypes": "explicit" | "features", and "scale", "bias", "form", "intersection", "difference", "antipodal",
        "normalize", "offset", "theta", "alpha", "beta", "learn_scalars", "share_scalars", "non_negative" as of
        TverskyProjection}; the layers of a group share banks, one for each width of inputs ("features": how many).
    efficient_attention: one entry per rewrite of attention scores (modeling/block_attention.py):
        {"kind": "linformer", "layers": [0, 1], "block": 64, "slots": 8, "per_head": false},
        {"kind": "nystromformer", "layers", "block", "landmarks": 16, "inverse": "none" | "newton"} or
        {"kind": "performer", "layers", "block", "features": 128, "feature_map": "favor+", "seed": 0, "local": true}.
    alibi: {"slopes": "geometric" | "fitted" | "learned", "learned_positions": false, "first": true}
        (modeling/alibi.py): how the slopes were found; whether wpe is still there, as it is until a recovery has taken
        it away; whether position 0 has a vector, and its key a bias of its own. n_positions then is the length that
        the model was trained at.
    token_factored: {"stage": one of streams.STAGES, "layers": [0, 1], "value_norm": true, "bias": true}
        (modeling/streams.py): the layers whose values and outputs are made as the stage says; whether values read
        LN(xt) or xt; whether Kronecker outputs have a bias.
    shaped_attention: {"layers": [0, 1], "parallel": false} (modeling/shaped.py); parallel: FFN beside attention.
    matryoshka: {"ffn": [3072, 1536], "width": [768, 384], "depth": [12, 8], "head": [768, 384], "rotated": true,
        "ffn_of_layers": null} (modeling/nesting.py): the sizes that are nested in the model, the whole one first; of
        one that was cut out its own alone. head: how many coordinates of the final state the logits are made of.
        ffn_of_layers: neurons of each layer where they differ.
    combined: {"widths": [768, 384], "ffn": [3072, 1536], "outputs": "apart" | "glued" | "dense"}
        (modeling/combined.py): the widths of two models side by side and of their FFNs, and what the linears that
        write to their residual stream are. A map of both final states stands before the head then.
    fractal: {"split": 2, "levels": 2, "heads": 12} (modeling/fractal.py): `split` times as many models side by side on
        each level as on the one before, within the model; heads: how many there are, which of a part that was cut out
        (levels 0) are fewer than n_head, as wide as n_head of them are.
    compression: the rewrites that made the model, as records of their fields.
    """

    model_type = "gpt2_compressed"

    ffn_groups: list | None = None
    tversky: list | None = None
    efficient_attention: list | None = None
    alibi: dict | None = None
    token_factored: dict | None = None
    shaped_attention: dict | None = None
    matryoshka: dict | None = None
    combined: dict | None = None
    fractal: dict | None = None
    compression: list | None = None
