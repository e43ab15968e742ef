"""USING IT: a RUN and EM become labels."""

from autoseg.predict.blocks import Trained, open_run, predict_regions
from autoseg.predict.export import export_labels, map_values, refuse_existing, zarr_of
from autoseg.predict.ledger import check_finished
from autoseg.predict.volumes import Region, crop_regions, cut_roi, drop_copy, file_region, volume_regions

__all__ = [
    "Region",
    "Trained",
    "check_finished",
    "crop_regions",
    "cut_roi",
    "drop_copy",
    "export_labels",
    "file_region",
    "map_values",
    "open_run",
    "predict_regions",
    "refuse_existing",
    "volume_regions",
    "zarr_of",
]
