"""What a RefDecoder starts from: a pretrained plain decoder, and perhaps a diffusion Transformer's blocks."""

from decoders.backbones.staged import StagedDecoder
from decoders.backbones.videovaeplus import VideoVAEPlusDecoder
from decoders.backbones.wan import WanDecoder
from decoders.refdecoder.model import RefDecoderModel
from decoders.refdecoder.released import from_released
from decoders.refdecoder.t2v_start import start_from_t2v

RELEASED = "refdecoder:"


def fill(model: RefDecoderModel, name: str | None, transformer: str | None = None) -> None:
    """Give ``model`` the weights of a pretrained decoder, in place.

    Args:
        name: a diffusers folder, a hub id or the original release's file; ``wan_mini``, which comes with the project;
            ``refdecoder:PATH``, the method's own released ``model.pt``, which holds all of the model; ``random`` (tests) or
            None, which leave the weights that are there.
        transformer: folder or hub id of Wan2.1-T2V-1.3B, whose first blocks start the model's.

    Raises:
        FileNotFoundError: there are no such weights; says how to get them.
        ValueError: they are of another layout.
    """
    if name is not None and name.startswith(RELEASED):
        _fill_released(model, name.removeprefix(RELEASED))
    elif name not in (None, "random"):
        model.fill_backbone(_pretrained(name, model))
    if transformer is not None:
        start_from_t2v(model, transformer)


def _fill_released(model: RefDecoderModel, path: str) -> None:
    released = from_released(path)
    own, theirs = model.state_dict(), released.state_dict()
    odd = sorted(own.keys() ^ theirs.keys()) or [k for k, v in own.items() if v.shape != theirs[k].shape]
    if odd:
        raise ValueError(
            f"{path} is RefDecoder on Wan 2.1 with {released.config.blocks} blocks and residual=none, and decoder describes another: "
            f"{len(odd)} weights do not fit; the first is {odd[0]}"
        )
    model.load_state_dict(theirs)


def _pretrained(name: str, model: RefDecoderModel) -> StagedDecoder:
    if isinstance(model.backbone, VideoVAEPlusDecoder):
        if name == "wan_mini":
            raise ValueError(
                "objective.start=wan_mini is no VideoVAE+ decoder, which decoder.layout=videovaeplus asks for"
            )
        return VideoVAEPlusDecoder.from_file(name)
    if name == "wan_mini":
        from decoders.latent_spaces.wan_mini import load_decoder

        return load_decoder()
    return WanDecoder.from_folder(name)
