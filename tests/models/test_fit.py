"""FIT beyond its recorded numbers: who depends on whom, limits, generation, what is refused."""

import pytest
import torch

import regard
from regard.models import FIT, FITAR, FITDenoiser, parse_layers
from regard.nn import GroupReadWrite, group_image, ungroup_image


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def lively(model):
    """Larger weights, so that every path shows in the output."""
    for p in model.parameters():
        if p.dim() > 1:
            p.data *= 2
        else:
            p.data += 0.1 * torch.randn_like(p)
    return model.eval()


def small(layers="(1)1(1)2(1)", **options):
    sizes = {"groups": 3, "tokens": 4, "latents": 2, "in_dim": 5, "dim": 16, "latent_dim": 12, "num_heads": 2}
    return lively(FIT(layers, **(sizes | options)))


def small_ar(layers="(1)1(2)1(1)", **options):
    sizes = {"groups": 4, "tokens": 5, "latents": 2, "dim": 16, "latent_dim": 12, "num_heads": 2}
    return lively(FITAR(11, layers, **(sizes | options)))


def test_layer_strings():
    assert parse_layers("(4)6(4)") == [(4, 6), (4, 0)]
    assert parse_layers("(1)2(3)4") == [(1, 2), (3, 4)]
    assert parse_layers("(12)0") == [(12, 0)]


@pytest.mark.parametrize("layers", ["", "4", "(2)0(2)", "(2)4(", "2(3)", "(a)1", 3])
def test_bad_layer_strings(layers):
    with pytest.raises(ValueError, match="layers: got"):
        parse_layers(layers)


def test_without_global_layers_groups_are_independent_encoders():
    model = small("(2)0")
    x = torch.randn(2, 3, 4, 5)
    whole, _ = model(x)
    alone = small("(2)0", groups=1)
    alone.load_state_dict({k: v for k, v in model.state_dict().items() if k != "latent_positions"}, strict=False)
    for group in range(3):
        torch.testing.assert_close(alone(x[:, group : group + 1])[0][:, 0], whole[:, group])


def test_groups_may_change_places_with_their_latents():
    model = small()
    x, order = torch.randn(2, 3, 4, 5), torch.tensor([2, 0, 1])
    tokens, latents = model(x)
    with torch.no_grad():
        model.latent_positions.copy_(model.latent_positions.unflatten(0, (3, 2))[order].flatten(0, 1))
    moved_tokens, moved_latents = model(x[:, order])
    torch.testing.assert_close(moved_tokens, tokens[:, order])
    torch.testing.assert_close(moved_latents, latents[:, order])


def test_global_layers_reach_everywhere_and_causal_ones_only_back():
    x = torch.randn(1, 3, 4, 5, requires_grad=True)
    for causal in (False, True):
        model = small(causal=causal)
        (grad,) = torch.autograd.grad(model(x)[0][0, 1].square().sum(), x)
        reached = grad[0].abs().sum((-1, -2)) > 0
        assert reached.tolist() == [True, True, not causal]


def test_side_tokens_stand_in_front_and_matter():
    model = small(side_dim=6)
    x, y = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 2, 6)
    tokens, latents = model(x, y)
    assert tokens.shape == (2, 3, 6, 16) and latents.shape == (2, 3, 2, 12)
    assert model(x)[0].shape == (2, 3, 4, 16)
    assert not torch.allclose(model(x, y + 1)[0][:, :, 2:], tokens[:, :, 2:])


def test_training_noise_and_gradients():
    model = small(dropout=0.1, attention_dropout=0.1, drop_path=0.3).train()
    x = torch.randn(4, 3, 4, 5)
    tokens, latents = model(x)
    assert not torch.equal(model(x)[0], tokens)
    (tokens.square().mean() + latents.square().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_autoregressive_looks_back_only():
    model = small_ar()
    ids = torch.randint(11, (1, 20))
    logits = model(ids)
    assert logits.shape == (1, 20, 11)
    torch.testing.assert_close(model(ids.view(1, 4, 5)).flatten(1, 2), logits)
    for place in (0, 4, 5, 13, 19):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 1) % 11
        other = model(changed)
        torch.testing.assert_close(other[:, :place], logits[:, :place], rtol=0, atol=1e-6)
        differs = (other - logits).abs().amax(-1)[0] > 1e-6
        assert differs[place]
        later = torch.arange(20) // 5 > place // 5
        assert differs[later].all()


@pytest.mark.parametrize("length", [1, 4, 5, 6, 13])
def test_shorter_inputs_give_the_first_logits(length):
    model = small_ar()
    ids = torch.randint(11, (2, 20))
    torch.testing.assert_close(model(ids[:, :length]), model(ids)[:, :length], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layers", ["(1)1(2)1(1)", "(2)0", "(1)1(1)1"])
@pytest.mark.parametrize("prompt", [0, 3, 5, 9])
def test_generation_is_the_argmax_of_teacher_forcing(layers, prompt):
    model = small_ar(layers)
    ids = torch.randint(11, (2, prompt))
    made = model.generate(ids, 20 - prompt)
    assert made.shape == (2, 20) and torch.equal(made[:, :prompt], ids)
    forced = model(torch.nn.functional.pad(made[:, :-1], (1, 0), value=model.start)).argmax(-1)
    assert torch.equal(forced[:, prompt:], made[:, prompt:])
    assert model.generate(ids, 0).shape == ids.shape


def test_sampling_follows_its_seed_and_its_limits():
    model = small_ar()
    ids = torch.zeros(2, 0, dtype=torch.long)

    def draw(seed):
        return model.generate(ids, 12, do_sample=True, top_k=5, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(model.generate(ids, 12, do_sample=True, top_k=1), model.generate(ids, 12))
    sampling = regard.models.Sampling(do_sample=True, top_p=0.5)
    shares = sampling.probabilities(torch.tensor([[0.3, 0.25, 0.25, 0.2]]).log())
    torch.testing.assert_close(
        shares, torch.tensor([[0.3, 0.25, 0.25, 0.2]]).masked_fill(shares == 0, 0) / 0.55, atol=1e-5, rtol=0
    )
    assert (shares > 0).sum() == 2


def test_loss_is_the_mean_over_tokens_and_trains():
    model = small_ar()
    ids = torch.randint(11, (3, 17))
    logits = model(torch.nn.functional.pad(ids[:, :-1], (1, 0)))
    expected = -logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(model.loss(ids), expected.mean())
    cut = ids.clone()
    cut[1, 9:] = -100
    kept = expected.clone()
    kept[1, 9:] = 0
    torch.testing.assert_close(model.loss(cut), kept.sum() / (cut >= 0).sum())
    model.loss(ids).backward()
    assert model.embedding.weight.grad.abs().sum() > 0


def test_denoiser_reads_time_condition_and_latents():
    sizes = {"groups": 3, "tokens": 4, "latents": 2, "in_dim": 5, "dim": 16, "latent_dim": 12, "num_heads": 2}
    model = lively(FITDenoiser("(1)1(1)1(1)", condition_dim=7, self_condition=True, **sizes))
    x, time, condition = torch.randn(2, 3, 4, 5), torch.rand(2), torch.randn(2, 7)
    out, latents = model(x, time, condition)
    assert out.shape == x.shape and latents.shape == (2, *model.latent_shape)
    for other in ((x, time + 0.1, condition), (x, time, condition + 1), (x, time, condition, latents)):
        assert not torch.allclose(model(*other)[0], out, atol=1e-4)
    torch.testing.assert_close(model(x, time, condition, torch.zeros_like(latents))[0], out)
    fresh = FITDenoiser("(1)1(1)1(1)", condition_dim=7, self_condition=True, **sizes).eval()
    torch.testing.assert_close(fresh(x, time, condition, latents)[0], fresh(x, time, condition)[0])


def test_images_in_groups_and_back():
    x = torch.arange(2 * 3 * 8 * 12).view(2, 3, 8, 12)
    for order in ("raster", "snake"):
        tokens = group_image(x, 4, 2, order)
        assert tokens.shape == (2, 6, 4, 12)
        assert torch.equal(ungroup_image(tokens, 8, 12, 4, 2, order), x)
    assert torch.equal(group_image(x, 4, order="snake")[:, 3:], group_image(x, 4)[:, 3:].flip(1))
    assert torch.equal(group_image(x, 4, 2)[0, 1, 0], x[0, :, :2, 4:6].permute(1, 2, 0).flatten())


def test_read_and_write_stay_in_their_group():
    part = lively(GroupReadWrite(16, 12, 4, 2))
    x, latents = torch.randn(2, 3, 5, 16, requires_grad=True), torch.randn(2, 3, 2, 12)
    (grad,) = torch.autograd.grad(part.read(latents, x)[:, 1].square().sum(), x)
    assert (grad.abs().sum((0, 2, 3)) > 0).tolist() == [False, True, False]
    assert part._read.attention.head_dim == 6
    with pytest.raises(ValueError, match="write"):
        GroupReadWrite(16, 12, 2, writes=False).write(x, latents)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small(groups=0), "groups"),
        (lambda: small(num_heads=40), "num_heads"),
        (lambda: small(position="sin_cos_2d", tokens=5), "position"),
        (lambda: small(position="rotary"), "position"),
        (lambda: small()(torch.randn(1, 3, 5, 5)), "x: got 'shape"),
        (lambda: small()(torch.randn(1, 3, 4, 5), torch.randn(1, 3, 1, 6)), "side_dim"),
        (lambda: small(side_dim=6)(torch.randn(1, 3, 4, 5), torch.randn(1, 2, 1, 6)), "y: got"),
        (lambda: small(drop_path=1.0), "drop_path"),
        (lambda: small_ar()(torch.zeros(1, 21, dtype=torch.long)), "at most 20"),
        (lambda: small_ar()(torch.zeros(1, 4, 6, dtype=torch.long)), "ids"),
        (lambda: small_ar().generate(torch.zeros(1, 18, dtype=torch.long), 3), "max_new_tokens"),
        (lambda: small_ar(start=11), "start"),
        (lambda: group_image(torch.zeros(1, 3, 8, 9), 4), "tile"),
        (lambda: group_image(torch.zeros(1, 3, 8, 8), 4, 3), "tile"),
        (lambda: regard.models.Sampling(temperature=0), "temperature"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_half_precision():
    sizes = {"groups": 3, "tokens": 4, "latents": 2, "in_dim": 5, "dim": 16, "latent_dim": 12, "num_heads": 2}
    denoiser = lively(FITDenoiser("(1)1(1)", condition_dim=7, **sizes))
    inputs = torch.randn(2, 3, 4, 5), torch.rand(2), torch.randn(2, 7)
    whole = denoiser(*inputs)[0]
    half = denoiser.bfloat16()(*(x.bfloat16() for x in inputs))[0]
    assert half.dtype == torch.bfloat16 and (half - whole).abs().max() < 0.1 * whole.abs().max()
    model = small_ar().bfloat16()
    assert model.generate(torch.randint(11, (2, 3)), 9).shape == (2, 12)
