"""The card of published files: what a Markdown renderer and a YAML reader find in it, and what is refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import Element

import gguf
import pytest
import yaml
from conversions import convert
from hub_uploads import metadata_fault
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token
from matplotlib.image import imread
from moecast.documents import read_json
from moecast.errors import BadInput
from moecast.reports.card import Statement, card
from moecast.reports.charts import pareto_picture
from moecast.reports.folder import PublishedFolder, read_folder
from moecast.reports.publication import write_publication
from moecast.sources.gguf import read_gguf
from published import COMMAND, SHA256, parity, write_folder, write_report
from reported import large_report, parsed

if TYPE_CHECKING:
    from conftest import Checkpoint

REPOSITORY = "somebody/tiny-GGUF"
RECIPES = ("Q8_0", "Q4_K_M")
HOSTILE = (
    "x|y](http://evil.example) <img src=x onerror=alert(1)> `a` **b** www.evil.example\n\n# head\n---\nlicense: mit"
)


@pytest.fixture(scope="module")
def made(minimax: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_folder(minimax.folder, folder, *RECIPES)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "folder")


def with_metadata(folder: PublishedFolder, values: Mapping[str, Any]) -> PublishedFolder:
    files = (replace(file, metadata={**file.metadata, **values}) for file in folder.files)
    return replace(folder, files=tuple(files))


def metadata_of(text: str) -> dict[str, Any]:
    """The front matter, as YAML and the Hub's own library read it; the Hub takes it."""
    found = yaml.safe_load(text.split("---\n")[1])
    assert ModelCard(text).data.to_dict() == found
    assert metadata_fault(text) is None
    return dict(found)


RENDERER = MarkdownIt("gfm-like", {"linkify": False})  # of the Hub's Markdown


def tokens_of(text: str) -> list[Token]:
    """What a renderer makes of what follows the front matter."""
    return RENDERER.parse(text.split("---\n", 2)[2])


def tables(text: str) -> list[list[list[str]]]:
    found: list[list[list[str]]] = []
    for token, before in zip((tokens := tokens_of(text))[1:], tokens, strict=False):
        if before.type == "table_open":
            found.append([])
        elif before.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and before.type in ("td_open", "th_open"):
            found[-1][-1].append("".join(part.content for part in token.children or ()))
    return found


def shape(text: str) -> list[list[int]]:
    """How many cells the rows of each table have."""
    return [[len(row) for row in rows] for rows in tables(text)]


def rendered(text: str) -> Element:
    """The page that a reader gets, in which there is no fault."""
    return parsed(f"<!DOCTYPE html><title>card</title>{RENDERER.render(text.split('---', 2)[2])}")


def links(text: str) -> list[str | int | float | None]:
    parts = (part for token in tokens_of(text) for part in token.children or ())
    return [part.attrGet("href") for part in parts if part.type == "link_open"]


def pictures(text: str) -> list[str | None]:
    return [image.get("src") for image in rendered(text).iter("img")]


def text_of(text: str) -> str:
    """All words that a reader sees."""
    return "\n".join(
        "".join(part.content for part in token.children) if token.children else token.content
        for token in tokens_of(text)
    )


def test_figures_are_those_of_the_reports(folder: Path) -> None:
    write_report(folder / "tiny-Q4_K_M.gguf", parity=parity(mean_kld=0.25, perplexity_candidate=30.0))
    read = read_folder(folder)
    files = tables(card(read, REPOSITORY))[0]
    assert [row[0] for row in files] == ["", "1", "2"]
    files = [row[1:] for row in files]
    assert files[0][3:8] == [
        "Mean KL divergence", "99.9 %", "Same top token", "Perplexity ratio", "Read for a token",
    ]  # fmt: skip
    small, large = files[1:]
    assert small[0] == "tiny-Q4_K_M.gguf" and small[3:7] == ["0.25000 ± 0.00125", "1.5000", "87.50%", "1.5000"]
    assert large[0] == "tiny-Q8_0.gguf" and large[3:7] == ["0.06250 ± 0.00125", "1.5000", "87.50%", "1.0500"]
    assert [row[8] for row in files] == ["Best of its size", "yes", "yes"]
    assert read.faults() == []


def test_types_are_those_of_the_files(folder: Path) -> None:
    (types,) = (table for table in tables(card(read_folder(folder), REPOSITORY)) if table[0][0] == "Weights")
    assert types[0][1:] == ["tiny-Q4_K_M", "tiny-Q8_0"]
    shown = {row[0]: row[2] for row in types[1:]}
    for name, role in (("blk.0.ffn_down_exps.weight", "expert down"), ("token_embd.weight", "embedding")):
        stored = {tensor.name: tensor.dtype for tensor in read_gguf(folder / "tiny-Q8_0.gguf")[1]}
        assert shown[role] == stored[name]
    assert "norm" not in shown and "router" not in shown


def test_how_it_was_measured_and_how_to_run_it(folder: Path) -> None:
    text = card(read_folder(folder), REPOSITORY)
    blocks = [token.content for token in tokens_of(text) if token.type == "fence"]
    assert COMMAND.replace("NAME", "Q8_0") + "\n" in blocks and COMMAND.replace("NAME", "Q4_K_M") + "\n" in blocks
    assert any(f"hf download {REPOSITORY} --include tiny-Q8_0.gguf" in block for block in blocks)
    assert any(f"ollama run hf.co/{REPOSITORY}:Q8_0\n" in block for block in blocks)
    words = text_of(text)
    assert SHA256 in words and "1020 tokens scored" in words and "4 chunks of 512 tokens" in words
    assert words.count("rows of 96 are stored as Q5_0") == 1 and words.count("token ids differ") == 1  # of both files


def test_dominated_files_are_marked_and_lose_to_stock(folder: Path) -> None:
    write_report(folder / "tiny-Q8_0.gguf", parity=parity(mean_kld=0.5))
    read = read_folder(folder)
    assert [row[-1] for row in tables(card(read, REPOSITORY))[0][1:]] == ["yes", "no"]
    assert read.faults() == []  # a stock mix may be a bad one
    largest = read.files[-1]
    plan = replace(largest.plan, recipe=replace(largest.plan.recipe, name="5.1bpw"))
    read = replace(read, files=(read.files[0], replace(largest, plan=plan)))
    assert read.faults() == [
        "tiny-Q8_0: worse than the stock mix Q4_K_M, which is here too and no larger: leave it out"
    ]


def test_files_of_other_tokens_are_not_compared(folder: Path) -> None:
    write_report(folder / "tiny-Q8_0.gguf", parity=parity(mean_kld=0.5, chunks=5))
    read = read_folder(folder)
    text = card(read, REPOSITORY)
    assert "not measured on the same tokens" in text and "Best of its size" not in text


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"parity": None}, "not measured, tiny-Q8_0.report.json holds no comparison with the source"),
        ({"parity": parity(mean_kld=None)}, "not measured, tiny-Q8_0.report.json holds no comparison"),
        ({"bytes": 5}, "not measured, tiny-Q8_0.report.json is of a file of 5 bytes"),
        (
            {"experts": [{"layer": 3, "unseen": [1, 2]}, {"layer": 4, "unseen": [0]}, {"layer": 7, "unseen": []}]},
            "calibration never saw 3 experts of layers 3-4",
        ),
    ],
)
def test_faults(folder: Path, changes: dict[str, Any], fault: str) -> None:
    write_report(folder / "tiny-Q8_0.gguf", **changes)
    read = read_folder(folder)
    (found,) = read.faults()
    assert found.startswith(f"tiny-Q8_0: {fault}")
    words = text_of(card(read, REPOSITORY, Statement([found], "a test of *faults*")))
    assert found in words and "Published all the same: a test of *faults*" in words


def test_a_file_without_a_report(folder: Path, tmp_path: Path) -> None:
    (folder / "tiny-Q8_0.report.json").unlink()
    read = read_folder(folder)
    assert read.faults() == [
        "tiny-Q8_0: not measured, tiny-Q8_0.report.json is missing: `moecast convert` writes it beside the file"
    ]
    assert tables(card(read, REPOSITORY))[0][2][3:7] == ["not measured"] * 4
    report = read_json(write_publication(read, REPOSITORY, tmp_path / "card")["report.json"])
    assert [candidate["path"] for candidate in report["candidates"]] == ["tiny-Q4_K_M.gguf"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "plan"}, "is no report of a conversion"),
        ({"version": 2}, "is no report of a conversion"),
        ({"bytes": "5"}, "bytes is '5', expected a finite number"),
        ({"parity": parity(kld_999="high")}, "kld_999 is 'high', expected a finite number"),
        ({"parity": parity(perplexity_reference=0)}, "perplexity_reference is 0.0, expected a positive number"),
        ({"parity": [1]}, "parity is .*, expected an object"),
        ({"experts": [{"layer": 0, "unseen": "all"}]}, "unseen is 'all', expected a list of experts"),
        ({"provenance": None}, "source is missing"),
    ],
)
def test_reports_that_cannot_be(folder: Path, changes: dict[str, Any], message: str) -> None:
    write_report(folder / "tiny-Q8_0.gguf", **changes)
    with pytest.raises(BadInput, match=message) as caught:
        read_folder(folder)
    assert "tiny-Q8_0.report.json" in str(caught.value)


def test_metadata_of_the_hub(folder: Path) -> None:
    read = with_metadata(
        read_folder(folder),
        {
            "moecast.source.repository": "owner/tiny",
            "moecast.source.revision": "c0ffee",
            "general.license": "other",
            "general.license.name": "Tiny License",
            "general.license.link": "LICENSE",
            "general.languages": ["en", "zh-CN", "zh", "not a language"],
            "general.tags": ["text-generation", "code", "gguf", "<b>"],
        },
    )
    text = card(read, REPOSITORY)
    assert metadata_of(text) == {
        "base_model": "owner/tiny",
        "base_model_relation": "quantized",
        "quantized_by": "somebody",
        "license": "other",
        "license_name": "tiny-license",
        "license_link": "https://huggingface.co/owner/tiny/blob/main/LICENSE",
        "language": ["en", "zh"],
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "moecast", "mixture-of-experts", "code"],
    }
    assert links(text) == ["https://huggingface.co/owner/tiny", "report.html"]


def test_text_from_outside_is_text(folder: Path) -> None:
    provenance = {
        "source": HOSTILE,
        "texts": {HOSTILE: [HOSTILE, HOSTILE]},
        "versions": {HOSTILE: HOSTILE},
        "command": f"moecast ```\n{HOSTILE}\n````",
    }
    for recipe in RECIPES:
        write_report(folder / f"tiny-{recipe}.gguf", problems=[HOSTILE], provenance=provenance)
    keys = ("name", "license", "license.name", "license.link")
    values: dict[str, Any] = {f"general.{key}": HOSTILE for key in keys}
    values |= {f"moecast.{key}": HOSTILE for key in ("version", "source.repository", "source.revision")}
    read = with_metadata(read_folder(folder), values | {"general.tags": [HOSTILE], "general.languages": [HOSTILE]})
    harmless, text = card(read_folder(folder), REPOSITORY), card(read, REPOSITORY, Statement([HOSTILE], HOSTILE))
    found = metadata_of(text)
    assert found["license"] == "other" and "base_model" not in found and found["tags"] == metadata_of(harmless)["tags"]
    assert "license_link" not in found and not set(found["license_name"]) & set("<>`[]()| ")
    parts = [part for token in tokens_of(text) for part in (token, *(token.children or ()))]
    assert not {"html_inline", "html_block", "strong_open", "hr"} & {part.type for part in parts}
    assert links(text) == ["report.html"] and pictures(text) == ["pareto.png"]
    headings = [part for part in parts if part.type == "heading_open"]
    assert len(headings) == sum(token.type == "heading_open" for token in tokens_of(harmless)) + 1  # of known faults
    assert [[len(row) for row in rows] for rows in tables(text)] == [
        [len(row) for row in rows] for rows in tables(harmless)
    ]
    assert text_of(text).count("www.evil.example") >= 6


def test_files_that_can_be_compared_have_a_picture(folder: Path, tmp_path: Path) -> None:
    read = read_folder(folder)
    for several, expected in ((read, ["pareto.png"]), (replace(read, files=read.files[:1]), [])):
        files = write_publication(several, REPOSITORY, tmp_path / str(len(expected)))
        assert pictures(files["README.md"].read_text(encoding="utf-8")) == expected
        assert [name for name in files if name.endswith(".png")] == expected
    height, width, colors = imread(tmp_path / "1" / "pareto.png").shape
    assert (width, colors) == (800, 4) and height > 500


def test_the_picture_has_the_colours_of_the_page() -> None:
    picture = imread(BytesIO(pareto_picture(large_report().candidates)))
    drawn = {tuple((255 * color[:3]).round().astype(int)) for color in picture.reshape(-1, 4)}
    style = (Path(__file__).parents[2] / "reports" / "page.css").read_text(encoding="utf-8")
    for name in ("paper", "ink", "series", "other"):
        color = re.findall(rf"--{name}: #(\w{{6}})", style)[0]  # the first is the light one
        assert tuple(bytes.fromhex(color)) in drawn, name


@pytest.mark.parametrize("said", [None, "owner/tiny"])
def test_where_files_of_a_folder_come_from_is_said(said: str | None, folder: Path) -> None:
    text = card(read_folder(folder, said), REPOSITORY)
    metadata = metadata_of(text)
    assert (metadata.get("base_model"), metadata.get("base_model_relation")) == (said, said and "quantized")
    assert ("https://huggingface.co/owner/tiny" in links(text)) == (said is not None)


def test_what_files_hold_cannot_be_said_otherwise(minimax: Checkpoint, tmp_path: Path) -> None:
    source = {"repository": "another/model", "revision": "c0ffee"}
    convert(minimax.folder, tmp_path / "other.gguf", "Q8_0", calibration=None, verify=False, provenance=source)
    assert read_folder(tmp_path, "another/model").base_model == "another/model"
    with pytest.raises(BadInput, match=r"made from another/model, leave out --base-model owner/tiny"):
        read_folder(tmp_path, "owner/tiny")


def test_what_is_written(folder: Path, tmp_path: Path) -> None:
    (folder / "imatrix.gguf").write_bytes((Path(__file__).parents[1] / "data" / "none").name.encode())
    with pytest.raises(BadInput, match=r"imatrix\.gguf"):
        read_folder(folder)
    (folder / "imatrix.gguf").unlink()
    files = write_publication(read_folder(folder), REPOSITORY, tmp_path / "card")
    beside = {f"tiny-{recipe}.{part}" for recipe in RECIPES for part in ("gguf", "report.html", "report.json")}
    written = {
        "README.md",
        "pareto.png",
        "report.html",
        "report.json",
        *(f"tiny-{recipe}.plan.json" for recipe in RECIPES),
    }
    assert {*files} == beside | written and {path.name for path in (tmp_path / "card").iterdir()} == written
    before = {name: path.read_bytes() for name, path in files.items()}
    again = write_publication(read_folder(folder), REPOSITORY, tmp_path / "card")
    assert {name: path.read_bytes() for name, path in again.items()} == before


def test_parts_count_as_one_and_an_importance_matrix_goes_along(
    minimax: Checkpoint, folder: Path, tmp_path: Path
) -> None:
    made = convert(
        minimax.folder, folder / "big.gguf", "BF16", calibration=None, verify=False, split_max_bytes=300_000
    ).files
    assert len(made) > 2
    draft = folder / "tiny-Q8_0-mtp.gguf"
    draft.write_bytes(b"GGUF, of a draft")
    matrix = gguf.GGUFWriter(folder / "imatrix.gguf", "")
    matrix.add_type("imatrix")
    matrix.write_header_to_file()
    matrix.write_kv_data_to_file()
    matrix.close()
    shutil.copy(folder / "tiny-Q8_0.report.json", folder / "big.report.json")
    read = read_folder(folder)
    by_name = {file.name: file for file in read.files}
    assert {*by_name} == {"big", "tiny-Q8_0", "tiny-Q4_K_M"}
    assert by_name["big"].paths == made and by_name["big"].bytes == sum(path.stat().st_size for path in made)
    assert by_name["tiny-Q8_0"].paths == (folder / "tiny-Q8_0.gguf", draft)
    text = card(read, REPOSITORY)
    assert any(row[1] == f"{made[0].name} and {len(made) - 1} more" for row in tables(text)[0])
    assert "Ollama takes no file in parts" in text  # the largest that fits is the example
    files = write_publication(read, REPOSITORY, tmp_path / "card")
    assert {*(path.name for path in made), draft.name, "imatrix.gguf"} <= {*files}
    made[0].unlink()
    with pytest.raises(BadInput, match=r"is one of .* splits, expected the first of them"):
        read_folder(folder)


def test_files_of_different_models(minimax: Checkpoint, folder: Path) -> None:
    source = {"repository": "another/model", "revision": "c0ffee"}
    convert(minimax.folder, folder / "other.gguf", "Q8_0", calibration=None, verify=False, provenance=source)
    with pytest.raises(BadInput, match=r"are made from different models: publish them from two folders"):
        read_folder(folder)


def test_one_file_brings_its_own_report(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("tiny-Q8_0*"):
        path.unlink()
    files = write_publication(read_folder(folder), REPOSITORY, tmp_path / "card")
    assert {*files} == {"README.md", "report.html", "report.json", "plan.json", "tiny-Q4_K_M.gguf"}
    assert files["report.json"].read_bytes() == (folder / "tiny-Q4_K_M.report.json").read_bytes()
