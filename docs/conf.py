"""Configuration of the documentation site; ``make docs`` builds it."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

project = "Prelude"
release = version = metadata.version("prelude-server")
copyright = "the Prelude authors"  # noqa: A001 - Sphinx's name

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
root_doc = "index"
html_theme = "furo"
html_title = f"Prelude {release}"
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist"]

# Examples contain "..." and the shells' prompts.
suppress_warnings = ["misc.highlighting_failure"]

SUMMARY = (
    "Prelude serves one frozen language model for many tasks: soft prompts and LoRA adapters are uploaded, versioned "
    "and swapped while it runs, and one batch mixes them."
)


def write_markdown(app: Any, error: Exception | None) -> None:
    """Write every page as Markdown beside its HTML, and an index of them for language models (llmstxt.org)."""
    if error is not None or app.builder.name != "html":
        return
    lines = [f"# {project}", "", f"> {SUMMARY}", "", "## Pages", ""]
    for name in sorted(app.env.found_docs):
        source = Path(app.env.doc2path(name))
        target = Path(app.outdir) / f"{name}.md"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        lines.append(f"- [{app.env.titles[name].astext()}]({name}.md)")
    (Path(app.outdir) / "llms.txt").write_text("\n".join(lines) + "\n")


def setup(app: Any) -> None:
    """Register the extra output."""
    app.connect("build-finished", write_markdown)
