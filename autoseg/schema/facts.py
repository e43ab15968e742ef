"""What a planner may know: classes, a data set and a machine."""

from __future__ import annotations

import math
from typing import Literal, get_args

import msgspec

from autoseg.geometry import Grid, NmZYX, VoxelsZYX
from autoseg.schema.records import Artifact, Record

LEAST_SKEWNESS = 0.03  # of five EM volumes the least was .09


class ClassEntry(Record, frozen=True, kw_only=True):
    """One class: an atom, or a composite that is present exactly where one of its components is."""

    name: str
    id: int | None = None
    components: tuple[str, ...] = ()
    instance: bool = False


class ClassTable(Artifact, frozen=True, kw_only=True, tag="class_table"):
    """Classes, which groups of them exclude each other in a voxel, and named sets to ask for."""

    classes: tuple[ClassEntry, ...]
    disjoint: tuple[tuple[str, ...], ...] = ()
    sets: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)


class Intensity(Record, frozen=True, kw_only=True):
    """Grey values of one EM volume, from a seeded sample of its stored chunks.

    `mean_interval` holds the mean of all stored chunks with 95 % confidence, as the sampled ones spread. `drift_z` is
    the sd of the means of sections, in sd of grey values. `local_skewness` is that of grey values less their
    surroundings (2 voxels, in sections); its sign is the polarity. None: not measured.
    """

    minimum: float
    p0_5: float
    p50: float
    p99_5: float
    maximum: float
    mean: float
    sd: float
    num_voxels: int
    mean_interval: tuple[float, float] | None = None
    drift_z: float | None = None
    local_skewness: float | None = None

    @property
    def polarity(self) -> Literal["dark", "bright"] | None:
        """Whether what is stained is dark, as in most EM, or bright (an inverted volume); None if that is unclear."""
        if self.local_skewness is None or abs(self.local_skewness) < LEAST_SKEWNESS:
            return None
        return "dark" if self.local_skewness < 0 else "bright"


class Probe(Record, frozen=True, kw_only=True):
    """Voxels by which an EM volume is known again: a box of the level that was measured, and the crc32 of its values.

    `shape_zyx` and `voxel_size_nm` are those of that level, `start_zyx` and `stop_zyx` of the box.
    """

    shape_zyx: VoxelsZYX
    voxel_size_nm: NmZYX
    start_zyx: VoxelsZYX
    stop_zyx: VoxelsZYX
    crc32: int


class VolumeFacts(Record, frozen=True, kw_only=True):
    """One EM volume: its finest level, and its grey values, None if they were never measured.

    `path` is the same for two names of one EM.
    """

    name: str
    path: str
    dtype: str
    shape_zyx: VoxelsZYX
    voxel_size_nm: NmZYX
    intensity: Intensity | None
    stored_fraction: float
    origin_nm: NmZYX = (0.0, 0.0, 0.0)
    probe: Probe | None = None


class ClassCount(Record, frozen=True, kw_only=True):
    """Voxels of one crop by what is known of one class.

    `along_y` and `along_x` say how many of the present ones lie in each part of that axis (`geometry.part_length`);
    () where there are none, or where it was not counted. Of a crop that was sampled the counts are scaled, and
    `share_interval` holds the share of the known voxels that are present with 95 % confidence.
    """

    absent: int
    present: int
    unknown: int
    along_y: tuple[int, ...] = ()
    along_x: tuple[int, ...] = ()
    share_interval: tuple[float, float] | None = None


class Contradiction(Record, frozen=True, kw_only=True):
    """Voxels of a crop where `present` is annotated although another annotation says that it cannot be there.

    `excludes`: `against` is present too; `contains`: `against` contains it and is absent; `parts`: no single class
    refutes it, but no part of it is left (`against` is the class itself).
    """

    present: str
    against: str
    rule: Literal["excludes", "contains", "parts"]
    voxels: int

    @property
    def text(self) -> str:
        """The two sides and their voxels, in words."""
        where = {
            "excludes": f"{self.present} together with {self.against}"
            if self.present != self.against
            else f"{self.present}, part of classes that exclude each other",
            "contains": f"{self.present} where {self.against} is absent",
            "parts": f"{self.present} where all its parts are absent",
        }[self.rule]
        return f"{where} ({self.voxels:,})"


class CropFacts(Record, frozen=True, kw_only=True):
    """One annotated box, `dataset/cropN`, and what its annotation holds for each class that was counted in it.

    `known_voxels` counts those in which anything is known, None if nobody counted: all of them.
    `conflicts` counts the voxels that contradict the class table; `contradictions` name the classes, most voxels first.
    `stored_sha256` is the digest of the stored bytes under it, EM and labels, and of what their metadata say.
    """

    name: str
    volume: str
    shape_zyx: VoxelsZYX
    voxel_size_nm: NmZYX
    origin_nm: NmZYX
    split: Literal["train", "validate"] | None
    annotated: tuple[str, ...]
    counts: dict[str, ClassCount]
    conflicts: int = 0
    contradictions: tuple[Contradiction, ...] = ()
    stored_sha256: str | None = None
    known_voxels: int | None = None

    @property
    def extent_nm(self) -> NmZYX:
        """Edge lengths."""
        return self.grid.extent_nm

    def present(self, name: str) -> int | None:
        """Voxels of a class: all voxels of the crop where it is annotated and was never counted; None if unknown."""
        if name in self.counts:
            return self.counts[name].present
        return math.prod(self.shape_zyx) if name in self.annotated else None

    @property
    def grid(self) -> Grid:
        """Where the annotation lies."""
        return Grid(self.shape_zyx, self.voxel_size_nm, self.origin_nm)


class Quantiles(Record, frozen=True, kw_only=True):
    """How values are distributed: a tenth lies below p10, half below p50, a tenth above p90."""

    p10: float
    p50: float
    p90: float


class ClassShape(Record, frozen=True, kw_only=True):
    """How thick and how large one class is, from seeded boxes of a few crops; None where nothing could be measured.

    `in_plane`: thickness was taken within sections, which lie too far apart for a distance across them.
    `thickness_cut_share`: of the class, the share that has no thickness because its widest ball leaves what is known.
    Instances that the border of a box cuts are counted apart and have no size.
    """

    name: str
    thickness_nm: Quantiles | None
    in_plane: bool
    thickness_cut_share: float
    num_instances: int
    num_instances_cut: int
    instance_nm3: Quantiles | None
    sampled_crops: int
    sampled_voxels: int


class LeftOut(Record, frozen=True, kw_only=True):
    """A crop that could not be used, and why."""

    name: str
    why: str


Missing = Literal["outside", "not-fetched", "miscounted", "undeclared", "damaged", "unseen"]
Harmless = Literal["empty", "shared-number", "sampled"]


class Finding(Record, frozen=True, kw_only=True):
    """Something of a crop or volume that looks wrong, the numbers behind it, and what to do.

    `empty`, `shared-number` and `sampled` are no alarms: a class may be annotated and absent, volumes of one's own may
    each count their crops, and what is too large is sampled.
    """

    where: str
    kind: Literal["swapped", "shifted", "constant", "few-values", "saturated", "inverted"] | Harmless | Missing
    what: str
    numbers: dict[str, float]
    remedy: str

    @property
    def alarm(self) -> bool:
        """Whether this is more than information."""
        return self.kind not in get_args(Harmless)


class Frequency(Record, frozen=True, kw_only=True):
    """How much of the crops that hold it a class fills, as somebody reported it, and who."""

    share: float
    source: str


class ValidShare(Record, frozen=True, kw_only=True):
    """How much of a patch lies in annotated boxes at that voxel size, placed as well as it can be, over the crops.

    Crops are those of `num_crops` whose labels are as fine as that or finer; a 2D patch has 1 along z.
    """

    voxel_size_nm: NmZYX
    patch_size_zyx: VoxelsZYX
    mean: float
    median: float
    num_crops: int


class Fingerprint(Artifact, frozen=True, kw_only=True, tag="fingerprint"):
    """What a planner may know of a data set; `class_sets` are the sets of its own classes.json.

    `cooccurrence` counts the voxels that hold two classes, in the order of `classes`; () if nobody counted.
    One that was not measured says in `source` what it was made from; a class that nobody counted may
    have its `frequencies`.
    """

    volumes: tuple[VolumeFacts, ...]
    crops: tuple[CropFacts, ...]
    classes: tuple[ClassEntry, ...]
    disjoint: tuple[tuple[str, ...], ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    shapes: tuple[ClassShape, ...] = ()
    class_sets: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    frequencies: dict[str, Frequency] = msgspec.field(default_factory=dict)
    cooccurrence: tuple[tuple[int, ...], ...] = ()
    valid_shares: tuple[ValidShare, ...] = ()
    source: str | None = None


class Gpu(Record, frozen=True, kw_only=True):
    """One accelerator; `free_bytes` of its memory no process held when it was looked at."""

    name: str
    memory_bytes: int
    free_bytes: int
    bf16: bool
    fp16: bool = True
    compute_capability: tuple[int, int] | None = None


class Hardware(Artifact, frozen=True, kw_only=True, tag="hardware"):
    """What a planner may know of a machine.

    `disk_free_bytes` is that of the folder it was asked in, None for a machine that is not at hand.
    `step_gflops` is the speed of whole training steps of the plan, by precision, measured on the first GPU or,
    where there is none, on the CPU; None if it was not.
    """

    name: str
    gpus: tuple[Gpu, ...]
    cpu_name: str
    cpu_threads: int
    cpu_bf16: bool
    ram_bytes: int
    shm_bytes: int
    disk_free_bytes: int | None = None
    step_gflops: dict[str, float] | None = None
