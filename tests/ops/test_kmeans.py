"""Online k-means and clusters of equal size."""

import pytest
import torch
from torch.nn import functional as F

from regard.ops.kmeans import (
    balanced_clusters,
    cluster_affinity,
    cluster_totals,
    ema_kmeans_step,
    spherical_kmeans,
    spherical_kmeans_step,
)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def test_each_centroid_takes_its_nearest_tokens_in_order_of_position():
    affinity = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.7, 0.3], [0.0, 0.1]])[None, None]
    assert balanced_clusters(affinity, 2)[0, 0].tolist() == [[1, 2], [0, 2]]
    assert balanced_clusters(affinity, 9)[0, 0].tolist() == [[0, 1, 2, 3]] * 2


def test_equal_affinities_go_to_the_earlier_token():
    assert balanced_clusters(torch.zeros(1, 1, 6, 1), 3)[0, 0, 0].tolist() == [0, 1, 2]


def test_affinities_that_are_no_numbers_come_last():
    affinity = torch.tensor([torch.nan, 1.0, 0.5, torch.nan, -3.0]).view(1, 1, 5, 1)
    assert balanced_clusters(affinity, 3)[0, 0, 0].tolist() == [1, 2, 4]
    assert balanced_clusters(affinity, 4)[0, 0, 0].tolist() == [0, 1, 2, 4]


def test_padding_is_never_taken():
    affinity = torch.rand(2, 3, 8, 4, generator=gen())
    keep = torch.arange(8) >= torch.tensor([[0], [5]])
    chosen = balanced_clusters(affinity, 4, keep=keep)
    assert int(chosen[0].min()) >= 0
    assert bool(((chosen[1] >= 5) | (chosen[1] == -1)).all())
    assert bool((chosen[1][..., -1] == -1).all()) and bool((chosen[1][..., 0] >= 5).all())


def test_strided_clusters_spread_over_the_order():
    affinity = torch.tensor([5.0, 4, 3, 2, 1, 0, -1]).view(1, 1, 7, 1)
    assert balanced_clusters(affinity, 3, strided=True)[0, 0, 0].tolist() == [0, 2, 4]


def test_totals_count_and_add():
    x = torch.randn(2, 1, 5, 3, generator=gen())
    nearest = torch.tensor([[[0, 0, 1, 2, 2]], [[2, 2, 2, 2, 2]]])
    keep = torch.tensor([[[True] * 5], [[True, False, False, False, False]]])
    counts, sums = cluster_totals(x, nearest, 4, keep)
    assert counts.tolist() == [[2, 1, 3, 0]]
    assert torch.allclose(sums[0, 2], x[0, 0, 3] + x[0, 0, 4] + x[1, 0, 0])


def test_moving_averages_of_a_constant_stream_settle_on_the_cluster_means():
    means, ema_means = torch.randn(1, 2, 3, generator=gen()), torch.zeros(1, 2, 3)
    ema_count = torch.zeros(1, 2)
    counts, sums = torch.tensor([[4.0, 1.0]]), torch.tensor([[[8.0, 0, 4], [1, 2, 3]]])
    for _ in range(200):
        ema_kmeans_step(means, ema_count, ema_means, counts, sums, decay=0.9)
    assert torch.allclose(means, sums / counts[..., None], atol=1e-3)


def test_spherical_kmeans_finds_separate_directions():
    axes = F.normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]), dim=-1)
    x = axes.repeat_interleave(20, 0) + 0.05 * torch.randn(60, 3, generator=gen())
    best = max(
        float(
            cluster_affinity(axes[None, None], spherical_kmeans(x[None, None], 3, generator=gen(seed))).amax(-1).min()
        )
        for seed in range(5)
    )
    assert best > 0.99
    means = spherical_kmeans(x[None, None], 3, generator=gen())
    assert torch.allclose(means.norm(dim=-1), torch.ones(1, 3), atol=1e-5)


def test_a_centroid_that_nobody_is_near_stays():
    means = F.normalize(torch.tensor([[[1.0, 0], [-1, 0]]]), dim=-1)
    after = spherical_kmeans_step(torch.tensor([[[[2.0, 1.0], [2.0, -1.0]]]]), means)
    assert torch.allclose(after[0, 0], torch.tensor([1.0, 0])) and torch.equal(after[0, 1], means[0, 1])


def test_more_clusters_than_tokens_and_bad_input():
    assert spherical_kmeans(torch.randn(1, 2, 3, 4), 7, iterations=1).shape == (2, 7, 4)
    with pytest.raises(ValueError, match="means"):
        cluster_affinity(torch.randn(1, 2, 3, 4), torch.randn(3, 5, 4))
    with pytest.raises(ValueError, match="width"):
        balanced_clusters(torch.randn(1, 1, 4, 2), 0)
    with pytest.raises(ValueError, match="keep"):
        balanced_clusters(torch.randn(1, 1, 4, 2), 2, keep=torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="x"):
        spherical_kmeans(torch.randn(1, 1, 0, 4), 2)
