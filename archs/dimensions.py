"""The table of a family's quantities: declared once, read from config.json and GGUF metadata, written as GGUF metadata.

A family's table is a frozen dataclass whose fields say what each quantity is called in either file and where a graph
holds it. GGUF keys are written in the order of the fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar, get_type_hints

from ..errors import BadInput
from .config import Config
from .graph import Attention, Graph, Operation, Rope, Yarn

T = TypeVar("T", bound=Operation)
FromGraph = Callable[[Graph], Any]  # None where a graph has nothing of the kind, then the key is not written

_REQUIRED: Any = object()
_READERS: Mapping[type, Callable[..., Any]] = {
    int: Config.integer,
    float: Config.number,
    bool: Config.flag,
    str: Config.text,
}


@dataclass(frozen=True)
class _Names:
    """What a quantity is called: keys of config.json, keys of GGUF metadata, and where a graph holds it."""

    config: tuple[str, ...] = ()
    gguf: tuple[str, ...] = ()
    from_graph: FromGraph | None = None
    default: Any = _REQUIRED


def _tuple(keys: str | tuple[str, ...]) -> tuple[str, ...]:
    return (keys,) if isinstance(keys, str) else keys


def quantity(
    config: str | tuple[str, ...] = (),
    gguf: str | tuple[str, ...] = (),
    from_graph: FromGraph | None = None,
    default: Any = _REQUIRED,
) -> Any:
    """A field of a table.

    Args:
        config: keys of config.json, of which the first that is present counts; `outer.inner` is nested.
            Without any, as without `gguf`, the adapter gives the value.
        gguf: keys of GGUF metadata without the architecture's name; all are written, the first is read.
        from_graph: its value in a graph.
        default: its value where a file has none of the keys; without, they are required.
    """
    return dataclasses.field(metadata={"names": _Names(_tuple(config), _tuple(gguf), from_graph, default)})


def written(gguf: str, from_graph: FromGraph) -> Any:
    """A key of GGUF metadata that llama.cpp needs and that tells nothing new; it is never read and no attribute."""
    return dataclasses.field(init=False, repr=False, compare=False, metadata={"names": _Names((), (gguf,), from_graph)})


def constant(gguf: str, value: Any) -> Any:
    """A key of GGUF metadata with the only value that is implemented; files that say otherwise are refused."""
    names = _Names((), (gguf,), lambda graph: value)
    return dataclasses.field(init=False, default=value, metadata={"names": names})


def of(kind: type[T], get: Callable[[T], Any]) -> FromGraph:
    """What `get` finds in the first operation of a kind, None in a graph without."""

    def find(graph: Graph) -> Any:
        operation = first(graph, kind)
        return None if operation is None else get(operation)

    return find


def of_rope(get: Callable[[Rope], Any]) -> FromGraph:
    """What `get` finds in the rotary embedding of the first attention, None where there is none."""
    return of(Attention, lambda attention: get(attention.rope) if attention.rope else None)


def of_yarn(get: Callable[[Yarn], Any]) -> FromGraph:
    """What `get` finds in the scaling of that embedding, None where there is none."""
    return of_rope(lambda rope: get(rope.yarn) if rope.yarn else None)


def first(graph: Graph, kind: type[T]) -> T | None:
    """The first operation of a kind, be it in a layer or in a drafting block."""
    layers = (*graph.layers, *(prediction.layer for prediction in graph.predictions))
    operations = (operation for layer in layers for operation in layer.operations)
    return next((operation for operation in operations if isinstance(operation, kind)), None)


@dataclass(frozen=True)
class Dimensions:
    """What all families have; each adds its own."""

    vocabulary: int = quantity("vocab_size")  # a GGUF file tells it by its embedding
    context: int = quantity("max_position_embeddings", "context_length", lambda graph: graph.context_length)
    hidden: int = quantity("hidden_size", "embedding_length", lambda graph: graph.hidden_size)

    @classmethod
    def from_config(cls, config: Config, **given: Any) -> Self:
        """The quantities of a config.json; those `given` are not looked up."""
        values = {
            name: _from_config(config, kind, names) for name, kind, names in cls._quantities() if name not in given
        }
        return cls(**values, **given)

    @classmethod
    def from_gguf(cls, metadata: Config, architecture: str, **given: Any) -> Self:
        """The quantities of GGUF metadata; those `given` are not looked up. Raises BadInput for other constants."""
        for field in dataclasses.fields(cls):
            if not field.init and field.default is not dataclasses.MISSING:
                metadata.expect(f"{architecture}.{field.metadata['names'].gguf[0]}", field.default)
        values = {
            name: _read(metadata, kind, (f"{architecture}.{names.gguf[0]}",), names.default)
            for name, kind, names in cls._quantities()
            if name not in given
        }
        return cls(**values, **given)

    @classmethod
    def metadata(cls, graph: Graph) -> dict[str, Any]:
        """The GGUF metadata of a graph."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            names: _Names = field.metadata["names"]
            value = names.from_graph(graph) if names.from_graph else None
            if value is not None:
                values |= {f"{graph.architecture}.{key}": value for key in names.gguf}
        return values

    @classmethod
    def _quantities(cls) -> Iterator[tuple[str, type, _Names]]:
        kinds = get_type_hints(cls)
        return (
            (field.name, kinds[field.name], field.metadata["names"]) for field in dataclasses.fields(cls) if field.init
        )


def _from_config(config: Config, kind: type, names: _Names) -> Any:
    places = [_place(config, key) for key in names.config]
    present = [(section, key) for section, key in places if section.get(key) is not None]
    _check_agreement(config, [key for section, key in present if section is config])
    section, keys = (present[0][0], present[0][1:]) if present else (config, names.config)
    return _read(section, kind, keys, names.default)


def _check_agreement(config: Config, spellings: list[str]) -> None:
    """Raises BadInput where a file gives one quantity two values, so that nobody can say which one is meant."""
    for key in spellings[1:]:
        if config.get(key) != config.get(spellings[0]):
            raise BadInput(
                f"{config.origin}: {spellings[0]} is {config.get(spellings[0])!r}, but {key}, another name of it, is "
                f"{config.get(key)!r}: leave one of them out"
            )


def _place(config: Config, key: str) -> tuple[Config, str]:
    """The section that a key like `outer.inner` is in, and its name there."""
    *outer, inner = key.split(".")
    for name in outer:
        config = config.section(name)
    return config, inner


def _read(config: Config, kind: type, keys: tuple[str, ...], default: Any) -> Any:
    reader = _READERS[kind]
    return reader(config, *keys) if default is _REQUIRED else reader(config, *keys, default=default)
