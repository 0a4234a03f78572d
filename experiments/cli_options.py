"""What ``experiments/cli.py`` can be asked: its options, with examples."""

import argparse
import re
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from experiments.video_kinds import CODECS

MODEL = (
    "an exported decoder's folder (make export), a hub id user/name, a run's folder or one of its weights' files, a diffusers "
    "autoencoder's folder, or wan_mini, which comes with the code"
)
SAMPLED = ("steps", "times", "extension", "skip")  # what families' decoders take, which --sampling gives them
EXAMPLES = """examples:
  latent2pixel reconstruct wan_mini film.mp4 -o again.mp4          # video in, video and PSNR, SSIM out
  latent2pixel encode wan_mini film.mp4 -o film.safetensors        # video to latents
  latent2pixel decode my_export film.safetensors -o film.mp4       # latents to video
  latent2pixel info my_export

A folder of files in, a folder out:
  latent2pixel encode wan_mini films/ -o latents/

exit status: 0 all done; 1 some file failed (the others are done); 2 a mistake in what was asked, nothing was done
"""
ENCODE = """examples:
  latent2pixel encode wan_mini film.mp4 -o film.safetensors
  latent2pixel encode my_export films/ -o latents/ --encoder wan21/vae
  latent2pixel encode wan_mini frames/ -o film.safetensors --fps 24       # a folder of images
  latent2pixel encode wan_mini film.mp4 -o film.safetensors --raw         # as the autoencoder gives them, with mean and std beside
"""
DECODE = """examples:
  latent2pixel decode my_export film.safetensors -o film.mp4
  latent2pixel decode my_export latents/ -o films/ --codec h265 --crf 20
  latent2pixel decode my_export film.safetensors -o frames/ --format png
  latent2pixel decode my_export film.safetensors -o film.mkv --audio film_with_sound.mp4
  latent2pixel decode my_regen film.safetensors -o film.mp4 --sampling steps=4 --seed 1
  latent2pixel decode my_export film.safetensors -o - | ffmpeg -f rawvideo -pixel_format rgb24 -video_size 832x480 \\
      -framerate 16 -i - film.webm                                        # raw RGB; sizes are printed before
"""
RECONSTRUCT = """examples:
  latent2pixel reconstruct wan_mini film.mp4 -o again.mp4 --audio
  latent2pixel reconstruct my_export films/ -o again/ --metrics psnr,ssim --json scores.json
  latent2pixel reconstruct my_export film.mp4 -o again.mkv --codec ffv1   # lossless, to look at pixels
"""
INFO = """examples:
  latent2pixel info my_export
  latent2pixel info film.safetensors
  latent2pixel info film.mp4
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """A command line (default: the process's). SystemExit, after a line on stderr that names the nearest right thing."""
    options, rest = parser().parse_known_args(arguments)
    if rest:
        known = re.findall(r"--[a-z-]+", options.parser.format_usage())
        odd = rest[0].partition("=")[0]
        hint = f"latent2pixel {options.command} --help lists what there is"
        if odd.lstrip("-") in SAMPLED and "--sampling" in known:
            hint = f"did you mean --sampling {odd.lstrip('-')}=...?"
        elif near := get_close_matches(odd, known, n=1):
            hint = f"did you mean {near[0]}?"
        options.parser.error(f"unrecognized argument {rest[0]}; {hint}")
    return options


def parser() -> argparse.ArgumentParser:
    """The command line. Mistakes end with a line on stderr and exit status 2."""
    top = argparse.ArgumentParser(
        prog="latent2pixel",
        description="Videos to latents and back with exported decoders, any length in bounded memory.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _encode(_command(commands, "encode", "video to latents", ENCODE))
    _decode(_command(commands, "decode", "latents to video, PNG images or raw RGB", DECODE))
    _reconstruct(_command(commands, "reconstruct", "video to latents and back, with scores", RECONSTRUCT))
    info = _command(commands, "info", "what a decoder, a latents' file or a video is", INFO)
    info.add_argument("what", help=f"{MODEL}; or a file of latents; or a video")
    _computing(info)
    return top


def _command(commands, name: str, about: str, examples: str) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    made = commands.add_parser(name, help=about, description=about, epilog=examples, formatter_class=raw)
    made.set_defaults(parser=made)  # whose usage is shown with a mistake
    return made


def _computing(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("computing")
    group.add_argument("--device", default="auto", help="cpu, cuda or cuda:1; default: cuda where there is one")
    group.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the weights; default float32"
    )
    group.add_argument("--revision", help="of a hub id: a branch, tag or commit")
    group.add_argument("-q", "--quiet", action="store_true", help="errors only")


def _files(p: argparse.ArgumentParser, what: str, out: str) -> None:
    p.add_argument("model", help=MODEL)
    p.add_argument("inputs", nargs="+", metavar="IN", help=what)
    p.add_argument("-o", "--out", required=True, help=out)
    p.add_argument("--overwrite", action="store_true", help="replace what is there; default: it is an error")


def _pixels(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("video")
    group.add_argument(
        "--format",
        choices=("video", "png", "raw"),
        default=None,
        help="default: raw for -o - and .rgb files, else video; png writes a folder of images",
    )
    group.add_argument(
        "--codec",
        choices=tuple(CODECS),
        default="h264",
        help="h264 and h265: yuv420p in .mp4, .mkv or .mov (yuv444p for odd sizes); ffv1: lossless RGB in .mkv. "
        "Default h264",
    )
    group.add_argument("--crf", type=int, help="quality of h264 and h265, 0 (lossless) to 51; default 15")
    group.add_argument("--fps", type=float, help="frames per second; default: the input's, with varying times kept")
    group.add_argument(
        "--reference", help="of a decoder that looks at one: an image, none, or (reconstruct) frames: 0,16"
    )
    group.add_argument("--seed", type=int, help="of a decoder that draws noise; default: the latents' own, else 0")
    group.add_argument(
        "--sampling",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of a decoder that has such options (info names them), as often as needed. REGEN: steps=4 of its sampler, "
        "extension=true against seams and, in decode, the frames at times=0,0.5,1,1.5 (numbers of the clip's frames, between "
        "them too), all in memory at once, shown at --fps. RefDecoder: skip=true decodes without the reference's attention",
    )
    group.add_argument(
        "--window",
        type=int,
        default=16,
        help="latent frames that a decoder without a stream takes at once, 0 for all; default 16",
    )


def _encoding(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--encoder", help="who encodes, if the decoder cannot: an export, a diffusers folder, wan_mini or dct"
    )
    p.add_argument("--chunk", type=int, help="frames that an encoder without a stream codes as one clip")
    p.add_argument("--any-space", action="store_true", help="do not compare the fingerprints of latent spaces")


def _encode(p: argparse.ArgumentParser) -> None:
    _files(p, "videos, a folder of videos, or a folder of images", "a .safetensors file, or a folder")
    _encoding(p)
    p.add_argument("--raw", action="store_true", help="not normalised; mean and std are written beside")
    p.add_argument("--fps", type=float, help="frames per second; default: the video's")
    _computing(p)


def _decode(p: argparse.ArgumentParser) -> None:
    _files(
        p, "files of latents (.safetensors, .pt), or a folder of them", "a video, a folder, or - for standard output"
    )
    p.add_argument(
        "--assume",
        choices=("normalised", "raw"),
        help="what the latents are, whatever their files say and their values look like",
    )
    p.add_argument("--any-space", action="store_true", help="do not compare the fingerprints of latent spaces")
    p.add_argument("--audio", metavar="FILE", help="copy this file's audio, if it has any, beside the frames")
    _pixels(p)
    _computing(p)


def _reconstruct(p: argparse.ArgumentParser) -> None:
    _files(p, "videos, a folder of videos, or a folder of images", "a video, a folder, or - for standard output")
    _encoding(p)
    p.add_argument("--metrics", default="psnr,ssim", help="psnr, psnr_video, ssim, or none; default psnr,ssim")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the scores; a file that is there needs --overwrite")
    p.add_argument("--audio", action="store_true", help="copy the video's audio, if it has any, beside the frames")
    _pixels(p)
    _computing(p)


def _version() -> str:
    try:
        return version("latent-to-pixel")
    except PackageNotFoundError:  # used from a checkout
        return "(not installed)"
