"""HOW GOOD IT IS: labels and annotation become scores."""

from autoseg.evaluate.scores import Scored, score_labels, summarize, voxels_without_em

__all__ = ["Scored", "score_labels", "summarize", "voxels_without_em"]
