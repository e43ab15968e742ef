"""USING IT: a RUN and EM become labels."""

from autoseg.predict.blocks import Trained, open_run, predict_regions
from autoseg.predict.export import export_labels
from autoseg.predict.volumes import Region, crop_regions, cut_roi, file_region, volume_regions

__all__ = [
    "Region",
    "Trained",
    "crop_regions",
    "cut_roi",
    "export_labels",
    "file_region",
    "open_run",
    "predict_regions",
    "volume_regions",
]
