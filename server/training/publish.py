"""Publishing what was trained, once the server is seen to answer as PEFT does.

The golden check needs the soft prompt on the server, and a version's record is not changed once it is there. So the
files are uploaded twice: first under a name of their own, where nobody looks for them, and after the check as the
next version, with the outcome in its metadata. Both uploads are the same blob, found by the same digest: what was
checked is what is served. If the check fails, no version is made and no alias moves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prompt_store.types import check_name
from server.client.http import ClientError, PreludeClient
from server.datasets import Conversation, Example
from server.training.encoding import Encoded, Encoder
from server.training.errors import GoldenCheckError, SettingsError, TrainingError
from server.training.run_directory import RunDirectory
from server.training.scoring import text_logprobs
from server.training.settings import TrainSettings

EXACT_TOLERANCE = 1e-3
"""Nats, where the server computes as exactly as we do; what is seen in float32 is near 1e-5."""

ROUNDED_FACTOR = 4.0
"""How many times the rounding that was seen a token may be off: it is the largest of a few, and sums differ."""

SAME_MODEL = 0.25
"""Mean nats a token by which the same weights may differ between two dtypes; other weights differ by whole nats."""

_MAX_NAME = 128
_MAX_TEXT_CHARS = 1000
_MAX_LABEL_BYTES = 16 * 1024
_MAX_RUN_CHARS = 128


@dataclass(frozen=True, slots=True)
class Difference:
    """How far the server's log-probabilities are from ours.

    Attributes:
        largest: Of one token, in nats.
        mean: Over all tokens.
        num_tokens: How many were compared.
    """

    largest: float
    mean: float
    num_tokens: int


class Publisher:
    """A server to publish to.

    Args:
        client: It.
        settings: The training's.
        directory: The run's.
    """

    def __init__(self, client: PreludeClient, settings: TrainSettings, directory: RunDirectory) -> None:
        self._client = client
        self._settings = settings
        self._directory = directory
        # One for each run directory: two runs of a name do not meet, and what a killed one left is found again.
        run = hashlib.sha256(str(settings.run_dir.resolve()).encode()).hexdigest()[:8]
        suffix = f".golden-check-{run}"
        self._staging = settings.name[: _MAX_NAME - len(suffix)] + suffix
        self._noise = Difference(0.0, 0.0, 0)
        self.base_name = ""
        self.max_model_len = 0

    def check_server(self, encoder: Encoder, examples: Sequence[Example]) -> None:
        """See, before anything is loaded, whether this server can take what will be trained.

        Raises:
            ClientError: If it cannot be reached, or the key may not publish.
            TrainingError: If it serves a model with another tokenizer, or by this name.
        """
        try:
            check_name(self._settings.name, "id")
            check_name(self._settings.alias, "alias")
        except ValueError as error:
            raise SettingsError(str(error)) from error
        try:
            base = self._client.models()[0]
            self.base_name, self.max_model_len = str(base["root"]), int(base["max_model_len"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise TrainingError(f"{self._settings.url} does not answer as a Prelude server does") from error
        if self._settings.name == self.base_name:
            raise SettingsError(f"id: {self.base_name!r} is the name of the server's base model")
        for example in examples:
            if isinstance(example, Conversation):
                turns = [{"role": turn.role, "content": turn.content} for turn in example.messages[:-1]]
                body: dict[str, Any] = {"messages": turns}
            else:
                body = {"prompt": encoder.prompt_of(example)}
            theirs, ours = self._client.tokenize(body), encoder.encode(example).prompt_ids
            if theirs != ours:
                raise TrainingError(
                    f"the server {self._settings.url} runs {self.base_name!r}, which is a different model from "
                    f"{self._settings.model!r}: it makes {len(theirs)} tokens of line {example.line}'s text and "
                    f"{theirs[:8]} of its beginning, where ours are {len(ours)} and {ours[:8]}"
                )
        self._unstage()  # also tells whether the key may change anything

    def check_base(self, base: Any, examples: Sequence[Encoded]) -> None:
        """See, before training, whether the server's weights are the local ones.

        Args:
            base: The bare model.
            examples: Texts to compare.

        Raises:
            TrainingError: If they are not.
        """
        bare = [Encoded(example.prompt_ids, example.completion_ids) for example in examples]
        self._noise = self._difference(self.base_name, bare, [text_logprobs(base, example) for example in bare])
        if not self._noise.mean <= SAME_MODEL:
            raise TrainingError(
                f"the server {self._settings.url} runs {self.base_name!r}, which has other weights than "
                f"{self._settings.model!r}: without a soft prompt its log-probabilities are {self._noise.mean:.3g} "
                f"nats off in the mean of {self._noise.num_tokens} tokens"
            )

    def tolerances(self, rounding: Difference) -> tuple[float, float | None]:
        """What the worst token may be off, and what the tokens may be in the mean.

        Args:
            rounding: What was seen of rounding: in the bare model on the server, or in the soft prompt here.

        Returns:
            As told, or by how exactly the server computes; there is no bound on the mean where one is enough.
        """
        if self._settings.golden_tolerance is not None:
            return self._settings.golden_tolerance, None
        if rounding.largest <= EXACT_TOLERANCE:
            return EXACT_TOLERANCE, None
        return ROUNDED_FACTOR * rounding.largest, ROUNDED_FACTOR * rounding.mean

    def publish(self, model: Any, examples: Sequence[Encoded], result: dict[str, Any]) -> dict[str, Any]:
        """Check what was saved against PEFT, and make it the next version if it holds.

        Args:
            model: PEFT's own, loaded from the saved directory.
            examples: Texts to compare.
            result: What ``result.json`` has.

        Returns:
            ``id``, ``version``, ``alias`` and ``golden_check``.

        Raises:
            GoldenCheckError: If the server's log-probabilities are off; nothing is published then.
            ClientError: If the server refuses.
        """
        reference = [text_logprobs(model, example) for example in examples]
        golden = [
            {"token_ids": example.token_ids, "task_id": example.task_id, "logprobs": logprobs}
            for example, logprobs in zip(examples, reference, strict=True)
        ]
        self._directory.write("golden.json", golden)
        rounding = self._noise
        if rounding.largest > EXACT_TOLERANCE:
            own = _rounding(model, examples, reference)
            rounding = Difference(max(rounding.largest, own.largest), max(rounding.mean, own.mean), own.num_tokens)
        tolerance, mean_tolerance = self.tolerances(rounding)
        settings, adapter = self._settings, self._directory.adapter
        try:
            staged, _ = self._client.push(adapter, name=self._staging, description="being checked by prelude train")
            difference = self._difference(f"{self._staging}@{staged['version']}", examples, reference)
        finally:
            self._unstage()
        check = {
            "is_passed": difference.largest <= tolerance
            and (mean_tolerance is None or difference.mean <= mean_tolerance),
            "largest_difference": difference.largest,
            "mean_difference": difference.mean,
            "tolerance": tolerance,
            "mean_tolerance": mean_tolerance,
            "bare_difference": self._noise.largest,
            "texts": len(examples),
            "tokens": difference.num_tokens,
            "digest": staged["digest"],
        }
        self._directory.write("golden_check.json", check)
        if not check["is_passed"]:
            raise GoldenCheckError(
                f"the golden check failed: a token's log-probability on the server is {difference.largest:.3g} nats "
                f"from PEFT's, and {tolerance:.3g} is allowed{_of_mean(difference.mean, mean_tolerance)}. "
                "Nothing was published, and no alias was moved",
                difference=difference.largest,
                tolerance=tolerance,
            )
        run = self._directory.read("settings.json")
        metadata = {
            "golden_check": check,
            "training": {key: run[key] for key in ("digests", "rows", "learning_rate", "versions")}
            | {key: result[key] for key in ("steps", "best_step", "train_loss", "scores")}
            | {"init_text": _cut(result["init_text"]), "settings": _for_others(run["settings"])},
        }
        if run["labels"] and len(json.dumps(run["labels"])) <= _MAX_LABEL_BYTES:
            metadata["labels"] = run["labels"]
        version, _ = self._client.push(
            adapter,
            name=settings.name,
            alias=settings.alias,
            description=settings.description,
            metadata=json.dumps(metadata),
            lineage=json.dumps(_lineage(run, result, settings)),
        )
        return {
            "id": version["id"],
            "version": version["version"],
            "alias": settings.alias,
            "golden_check": check,
        }

    def _difference(self, model: str, examples: Sequence[Encoded], ours: Sequence[Sequence[float]]) -> Difference:
        theirs: list[list[float]] = []
        for example in examples:
            body: dict[str, Any] = {"model": model, "prompt": example.token_ids, "max_tokens": 0}
            body |= {"echo": True, "logprobs": 1, "temperature": 0}
            if example.task_id is not None:
                body["task_id"] = example.task_id
            theirs.append(self._client.complete(body)["choices"][0]["logprobs"]["token_logprobs"][1:])
        return _compared(ours, theirs)

    def _unstage(self) -> None:
        try:
            self._client.remove(self._staging)
        except ClientError as error:
            if error.status != 404:
                raise


def _compared(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Difference:
    offs = [
        abs(our - their)
        for one, other in zip(ours, theirs, strict=True)
        for our, their in zip(one, other, strict=True)
    ]
    return Difference(max(offs), sum(offs) / len(offs), len(offs))


def _rounding(model: Any, examples: Sequence[Encoded], reference: Sequence[Sequence[float]]) -> Difference:
    """How far this very soft prompt is off itself in bfloat16, in which a server that rounds may serve it.

    A soft prompt's rows are larger than a vocabulary's, and so is their rounding. The model is left in bfloat16.
    """
    model.to(torch.bfloat16)
    return _compared(reference, [text_logprobs(model, example) for example in examples])


def _of_mean(mean: float, tolerance: float | None) -> str:
    return "" if tolerance is None else f"; in the mean it is {mean:.3g}, and {tolerance:.3g} is allowed"


def _for_others(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as a catalog should have them: where files lay on this machine is nobody's business."""
    hidden = {"data", "eval_data", "run_dir", "url", "resume", "push", "init_text", "description"}
    return {key: value for key, value in settings.items() if key not in hidden and value is not None}


def _cut(text: str | None) -> str | None:
    """A text that may be a whole corpus, short enough for a version's record."""
    return text if text is None or len(text) <= _MAX_TEXT_CHARS else text[:_MAX_TEXT_CHARS] + "..."


def _lineage(run: dict[str, Any], result: dict[str, Any], settings: TrainSettings) -> dict[str, Any]:
    scores = {
        f"{which}_{measure}": value
        for which, measures in result["scores"].items()
        if measures is not None
        for measure, value in measures.items()
    }
    if result["train_loss"] is not None:
        scores["train_loss"] = result["train_loss"]
    if "trained_accuracy" in scores:
        scores |= {"accuracy": scores["trained_accuracy"], "loss": scores["trained_loss"]}
    return {
        "training_run": settings.run_dir.resolve().name[:_MAX_RUN_CHARS] or settings.name,
        "dataset_digest": f"sha256:{run['digests']['data']}",
        "scores": scores,
    }
