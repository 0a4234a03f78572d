"""Our Wan autoencoders against diffusers' on the same random weights; streams, features, checkpointing, names of weights."""

import pytest
import torch

from decoders.backbones import wan_weights
from decoders.backbones.wan import WAN21, WAN22, WanConfig, WanDecoder, WanEncoder, layout

SMALL = {
    "wan21": WanConfig(dim=8, channels=4, mean=[0.1, -0.2, 0.3, 0.0], std=[1.0, 2.0, 0.5, 1.5]),
    "wan22": WanConfig(dim=8, encoder_dim=4, channels=6, residual=True, patch=2, temporal=(False, True, True)),
}


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Weights away from their initial values, norms included, of a size that keeps the output in range."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1 and parameter[0].numel() > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * noise + float(parameter.mean() > 0.5))
    return module.requires_grad_(False).eval()


@pytest.fixture(scope="module", params=list(SMALL))
def pair(request):
    """diffusers' autoencoder of a small layout, and our halves with its weights."""
    from diffusers import AutoencoderKLWan

    config = SMALL[request.param]
    theirs = randomise(AutoencoderKLWan(**{k: v for k, v in wan_weights.to_config(config).items() if k[0] != "_"}))
    state = theirs.state_dict()
    decoder = wan_weights.fill(WanDecoder(config), state, "test").eval().requires_grad_(False)
    encoder = wan_weights.fill(WanEncoder(config), state, "test").eval().requires_grad_(False)
    return theirs, encoder, decoder


def latents(config: WanConfig, n: int, b: int = 1) -> torch.Tensor:
    return torch.randn(b, config.channels, n, 2, 3, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("n", [1, 2, 5, 21])
def test_decoder_equals_diffusers(pair, n):
    theirs, _, decoder = pair
    z = latents(decoder.config, n, b=2 if n < 5 else 1)
    raw = z * decoder.latent_std + decoder.latent_mean
    expected = theirs.decode(raw).sample
    assert expected.std() > 0.1 and (expected.abs() < 1).float().mean() > 0.3  # not all clamped
    assert expected.shape[2] == 4 * n - 3
    torch.testing.assert_close(decoder(z).clamp(-1, 1), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(decoder.decode(z), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("t", [1, 5, 17])
def test_encoder_equals_diffusers(pair, t):
    theirs, encoder, decoder = pair
    side = decoder.stride_hw
    video = torch.rand(1, 3, t, 2 * side, 3 * side, generator=torch.Generator().manual_seed(t)) * 2 - 1
    posterior = theirs.encode(video).latent_dist
    for mean, log_variance in (encoder(video), encoder.encode_in_chunks(video)):
        torch.testing.assert_close(mean, posterior.mean, atol=1e-4, rtol=0)
        torch.testing.assert_close(log_variance.clamp(-30, 20), posterior.logvar, atol=1e-4, rtol=0)


@pytest.mark.parametrize("split", [(1, 1, 1, 1, 1), (2, 3), (1, 4), (3, 1, 1), (5,)])
def test_any_split_is_the_whole_clip(pair, split):
    _, _, decoder = pair
    z = decoder.denormalise(latents(decoder.config, 5))
    whole, _, _ = decoder.run(z, None, True)
    past, parts = None, []
    for index, part in enumerate(z.split(split, 2)):
        out, past, _ = decoder.run(part, past, index == 0)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-5, rtol=0)


def test_streams_have_their_own_state_which_does_not_grow(pair):
    _, _, decoder = pair
    one, two = latents(decoder.config, 9), latents(decoder.config, 9).flip(2)
    s = decoder.stride_hw
    states = [decoder.start_stream(1, 2 * s, 3 * s - 2) for _ in range(2)]
    outputs, sizes = ([], []), []
    for frame_one, frame_two in zip(one.unbind(2), two.unbind(2), strict=True):
        outputs[0].append(decoder.step_stream(frame_one, states[0]))
        outputs[1].append(decoder.step_stream(frame_two, states[1]))
        sizes.append(states[0].num_bytes())
    for frames, z in zip(outputs, (one, two), strict=True):
        torch.testing.assert_close(torch.cat(frames, 2), decoder.decode(z)[..., : 3 * s - 2], atol=1e-5, rtol=0)
    assert len(set(sizes[1:])) == 1, "the state is as large after two latent frames as after nine"
    assert decoder.end_stream(states[0]).shape == (1, 3, 0, 2 * s, 3 * s - 2)
    with pytest.raises(ValueError, match="has ended"):
        decoder.step_stream(one[:, :, 0], states[0])
    with pytest.raises(ValueError, match="this stream of 1"):
        decoder.step_stream(one[:, :, 0, :1], states[1])


def test_stages_give_their_features(pair):
    _, _, decoder = pair
    z = latents(decoder.config, 3)
    names = ["conv_in", "mid", "up0", "up1", "up2", "up3", "out"]
    assert list(decoder.stages) == names
    video, features = decoder(z, taps=names)
    torch.testing.assert_close(decoder.finish(features["out"]), video)
    assert [features[name].shape[2] for name in names] == [3, 3, 5, 9, 9, 9, 9]
    later, _, _ = decoder.run(features["up1"], None, True, stages=("up2", "up3", "out"))
    torch.testing.assert_close(decoder.finish(later), video)
    with pytest.raises(ValueError, match="no stage up4; there are conv_in"):
        decoder(z, taps=["up4"])


def test_checkpointing_changes_no_gradient():
    decoder = randomise(WanDecoder(SMALL["wan22"])).requires_grad_(True)
    z = latents(decoder.config, 3)

    def gradients(enabled: bool) -> list[torch.Tensor]:
        decoder.set_checkpointing(enabled)
        decoder.zero_grad()
        first, past, _ = decoder.run(z[:, :, :2], None, True)  # two calls: gradients flow through what is remembered
        second, _, _ = decoder.run(z[:, :, 2:], past, False)
        torch.cat([first, second], 2).square().mean().backward()
        return [parameter.grad.clone() for parameter in decoder.parameters()]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_names_are_those_of_diffusers(pair, kind):
    theirs, encoder, decoder = pair
    state = wan_weights.to_diffusers(decoder if kind == "decoder" else encoder)
    top = ("decoder.", "post_quant") if kind == "decoder" else ("encoder.", "quant")
    expected = {name: tensor for name, tensor in theirs.state_dict().items() if name.startswith(top)}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_original_names_are_converted_as_diffusers_converts_them():
    """diffusers' own converter of the original checkpoint is the known answer."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    config = layout("wan21", dim=8)
    for half in (WanDecoder(config), WanEncoder(config)):
        name_of_half = "decoder" if isinstance(half, WanDecoder) else "encoder"
        original = {wan_weights.other_names(n, config, name_of_half)[1]: p.detach() for n, p in half.named_parameters()}
        assert convert_wan_vae_to_diffusers(original).keys() == wan_weights.to_diffusers(half).keys()
        again = wan_weights.fill(type(half)(config), original, "test")
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), half.parameters(), strict=True))


def test_folders(tmp_path, pair):
    theirs, _, decoder = pair
    theirs.save_pretrained(tmp_path / "vae")
    again = WanDecoder.from_folder(str(tmp_path))
    z = latents(decoder.config, 2)
    assert torch.equal(again.decode(z), decoder.decode(z))
    with pytest.raises(FileNotFoundError, match="no autoencoder at"):
        WanDecoder.from_folder(str(tmp_path / "nowhere"))


def test_weights_that_do_not_fit_are_refused(pair):
    theirs, _, decoder = pair
    state = dict(theirs.state_dict())
    moved = state.pop("decoder.conv_out.bias")
    with pytest.raises(ValueError, match=r"1 weights do not fit this layout; decoder.conv_out.bias is missing"):
        wan_weights.fill(WanDecoder(decoder.config), state, "here")
    state |= {"decoder.conv_out.bias": moved, "decoder.more": moved}
    with pytest.raises(ValueError, match=r"decoder.more is left over"):
        wan_weights.fill(WanDecoder(decoder.config), state, "here")


def test_parameter_counts():
    with torch.device("meta"):
        counts = [sum(p.numel() for p in WanDecoder(config).parameters()) for config in (WAN21, WAN22)]
    assert [f"{count / 1e6:.2f}" for count in counts] == ["73.30", "555.05"]


def test_released_statistics_are_diffusers_defaults():
    import inspect

    from diffusers import AutoencoderKLWan

    defaults = inspect.signature(AutoencoderKLWan.__init__).parameters
    assert list(defaults["latents_mean"].default) == WAN21.mean
    assert list(defaults["latents_std"].default) == WAN21.std


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan21", "wan22"])
def test_full_size_layouts_equal_diffusers(name):
    from diffusers import AutoencoderKLWan

    from decoders.baseline.model import RELEASED

    theirs = randomise(AutoencoderKLWan(**RELEASED[name]))
    theirs.encoder = None
    config = layout(name)
    ours = wan_weights.fill(WanDecoder(config), theirs.state_dict(), name).eval()
    z = torch.randn(1, config.channels, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = theirs.decode(z * ours.latent_std + ours.latent_mean).sample
    torch.testing.assert_close(ours.decode(z), expected, atol=1e-4, rtol=0)
