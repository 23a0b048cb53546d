"""Response bodies of the comparison of two versions."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from prompt_store.files.comparison import RowDifference, VectorDifference
from server.api.prompts.bodies import ObjectType


class FieldChange(BaseModel):
    """A field that differs."""

    field: str = Field(description="Its path, with dots between names.")
    before: Any = Field(description="Its value in the first version; null if it has none.")
    after: Any = Field(description="Its value in the second version; null if it has none.")


class VectorBody(BaseModel):
    """Two vectors."""

    cosine: float = Field(description="Cosine of the angle between them, -1 to 1; 0 if one of them is zero.")
    norm_before: float = Field(description="Euclidean norm in the first version.")
    norm_after: float = Field(description="Euclidean norm in the second version.")

    @classmethod
    def of(cls, found: VectorDifference) -> VectorBody:
        """Convert the numbers."""
        return cls(cosine=found.cosine, norm_before=found.norms[0], norm_after=found.norms[1])


class LayerBody(BaseModel):
    """The keys and the values of a virtual token in one layer."""

    keys: VectorBody = Field(description="Its keys.")
    values: VectorBody = Field(description="Its values.")


class TokenDifference(VectorBody):
    """A virtual token in both versions."""

    index: int = Field(description="Index of the virtual token, from 0.")
    layers: list[LayerBody] | None = Field(description="By layer, for keys and values; null for embeddings.")

    @classmethod
    def at(cls, index: int, found: RowDifference) -> TokenDifference:
        """Convert the numbers of the virtual token at an index."""
        layers = [LayerBody(keys=VectorBody.of(keys), values=VectorBody.of(values)) for keys, values in found.layers]
        return cls(index=index, layers=layers or None, **VectorBody.of(found.row).model_dump())


class Compared(BaseModel):
    """One of the versions, and who uses it on this server."""

    id: str = Field(description="The soft prompt's name.")
    version: int = Field(description="Version number.")
    aliases: list[str] = Field(description="Aliases that point at it.")
    num_virtual_tokens: int = Field(description="Number of positions before the text.")
    scores: dict[str, float] = Field(description="Scores of its lineage.")
    requests_last_hour: int = Field(description="Requests that this server has answered with it in the last hour.")
    running: int = Field(description="Requests that this server answers with it now.")
    pinned: bool = Field(description="Whether it is pinned on this server.")


class ShadowResults(BaseModel):
    """Comparisons of the second version as a shadow, since this server started."""

    equal: int = Field(description="Requests with equal answers.")
    different: int = Field(description="Requests with different answers.")
    errors: int = Field(description="Requests that the shadow failed.")
    dropped: int = Field(description="Requests that were not copied because the server was busy.")
    mean_logprob_difference: float | None = Field(
        description="Mean over the requests of the log-probability per token of its answer minus that of the "
        "returned answer."
    )


class DiffReply(BaseModel):
    """How two versions differ."""

    object: ObjectType = "prompt.diff"
    before: Compared = Field(description="The first version.")
    after: Compared = Field(description="The second version.")
    same_files: bool = Field(description="Whether both have the same bytes.")
    configuration: list[FieldChange] = Field(description="Fields of `adapter_config.json` that differ.")
    metadata: list[FieldChange] = Field(
        description="Fields of the metadata, description, tags and format that differ."
    )
    lineage: list[FieldChange] = Field(description="Fields of the lineage that differ.")
    tokens: list[TokenDifference] | None = Field(
        description="The virtual tokens that both have; null for adapters, for different kinds of rows, and for more "
        "virtual tokens than `max_tokens`."
    )
    shadow: ShadowResults = Field(description="Results of the second version as a shadow.")
