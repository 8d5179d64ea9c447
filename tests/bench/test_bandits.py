"""Query bandits: features, rewards, policies against their closed forms, regret."""

import math

import pytest
import torch

from regard.bench.bandits import (
    FEATURES,
    REWRITES,
    UCB,
    BetaThompson,
    EpsilonGreedy,
    Exp3,
    FollowTheLeader,
    LinearThompson,
    LinUCB,
    Static,
    bleu1,
    fuzzy,
    play,
    qa_reward,
    query_features,
    replay,
    rewrite_prompt,
    win_rate,
)


def world(rounds=400, features=5, arms=3, seed=0, noise=0.05):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(rounds, features, generator=generator) < 0.5).float()
    weights = torch.randn(arms, features, generator=generator)
    rewards = (0.5 + 0.15 * x @ weights.T + noise * torch.randn(rounds, arms, generator=generator)).clamp(0, 1)
    return x, rewards


@pytest.mark.parametrize("bias", [True, False])
def test_ridge_by_rank_one_updates_is_the_direct_solution(bias):
    x, rewards = world()
    policy = LinUCB(3, 5, alpha=0.3, ridge=0.7, bias=bias)
    done = replay(policy, x, rewards)
    rows = torch.cat([x, torch.ones(len(x), 1)], 1) if bias else x
    for arm in range(3):
        mine = rows[done.arms == arm].double()
        b = 0.7 * torch.eye(rows.shape[1], dtype=torch.float64) + mine.T @ mine
        torch.testing.assert_close(policy.inverse[arm], b.inverse(), rtol=1e-8, atol=1e-10)
        f = (mine * rewards[done.arms == arm, arm, None].double()).sum(0)
        torch.testing.assert_close(policy.weights()[arm], b.inverse() @ f, rtol=1e-8, atol=1e-10)
    value = (
        policy.weights()[0] @ rows[0].double() + 0.3 * (rows[0].double() @ policy.inverse[0] @ rows[0].double()).sqrt()
    )
    torch.testing.assert_close(policy.values(x[0])[0], value)


def test_thompson_without_width_and_ucb_without_bonus_are_greedy_ridge():
    x, rewards = world()
    policies = [FollowTheLeader(3, 5), LinearThompson(3, 5, v=0.0), LinUCB(3, 5, alpha=0.0)]
    for number, row in enumerate(x[:100]):
        values = [policy.values(row) for policy in policies]
        torch.testing.assert_close(values[0], values[1])
        torch.testing.assert_close(values[0], values[2])
        for policy in policies:
            policy.update(row, number % 3, float(rewards[number, number % 3]))


def test_thompson_draws_have_the_width_of_the_posterior():
    policy = LinearThompson(1, 2, v=0.5, ridge=2.0, bias=False)
    x = torch.tensor([1.0, 3.0])
    draws = torch.stack([policy.values(x)[0] for _ in range(4000)])
    assert draws.mean().abs() < 0.1
    assert draws.std() == pytest.approx(0.5 * math.sqrt(10 / 2.0), rel=0.05)


def test_a_constant_context_is_a_gaussian_bandit():
    policy = LinearThompson(2, 1, ridge=1.0, bias=False)
    one = torch.ones(1)
    for reward in (1.0, 0.0, 0.5):
        policy.update(one, 0, reward)
    assert float(policy.weights()[0, 0]) == pytest.approx(1.5 / 4)
    assert float(policy.inverse[0, 0, 0]) == pytest.approx(1 / 4)


def test_contextual_beats_what_looks_at_no_context_where_the_best_arm_depends_on_it():
    x, rewards = world(1500)
    best = lambda policy: replay(policy, x, rewards)  # noqa: E731
    contextual = best(LinearThompson(3, 5))
    others = [
        best(policy)
        for policy in (BetaThompson(3), UCB(3), EpsilonGreedy(3), Exp3(3), *(Static(3, a) for a in range(3)))
    ]
    assert contextual.total > max(other.total for other in others)
    late = contextual.oracle_regret[-1] - contextual.oracle_regret[-500]
    assert late < 0.5 * contextual.oracle_regret[499]  # sub-linear
    statics = others[-3:]
    assert min(float(other.regret[-1]) for other in statics) == pytest.approx(0.0, abs=1e-9)


def test_policies_without_context_find_the_best_arm():
    generator = torch.Generator().manual_seed(1)
    rewards = (torch.rand(2000, 4, generator=generator) < torch.tensor([0.2, 0.5, 0.8, 0.4])).float()
    for policy in (BetaThompson(4), UCB(4, c=0.5), EpsilonGreedy(4), Exp3(4)):
        assert float((replay(policy, None, rewards).arms[1000:] == 2).float().mean()) > 0.7


def test_l1_switches_small_weights_off():
    x, rewards = world()
    plain, cut = FollowTheLeader(3, 5), FollowTheLeader(3, 5, l1=10.0)
    for policy in (plain, cut):
        for row, reward in zip(x, rewards[:, 0]):
            policy.update(row, 0, float(reward))
    assert plain.values(x[0])[0] != 0 and cut.values(x[0])[0] == 0


def test_rewards():
    assert qa_reward("Paris", "Paris") == pytest.approx(1.0)
    assert qa_reward("", "Paris") == 0.0 == qa_reward("  ", "Paris")
    assert bleu1("the the cat", "the cat sat") == pytest.approx(2 / 3)
    # RapidFuzz 3: ratio("kitten", "sitting") = 61.54, ratio("abc", "xyz") = 0
    assert fuzzy("kitten", "sitting") == pytest.approx(0.6153846)
    assert fuzzy("abc", "xyz") == 0 and fuzzy("", "") == 1
    told = qa_reward("It is in Lyon", "Paris", judge=lambda answer, gold: 1.0)
    assert told == pytest.approx(0.6 + 0.3 * fuzzy("It is in Lyon", "Paris"))
    assert qa_reward("The capital is Paris.", "paris") > 0.6


def test_features():
    def on(text, **options):
        return {name for name, value in zip(FEATURES, query_features(text, **options)) if value}

    assert len(FEATURES) == 17 == len(query_features("x"))
    assert {"negation", "anaphora", "intention_grounding", "answerability"} <= on("Why did it not work?")
    assert "superlative" in on("Name the tallest tower") and "constraints" in on("in 20 words at most, explain")
    assert "entities" in on("Where is Lyon?") and "entities" not in on("Where is it?")
    assert "excessive_detail" in on("word " * 31) and "excessive_detail" not in on("word " * 30)
    assert on("x", labeller=lambda text: dict.fromkeys(FEATURES, True)) == set(FEATURES)
    assert rewrite_prompt("none", "q") is None and rewrite_prompt("expand", "q").endswith("\n\nq")
    assert len(REWRITES) == 6


def test_play_and_win_rate():
    done = play(Static(2, 1), [(None, "a"), (None, "b")], lambda query, arm: {"a": 0.5, "b": 1.0}[query] * arm)
    assert done.total == 1.5 and done.regret is None
    assert win_rate(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 4.0])) == 0.5


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Static(2, 2), "arm"),
        (lambda: LinearThompson(2, 3).select(torch.zeros(4)), "x: got"),
        (lambda: BetaThompson(2).update(None, 0, 1.5), "reward"),
        (lambda: UCB(2).update(None, 5, 0.5), "arm"),
        (lambda: UCB(2).update(None, 0, math.nan), "reward"),
        (lambda: replay(UCB(2), None, torch.zeros(3, 4)), "rewards"),
        (lambda: replay(LinUCB(2, 2), torch.zeros(2, 2), torch.zeros(3, 2)), "features"),
        (lambda: query_features(" "), "text"),
        (lambda: query_features("a", labeller=lambda text: {"polite": True}), "labeller"),
        (lambda: rewrite_prompt("rewrite", "q"), "arm"),
        (lambda: qa_reward("a", ""), "gold"),
        (lambda: win_rate(torch.zeros(2), torch.zeros(3)), "ours"),
    ],
)
def test_bad_input(make, text):
    with pytest.raises(ValueError, match=text):
        make()
