"""Padding is counted from the inputs of the model by all that tells it, and none of that is believed alone."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kernels_check.judges.batch import judge_padding
from kernels_check.observation.inputs import ModelCall
from kernels_check.observation.padding import count_padding

PAD, END, IMAGE = 0, 9, 8


class Model(nn.Module):
    """A model that is nothing but its configuration."""

    def __init__(self, **config):
        super().__init__()
        self.config = SimpleNamespace(**{"pad_token_id": PAD, "eos_token_id": END, "image_token_id": IMAGE} | config)


def calls(*arguments, gradients=True):
    model = Model()
    return [ModelCall(module=model, arguments=one, gradients=gradients) for one in arguments]


def count(model=None, **arguments):
    """Surely padded, doubtful and all positions of one call."""
    seen = count_padding(model or Model(), calls(arguments))
    return seen.padded, seen.doubtful, seen.tokens


def ids(*rows):
    return torch.tensor(rows)


PADDED = ids([5, 6, 0, 0], [0, 0, 0, 7], [1, 2, 3, 0])


def test_the_mask_tells():
    """Zeros of a two-dimensional mask, of whatever kind."""
    for mask in (PADDED.ne(0), PADDED.ne(0).long(), PADDED.ne(0).float(), PADDED.eq(0) * -1e9):
        assert count(input_ids=PADDED, attention_mask=mask) == (6, 0, 12)


def test_a_mask_of_ones_hides_no_padding():
    """The token of the configuration repeats at the ends of the rows; the one next to the text is doubtful."""
    assert count(input_ids=PADDED, attention_mask=torch.ones(3, 4)) == (3, 3, 12)
    assert count(input_ids=PADDED) == (3, 3, 12)
    assert count(input_ids=ids([1, 0, 0, 0, 2])) == (0, 0, 5)


def test_one_token_of_padding_is_doubtful():
    """It is text only if the configuration names it for something else, too, as where texts end or answers begin."""
    rows = ids([5, 6, 7, 0], [0, 6, 7, 1], [1, 0, 2, 3])
    assert count(input_ids=rows) == (0, 2, 12)
    assert count(input_ids=rows, attention_mask=torch.ones(3, 4)) == (0, 2, 12)
    for other in ({"pad_token_id": END}, {"eos_token_id": PAD}, {"decoder_start_token_id": PAD}):
        assert count(Model(**other), input_ids=rows) == (0, 0, 12)
    hidden = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]])
    assert count(input_ids=rows, attention_mask=hidden) == (1, 0, 12)
    restarts = torch.tensor([[0, 1, 0, 1]] * 3)
    assert count(input_ids=rows, position_ids=restarts) == (0, 3, 12)


def test_records_that_begin_at_the_same_place_do_not_stand_still():
    """A record of one token before one that begins with the same token twice: each begins at 0."""
    rows, places = ids([5, 6, 7, 8, 8, 9]), torch.tensor([[0, 1, 0, 0, 1, 2]])
    assert count(input_ids=rows, position_ids=places)[0] == 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_four_dimensions_tells_what_nobody_sees(dtype):
    """Also where rows that see nothing were opened to everything; the last token of a causal mask is seen by itself."""
    real = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]).bool()
    mask = torch.ones(2, 1, 4, 4).tril().bool() & real[:, None, None, :]
    opened = mask | ~mask.any(dim=-1, keepdim=True)
    tokens = ids([1, 2, 3, 4], [5, 6, 7, 1])
    for one in (mask, opened):
        given = one if dtype == torch.bool else torch.zeros(one.shape).masked_fill(~one, -1e30)
        assert count(input_ids=tokens, attention_mask=given) == (2, 0, 8)
    assert count(input_ids=tokens, attention_mask=torch.ones(4, 4).tril()[None, None]) == (0, 0, 8)
    assert count(input_ids=tokens, attention_mask=torch.ones(2, 1, 4, 4, dtype=torch.bool)) == (0, 0, 8)


def test_a_token_that_the_configuration_does_not_name():
    """Labels of -100 tell it; without any, it is doubtful, and text that ends so is no more than that."""
    tokens = ids([5, 6, 4, 4, 4], [5, 6, 7, 1, 2])
    labels = tokens.masked_fill(tokens.eq(4), -100)
    assert count(input_ids=tokens, labels=labels, attention_mask=torch.ones(2, 5)) == (2, 0, 10)
    for more in (
        {},
        {"labels": tokens},
        {"labels": torch.full_like(tokens, -100)},
        {"attention_mask": torch.ones(2, 5)},
    ):
        assert count(input_ids=tokens, **more) == (0, 2, 10)


def test_the_end_token_pads_as_well():
    """As tokenizers without a padding token have it."""
    assert count(input_ids=ids([5, 6, 9, 9, 9, 9], [5, 6, 5, 6, 5, 9])) == (3, 0, 12)


def test_the_rows_of_a_mask_with_zeros_are_read_on():
    """One row more is padded with the same token; what else repeats there is text."""
    tokens = ids([5, 6, 4, 4, 4], [1, 6, 4, 4, 4], [1, 2, 3, 3, 3])
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert count(input_ids=tokens, attention_mask=mask) == (5, 0, 15)


def test_a_row_of_nothing_else_counts_once():
    """It is a run from either end."""
    assert count(input_ids=ids([0, 0, 0, 0], [1, 2, 3, 4])) == (3, 1, 8)
    assert count(input_ids=ids([7, 7, 7, 7], [1, 2, 3, 4])) == (0, 3, 8)


def test_places_of_an_image_are_no_padding():
    """They repeat because an image has many."""
    assert count(input_ids=ids([8, 8, 8, 8, 1, 2])) == (0, 0, 6)


def test_records_in_a_row_are_padded_each():
    """At the end of the row as a record of its own, or each to a multiple."""
    rows = ids([1, 2, 3, 0, 0, 0, 0, 0])
    assert count(input_ids=rows, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])) == (4, 1, 8)
    assert count(input_ids=rows, position_ids=torch.tensor([[0, 1, 2, 0, 0, 0, 0, 0]])) == (5, 0, 8)
    each = ids([1, 2, 0, 0, 1, 2, 0, 0])
    assert count(input_ids=each, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])) == (2, 2, 8)
    unnamed = ids([1, 2, 3, 4, 4, 4, 4, 4])
    assert count(input_ids=unnamed, position_ids=torch.tensor([[0, 1, 2, 3, 3, 3, 3, 3]])) == (4, 0, 8)


def test_embeddings_are_unknown_unless_a_mask_tells(seen):
    """There is nothing to see in them."""
    features = torch.ones(2, 4, 3)
    masked = count_padding(Model(), calls({"inputs_embeds": features, "attention_mask": PADDED[:2].ne(0)}))
    assert (masked.padded, masked.tokens, masked.unseen) == (5, 8, None)
    for more in ({}, {"attention_mask": torch.ones(2, 4)}):
        finding = judge_padding(seen(model_calls=calls({"inputs_embeds": features, **more}), model=Model()), 0.5)
        check = finding.against("padding.share", 0.5)
        assert check.status == "unknown"
        assert "inputs_embeds of [2, 4, 3] hides the tokens" in check.reason


def test_every_call_counts(seen):
    """Those that were trained on; a padded second batch of an accumulation is not hidden by the first."""
    full = {"input_ids": ids([1, 2, 3, 4])}
    padded = {"input_ids": ids([1, 2, 0, 0]), "attention_mask": ids([1, 1, 0, 0])}
    reference = calls(padded, padded, gradients=False)
    watched = [*calls(full, padded), *reference]
    finding = judge_padding(seen(model_calls=watched, model=Model()), 0.5)
    assert "2 of 8 positions (25%)" in finding.reason
    assert "(by call: 0 of 4, 2 of 4)" in finding.reason
    assert count_padding(Model(), reference).padded == 4


def test_what_is_decoded_counts_as_well():
    """By its labels, its own tokens or its own mask; -100 at the end of a text is padding but for one."""
    source = {"input_ids": ids([1, 2, 3, 4]), "attention_mask": torch.ones(1, 4)}
    model = Model(is_encoder_decoder=True, decoder_start_token_id=PAD)

    def counted(**decoded):
        seen = count_padding(model, [ModelCall(module=model, arguments=source | decoded)])
        return seen.padded, seen.doubtful, seen.tokens

    labels = ids([5, 6, -100, -100, -100, -100])
    assert counted(labels=labels) == (3, 0, 10)
    assert counted(labels=labels, decoder_input_ids=ids([0, 5, 6, 0, 0, 0])) == (2, 0, 10)
    tokens, mask = ids([0, 5, 6, 7, 8, 1]), torch.tensor([[1, 1, 1, 1, 0, 0]])
    assert counted(decoder_input_ids=tokens, decoder_attention_mask=mask) == (2, 0, 10)
    assert counted() == (0, 0, 4)


def test_no_call_seen_is_unknown_where_it_was_asked(seen):
    """And nothing to report where it was not."""
    assert count_padding(Model(), []) is None
    assert judge_padding(seen(), 0.5).against("padding.share", 0.5).status == "unknown"
    assert judge_padding(seen(), None).against("padding.share", None).status == "not_applicable"
    nothing = judge_padding(seen(model_calls=calls({"pixel_values": torch.ones(3)})), 0.5)
    assert nothing.against("padding.share", 0.5).status == "unknown"
    assert "was given no tokens of [rows, tokens]" in nothing.reason


@pytest.mark.parametrize(
    ("tokens", "required", "status"),
    [
        ([1, 2, 3, 4, 0, 0, 0, 0, 0, 0], 0.6, "active"),
        ([1, 2, 3, 0, 0, 0, 0, 0, 0, 0], 0.6, "unknown"),
        ([1, 2, 0, 0, 0, 0, 0, 0, 0, 0], 0.6, "fallback"),
        ([1, 2, 3, 4, 4, 4, 4, 4, 4, 4], 0.6, "active"),
        ([1, 2, 4, 4, 4, 4, 4, 4, 4, 4], 0.6, "unknown"),
        ([1, 2, 4, 4, 4, 4, 4, 4, 4, 4], None, "active"),
    ],
)
def test_the_requirement_is_a_maximum(seen, tokens, required, status):
    """The share itself is accepted; above it is a failure with a remedy, or unknown where only what is doubtful is."""
    finding = judge_padding(seen(model_calls=calls({"input_ids": ids(tokens)}), model=Model()), required)
    check = finding.against("padding.share", required)
    assert check.status == status
    assert "of 10 positions" in check.reason
    assert ("sort them by length" in check.reason) is (status == "fallback")
    assert "more at the ends of records" in check.reason
    assert "by call" not in check.reason


@given(
    rows=st.lists(st.tuples(st.integers(2, 8), st.integers(0, 8)), min_size=1, max_size=4),
    left=st.booleans(),
    pad=st.sampled_from([PAD, END, 4]),
    told=st.sets(st.sampled_from(["mask", "labels", "ones"])),
)
def test_padding_that_was_put_there_is_found(rows, left, pad, told):
    """Rows of text, no token of which repeats, padded to one length: surely counted if told, else doubtful."""
    length = max(text + padding for text, padding in rows)
    tokens, real = [], []
    for number, (text, _) in enumerate(rows):
        words = [20 + number * 10 + place for place in range(text)]
        filler = [pad] * (length - text)
        tokens.append([*filler, *words] if left else [*words, *filler])
        real.append([0] * len(filler) + [1] * text if left else [1] * text + [0] * len(filler))
    arguments = {"input_ids": torch.tensor(tokens)}
    hidden = torch.tensor(real) == 0
    if told & {"mask", "ones"}:
        arguments["attention_mask"] = torch.tensor(real) if "mask" in told else torch.ones(len(rows), length)
    if "labels" in told:
        arguments["labels"] = arguments["input_ids"].masked_fill(hidden, -100)
    padded, doubtful, total = count(**arguments)
    truth = int(hidden.sum())
    spared = sum(length - text > 0 for text, _ in rows)  # a row's token next to its text may be text
    assert total == len(rows) * length
    if "mask" in told:
        assert (padded, doubtful) == (truth, 0)
    elif pad in (PAD, END) or "labels" in told:
        assert (padded, doubtful) == (truth - spared, spared if pad == PAD else 0)
    else:
        assert (padded, doubtful) == (0, truth - spared)


def test_positional_inputs_are_read_and_hooks_are_removed(training):
    """The first two arguments of a language model are its tokens and their mask."""
    run = training()
    tokens = run.inputs["input_ids"]
    mask = torch.ones_like(tokens)
    mask[:, 12:] = 0

    def step():
        run.optimizer.zero_grad()
        run.model(tokens, mask, labels=tokens).loss.backward()
        run.optimizer.step()

    assert run.check("padding.share", 0.2, step).observed == 0.25
    hooks = [(module._forward_pre_hooks, module._forward_hooks) for module in run.model.modules()]
    assert not any(before or after for before, after in hooks)


def test_inputs_are_kept_as_they_were(training):
    """A step may use the same memory for its next batch."""
    run = training()
    tokens = run.inputs["input_ids"]
    mask = torch.ones_like(tokens)

    def step():
        run.optimizer.zero_grad()
        for real in (8, 16):
            mask.fill_(1)[:, real:] = 0
            run.model(tokens, mask, labels=tokens).loss.backward()
        run.optimizer.step()

    assert "(by call: 16 of 32, 0 of 32)" in run.check("padding.share", 0.5, step).reason


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_read_or_left_out(training, in_place):
    """A hook on a model compiled in place would be compiled with it: left out, never a pass, never recompiled."""
    from torch._dynamo.utils import counters

    run = training(quant=None)
    if in_place:
        run.model.compile(backend="aot_eager")
    else:
        run.model = torch.compile(run.model, backend="aot_eager")
    run.step()
    graphs = counters["stats"]["unique_graphs"]
    checks = {check.path: check for check in run.verify({"padding.share": 0.5})}
    run.step()
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()
    if not in_place:
        assert checks["padding.share"].met
    elif run.instrument == "spy":
        assert "padding.share" not in checks
    else:
        assert checks["padding.share"].status == "unknown"
