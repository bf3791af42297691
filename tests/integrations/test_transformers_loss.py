"""The training loss of a patched Llama: transformers' conventions, and nothing passed over."""

import pytest
import torch
from memory import peak_extra_bytes
from numerics import same_bits
from patched_llama import LENGTH, ROWS, VOCABULARY, batch, both, gradients, near
from torch import Tensor, nn
from torch.nn.utils import prune


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_items_in_batch": 11},
        {"num_items_in_batch": torch.tensor(11)},
        {"ignore_index": 7},
        {"shift_labels": torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)},
    ],
    ids=["mean", "number", "tensor", "ignore", "shifted"],
)
def test_loss_conventions(settings):
    ours, theirs = both()
    inputs, _ = batch("plain")
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, :4] = settings.get("ignore_index", -100)
    losses = [model.train()(**inputs, **settings).loss for model in (ours, theirs)]
    assert near(*losses)


@pytest.mark.parametrize("settings", [{}, {"num_items_in_batch": 11}])
def test_a_batch_without_labels_to_predict(settings):
    ours, theirs = both()
    inputs, _ = batch("plain")
    inputs["labels"] = torch.full((ROWS, LENGTH), -100)
    losses = [model.train()(**inputs, **settings).loss for model in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=0, atol=0, equal_nan=True)


def test_a_wrong_label_is_refused():
    ours, _ = both()
    inputs, _ = batch("plain")
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][1, 3] = -5
    with pytest.raises(ValueError, match="targets: "):
        ours.train()(**inputs)


def test_labels_of_the_wrong_number_are_refused():
    ours, _ = both()
    inputs, _ = batch("plain")
    inputs["labels"] = inputs["input_ids"][:, 1:]
    with pytest.raises(ValueError, match="labels: expected 60, one a token, got 57"):
        ours.train()(**inputs)


def test_labels_of_the_logits_that_are_kept():
    ours, theirs = both()
    inputs, _ = batch("plain")
    inputs |= {"labels": inputs["input_ids"][:, -5:], "logits_to_keep": 5}
    assert near(*(model.train()(**inputs).loss for model in (ours, theirs)))


def test_training_never_holds_the_logits():
    ours, theirs = both(vocab_size=16384)
    inputs = {"input_ids": torch.randint(0, 16384, (2, 256))}
    inputs["labels"] = inputs["input_ids"]
    logits_bytes = 2 * 256 * 16384 * 4

    def peak(model) -> int:
        return peak_extra_bytes(lambda: tuple(gradients(model, **inputs).values()))

    assert peak(theirs) > 2 * logits_bytes  # what there is to save
    assert peak(ours) < logits_bytes / 2


def test_evaluation_gives_logits_beside_the_loss(calls):
    ours, theirs = both()
    inputs, _ = batch("plain")
    found, wanted = (model(**inputs, labels=inputs["input_ids"]) for model in (ours, theirs))
    assert near(found.loss, wanted.loss) and near(found.logits, wanted.logits)
    assert calls["token_logprob"] == 0
    last = ours(**inputs, logits_to_keep=1).logits
    assert last.shape == (ROWS, 1, VOCABULARY) and near(last, wanted.logits[:, -1:])


def test_a_loss_of_the_callers_own_is_used():
    ours, _ = both()
    inputs, _ = batch("plain")
    ours.loss_function = lambda logits, labels, **_: logits.sum()
    result = ours.train()(**inputs, labels=inputs["input_ids"])
    assert same_bits(result.loss, result.logits.sum())


class Doubled(nn.Linear):
    """An output layer that is more than its weight, as an adapter's is."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_an_output_layer_of_the_callers_own_is_used():
    ours, theirs = both()
    ours.lm_head.__class__ = theirs.lm_head.__class__ = Doubled
    inputs, _ = batch("plain")
    inputs["labels"] = inputs["input_ids"]
    assert near(*(model.train()(**inputs).loss for model in (ours, theirs)))


def double_by_hook(head):
    head.register_forward_hook(lambda module, inputs, output: 2 * output)


def double_by_forward(head):
    inner = head.forward
    head.forward = lambda x: 2 * inner(x)


def double_by_weight_norm(head):
    nn.utils.weight_norm(head)
    with torch.no_grad():
        head.weight_g.mul_(2)


def double_by_pruning(head):
    prune.identity(head, "weight")
    with torch.no_grad():
        head.weight_orig.mul_(2)


def watch_gradients(head):
    head.register_full_backward_hook(lambda module, *gradients: None)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        double_by_hook,
        double_by_forward,
        double_by_weight_norm,
        double_by_pruning,
        watch_gradients,
    ],
)
def test_what_hangs_on_the_output_layer_is_used(change, calls):
    ours, theirs = both()
    inputs, _ = batch("plain")
    inputs["labels"] = inputs["input_ids"]
    for model in (ours, theirs):
        change(model.lm_head)
    assert near(*(model.train()(**inputs).loss for model in (ours, theirs)))
    assert calls["token_logprob"] == 0
