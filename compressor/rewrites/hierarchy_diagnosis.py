"""What the prefixes of a nested model's token embeddings know of what tokens look like: clusters beside imposed groups,
and cosines of tokens that the source looks at."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GPT2LMHeadModel

from .. import gpt2
from ..embedding_clusters import agreement, directions, emergent_groups
from ..modeling.nesting import Size
from ..token_groups import SCHEMES, Strings, imposed_groups
from .hierarchy import Emergent, prefix_of

# Tokens of the heat maps, where a vocabulary has them; the source's are characters.
SETS: dict[str, Sequence[str]] = {
    "blanks": (" ", "\n", "\t"),
    "vowels": tuple("aeiou"),
    "consonants": tuple("bdlmnrst"),
    "upper case": tuple("AEIBLMST"),
    "ends of sentences": tuple(".!?"),
    "inside of sentences": tuple(",;:-"),
    "symbols": tuple("#$%&*+=@"),
    "digits": tuple("01239"),
}


@torch.no_grad()
def diagnose(
    model: GPT2LMHeadModel, sizes: Sequence[Size], strings: Strings, settings: Emergent
) -> dict[str, Any] | None:
    """The hierarchy of a nested model as it stands in report.json; None where no size reads a prefix.

    minimum_similarity, minimum_group_size: of the clusters (embedding_clusters.py). prefixes: the longest first, each
    with its coordinates, mean_cosine (of any two embeddings as they are), clusters (how many), largest and clustered
    (tokens) and by scheme (token_groups.py) `agreement` of the clusters with the imposed groups: tokens in both, purity
    beside that by chance, nmi, ami; null where no token is in both. map: tokens of `sets` (name, how many) and for each
    prefix their cosines after the mean over the vocabulary is taken off, rounded to 3 decimals.
    """
    width = model.config.n_embd
    prefixes = sorted({width, *(prefix_of(size, width) for size in sizes)}, reverse=True)
    if len(prefixes) == 1:
        return None
    embeddings = gpt2.embeddings(model).detach().cpu().double()
    imposed = {scheme: imposed_groups(strings, scheme)[0] for scheme in SCHEMES}
    places = {string: index for index, string in reversed(list(enumerate(strings)))}
    sets = {name: [places[string] for string in own if string in places] for name, own in SETS.items()}
    shown = [index for own in sets.values() for index in own]
    told, cosines = [], []
    for prefix in prefixes:
        own = embeddings[:, :prefix]
        found = emergent_groups(
            own, minimum_similarity=settings.minimum_similarity, minimum_group_size=settings.minimum_group_size
        )
        counts = torch.bincount(found[found >= 0])
        raw = torch.nn.functional.normalize(own, dim=1).sum(0).square().sum()
        met = {scheme: agreement(found, groups) for scheme, groups in imposed.items()}
        told.append(
            {
                "coordinates": prefix,
                "mean_cosine": float((raw - len(own)) / (len(own) * (len(own) - 1))),
                "clusters": len(counts),
                "largest": int(counts.max()) if len(counts) else 0,
                "clustered": int(counts.sum()),
                "agreement": {name: None if one is None else dataclasses.asdict(one) for name, one in met.items()},
            }
        )
        some = torch.from_numpy(directions(own)[shown]).double()
        cosines.append([[round(value, 3) for value in row] for row in (some @ some.T).tolist()])
    return {
        "minimum_similarity": settings.minimum_similarity,
        "minimum_group_size": settings.minimum_group_size,
        "vocabulary": len(embeddings),
        "prefixes": told,
        "map": {
            "tokens": [strings[index] for index in shown],
            "sets": [[name, len(own)] for name, own in sets.items() if own],
            "cosines": cosines,
        },
    }
