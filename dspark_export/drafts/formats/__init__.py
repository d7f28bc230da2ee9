"""Reads draft checkpoints of every supported format strictly into one form."""

from dspark_export.drafts.formats.draft import BlockConfig, DraftCheckpoint, DraftLayers, EagleConfig, Rope
from dspark_export.drafts.formats.recognise import recognise

__all__ = ["BlockConfig", "DraftCheckpoint", "DraftLayers", "EagleConfig", "Rope", "recognise"]
