"""What a RefDecoder starts from: a pretrained plain decoder, and perhaps a diffusion Transformer's blocks."""

from decoders.backbones.staged import StagedDecoder
from decoders.backbones.videovaeplus import VideoVAEPlusDecoder
from decoders.backbones.wan import WanDecoder
from decoders.refdecoder.model import RefDecoderModel
from decoders.refdecoder.released import fill_released, read_released
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
    state, blocks = read_released(path)
    if model.config.residual != "none" or model.config.layout not in ("wan21", "wan_mini"):
        raise ValueError(
            f"{path} is RefDecoder on Wan 2.1 with residual=none; with decoder.layout={model.config.layout} and "
            f"residual={model.config.residual} its weights would mean something else"
        )
    try:
        fill_released(model, state, path)
    except ValueError as error:
        raise ValueError(f"{error}. The file has {blocks} blocks; decoder must describe the same model") from None


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
