"""Publish a trained soft prompt or adapter after checking that the server computes what PEFT computes.

The golden check needs it on the server, and the record of a version cannot be changed later. So the
files are uploaded twice: under a temporary name for the check, and then as the next version, with the result of the
check in its metadata. Both uploads have the same digest, so the checked files are the served ones. If the check
fails, no version is created and no alias moves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prompt_store.types import check_name
from server.client.http import ClientError, PreludeClient
from server.datasets import Conversation, Example
from server.training.encoding import Encoded, Encoder
from server.training.errors import GoldenCheckError, SettingsError, TrainingError
from server.training.heads.classifier import text_class_logits
from server.training.over import Over
from server.training.run_directory import RunDirectory
from server.training.scoring import text_logprobs
from server.training.settings import TrainSettings, public_settings

EXACT_TOLERANCE = 1e-3
"""Tolerance in nats if the server computes in float32, where differences near 1e-5 are usual."""

ROUNDED_FACTOR = 4.0
"""Tolerance as a multiple of the measured rounding error, which is the largest of only a few texts."""

SAME_MODEL = 0.25
"""Mean difference per token, in nats, up to which weights count as the same. Other weights differ by whole nats."""

_MAX_NAME = 128
_MAX_TEXT_CHARS = 1000
_MAX_LABEL_BYTES = 16 * 1024
_MAX_RUN_CHARS = 128


@dataclass(frozen=True, slots=True)
class Difference:
    """Difference between the server's values and the local ones.

    The values are log-probabilities of tokens, or logits of a head's labels, both in nats.

    Attributes:
        largest: Largest difference of one value.
        mean: Mean over all values.
        num_tokens: Number of compared values.
    """

    largest: float
    mean: float
    num_tokens: int


class Publisher:
    """Checks a server and publishes to it.

    Args:
        client: Client of the server.
        settings: The settings of the training.
        directory: The directory of the run.
        over: The adapter that the soft prompt is trained over; the server then adds it to the soft prompt.
    """

    def __init__(
        self, client: PreludeClient, settings: TrainSettings, directory: RunDirectory, *, over: Over | None = None
    ) -> None:
        self._over = None if over is None else over.ref
        self._client = client
        self._settings = settings
        self._directory = directory
        # One name per run directory: concurrent runs do not collide, and a resumed run removes what a killed one
        # left.
        run = hashlib.sha256(str(settings.run_dir.resolve()).encode()).hexdigest()[:8]
        suffix = f".golden-check-{run}"
        self._staging = settings.name[: _MAX_NAME - len(suffix)] + suffix
        self._noise = Difference(0.0, 0.0, 0)
        self.base_name = ""
        self.max_model_len = 0

    def check_server(self, encoder: Encoder, examples: Sequence[Example]) -> None:
        """Check the server before a model is loaded.

        Args:
            encoder: Encoder of the local model.
            examples: Texts whose tokens are compared.

        Raises:
            ClientError: If the server cannot be reached, or the key may not publish.
            TrainingError: If the server's tokenizer differs, or its base model has the name of the soft prompt.
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
                    f"{self._settings.model!r}: it encodes the text of line {example.line} as {len(theirs)} tokens "
                    f"({theirs[:8]}...), the local model as {len(ours)} ({ours[:8]}...)"
                )
        self._unstage()  # also checks that the key may delete and publish

    def check_base(self, base: Any, examples: Sequence[Encoded]) -> None:
        """Check before training that the server has the local model's weights.

        Args:
            base: The model without a soft prompt.
            examples: Texts to compare.

        Raises:
            TrainingError: If the weights differ.
        """
        bare = [Encoded(example.prompt_ids, example.completion_ids) for example in examples]
        self._noise = self._difference(self.base_name, bare, [text_logprobs(base, example) for example in bare])
        if not self._noise.mean <= SAME_MODEL:
            raise TrainingError(
                f"the server {self._settings.url} runs {self.base_name!r}, whose weights differ from those of "
                f"{self._settings.model!r}: without a soft prompt the log-probabilities of {self._noise.num_tokens} "
                f"tokens differ by {self._noise.mean:.3g} nats on average"
            )

    def check_over(self, model: Any, examples: Sequence[Encoded]) -> None:
        """Check before training that the server computes the adapter as PEFT does.

        Args:
            model: The model with the adapter, without a soft prompt.
            examples: Texts to compare.

        Raises:
            TrainingError: If the log-probabilities differ.
        """
        bare = [Encoded(example.prompt_ids, example.completion_ids) for example in examples]
        found = self._difference(str(self._over), bare, [text_logprobs(model, example) for example in bare])
        if not found.mean <= SAME_MODEL:
            raise TrainingError(
                f"the server {self._settings.url} does not compute {self._over} as PEFT does: without a soft prompt "
                f"the log-probabilities of {found.num_tokens} tokens differ by {found.mean:.3g} nats on average"
            )

    def check_files(self, folder: Path) -> None:
        """Check before training that the server accepts files of this form.

        Raises:
            ClientError: If it does not; with every fault.
        """
        try:
            self._client.push(folder, name=self._staging, description="check of prelude train")
        finally:
            self._unstage()

    def tolerances(self, rounding: Difference) -> tuple[float, float | None]:
        """The allowed largest and mean difference, in nats.

        Args:
            rounding: The measured rounding error: of the bare model on the server, or of the trained one here.

        Returns:
            The configured tolerance, or one derived from the rounding error. The second is None if the mean is not
            checked.
        """
        if self._settings.golden_tolerance is not None:
            return self._settings.golden_tolerance, None
        if rounding.largest <= EXACT_TOLERANCE:
            return EXACT_TOLERANCE, None
        return ROUNDED_FACTOR * rounding.largest, ROUNDED_FACTOR * rounding.mean

    def publish(self, model: Any, examples: Sequence[Encoded], result: dict[str, Any]) -> dict[str, Any]:
        """Compare the server with PEFT, and publish the saved files as the next version if they agree.

        Args:
            model: The PEFT model, loaded from the saved directory.
            examples: Texts to compare.
            result: The contents of ``result.json``.

        Returns:
            ``id``, ``version``, ``alias`` and ``golden_check``.

        Raises:
            GoldenCheckError: If the log-probabilities differ by more than the tolerance; nothing is published then.
            ClientError: If the server rejects the files.
        """
        reference = [_values(model, example) for example in examples]
        kind = "logits" if self._settings.has_head else "logprobs"
        golden = [
            {"token_ids": example.token_ids, "task_id": example.task_id, kind: values}
            for example, values in zip(examples, reference, strict=True)
        ]
        self._directory.write("golden.json", golden)
        rounding = self._noise
        if rounding.largest > EXACT_TOLERANCE:
            own = _rounding(model, examples, reference)
            rounding = Difference(max(rounding.largest, own.largest), max(rounding.mean, own.mean), own.num_tokens)
        tolerance, mean_tolerance = self.tolerances(rounding)
        settings, adapter = self._settings, self._directory.adapter
        try:
            text = "golden check of prelude train"
            staged, _ = self._client.push(adapter, name=self._staging, description=text, over=self._over)
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
                f"the golden check failed: the {_value_name(self._settings)} differs from PEFT's by "
                f"{difference.largest:.3g} nats; the tolerance is {tolerance:.3g}"
                f"{_mean_suffix(difference.mean, mean_tolerance)}. Nothing was published, and no alias was moved",
                difference=difference.largest,
                tolerance=tolerance,
            )
        run = self._directory.read("settings.json")
        metadata = {
            "golden_check": check,
            "training": {key: run[key] for key in ("digests", "rows", "learning_rate", "versions")}
            | {key: result[key] for key in ("steps", "best_step", "train_loss", "scores")}
            | {"init_text": _truncate(result["init_text"]), "settings": public_settings(run["settings"])},
        }
        if run["labels"] and len(json.dumps(run["labels"])) <= _MAX_LABEL_BYTES:
            metadata["labels"] = run["labels"]
        version, _ = self._client.push(
            adapter,
            name=settings.name,
            alias=settings.alias,
            over=self._over,
            description=settings.description,
            metadata=json.dumps(metadata),
            lineage=json.dumps(_lineage(run, result, settings)),
            prompt_format=json.dumps(result["format"]) if "format" in result else None,
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
            if example.class_id is not None:
                theirs.append(self._class_logits(model, example))
                continue
            body: dict[str, Any] = {"model": model, "prompt": example.token_ids, "max_tokens": 0}
            body |= {"echo": True, "logprobs": 1, "temperature": 0}
            if example.task_id is not None:
                body["task_id"] = example.task_id
            theirs.append(self._client.complete(body)["choices"][0]["logprobs"]["token_logprobs"][1:])
        return _compare(ours, theirs)

    def _class_logits(self, model: str, example: Encoded) -> list[float]:
        body: dict[str, Any] = {"model": model, "input": example.token_ids}
        if example.task_id is not None:
            body["task_id"] = example.task_id
        (found,) = self._client.classify(body)["data"]
        return [float(value) for value in found["logits"].values()]

    def _unstage(self) -> None:
        try:
            # A killed run may have left another version.
            self._client.remove(self._staging, force=True)
        except ClientError as error:
            if error.status != 404:
                raise


def _compare(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Difference:
    differences = [
        abs(our - their)
        for our_text, their_text in zip(ours, theirs, strict=True)
        for our, their in zip(our_text, their_text, strict=True)
    ]
    # Texts of one token without a completion have no log-probabilities.
    count = len(differences)
    return Difference(max(differences, default=0.0), sum(differences) / max(1, count), count)


def _rounding(model: Any, examples: Sequence[Encoded], reference: Sequence[Sequence[float]]) -> Difference:
    """Difference between this soft prompt, or adapter, in bfloat16 and in its own dtype.

    Rows of a soft prompt are larger than those of a vocabulary, and so are their rounding errors. Leaves the model in
    bfloat16.
    """
    model.to(torch.bfloat16)
    return _compare(reference, [_values(model, example) for example in examples])


def _values(model: Any, example: Encoded) -> list[float]:
    """What the golden check compares: the logits of a head, or the log-probabilities of the tokens."""
    return text_logprobs(model, example) if example.class_id is None else text_class_logits(model, example)


def _value_name(settings: TrainSettings) -> str:
    return "logit of a label" if settings.has_head else "log-probability of a token"


def _mean_suffix(mean: float, tolerance: float | None) -> str:
    return "" if tolerance is None else f"; the mean difference is {mean:.3g}, its tolerance {tolerance:.3g}"


def _truncate(text: str | None) -> str | None:
    """Truncate a text for the record of a version; it may be a whole corpus."""
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
