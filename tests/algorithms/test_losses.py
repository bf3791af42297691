"""Losses against TRL's own code, at extreme gaps, and in what they refuse."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from trl_stand_in import trl_host

from llama2rt.algorithms import losses

KINDS = ["dpo", "ipo", "hinge", "kto", "nca", "exo", "robust", "simpo", "orpo"]


def settings(kind):
    return {
        "label_smoothing": 0.1 if kind in ("exo", "robust") else 0.0,
        "gamma": 0.5 if kind == "simpo" else 0.0,
    }


@pytest.fixture
def pairs():
    """Token log-probabilities of 6 pairs, up to 5 tokens each, and their masks: [12, 5]."""
    generator = torch.Generator().manual_seed(0)
    policy = -3 * torch.rand(12, 5, generator=generator)
    reference = -3 * torch.rand(12, 5, generator=generator)
    lengths = torch.randint(1, 6, (12,), generator=generator)
    mask = torch.arange(5) < lengths[:, None]
    return policy * mask, reference * mask, mask


def reduced(pairs, kind):
    policy, reference, mask = pairs
    count = mask.sum(1) if kind in losses.AVERAGED else 1
    chosen, rejected = (policy.sum(1) / count).chunk(2)
    return chosen, rejected, *(reference.sum(1) / count).chunk(2)


def trl_dpo(pairs, loss_type, beta, label_smoothing):
    """TRL's DPO loss, a mean over the pairs, from fixed token log-probabilities."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    policy, reference, mask = pairs
    host = trl_host(
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
    )

    def model(**inputs):
        zeros = torch.zeros_like(policy)
        return SimpleNamespace(
            log_probs=policy, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )

    reference_chosen, reference_rejected = reference.sum(1).chunk(2)
    prompt = torch.zeros(12, 1, dtype=torch.bool)
    inputs = {
        "input_ids": torch.ones(12, 6, dtype=torch.long),
        "completion_mask": torch.cat([prompt, mask], dim=1).long(),
        "ref_chosen_logps": reference_chosen,
        "ref_rejected_logps": reference_rejected,
    }
    return trainer._compute_loss(host, model, inputs, return_outputs=False)


@pytest.mark.parametrize(
    "kind, theirs",
    [
        ("dpo", "sigmoid"),
        ("ipo", "ipo"),
        ("hinge", "hinge"),
        ("nca", "nca_pair"),
        ("exo", "exo_pair"),
        ("robust", "robust"),
    ],
)
def test_equals_trl_dpo(pairs, kind, theirs):
    options = settings(kind)
    ours = losses.preference(*reduced(pairs, kind), kind=kind, beta=0.3, **options).mean()
    torch.testing.assert_close(ours, trl_dpo(pairs, theirs, 0.3, options["label_smoothing"]))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_equals_trl_cpo(pairs, smoothing):
    trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    host = trl_host(
        alpha=0.0,
        loss_type="simpo",
        simpo_gamma=0.7,
        beta=2.0,
        label_smoothing=smoothing,
    )
    chosen, rejected, _, _ = reduced(pairs, "simpo")
    theirs, _, _ = trainer.cpo_loss(host, chosen, rejected)
    ours = losses.preference(
        chosen, rejected, None, None, kind="simpo", beta=2.0, gamma=0.7, label_smoothing=smoothing
    )
    torch.testing.assert_close(ours, theirs)


def test_conservative_dpo_equals_trl_cpo_with_reference_ratios(pairs):
    trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    host = trl_host(
        alpha=0.0,
        loss_type="sigmoid",
        beta=0.3,
        label_smoothing=0.2,
    )
    chosen, rejected, *reference = reduced(pairs, "dpo")
    theirs, _, _ = trainer.cpo_loss(host, chosen - reference[0], rejected - reference[1])
    ours = losses.preference(
        chosen, rejected, *reference, kind="dpo", beta=0.3, label_smoothing=0.2
    )
    torch.testing.assert_close(ours, theirs)


def test_orpo_equals_trl(pairs):
    trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer
    host = trl_host(beta=0.1)
    chosen, rejected, _, _ = reduced(pairs, "orpo")
    odds, *_ = trainer.odds_ratio_loss(host, chosen, rejected)
    ours = losses.preference(chosen, rejected, None, None, kind="orpo", beta=0.1)
    torch.testing.assert_close(ours, -chosen - odds)


def test_kto_by_hand():
    chosen, rejected = torch.tensor([-1.0, -2.0]), torch.tensor([-4.0, -1.0])
    reference = torch.tensor([-3.0, -3.0])
    # Log-ratios chosen (2, 1), rejected (-1, 2): KL terms 1.5 and 0.5.
    expected = [
        (1 - sigmoid(0.1 * (c - 0.5)) + 1 - sigmoid(0.1 * (1.5 - r))) / 2
        for c, r in ((2, -1), (1, 2))
    ]
    ours = losses.preference(chosen, rejected, reference, reference, kind="kto", beta=0.1)
    torch.testing.assert_close(ours, torch.tensor(expected))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_infonca_of_two_hard_rewards_is_dpo(pairs):
    chosen, rejected, reference_chosen, reference_rejected = reduced(pairs, "dpo")
    ours = losses.infonca(
        torch.stack([chosen, rejected], 1),
        torch.stack([reference_chosen, reference_rejected], 1),
        torch.tensor([[1000.0, 0.0]]).expand(6, 2),
        beta=0.3,
    )
    theirs = losses.preference(
        chosen, rejected, reference_chosen, reference_rejected, kind="dpo", beta=0.3
    )
    torch.testing.assert_close(ours, theirs)


def test_ranking_equals_trl():
    trainer = pytest.importorskip("trl.trainer.reward_trainer").RewardTrainer
    chosen, rejected = torch.randn(7), torch.randn(7)
    margin = torch.rand(7)
    logits = torch.cat([chosen, rejected])[:, None]

    def model(**inputs):
        return SimpleNamespace(logits=logits)

    host = trl_host(args=SimpleNamespace(center_rewards_coefficient=None))
    theirs = trainer.compute_loss(host, model, {"margin": margin})
    torch.testing.assert_close(losses.ranking(chosen, rejected, margin).mean(), theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gap", [-1e4, -100.0, 0.0, 100.0, 1e4])
def test_finite_at_extreme_gaps(kind, gap):
    low = torch.tensor([-1e4 - 1.0])
    chosen = (low + max(gap, 0.0)).requires_grad_()
    rejected = (low + max(-gap, 0.0)).requires_grad_()
    loss = losses.preference(chosen, rejected, low, low, kind=kind, beta=1.0, **settings(kind))
    loss.sum().backward()
    for value in (loss, chosen.grad, rejected.grad):
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("logprob", [0.0, -1e-6, -1e-3, -0.693, -0.6932, -5.0, -200.0])
def test_orpo_odds_keep_their_digits(logprob):
    x = torch.tensor([logprob], requires_grad=True)
    loss = losses.preference(x, torch.tensor([-1.0]), None, None, kind="orpo", beta=1.0)
    loss.sum().backward()
    assert torch.isfinite(x.grad).all()
    exact = min(logprob, -1e-7)
    odds = exact - math.log(-math.expm1(exact)) + 1 + math.log(-math.expm1(-1.0))
    assert loss.item() == pytest.approx(-logprob + math.log1p(math.exp(-odds)), rel=1e-4, abs=1e-5)


def test_ranking_is_finite_and_pulls_at_gap_100():
    chosen = torch.tensor([-100.0, 100.0], requires_grad=True)
    loss = losses.ranking(chosen, torch.zeros(2), 3.0)
    loss.sum().backward()
    torch.testing.assert_close(loss[0], torch.tensor(103.0))
    torch.testing.assert_close(chosen.grad[0], torch.tensor(-1.0))


def test_safety_loss():
    scores = torch.tensor([2.0, -3.0])
    ours = losses.safety(scores, torch.tensor([True, False]))
    torch.testing.assert_close(ours, -F.logsigmoid(torch.tensor([2.0, 3.0])))


@pytest.mark.parametrize("kind", ["ipo", "hinge", "kto", "nca", "orpo"])
def test_unused_label_smoothing_is_refused(kind):
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="label_smoothing"):
        losses.preference(x, x, x, x, kind=kind, beta=0.1, label_smoothing=0.1)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kind": "exo"}, "label_smoothing"),
        ({"kind": "dpo", "label_smoothing": 0.5}, "label_smoothing"),
        ({"kind": "dpo", "gamma": 1.0}, "gamma"),
        ({"kind": "slic"}, "kind"),
    ],
)
def test_impossible_options_are_refused(options, named):
    x = torch.zeros(2)
    with pytest.raises(ValueError, match=named):
        losses.preference(x, x, x, x, beta=0.1, **options)


def test_missing_reference_is_refused():
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="reference"):
        losses.preference(x, x, None, None, kind="dpo", beta=0.1)


def test_smoothing_changes_every_kind_that_takes_it(pairs):
    for kind in losses.SMOOTHED:
        values = [
            losses.preference(*reduced(pairs, kind), kind=kind, beta=0.3, label_smoothing=e)
            for e in (0.1, 0.2)
        ]
        assert not torch.allclose(*values)


def test_policy_clip():
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    ratio = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.0, 1.5])
    logprob = ratio.log().requires_grad_()
    loss, clipped = losses.policy_clip(logprob, torch.zeros(6), advantages, 0.2)
    torch.testing.assert_close(loss, torch.tensor([-0.5, -1.0, -1.2, 0.8, 1.0, 1.5]))
    assert clipped.tolist() == [False, False, True, True, False, False]
    loss.sum().backward()
    assert (logprob.grad == 0).tolist() == clipped.tolist()


def test_value_clip():
    values = torch.tensor([0.1, 1.0, -1.0], requires_grad=True)
    loss, clipped = losses.value_clip(values, torch.zeros(3), torch.full((3,), 2.0), 0.2)
    # Moving towards the return by more than the clip pays as if it had stopped there; moving away
    # is never excused.
    torch.testing.assert_close(loss, torch.tensor([1.805, 1.62, 4.5]))
    assert clipped.tolist() == [False, True, False]
