"""The front matter of a model card: what the Hub sorts repositories by, as GGUF metadata has it of the source."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from .folder import PublishedFolder
from .text import printable

_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
_LICENSE = re.compile(r"[a-z0-9.-]+")
_LINK, _FILE = re.compile(r"https?://[^\s<>\"']+"), re.compile(r"[\w./-]+")
_TAG = re.compile(r"[\w.+-]{1,60}")
_TASKS = ("text-generation", "image-text-to-text", "any-to-any")  # in which order one of several is chosen
_OWN_TAGS = ("gguf", "moecast", "mixture-of-experts")


def front_matter(folder: PublishedFolder, repository: str) -> str:
    """The metadata of a repository, `owner/name`, as YAML. What the Hub would not take is left out."""
    metadata = folder.files[0].metadata
    tags, base = _texts(metadata, "general.tags"), folder.base_model
    named = (language.partition("-")[0].lower() for language in _texts(metadata, "general.languages"))
    languages = [language for language in dict.fromkeys(named) if _LANGUAGE.fullmatch(language)]
    data = ModelCardData(
        base_model=base,
        language=languages or None,
        pipeline_tag=next((task for task in _TASKS if task in tags), None),
        tags=[*_OWN_TAGS, *(tag for tag in tags if _TAG.fullmatch(tag) and tag not in (*_OWN_TAGS, *_TASKS))],
        base_model_relation="quantized" if base else None,
        quantized_by=repository.partition("/")[0],
        **_license(metadata, base),
    )
    return str(data.to_yaml())


def _license(metadata: Mapping[str, Any], base: str | None) -> dict[str, Any]:
    """License, its name and its link; a name that the Hub would refuse goes by "other"."""
    license, name, link = (_text(metadata, f"general.license{part}") for part in ("", ".name", ".link"))
    if license and not _LICENSE.fullmatch(license):
        license, name = "other", name or license
    name = re.sub(r"[^a-z0-9.-]+", "-", name.lower()).strip("-") if name else None
    if link and base and _FILE.fullmatch(link):  # of the source
        link = f"https://huggingface.co/{base}/blob/main/{link.removeprefix('./')}"
    if link and not _LINK.fullmatch(link):
        link = None
    found = {"license": license, "license_name": name, "license_link": link}
    return {key: value for key, value in found.items() if value}


def _text(metadata: Mapping[str, Any], key: str) -> str | None:
    value = metadata.get(key)
    return printable(value) if isinstance(value, str) and value else None


def _texts(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata.get(key)
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []
