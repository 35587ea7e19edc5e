"""What a model looks like: skeleton, weights on disk, blocks, and the folds that leave it unchanged."""

from awq.model.blocks import BlockCall, find_blocks, hidden_of, kind_of
from awq.model.classes import auto_class
from awq.model.dry import DryPass, dry_pass
from awq.model.placement import pick_device, place
from awq.model.skeleton import Skeleton, open_model
from awq.model.weights import CheckpointReader, TensorInfo, read_json

__all__ = [
    "BlockCall",
    "CheckpointReader",
    "DryPass",
    "Skeleton",
    "TensorInfo",
    "auto_class",
    "dry_pass",
    "find_blocks",
    "hidden_of",
    "kind_of",
    "open_model",
    "pick_device",
    "place",
    "read_json",
]
