"""Where a text-to-video pipeline's time goes, with decoders swapped: ``python -m experiments.bench_pipeline pipeline=FOLDER``.

    make bench-pipeline pipeline=Wan2.1-T2V-1.3B-Diffusers decoders=[own,exports/flashdecoder_xl] height=480 width=832
    make bench-pipeline pipeline=FOLDER decoders=[own,exports/a,exports/a+optimised+compiled] decoder_dtype=bf16
    make bench-pipeline pipeline=FOLDER decoders=[own,a=exports/a] image=first.png num_frames=17 steps=50 rounds=5

The papers' end-to-end figures: one prompt, the same seed, the whole pipeline from text to frames for every decoder in turn, ``rounds``
times, in every other round in reverse order. A call is divided into

    text       the pipeline's encode_prompt: the prompt and, with guidance, the negative one
    image      its image encoder, and encoding the image into latents
    denoise    from the first call of a transformer to the end of the scheduler's last step
    decode     the autoencoder's decode, whichever stands there
    other      what is left: preparing noise, and frames from the decoder's range to [0, 1]

Medians over rounds with the smallest and the largest; shares of the median total. Work on a GPU is waited for at each boundary and at
the end of each step. The first, untimed call of each decoder takes two steps; it is at the clip's size, so that what is compiled,
captured or tuned for that size is ready.

    pipeline      a folder that save_pretrained wrote, over the autoencoder of Wan or LTX
    decoders      own, what decoders.load takes, runs by name; LABEL=SOURCE gives a label; SOURCE+optimised its optimised form
                  (decoders/inference.py), with +compiled, +nographs, +mlp8, +linear8, +uint8, +fast as in make bench-all; speeds
                  are against the first
    prompt, image, height, width, num_frames, steps, guidance    of the call; default: the pipeline's own
    dtype         bf16 or fp32, of transformer and text encoder; decoder_dtype: of the autoencoder and the decoders (default fp32)
    rounds, seed, device, threads (of a CPU), out (a folder: JSON and Markdown)

peak_gib in the JSON file is the GPU memory of the whole pipeline with that decoder in it, beside the autoencoder's own. Optimised forms
stay on the GPU while others are measured; what they hold there is not counted for those.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from datamodules.probe import BadFile
from decoders.exported import Exported, ExportError
from experiments import measured, pipeline_folder
from experiments.bench import device_name, find_device
from experiments.bench_all import read_options
from experiments.bench_rows import PLAIN, options_of
from experiments.compose import ConfigError, run_cli
from experiments.decoder_choice import OWN, Named, load_export, optimised, parse
from experiments.measured import markdown, require_folder
from experiments.pipeline_folder import DTYPES, PipelineFolder

STAGES = ("text", "image", "denoise", "decode", "other")
WARM_UP_STEPS = 2


@dataclass
class BenchPipelineConfig:
    """The command's options; the module says what they are."""

    pipeline: str = ""
    decoders: list[str] = field(default_factory=lambda: [OWN])
    prompt: str = "A red kite climbs over a windy beach while two children run after it, filmed from the side."
    image: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    dtype: Literal["bf16", "fp32"] = "bf16"
    decoder_dtype: Literal["bf16", "fp32"] = "fp32"
    rounds: int = 3
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    out: str = "results"

    def __post_init__(self) -> None:
        if not self.pipeline:
            raise ValueError("pipeline is needed: make bench-pipeline pipeline=FOLDER decoders=[own,exports/mine]")
        for key in ("height", "width", "num_frames", "steps", "rounds", "threads"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ValueError(f"{key}={value} must be at least 1")


class StageClock:
    """Divides calls of a pipeline into stages, from outside: ``with clock.watch(pipe): ...``, then ``clock.read(total)``.

    A stage inside another one counts as the outer one.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._seconds: dict[str, float] = {}
        self._inside = False
        self._loop: list[float] = []  # when the first transformer began, and when the last step ended

    def now(self) -> float:
        """Seconds, when all work so far is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def start(self) -> None:
        """Forget what was measured."""
        self._seconds, self._loop = {}, []

    def read(self, total: float) -> dict[str, float]:
        """Seconds by stage since ``start``. Raises RuntimeError where the pipeline has no such loop."""
        if len(self._loop) != 2:
            raise RuntimeError("no transformer was called, or no step of a scheduler was taken")
        found = {name: self._seconds.get(name, 0.0) for name in STAGES[:-1]}
        found["denoise"] = self._loop[1] - self._loop[0]
        found["other"] = total - sum(found.values())
        return found | {"total": total}

    @contextmanager
    def watch(self, pipe: Any) -> Iterator[None]:
        """While this is open, calls of ``pipe`` are measured. Its parts are as before when it closes."""
        watched = [(pipe, "encode_prompt", "text"), (pipe, "encode_image", "image"), (pipe.vae, "encode", "image")]
        watched += [(pipe.vae, "decode", "decode")]
        undo: list[Callable[[], None]] = []
        try:
            for owner, name, stage in watched:
                if hasattr(owner, name):
                    undo.append(self._replace(owner, name, self._timed(getattr(owner, name), stage)))
            undo.append(self._replace(pipe.scheduler, "step", self._step(pipe.scheduler.step)))
            for name, part in pipe.components.items():
                if name.startswith("transformer") and part is not None:
                    undo.append(part.register_forward_pre_hook(self._begin).remove)
            yield
        finally:
            for take_back in reversed(undo):
                take_back()

    @staticmethod
    def _replace(owner: Any, name: str, function: Callable) -> Callable[[], None]:
        before = owner.__dict__.get(name)
        owner.__dict__[name] = function

        def take_back() -> None:
            if before is None:
                del owner.__dict__[name]
            else:
                owner.__dict__[name] = before

        return take_back

    def _timed(self, function: Callable, stage: str) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            begun, self._inside = self.now(), True
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False
                self._seconds[stage] = self._seconds.get(stage, 0.0) + self.now() - begun

        return run

    def _begin(self, *_: Any) -> None:
        if not self._loop:
            self._loop = [self.now()]

    def _step(self, function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            stepped = function(*args, **kwargs)
            self._loop = [*self._loop[:1], self.now()]
            return stepped

        return run


def bench_pipeline(config: BenchPipelineConfig, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Measure, in turns. What the JSON file holds.

    Raises:
        ConfigError: no such pipeline or decoder, a decoder of another space, sizes that cannot be.
    """
    device = find_device(config.device, "bench_pipeline")
    require_folder(config.out)
    if config.threads:
        torch.set_num_threads(config.threads)
    named = parse(config.decoders)
    folder = pipeline_folder.read_folder(config.pipeline)
    given = _arguments(folder, config)
    t, height, width = pipeline_folder.clip_size(folder, given)
    pipe = pipeline_folder.load_pipeline(folder, config.dtype, device, vae_dtype=config.decoder_dtype)
    short = given | {"num_inference_steps": WARM_UP_STEPS}
    models, held = {}, {}  # held: bytes of the GPU between its turns
    rows: dict[str, list[dict[str, float]]] = {name.label: [] for name in named}
    peaks: dict[str, float] = {}
    for name in named:  # all are loaded before the first call, which may take minutes
        models[name.label] = None if name.source == OWN else load_export(name, DTYPES[config.decoder_dtype], "cpu")
    for name in named:
        _say(f"warming up {name.label}")
        before = _allocated(device)
        if name.way != PLAIN:
            models[name.label] = _optimised(name, models[name.label].to(device), pipe, folder, short, config.seed)
        _run(pipe, models[name.label], name, short, config.seed, device)
        held[name.label] = _allocated(device) - before if name.way != PLAIN else 0
    for number in range(config.rounds):
        for name in named[:: -1 if number % 2 else 1]:
            row, shape = _run(pipe, models[name.label], name, given, config.seed, device)
            if shape != (t, height, width):
                raise ConfigError(f"{name.label} made {shape} (frames, height, width), not {(t, height, width)}")
            rows[name.label].append(row)
            if device == "cuda":
                others = sum(held.values()) - held[name.label]
                peaks[name.label] = max(
                    peaks.get(name.label, 0.0), (torch.cuda.max_memory_allocated() - others) / 2**30
                )
            _say(f"round {number + 1}, {name.label}: {row['total']:.3g} s, of which decoding {row['decode']:.3g} s")
    return {
        "command": " ".join(["python -m experiments.bench_pipeline", *arguments]),
        "experiment": Path(config.pipeline).expanduser().resolve().name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")}
        | ({"cuda": torch.version.cuda} if device == "cuda" else {}),
        "options": asdict(config),
        "pipeline": folder.identity(),
        "clip": {"num_frames": t, "height": height, "width": width, "steps": _steps(folder, given)},
        "decoders": {
            name.label: _summary(rows[name.label], rows[named[0].label])
            | {"source": name.source, "way": name.way, "peak_gib": peaks.get(name.label), "rounds": rows[name.label]}
            for name in named
        },
    }


def report(result: dict[str, Any]) -> str:
    """A Markdown table: seconds and shares of every stage for every decoder."""
    first = next(iter(result["decoders"]))
    lines = [["decoder", *STAGES, "total", f"pipeline's speed against {first}", f"decoding's speed against {first}"]]
    for label, row in result["decoders"].items():
        cells = [
            f"{row['median'][stage]:.3g} s ({row['smallest'][stage]:.3g}-{row['largest'][stage]:.3g}), {row['shares'][stage]:.1%}"
            for stage in STAGES
        ]
        total = f"{row['median']['total']:.3g} s ({row['smallest']['total']:.3g}-{row['largest']['total']:.3g})"
        lines.append([label, *cells, total, f"{row['speed']['total']:.2f} x", f"{row['speed']['decode']:.2f} x"])
    clip, options = result["clip"], result["options"]
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    return (
        f"{result['experiment']} ({result['pipeline']['class']}): {clip['num_frames']} frames of {clip['height']}x{clip['width']}, "
        f"{clip['steps']} steps; {result['device']}; {versions}; {result['date']}\n"
        f"transformer and text encoder in {options['dtype']}, decoders in {options['decoder_dtype']}; median of {options['rounds']} rounds "
        "(smallest-largest), share of the total\n\n" + markdown(lines)
    )


def _arguments(folder: PipelineFolder, config: BenchPipelineConfig) -> dict[str, Any]:
    """Of every call. Raises ConfigError: an image is needed, or of no use, or cannot be read."""
    wanted = {
        "height": config.height,
        "width": config.width,
        "num_frames": config.num_frames,
        "num_inference_steps": config.steps,
        "guidance_scale": config.guidance,
    }
    given = {"prompt": config.prompt} | {name: value for name, value in wanted.items() if value is not None}
    pipeline_folder.check_arguments(folder, given)
    if folder.takes_image != (config.image is not None):
        needs = "starts from an image: give image=FILE" if folder.takes_image else "takes no image; leave image out"
        raise ConfigError(f"{folder.class_name} {needs}")
    if config.image is not None:
        try:
            given["image"] = pipeline_folder.resized(config.image, pipeline_folder.clip_size(folder, given)[1:])
        except BadFile as error:
            raise ConfigError(f"image={config.image}: {error}") from None
    return given


def _run(
    pipe: Any, model: torch.nn.Module | None, name: Named, given: dict[str, Any], seed: int, device: str
) -> tuple[dict[str, float], tuple[int, int, int]]:
    """One call from text to frames: seconds by stage, and (frames, height, width) of what came out."""
    from decoders.pipelines import swap

    clock = StageClock(device)
    try:
        with swap(pipe, model, seed=seed) if model is not None else nullcontext(), clock.watch(pipe):
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            clock.start()
            begun = clock.now()
            generator = torch.Generator("cpu").manual_seed(seed)
            frames = pipe(**given, generator=generator, output_type="pt", return_dict=False)[0]
            measured_s = clock.read(clock.now() - begun)
    except (ExportError, ValueError) as error:
        raise ConfigError(f"{name.label}: {str(error).splitlines()[0]}") from None
    if model is not None and name.way == PLAIN:
        model.to("cpu")  # the memory of the next one is its own; an optimised form stays where it was made
    return measured_s, (frames.shape[1], frames.shape[3], frames.shape[4])  # "b t 3 h w"


def _optimised(
    name: Named, model: Exported, pipe: Any, folder: PipelineFolder, given: dict[str, Any], seed: int
) -> Exported:
    """Its optimised form, calibrated where it has eight bits on latents that the pipeline itself makes: speed is measured here."""
    options = options_of(name.way)
    latents = []
    if options is not None and options.bits8 != "none":
        latent = pipeline_folder.call_latents(pipe, folder, given, seed)
        latents = [latent[None].to(model.device, torch.float32)]
    return optimised(name, model, latents)


def _allocated(device: str) -> int:
    """Bytes of a GPU that are in use."""
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def _summary(rows: list[dict[str, float]], first: list[dict[str, float]]) -> dict[str, Any]:
    """Medians, spread and shares; speeds are medians of the rounds' ratios, in which both took turns."""
    names = (*STAGES, "total")
    median = {name: statistics.median(row[name] for row in rows) for name in names}
    return {
        "median": median,
        "smallest": {name: min(row[name] for row in rows) for name in names},
        "largest": {name: max(row[name] for row in rows) for name in names},
        "shares": {name: median[name] / median["total"] for name in STAGES},
        "speed": {
            name: statistics.median(theirs[name] / ours[name] for ours, theirs in zip(rows, first, strict=True))
            for name in ("decode", "total")
        },
    }


def _steps(folder: PipelineFolder, given: dict[str, Any]) -> int:
    return given.get("num_inference_steps", folder.defaults["num_inference_steps"])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str]) -> None:
    config = read_options(arguments, BenchPipelineConfig)
    result = bench_pipeline(config, arguments)
    path = measured.write("bench-pipeline", result, config.out)
    text = report(result)
    path.with_suffix(".md").write_text(text)
    print(text)
    print(f"written to {path} and {path.with_suffix('.md')}")


if __name__ == "__main__":
    run_cli(main)
