"""Hierarchies of token embeddings: the settings of the losses of groups on prefixes of the final state.

Source: evintunador/hierarchical_embeddings. imposed: groups by what tokens look like (token_groups.py). emergent:
groups found in the prefixes of the embeddings themselves (embedding_clusters.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .. import fields
from ..errors import UserError, unknown
from ..modeling.nesting import Size
from ..token_groups import SCHEMES


@dataclass(frozen=True)
class Imposed:
    """scheme: of token_groups.SCHEMES, one for all prefixes or a list, one for each, the longest first (coarser ones
    for shorter prefixes). weight: of the groups' loss beside that of next tokens."""

    scheme: str | list = "form"
    weight: float = 0.1

    def schemes(self, prefixes: int) -> list[str]:
        """One for each prefix. Raises UserError for another number of them."""
        found = self.scheme if isinstance(self.scheme, list) else [self.scheme] * prefixes
        if len(found) != prefixes:
            raise UserError(f"{OWNER}: scheme has {len(found)} names; allowed: one, or one for each of {prefixes}")
        return found


@dataclass(frozen=True)
class Emergent:
    """weight: as of Imposed. minimum_similarity, minimum_group_size: see embedding_clusters.py. every: after so many
    steps groups are found anew."""

    weight: float = 0.1
    minimum_similarity: float = 0.7
    minimum_group_size: int = 3
    every: int = 100


OWNER = "matryoshka: groups"
KINDS: dict[str, type[Imposed] | type[Emergent]] = {"imposed": Imposed, "emergent": Emergent}


def hierarchy(record: dict[str, Any], prefixes: int) -> Imposed | Emergent:
    """The settings of a record such as {"kind": "imposed", "scheme": "case"} for so many smaller prefixes. Raises
    UserError for what is not allowed."""
    kind = record.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise unknown(f"kind of {OWNER}", str(kind), KINDS)
    given = {key: value for key, value in record.items() if key != "kind"}
    found = fields.from_record(KINDS[kind], given, OWNER)
    if found.weight < 0:
        raise UserError(f"{OWNER}: weight is {found.weight}; allowed: 0 or more")
    if isinstance(found, Imposed):
        for scheme in found.schemes(prefixes):
            if not isinstance(scheme, str) or scheme not in SCHEMES:
                raise unknown(f"scheme of {OWNER}", str(scheme), SCHEMES)
        return found
    if not -1 <= found.minimum_similarity <= 1:
        raise UserError(f"{OWNER}: minimum_similarity is {found.minimum_similarity}; allowed: -1 to 1")
    for name, least in (("minimum_group_size", 2), ("every", 1)):
        if getattr(found, name) < least:
            raise UserError(f"{OWNER}: {name} is {getattr(found, name)}; allowed: {least} or more")
    return found


def as_record(settings: Imposed | Emergent) -> dict[str, Any]:
    """With every default written out."""
    return {"kind": type(settings).__name__.lower(), **dataclasses.asdict(settings)}


def prefix_of(size: Size, width: int) -> int:
    """How many coordinates of the token embeddings the logits of a size are made of; width: of the whole model."""
    return size.head if size.width == width else size.width - 1
