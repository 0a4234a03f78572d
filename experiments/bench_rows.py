"""What ``make bench-all`` measures: the decoders, by the latent space that they share, and the sizes of its profiles.

A group is decoders that read the same latents; its first is the anchor, the decoder that frames/s are compared with. Ways to
run a decoder are words: ``plain``, or ``optimised`` (decoders/inference.py) with any of ``compiled``, ``nographs``, ``mlp8``,
``linear8``, ``uint8`` and ``fast`` after plus signs.
"""

from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from decoders.inference import InferenceOptions

PLAIN, OPTIMISED = "plain", "optimised"
WORDS: dict[str, dict[str, Any]] = {
    OPTIMISED: {},
    "compiled": {"compile": True},
    "nographs": {"graphs": False},
    "mlp8": {"bits8": "mlp"},
    "linear8": {"bits8": "linear"},
    "uint8": {"uint8": True},
    "fast": {"fast_convolutions": True},
}
LOSSY = {"mlp8", "linear8", "fast"}  # beyond the rounding of the dtype


@dataclass(frozen=True)
class Entry:
    """A decoder of the benchmark. Either ``experiment`` or a released layout by ``kind`` (experiments/bench_build.py)."""

    label: str
    experiment: str = ""
    release: str = ""
    kind: str = "diffusers"
    millions: float = 0.0  # parameters, to know beforehand how much memory it takes
    references: int = 0
    ways: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by profile; absent: plain alone
    sizes: dict[str, tuple[tuple[int, int, int], ...]] = field(
        default_factory=dict
    )  # by profile; absent: the profile's
    arguments: tuple[tuple[tuple[str, Any], ...], ...] = ((),)  # of decode, each a row of its own
    equals: str = ""  # label of the decoder whose frames it must give: the same weights, computed by other code
    profiles: tuple[str, ...] = ("cpu", "gpu")


@dataclass(frozen=True)
class Group:
    name: str
    entries: tuple[Entry, ...]  # the first is the anchor


@dataclass(frozen=True)
class Profile:
    """Sizes are (frames, height, width)."""

    device: str
    sizes: tuple[tuple[int, int, int], ...]
    check_size: tuple[int, int, int]  # where each way is held against float32
    modes: tuple[str, ...]
    rounds: int
    minutes: float  # for one size of one group no further round is begun after so long
    together: bool  # all decoders of a group take turns; else each is measured alone, with the device to itself


PROFILES = {
    "cpu": Profile("cpu", ((9, 256, 256),), (9, 64, 64), ("stream",), rounds=2, minutes=1.5, together=True),
    "gpu": Profile(
        device="cuda",
        sizes=tuple((frames, *size) for size in ((480, 832), (720, 1280), (1080, 1920)) for frames in (25, 121)),
        check_size=(9, 128, 128),
        modes=("stream", "clip"),
        rounds=5,
        minutes=1.5,
        together=False,
    ),
}

EXACT = {"cpu": (PLAIN, OPTIMISED), "gpu": (PLAIN, OPTIMISED, "optimised+compiled")}
TRANSFORMER = {
    "cpu": (PLAIN, OPTIMISED, "optimised+linear8"),
    "gpu": (PLAIN, OPTIMISED, "optimised+compiled", "optimised+compiled+mlp8", "optimised+compiled+linear8"),
}
HEADLINE = {
    "cpu": (PLAIN, OPTIMISED, "optimised+compiled+mlp8"),
    "gpu": (*TRANSFORMER["gpu"], "optimised+compiled+linear8+uint8"),
}
BACKBONE = {"cpu": (PLAIN, OPTIMISED, "optimised+fast"), "gpu": EXACT["gpu"]}
# Of the CPU, whose profile must end within minutes: convolutions cost so much per pixel at any size; XL's products of fewer
# tokens than 256x256 has would wait for the weights.
SMALL = {"cpu": ((9, 128, 128),)}
BOTH = {"cpu": (*SMALL["cpu"], (9, 256, 256))}  # the small one first: the faster layout is found there


def _flash(size: str, millions: float, ways: dict[str, tuple[str, ...]], **changes: Any) -> Entry:
    name = f"flashdecoder_{size}_stage1"
    return Entry(f"FlashDecoder-{size.upper()}", experiment=name, millions=millions, ways=ways, **changes)


def _regen(k: int, frames: int, baseline: float) -> Group:
    """One chunk of small frames on a CPU: 1.2 B parameters see every pixel of it in every step of the sampler."""
    clip = {"cpu": ((frames, 64, 64),)}
    steps = ((("steps", 1),), (("steps", 4),))
    profiles = ("cpu", "gpu") if k == 4 else ("gpu",)
    sizes = {"sizes": clip, "profiles": profiles}
    anchor = Entry(f"MAGVIT-v2 k{k}", experiment=f"magvit2_k{k}", millions=baseline, ways=EXACT, **sizes)
    ours = Entry(f"REGEN k{k}", experiment=f"regen_k{k}", millions=1214.7, ways=EXACT, arguments=steps, **sizes)
    return Group(f"k{k}", (anchor, ours))


GROUPS = (
    Group(
        "wan22",
        (
            Entry("diffusers Wan 2.2", release="wan22", millions=555.0, sizes=BOTH),
            _flash("xl", 769.3, HEADLINE),
            _flash("l", 348.0, TRANSFORMER, profiles=("gpu",)),
            _flash("b", 161.7, TRANSFORMER, profiles=("gpu",)),
            _flash("s", 56.8, TRANSFORMER, profiles=("gpu",)),
            Entry(
                "Wan 2.2 backbone",
                "",
                "wan22",
                "backbone",
                555.0,
                ways=BACKBONE,
                equals="diffusers Wan 2.2",
                sizes=SMALL,
            ),
            Entry("Flash-VAED Wan 2.2", "flash_vaed_wan22_phase1", millions=47.5, ways=EXACT, profiles=("gpu",)),
            Entry(
                "RefDecoder Wan 2.2",
                "refdecoder_wan22_clip5",
                millions=998.0,
                references=1,
                ways=EXACT,
                profiles=("gpu",),
            ),
            Entry("TAEHV-like Wan 2.2", "", "wan22", "taehv", 9.9, ways=EXACT, profiles=("gpu",)),
        ),
    ),
    Group(
        "wan21",
        (
            Entry("diffusers Wan 2.1", release="wan21", millions=73.3, sizes=SMALL),
            Entry(
                "Wan 2.1 backbone",
                "",
                "wan21",
                "backbone",
                73.3,
                ways=BACKBONE,
                equals="diffusers Wan 2.1",
                sizes=SMALL,
            ),
            Entry("Flash-VAED Wan 2.1", "flash_vaed_wan21_phase1", millions=5.9, ways=EXACT, sizes=SMALL),
            Entry(
                "FlashDecoder-XL Wan 2.1",
                "flashdecoder_xl_wan21_stage1",
                millions=750.4,
                ways=TRANSFORMER,
                profiles=("gpu",),
            ),
            Entry(
                "RefDecoder Wan 2.1", "refdecoder_wan21_clip5", millions=495.7, references=1, ways=EXACT, sizes=SMALL
            ),
            Entry(
                "REGEN Wan 2.1",
                "regen_wan21",
                millions=1214.7,
                ways=EXACT,
                arguments=((("steps", 1),), (("steps", 4),)),
                profiles=("gpu",),
            ),
            Entry("TAEHV-like Wan 2.1", "", "wan21", "taehv", 9.8, ways=EXACT, sizes=SMALL),
        ),
    ),
    Group(
        "ltx",
        (
            Entry("diffusers LTX", release="ltx", millions=238.8, sizes=SMALL),
            Entry("LTX backbone", "", "ltx", "backbone", 238.8, ways=BACKBONE, equals="diffusers LTX", sizes=SMALL),
            Entry("Flash-VAED LTX", "flash_vaed_ltx_phase1", millions=67.0, ways=EXACT, sizes=SMALL),
        ),
    ),
    _regen(4, 5, 265.8),
    _regen(8, 9, 425.0),
    _regen(16, 17, 441.0),
    _regen(32, 33, 317.1),
)


def options_of(way: str) -> InferenceOptions | None:
    """What a way asks of ``optimise``; None for the plain decoder. Raises ValueError for words that are not known."""
    first, *rest = way.split("+")
    if way == PLAIN:
        return None
    if first != OPTIMISED or (unknown := [word for word in rest if word not in WORDS or word == OPTIMISED]):
        unknown = unknown if first == OPTIMISED else [way]
        known = ", ".join(word for word in WORDS if word != OPTIMISED)
        raise ValueError(f"no way '{unknown[0]}' to run a decoder; there are {PLAIN} and {OPTIMISED}, with +{known}")
    return InferenceOptions(**{key: value for word in rest for key, value in WORDS[word].items()})


def is_lossless(way: str) -> bool:
    """Whether only the dtype's own rounding may differ from the plain decoder's."""
    return not LOSSY & set(way.split("+"))


def _hits(patterns: list[str], *names: str) -> set[str]:
    return {p for p in patterns if any(fnmatchcase(name.lower(), p.lower()) for name in names)}


def chosen(profile: str, only: list[str]) -> list[Group]:
    """The groups of a profile, or with ``only`` (patterns of labels, experiments or groups' names) what they name, each group
    with its anchor, which is also the decoder that one of its own must equal. A decoder that is named is taken whatever the
    profile; of a group that is named, what the profile has, and all of it where it has nothing.

    Raises:
        ValueError: a pattern that names nothing.
    """
    groups, named = [], set()
    for group in GROUPS:
        own = [entry for entry in group.entries if profile in entry.profiles]
        of_group = _hits(only, group.name)
        kept = list(own or group.entries) if of_group else [] if only else own
        named |= of_group
        for entry in group.entries:
            hits = _hits(only, entry.label, entry.experiment)
            named |= hits
            if hits and entry not in kept:
                kept.append(entry)
        if kept:
            anchor = group.entries[0]
            groups.append(replace(group, entries=(anchor, *(entry for entry in kept if entry is not anchor))))
    if missing := [pattern for pattern in only if pattern not in named]:
        labels = ", ".join(entry.label for group in GROUPS for entry in group.entries)
        raise ValueError(f"only: '{missing[0]}' names no decoder; there are {labels}; * stands for anything")
    return groups
