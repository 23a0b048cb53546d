"""The embedded model, its soft prompts, and the tour of ``prelude demo``."""

from dataclasses import dataclass
from pathlib import Path

DEMO_NAME = "prelude-demo"
"""The embedded model's name in the API."""

DEMO_MODEL = Path(__file__).parent / "model"


@dataclass(frozen=True, slots=True)
class Exhibit:
    """What a tour shows: soft prompts and adapters of one model, each in the folder of its name.

    Attributes:
        folder: Contains ``soft_prompts``, ``heldout`` with examples of each, and possibly ``adapters``, ``pairs`` and
            ``examples``.
        keep_command: A command that shows the same and keeps the store.
    """

    folder: Path
    keep_command: str

    @property
    def soft_prompts(self) -> Path:
        """Soft prompts for the bare model: ``NAME``."""
        return self.folder / "soft_prompts"

    @property
    def adapters(self) -> Path:
        """Adapters: ``NAME``."""
        return self.folder / "adapters"

    @property
    def pairs(self) -> Path:
        """Soft prompts that were trained over an adapter: ``ADAPTER/NAME``."""
        return self.folder / "pairs"

    @property
    def heldout(self) -> Path:
        """Examples that no training has seen: ``NAME.jsonl``."""
        return self.folder / "heldout"

    @property
    def examples(self) -> Path:
        """Data to train with: ``triage.jsonl`` and ``triage-test.jsonl``."""
        return self.folder / "examples"


EMBEDDED = Exhibit(Path(__file__).parent, "prelude demo --store DIRECTORY")
"""What the embedded model was trained with."""
