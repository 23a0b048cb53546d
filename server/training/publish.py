"""Publish a trained soft prompt after checking that the server computes what PEFT computes.

The golden check needs the soft prompt on the server, and the record of a version cannot be changed later. So the
files are uploaded twice: under a temporary name for the check, and then as the next version, with the result of the
check in its metadata. Both uploads have the same digest, so the checked files are the served ones. If the check
fails, no version is created and no alias moves.
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
    """Difference between the server's log-probabilities and the local ones.

    Attributes:
        largest: Largest difference of one token, in nats.
        mean: Mean over all tokens, in nats.
        num_tokens: Number of compared tokens.
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
    """

    def __init__(self, client: PreludeClient, settings: TrainSettings, directory: RunDirectory) -> None:
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

    def tolerances(self, rounding: Difference) -> tuple[float, float | None]:
        """The allowed largest and mean difference, in nats.

        Args:
            rounding: The measured rounding error: of the bare model on the server, or of the soft prompt here.

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
            staged, _ = self._client.push(adapter, name=self._staging, description="golden check of prelude train")
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
                f"the golden check failed: the log-probability of a token differs from PEFT's by "
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
            | {"init_text": _truncate(result["init_text"]), "settings": _public_settings(run["settings"])},
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
        return _compare(ours, theirs)

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
    return Difference(max(differences), sum(differences) / len(differences), len(differences))


def _rounding(model: Any, examples: Sequence[Encoded], reference: Sequence[Sequence[float]]) -> Difference:
    """Difference between this soft prompt in bfloat16 and in its own dtype.

    Rows of a soft prompt are larger than those of a vocabulary, and so are their rounding errors. Leaves the model in
    bfloat16.
    """
    model.to(torch.bfloat16)
    return _compare(reference, [text_logprobs(model, example) for example in examples])


def _mean_suffix(mean: float, tolerance: float | None) -> str:
    return "" if tolerance is None else f"; the mean difference is {mean:.3g}, its tolerance {tolerance:.3g}"


def _public_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings to store in the catalog, without paths of this machine and without texts."""
    hidden = {"data", "eval_data", "run_dir", "url", "resume", "push", "init_text", "description"}
    return {key: value for key, value in settings.items() if key not in hidden and value is not None}


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
