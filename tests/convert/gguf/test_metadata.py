"""What a file says of its origins is what llama.cpp's converter says of the same folder, by gguf-py's own rules."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import transformers
from checkpoints import EXAMPLES, TEXT
from conversions import convert
from hub_server import HubServer
from huggingface_hub import constants
from moecast.convert.gguf.metadata import publication_metadata
from moecast.convert.requantize import requantize
from moecast.convert.settings import Goal
from moecast.progress import NoProgress
from moecast.sources.model import open_model

CARDS = {
    "plain": "license: apache-2.0\nlanguage: [en, de]\npipeline_tag: text-generation\ntags:\n- moe\n- conversational\n",
    "own license": "license: other\nlicense_name: open-model\nlicense_link: https://example.org/license\n",
    "tuned": "base_model: owner/Base-Model-30B-A3B-v1.1\nlibrary_name: any\ndatasets: [owner/some-data-v2]\n",
    "merged": "base_model:\n- https://huggingface.co/owner/First-8x7B\n- https://example.org/second\n- name: Third\n",
    "licenses": "license: [mit, apache-2.0]\nauthor: Some\nversion: v1.5\nsize_label: 30B-A3B\nurl: https://a.example\n",
}
NAMES = ("Model-30B-A3B", "Model-2-Instruct-v1.5", "model", "A-Model-4M-chat")
OURS = ("general.name", "general.type", "general.file_type", "general.quantization_version", "general.architecture")


class Notes(NoProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


def folder_of(place: Path, name: str, card: str | None) -> Path:
    folder = Path(shutil.copytree(EXAMPLES / "minimax-m2-tiny", place / name))
    (folder / "generation_config.json").unlink()
    if card is not None:
        (folder / "README.md").write_text(f"---\n{card}---\n# Words\n", encoding="utf-8")
    return folder


def general(file: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(file).fields
    return {key: field.contents() for key, field in fields.items() if key.startswith("general.") and key not in OURS}


def as_the_converter_says(folder: Path, file: Path, place: Path) -> dict[str, Any]:
    """The keys of gguf-py's `Metadata` and of llama.cpp's converter, which adds the size."""
    writer = gguf.GGUFWriter(place / "oracle.gguf", "llama")
    for tensor in gguf.GGUFReader(file).tensors:
        writer.add_tensor_info(tensor.name, tensor.shape[::-1].tolist(), tensor.data.dtype, tensor.n_bytes)
    counts = writer.get_total_parameter_count()
    found = gguf.Metadata.load(model_path=folder, total_params=counts[0])
    found.size_label = found.size_label or gguf.size_label(*counts)
    alone = gguf.GGUFWriter(place / "oracle.gguf", "llama")
    found.set_gguf_meta_model(alone)
    alone.write_header_to_file()
    alone.write_kv_data_to_file()
    alone.close()
    return general(place / "oracle.gguf")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("card", CARDS)
def test_keys_are_those_of_gguf_py(name: str, card: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, name, CARDS[card])
    file = convert(folder, tmp_path / "out.gguf", "F32", calibration=None, verify=False, padding=False).files[0]
    found = general(file)
    assert found == as_the_converter_says(folder, file, tmp_path)
    assert {"general.size_label"} < found.keys()
    again = requantize(file, tmp_path / "again.gguf", "Q8_0").files[0]
    assert general(again) == found


def test_sizes_are_told_as_publishers_do(tmp_path: Path) -> None:
    model = open_model(folder_of(tmp_path, "model", None))
    found = publication_metadata(model, "Model-30B-A3B-Instruct-v1.5", NoProgress())
    assert found["general.size_label"] == "A3B" and found["general.basename"] == "Model"  # 30 B are not 4 M
    assert publication_metadata(model, "Model", NoProgress())["general.size_label"] == "16x1.3M"


def test_broken_card_is_noted_and_stops_nothing(tmp_path: Path) -> None:
    notes = Notes()
    folder = folder_of(tmp_path, "model", "license: [mit\n")
    file = convert(folder, tmp_path / "out.gguf", "BF16", calibration=None, verify=False, progress=notes).files[0]
    assert [line for line in notes.lines if line.startswith("README.md says nothing of the model")]
    assert general(file) == {"general.size_label": "16x1.3M"}


def test_importance_matrix_is_named_without_its_place(tmp_path: Path) -> None:
    matrix = tmp_path / "somewhere" / "imatrix.gguf"
    folder, quick = EXAMPLES / "minimax-m2-tiny", {"verify": False, "padding": False, "context": 64}
    said = {"calibration": TEXT, "calibration_chunks": 4, "save_to": matrix}
    made = convert(folder, tmp_path, "IQ4_XS", **said, **quick).files[0]
    keys = {"dataset": TEXT.name, "chunks_count": gguf.GGUFReader(matrix).fields["imatrix.chunk_count"].contents()}
    assert imatrix_keys(made) == keys
    used = convert(folder, tmp_path / "out.gguf", "IQ4_XS", imatrix=matrix, **quick).files[0]
    weights = sum(tensor.name.endswith(".in_sum2") for tensor in gguf.GGUFReader(matrix).tensors)
    assert imatrix_keys(used) == {**keys, "file": "imatrix.gguf", "entries_count": weights}
    plain = convert(folder, tmp_path / "plain.gguf", "IQ4_XS", calibration=None, **quick).files[0]
    assert imatrix_keys(plain) == {}
    other = Goal("Q4_0")
    requantized = requantize(used, tmp_path / "other.gguf", other, imatrix=matrix, allow_requantize=True).files[0]
    assert imatrix_keys(requantized) == imatrix_keys(used)


def imatrix_keys(file: Path) -> dict[str, Any]:
    prefix = "quantize.imatrix."
    fields = gguf.GGUFReader(file).fields
    return {key.removeprefix(prefix): field.contents() for key, field in fields.items() if key.startswith(prefix)}


def test_card_and_templates_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamed from the Hub as well; the repository is the source, whatever a card says."""
    folder = folder_of(tmp_path, "published", CARDS["plain"] + "repo_url: https://example.org/elsewhere\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool-use.jinja").write_text("{{ tools }}")
    with HubServer(folder) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        options = {"calibration": None, "verify": False, "padding": False}
        file = convert(f"{server.endpoint}/tiny/moe", tmp_path / "out.gguf", "BF16", **options).files[0]
        onnx = convert(f"{server.endpoint}/tiny/moe", tmp_path / "onnx", "Q4_0", file_format="onnx", **options)
    found, fields = general(file), gguf.GGUFReader(file).fields
    assert found["general.license"] == "apache-2.0" and found["general.languages"] == ["en", "de"]
    assert found["general.tags"] == ["moe", "conversational", "text-generation"]
    assert found["general.source.repo_url"] == "https://huggingface.co/tiny/moe"
    assert fields["tokenizer.chat_templates"].contents() == ["tool_use"]
    assert fields["tokenizer.chat_template.tool_use"].contents() == "{{ tools }}"
    assert fields["tokenizer.chat_template"].contents() == (folder / "chat_template.jinja").read_text()
    for name in ("chat_template.jinja", "additional_chat_templates/tool-use.jinja"):
        assert (onnx.files[0].parent / name).read_bytes() == (folder / name).read_bytes()
    assert [path.name for path in onnx.files[0].parent.rglob("*.part")] == []
    read = transformers.PreTrainedTokenizerFast.from_pretrained(onnx.files[0].parent).chat_template
    assert read == {"default": (folder / "chat_template.jinja").read_text(), "tool-use": "{{ tools }}"}
