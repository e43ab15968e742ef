"""Volumes in people's files: TIFF, HDF5, NIfTI, npy and PNG, read and written slab by slab.

A volume has axes z, y, x; whatever a file library raises becomes one DataError that names the file.
"""

from autoseg.data.formats.pairing import expand_globs, open_volume
from autoseg.data.formats.volume import Volume, in_memory
from autoseg.data.formats.writers import write_hdf5, write_tiff

__all__ = ["Volume", "expand_globs", "in_memory", "open_volume", "write_hdf5", "write_tiff"]
