"""The chat templates of a checkpoint folder, from the places where tools put them; transformers' order decides.

Files of their own come first, `chat_template.jinja` and `additional_chat_templates/NAME.jinja`, and where one of them
is there no other place counts. Then chat_template.json, then tokenizer_config.json, each with one template, a list of
{"name", "template"} or an object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..documents import is_file, is_folder, read_json, read_text, unreadable
from ..errors import BadInput

DEFAULT = "default"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
_TEMPLATE_JSON = "chat_template.json"
_KEY = "chat_template"


@dataclass(frozen=True)
class ChatTemplates:
    """Jinja sources by name, and what else the folder holds that nobody will see, a line each."""

    sources: Mapping[str, str]
    losses: tuple[str, ...]


def read_chat_templates(folder: Path, in_config: Any) -> ChatTemplates:
    """The templates of a folder whose tokenizer_config.json holds `in_config`, None where it holds none.

    Raises BadInput for a file that cannot be read, and for templates without a name or a text.
    """
    places = {"the folder's .jinja files": _from_files(folder)}
    if is_file(folder / _TEMPLATE_JSON):
        places[_TEMPLATE_JSON] = _from_json(read_json(folder / _TEMPLATE_JSON).get(_KEY), folder / _TEMPLATE_JSON)
    places["tokenizer_config.json"] = _from_json(in_config, folder / "tokenizer_config.json")
    filled = {place: templates for place, templates in places.items() if templates}
    if not filled:
        return ChatTemplates({}, ())
    (first, chosen), *others = filled.items()
    losses = [
        f"{place} holds further chat templates ({', '.join(lost)}): left out, as transformers does beside {first}"
        for place, templates in others
        if (lost := sorted(templates.keys() - chosen.keys()))
    ]
    losses += [f"the chat template {name!r} is empty" for name, text in chosen.items() if not text.strip()]
    return ChatTemplates({name: text for name, text in chosen.items() if text.strip()}, tuple(losses))


def further_templates(folder: Path) -> list[Path]:
    """The files of templates beside the default one. Raises BadInput where the system does not say."""
    try:
        files = sorted((folder / TEMPLATE_FOLDER).iterdir()) if is_folder(folder / TEMPLATE_FOLDER) else []
    except OSError as error:
        raise unreadable(folder / TEMPLATE_FOLDER, error) from None
    return [file for file in files if file.suffix == ".jinja" and is_file(file)]


def _from_files(folder: Path) -> dict[str, str]:
    templates = {DEFAULT: read_text(folder / TEMPLATE_FILE)} if is_file(folder / TEMPLATE_FILE) else {}
    return templates | {file.stem: read_text(file) for file in further_templates(folder)}


def _from_json(stored: Any, origin: Path) -> dict[str, str]:
    if stored is None:
        return {}
    if isinstance(stored, str):
        return {DEFAULT: stored}
    if isinstance(stored, Mapping):
        entries = [{"name": name, "template": template} for name, template in stored.items()]
    else:
        entries = stored if isinstance(stored, list) else [stored]
    templates: dict[str, str] = {}
    for entry in entries:
        name, template = (entry.get(key) if isinstance(entry, Mapping) else None for key in ("name", "template"))
        if not isinstance(name, str) or not isinstance(template, str) or not name:
            raise BadInput(f'{origin}: {_KEY} holds {entry!r}, expected text, or a list of {{"name", "template"}}')
        if templates.setdefault(name, template) != template:
            raise BadInput(f"{origin}: {_KEY} names {name!r} twice, with different templates: remove one of them")
    return templates
