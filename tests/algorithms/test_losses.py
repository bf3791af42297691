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


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.7)])
def test_unpaired_kto_equals_trl(pairs, weights):
    """And its KL, whose estimate is the mean log-ratio of other prompts' answers."""
    trainer = pytest.importorskip("trl.trainer.kto_trainer").KTOTrainer
    policy, reference, mask = pairs
    mismatched, mismatched_reference = policy.roll(1, 0) + 1, reference.roll(1, 0)
    desirable = torch.arange(12) % 3 == 0
    host = trl_host(
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=0.3,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        _tp_size=1,
    )

    def model(input_ids, **inputs):
        values = mismatched if input_ids[0, 0] == 2 else policy
        zeros = torch.zeros_like(values)
        return SimpleNamespace(log_probs=values, entropy=zeros, mean_logits=zeros)

    host._compute_kl_logps = lambda llm, batch: trainer._compute_kl_logps(host, llm, batch)
    ids = torch.ones(12, 6, dtype=torch.long)
    completion = torch.cat([torch.zeros(12, 1, dtype=torch.bool), mask], dim=1).long()
    inputs = {
        "input_ids": ids,
        "attention_mask": ids,
        "completion_mask": completion,
        "KL_input_ids": 2 * ids,
        "KL_attention_mask": ids,
        "KL_completion_mask": completion,
        "label": desirable,
        "ref_logps": reference.sum(1),
        "ref_KL_logps": mismatched_reference.sum(1),
    }
    theirs = trainer._compute_loss(host, model, inputs, return_outputs=False)
    kl = float((mismatched.sum(1) - mismatched_reference.sum(1)).mean())
    assert kl > 0.1
    ratio = policy.sum(1) - reference.sum(1)
    ours = losses.kto_unpaired(ratio, desirable, kl, beta=0.3, weights=weights)
    torch.testing.assert_close(ours.mean(), theirs, rtol=1e-5, atol=1e-6)
    floored = losses.kto_unpaired(ratio, desirable, -3.0, beta=0.3, weights=weights)
    at_zero = losses.kto_unpaired(ratio, desirable, 0.0, beta=0.3, weights=weights)
    assert torch.equal(floored, at_zero)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_infonca_of_two_hard_rewards_is_dpo(pairs):
    chosen, rejected, reference_chosen, reference_rejected = reduced(pairs, "dpo")
    ratio = torch.stack([chosen - reference_chosen, rejected - reference_rejected], 1)
    labels = losses.soft_labels(torch.tensor([[1000.0, 0.0]]).expand(6, 2), 1.0)
    ours = losses.infonca(ratio.flatten(), labels.flatten(), torch.full((6,), 2), 0.3)
    theirs = losses.preference(
        chosen, rejected, reference_chosen, reference_rejected, kind="dpo", beta=0.3
    )
    torch.testing.assert_close(ours, theirs)


def test_group_losses_by_hand():
    """Two prompts, of three answers and of two, in fp64 as the paper's formulas stand."""
    ratio = torch.tensor([0.5, -1.0, 2.0, 300.0, -200.0], dtype=torch.float64)
    rewards = [torch.tensor([1.0, 0.0, -2.0]), torch.tensor([0.2, 0.1])]
    labels = torch.cat([losses.soft_labels(r.double(), 0.5) for r in rewards])
    sizes = torch.tensor([3, 2])
    infonca, nca = [], []
    for values, wanted in zip(ratio.split([3, 2]), labels.split([3, 2]), strict=True):
        logits = 0.1 * values
        infonca.append(-(wanted * logits.log_softmax(0)).sum())
        noise = F.logsigmoid(-logits).mean()
        nca.append(-(wanted * F.logsigmoid(logits)).sum() - noise)
    torch.testing.assert_close(losses.infonca(ratio, labels, sizes, 0.1), torch.stack(infonca))
    torch.testing.assert_close(losses.nca_group(ratio, labels, sizes, 0.1), torch.stack(nca))
    torch.testing.assert_close(labels[:3], (rewards[0].double() / 0.5).softmax(0))


def test_nca_of_two_hard_labels_is_the_pairs(pairs):
    """Which equals TRL's."""
    chosen, rejected, *reference = reduced(pairs, "nca")
    ratio = torch.stack([chosen - reference[0], rejected - reference[1]], 1).flatten()
    ours = losses.nca_group(ratio, torch.tensor([1.0, 0.0]).repeat(6), torch.full((6,), 2), 0.3)
    theirs = losses.preference(chosen, rejected, *reference, kind="nca", beta=0.3)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("loss", [losses.infonca, losses.nca_group])
def test_group_losses_are_finite_at_extreme_gaps(loss):
    ratio = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    value = loss(ratio, torch.tensor([0.0, 1.0, 0.0]), torch.tensor([3]), 1.0)
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(ratio.grad).all()


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
