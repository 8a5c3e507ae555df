"""The unified graph: frozen, printable, comparable blocks that every reader executes, writes or prices.

No reader asks which architecture a graph came from; everything it needs to know is a field here, or a fact that an
operation states of itself (see `operation.Operation`).
"""

from .attention import (
    Attention,
    BlockSelection,
    CompressedAttention,
    Compressor,
    EntryIndexer,
    Indexer,
    LatentAttention,
    TokenIndexer,
)
from .deltanet import GatedDeltaNet
from .experts import MLP, HashRouter, MoE, Router
from .mamba import Mamba2
from .model import BlockDraft, Branch, Graph, HyperConnections, Layer, Prediction, ResidualMix, SubLayer, sequential
from .operation import Operation, Width
from .parts import SIGMOID_GAIN, Activation, Norm, Rope, Score, Yarn
from .per_layer import PerLayerEmbedding, PerLayerInput
from .walk import graph_as_json, parts_in, weights_in, with_weights

__all__ = [
    "MLP",
    "SIGMOID_GAIN",
    "Activation",
    "Attention",
    "BlockDraft",
    "BlockSelection",
    "Branch",
    "CompressedAttention",
    "Compressor",
    "EntryIndexer",
    "GatedDeltaNet",
    "Graph",
    "HashRouter",
    "HyperConnections",
    "Indexer",
    "LatentAttention",
    "Layer",
    "Mamba2",
    "MoE",
    "Norm",
    "Operation",
    "PerLayerEmbedding",
    "PerLayerInput",
    "Prediction",
    "ResidualMix",
    "Rope",
    "Router",
    "Score",
    "SubLayer",
    "TokenIndexer",
    "Width",
    "Yarn",
    "graph_as_json",
    "parts_in",
    "sequential",
    "weights_in",
    "with_weights",
]
