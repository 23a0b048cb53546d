from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_store.files.base_names import hub_id, model_name

COMMIT = "01c7f73d771dfac7d292323805ebc428287df4f9"
HUB = "/home/u/.cache/huggingface/hub"


@pytest.mark.parametrize(
    "text",
    [
        "Llama-2-7b-hf",
        "meta-llama/Llama-2-7b-hf",
        "meta-llama/llama-2-7B-HF",
        "meta-llama/Llama-2-7b-hf@main",
        f"meta-llama/Llama-2-7b-hf@{COMMIT}",
        " meta-llama/Llama-2-7b-hf ",
        "/data/models/Llama-2-7b-hf/",
        "./models//Llama-2-7b-hf/.",
        "models/x/../Llama-2-7b-hf",
        "C:\\Users\\me\\models\\Llama-2-7b-hf",
        "D:\\models\\Llama-2-7b-hf\\",
        "\\\\server\\share\\Llama-2-7b-hf",
        "C:/models/Llama-2-7b-hf",
        f"{HUB}/models--meta-llama--Llama-2-7b-hf/snapshots/{COMMIT}",
        f"{HUB}/models--meta-llama--Llama-2-7b-hf/snapshots/{COMMIT}/",
        f"{HUB}/models--meta-llama--Llama-2-7b-hf/snapshots/{COMMIT}\\",
        f"{HUB}/models--meta-llama--Llama-2-7b-hf/snapshots",
        f"{HUB}/models--meta-llama--Llama-2-7b-hf",
        f"C:\\Users\\me\\hub\\models--meta-llama--Llama-2-7b-hf\\snapshots\\{COMMIT}",
        f"{HUB}/models--Llama-2-7b-hf/snapshots/{COMMIT}",
        "https://huggingface.co/meta-llama/Llama-2-7b-hf",
        "https://huggingface.co/meta-llama/Llama-2-7b-hf/tree/main",
        "https://huggingface.co/meta-llama/Llama-2-7b-hf/blob/main/config.json?download=true",
        "hf://meta-llama/Llama-2-7b-hf",
        "s3://bucket/models/Llama-2-7b-hf/",
        "file:///models/Llama-2-7b-hf",
    ],
)
def test_forms_of_one_name(text: str) -> None:
    assert model_name(text) == "llama-2-7b-hf"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("", ""),
        (" ", ""),
        (".", ""),
        ("..", ""),
        ("/", ""),
        ("models/..", ""),
        ("../..", ""),
        ("https://", ""),
        ("https://[/x", ""),
        ("gpt2", "gpt2"),
        ("meta-llama", "meta-llama"),
        ("Llama-2-7b-hf/checkpoint-500", "checkpoint-500"),
        ("meta-llama/Llama-2-13b-hf", "llama-2-13b-hf"),
        ("/root/.cache/modelscope/hub/Qwen/Qwen2___5-0___5B", "qwen2.5-0.5b"),
        ("Qwen/Qwen2.5-0.5B", "qwen2.5-0.5b"),
        (f"{HUB}/models--org--one/snapshots/{COMMIT}/other", "other"),  # a repository with several models
        (f"{HUB}/models--org--one/blobs", "blobs"),
        (f"{HUB}/datasets--org--one/snapshots/{COMMIT}", COMMIT),
    ],
)
def test_other_names(text: str, name: str) -> None:
    assert model_name(text) == name


def test_the_hub_id_of_a_cached_directory() -> None:
    assert hub_id(f"{HUB}/models--meta-llama--Llama-2-7b-hf/snapshots/{COMMIT}") == "meta-llama/Llama-2-7b-hf"
    assert hub_id(f"{HUB}/models--gpt2/snapshots/{COMMIT}") == "gpt2"
    assert hub_id("/models/Llama-2-7b-hf") is None
    assert hub_id("") is None


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="aB./\\@:-_ ?[]é\ud800") | st.text())
def test_any_text_has_a_name_without_separators(text: str) -> None:
    name = model_name(text)
    assert not set(name) & set("/\\")
    hub_id(text)


NAME = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9.-]{0,20}[A-Za-z0-9]", fullmatch=True).filter(
    lambda text: "--" not in text
)


@settings(max_examples=200, deadline=None)
@given(
    NAME,
    NAME,
    st.sampled_from(["{0}/{1}", "/m/{1}/", "C:\\m\\{1}", "/h/models--{0}--{1}/snapshots/abc", "./x/../{1}"]),
)
def test_a_name_is_found_in_every_form(owner: str, name: str, form: str) -> None:
    assert model_name(form.format(owner, name)) == name.casefold()
