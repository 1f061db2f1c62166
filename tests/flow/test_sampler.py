import dataclasses

import pytest
import torch
from fluxbfl.model import Flux, FluxParams

from flux_func import tree
from flux_func.flow import sampler, timesteps
from flux_func.models import flux, layers

CFG = flux.flavor("flux-tiny")
GUIDED = dataclasses.replace(CFG, guidance_embed=True)


@pytest.fixture(scope="module")
def params():
    return {cfg: flux.init(cfg, seed=3, scheme="nonzero") for cfg in (CFG, GUIDED)}


def inputs(batch=2, height=6, width=10, length=5, seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    return dict(
        noise=normal(batch, 16, height, width), txt=normal(batch, length, CFG.context_in_dim), y=normal(batch, 768)
    )


def reference(cfg, params):
    """fluxbfl's own model with our weights."""
    fields = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(FluxParams)}
    with torch.device("meta"):
        model = Flux(FluxParams(**{**fields, "axes_dim": list(cfg.axes_dim)}))
    model.load_state_dict(tree.flatten(params), strict=True, assign=True)
    return model.eval().requires_grad_(False)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_euler_of_a_linear_field_is_its_closed_form():
    # dx/dt = a x + t: each step multiplies by (1 + a dt) and adds dt t.
    a, schedule = 0.7, timesteps.schedule(9, 1024)
    x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    out = sampler.euler(lambda x, t: a * x + t, x, schedule)
    times = schedule.tolist()
    gains = [1 + a * (s - t) for t, s in zip(times, times[1:], strict=False)]
    expected = x.clone()
    for i, gain in enumerate(gains):
        expected = gain * expected + (times[i + 1] - times[i]) * times[i]
    torch.testing.assert_close(out, expected, rtol=1e-14, atol=0)
    # And it tends to the solution of the equation, with an error that halves as steps double.
    exact = torch.exp(torch.tensor(-a, dtype=torch.float64)) * x
    errors = [
        (sampler.euler(lambda x, t: a * x, x, timesteps.schedule(n, None)) - exact).abs().max().item()
        for n in (50, 100)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.05)


def test_euler_along_a_straight_path_is_exact_in_one_step():
    x0, eps = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    out = sampler.euler(lambda x, t: eps - x0, eps, timesteps.schedule(1, 4096))
    torch.testing.assert_close(out, x0, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("cfg", [CFG, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("shift", [True, False])
def test_sample_is_bfls_denoise(bfl_sampling, params, cfg, shift):
    batch, steps = inputs(), 3
    noise, (height, width) = batch["noise"], batch["noise"].shape[2:]
    expected = bfl_sampling.denoise(
        reference(cfg, params[cfg]),
        img=flux.patchify(noise),
        img_ids=flux.image_ids(height, width).expand(2, -1, -1),
        txt=batch["txt"],
        txt_ids=flux.text_ids(5).expand(2, -1, -1),
        vec=batch["y"],
        timesteps=bfl_sampling.get_schedule(steps, height * width // 4, shift=shift),
        guidance=2.5,
    )
    # BFL's unpack is given pixels.
    expected = bfl_sampling.unpack(expected, 8 * height, 8 * width)
    guidance = 2.5 if cfg.guidance_embed else None
    out = sampler.sample(params[cfg], cfg, **batch, steps=steps, guidance=guidance, shift=shift)
    assert out.shape == noise.shape and relative(out, expected) < 2e-6


def test_guidance_reaches_each_sample_of_a_batch(params):
    batch = inputs(batch=3)
    values = torch.tensor([1.0, 4.0, 7.0])
    run = lambda guidance, part=slice(None): sampler.sample(  # noqa: E731
        params[GUIDED], GUIDED, **{k: v[part] for k, v in batch.items()}, steps=2, guidance=guidance
    )
    together = run(values)
    for i, value in enumerate(values):
        assert relative(together[i], run(value.item(), slice(i, i + 1))[0]) < 1e-6
        assert relative(run(value)[i], together[i]) < 1e-6  # a scalar tensor is for all
    assert relative(run(1.0)[1], together[1]) > 1e-3


def test_classifier_free_guidance_is_two_forwards_combined(params):
    batch, scale, steps = inputs(), 3.0, 3
    empty = inputs(batch=1, seed=9)
    out = sampler.sample(
        params[CFG], CFG, **batch, steps=steps, cfg_scale=scale, uncond_txt=empty["txt"], uncond_y=empty["y"]
    )
    x, schedule = batch["noise"], timesteps.schedule(steps, 15)
    ids = dict(img_ids=flux.image_ids(6, 10), txt_ids=flux.text_ids(5))
    for t, after in zip(schedule[:-1], schedule[1:], strict=True):
        img, times = flux.patchify(x), torch.full((2,), t.item())
        cond = flux.apply(params[CFG], CFG, img=img, timesteps=times, txt=batch["txt"], y=batch["y"], **ids)
        uncond = flux.apply(
            params[CFG],
            CFG,
            img=img,
            timesteps=times,
            txt=empty["txt"].expand_as(batch["txt"]),
            y=empty["y"].expand_as(batch["y"]),
            **ids,
        )
        x = x + (after - t) * flux.unpatchify(uncond + scale * (cond - uncond), 6, 10)
    assert relative(out, x) < 2e-6


def counting(passes):
    """Ops whose attention notes the batch of each call."""

    def attention(q, k, v):
        passes.append(len(q))
        return layers.attention(q, k, v)

    return layers.Ops(attention=attention)


@pytest.mark.parametrize(("scale", "expected"), [(None, 2), (1, 2), (1.0, 2), (2.0, 4), (0.0, 4)])
def test_one_forward_pass_a_step(params, scale, expected):
    batch, passes = inputs(), []
    sampler.sample(
        params[CFG],
        CFG,
        **batch,
        steps=2,
        cfg_scale=scale,
        **({} if scale is None else {"uncond_txt": batch["txt"], "uncond_y": batch["y"]}),
        ops=counting(passes),
    )
    assert passes == [expected] * 2 * (CFG.depth + CFG.depth_single_blocks)


def test_scale_zero_is_unconditional(params):
    batch, empty = inputs(), inputs(seed=9)
    without = dict(uncond_txt=empty["txt"], uncond_y=empty["y"])
    out = sampler.sample(params[CFG], CFG, **batch, steps=2, cfg_scale=0.0, **without)
    expected = sampler.sample(params[CFG], CFG, **{**batch, "txt": empty["txt"], "y": empty["y"]}, steps=2)
    assert relative(out, expected) < 1e-6


def test_image_seq_len_is_what_the_shift_goes_by(params):
    batch = inputs(height=4, width=4)
    four_times = sampler.sample(params[CFG], CFG, **batch, steps=4, image_seq_len=16)
    own = sampler.sample(params[CFG], CFG, **batch, steps=4)
    same = sampler.sample(params[CFG], CFG, **batch, steps=4, image_seq_len=4)
    assert torch.equal(own, same) and relative(four_times, own) > 1e-6
    # A shifted schedule of one step is the plain one.
    one = [sampler.sample(params[CFG], CFG, **batch, steps=1, shift=shift) for shift in (True, False)]
    assert torch.equal(*one)


def test_types_are_the_noises_own(params):
    batch = inputs(dtype=torch.float64)
    out = sampler.sample(tree.map(torch.Tensor.double, params[CFG]), CFG, **batch, steps=2)
    single = sampler.sample(params[CFG], CFG, **inputs(), steps=2)
    assert out.dtype == torch.float64 and 0 < relative(single.double(), out) < 2e-6
    half = {name: value.bfloat16() for name, value in inputs().items()}
    low = sampler.sample(tree.map(torch.Tensor.bfloat16, params[CFG]), CFG, **half, steps=2)
    assert low.dtype == torch.bfloat16 and relative(low.double(), out) < 0.05


def test_it_is_differentiable(params):
    batch = inputs(batch=1, height=4, width=4, length=2, dtype=torch.float64)
    wide = tree.map(torch.Tensor.double, params[CFG])

    def total(y):
        out = sampler.sample(wide, CFG, **{**batch, "y": y}, steps=2)
        return (out * batch["noise"]).sum()

    direction = torch.ones_like(batch["y"])
    slope = (torch.func.grad(total)(batch["y"]) * direction).sum()
    h = 1e-6
    finite = (total(batch["y"] + h * direction) - total(batch["y"] - h * direction)) / (2 * h)
    torch.testing.assert_close(slope, finite, rtol=1e-6, atol=1e-8)


def test_what_cannot_be_honoured_is_an_error(params):
    batch = inputs()

    def run(cfg=CFG, **changes):
        return sampler.sample(params[cfg], cfg, **{**batch, "steps": 2, **changes})

    with pytest.raises(ValueError, match="guidance is 3.5, but this model takes no guidance"):
        run(guidance=3.5)
    with pytest.raises(ValueError, match="guidance is None, but this model has a guidance embedding"):
        run(GUIDED)
    with pytest.raises(ValueError, match=r"guidance has shape \(3,\), it should be \(2,\)"):
        run(GUIDED, guidance=torch.ones(3))
    with pytest.raises(ValueError, match="cfg_scale is 5.0: uncond_txt and uncond_y"):
        run(cfg_scale=5.0, uncond_txt=batch["txt"])
    with pytest.raises(ValueError, match="uncond_txt has 4 tokens, it should have txt's 5"):
        run(cfg_scale=5.0, uncond_txt=batch["txt"][:, :4], uncond_y=batch["y"])
    with pytest.raises(ValueError, match=r"noise has shape \(2, 16, 5, 10\)"):
        run(noise=batch["noise"][:, :, :5])
    with pytest.raises(ValueError, match=r"txt has shape \(3, 5, 4096\)"):
        run(txt=torch.zeros(3, 5, 4096))
    with pytest.raises(ValueError, match=r"txt has shape \(5, 4096\), it should be \(2, L, 4096\)"):
        run(txt=batch["txt"][0])
    with pytest.raises(ValueError, match="cfg_scale is None: uncond_txt and uncond_y are read only where it is given"):
        run(uncond_txt=batch["txt"], uncond_y=batch["y"])
    with pytest.raises(ValueError, match="params are of a model whose guidance_embed is False, cfg's is True"):
        sampler.sample(params[CFG], GUIDED, **batch, steps=1, guidance=2.0)
    with pytest.raises(ValueError, match="steps 0 should be a whole number from 1 on"):
        run(steps=0)
    uncond = {"uncond_txt": batch["txt"], "uncond_y": batch["y"]}
    for scale in (torch.ones(3), torch.ones(1)):
        with pytest.raises(ValueError, match=r"cfg_scale has shape .* should be a number or a tensor \(2,\)"):
            run(cfg_scale=scale, **uncond)
    with pytest.raises(ValueError, match=r"cfg_scale is \[1.0, 2.0\], it should be a number or a tensor"):
        run(cfg_scale=[1.0, 2.0], **uncond)
    with pytest.raises(ValueError, match=r"guidance is \[1.0, 2.0\], it should be a number or a tensor"):
        run(GUIDED, guidance=[1.0, 2.0])
    with pytest.raises(ValueError, match="noise is torch.int64, it should be of a floating type"):
        run(noise=batch["noise"].long())
    fill = dataclasses.replace(CFG, in_channels=2 * CFG.in_channels)
    with pytest.raises(ValueError, match="in_channels 128 and out_channels 64 should be equal for a flow"):
        sampler.sample(flux.init(fill), fill, **batch, steps=1)


def test_a_guidance_scale_may_be_a_tensor_and_differentiated(params):
    given = inputs()
    noise = given.pop("noise")
    uncond = {"uncond_txt": given["txt"][:1].roll(1, 1), "uncond_y": given["y"][:1].roll(1, 1)}

    def at(scale):
        flow = sampler.velocity(params[CFG], CFG, **given, cfg_scale=scale, **uncond)
        return flow(noise, torch.tensor(0.6))

    one, three = at(torch.tensor(1.0)), at(3.0)
    torch.testing.assert_close(one, at(1.0), rtol=1e-5, atol=1e-5)
    # It is linear in the scale.
    _, rate = torch.func.jvp(at, (torch.tensor(1.0),), (torch.tensor(1.0),))
    torch.testing.assert_close(rate, (three - one) / 2, rtol=1e-4, atol=1e-5)
    both = at(torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(both, torch.stack([one[0], three[1]]), rtol=1e-5, atol=1e-5)
