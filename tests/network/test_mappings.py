"""Batches as mappings, as Hugging Face's tokenizers and collators give them: keyword arguments, and labels by name."""

import collections
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import fisherviz as fv
from tests.oracles import nets, positions
from tests.oracles.checks import assert_matches

CLASSES = 5


class BatchEncoding(collections.UserDict):
    """A mapping that is no dictionary, as in Hugging Face's transformers."""


@dataclasses.dataclass
class Output(collections.OrderedDict):
    """What Hugging Face's models return: entries that are attributes as well."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None

    def __post_init__(self):
        super().__init__({field.name: getattr(self, field.name) for field in dataclasses.fields(self)})


class Model(nn.Module):
    """A model for token classification that takes labels and an attention mask, as Hugging Face's do."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(9, 3), nn.Linear(3, 3), nn.Linear(3, CLASSES)
        self.given = []

    def forward(self, input_ids, attention_mask=None, labels=None):
        self.given.append(labels)
        h = self.embedding(input_ids)
        weights = torch.ones_like(h[..., 0]) if attention_mask is None else attention_mask.to(h.dtype)
        pooled = (h * weights.unsqueeze(-1)).sum(1, keepdim=True) / weights.sum(1)[:, None, None]
        logits = self.head(torch.tanh(h + self.mix(pooled)))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Output(loss, logits)


class Plain(nn.Module):
    """The same with a tensor for its output."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(ids, mask).logits


@pytest.fixture
def batch():
    torch.manual_seed(0)
    ids, mask = torch.randint(9, (6, 4)), torch.ones(6, 4, dtype=torch.long)
    mask[1, 2:], mask[3, 1:], mask[5, 3:] = 0, 0, 0
    labels = torch.randint(CLASSES, (6, 4)).masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def oracle(model, batch, kind, counted=None):
    ids, mask, labels = batch.values()
    one = [(ids[n : n + 1], mask[n : n + 1]) for n in range(len(ids))]
    counted = labels != -100 if counted is None else counted
    return positions.mean(positions.rows(Plain(model), one, counted, labels if kind == "empirical" else None))


def probe(model):
    return fv.Probe(model, "categorical", output=lambda out: out.logits)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("mapping", [dict, BatchEncoding, collections.OrderedDict])
def test_labels_by_name(batch, mapping, kind):
    model = nets.randomised(Model())
    fisher = probe(model).fisher(mapping(batch), targets="labels", kind=kind)
    expected = oracle(model, batch, kind)
    model.given.clear()
    assert_matches(fisher.to_dense(), expected)
    assert_matches(fisher.fresh() @ torch.ones(len(expected)).double(), expected.sum(1))
    assert all(labels is None for labels in model.given)
    assert fisher.has_targets()


@pytest.mark.parametrize("mapping", [dict, BatchEncoding])
def test_a_loader_of_mappings(batch, mapping):
    model = nets.randomised(Model())
    examples = [{name: t[n] for name, t in batch.items()} for n in range(6)]

    def collate(rows):
        return mapping({name: torch.stack([row[name] for row in rows]) for name in rows[0]})

    loader = DataLoader(examples, batch_size=4, collate_fn=collate)
    fisher = probe(model).fisher(loader, targets="labels", kind="empirical")
    assert_matches(fisher.to_dense(), oracle(model, batch, "empirical"))
    comparison = fv.compare(probe(model).fisher(loader, targets="labels"), ["kfac"], progress=False)
    assert "direction_cosine" in comparison.summary()


@pytest.mark.parametrize("mapping", [dict, BatchEncoding])
def test_a_pair_of_a_mapping_and_targets(batch, mapping):
    model = nets.randomised(Model())
    inputs = {name: t for name, t in batch.items() if name != "labels"}
    fisher = probe(model).fisher((mapping(inputs), batch["labels"]))
    assert_matches(fisher.to_dense(), oracle(model, batch, "exact"))
    both = probe(model).fisher((mapping(batch), batch["labels"]))  # the model may have them too
    assert_matches(both.to_dense(), oracle(model, batch, "exact"))


def test_an_attention_mask_alone_leaves_no_output_out(batch):
    model = nets.randomised(Model())
    inputs = {name: t for name, t in batch.items() if name != "labels"}
    everywhere = torch.ones(6, 4, dtype=torch.bool)
    assert_matches(probe(model).fisher(inputs).to_dense(), oracle(model, batch, "exact", everywhere))


def test_targets_of_a_causal_model_are_shifted_by_the_user(batch):
    model = nets.randomised(Model())
    shifted = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    fisher = probe(model).fisher(batch | {"labels": shifted}, targets="labels", kind="empirical")
    short = fv.Probe(model, "categorical", output=lambda out: out.logits[:, :-1])
    other = short.fisher(batch | {"labels": batch["labels"][:, 1:]}, targets="labels", kind="empirical")
    assert fisher.examples == other.examples == 5  # one has a single token, from which none is to be told
    assert_matches(fisher.to_dense(), other.to_dense())


REFUSED = {
    "unnamed": (lambda b: (b, None), r"has an entry 'labels': pass targets='labels'"),
    "unnamed in batches": (lambda b: ([b], None), r"has an entry 'labels': pass targets='labels'"),
    "unknown": (
        lambda b: (b, "label"),
        r"targets='label' names .* has the entries 'input_ids'",
    ),
    "no mapping": (lambda b: (b["input_ids"], "labels"), r"targets='labels' names an entry .* a batch is none"),
    "twice": (lambda b: ([(b, b["labels"])], "labels"), r"a batch has other targets in a pair"),
}


@pytest.mark.parametrize(("data", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(batch, data, words):
    given, targets = data(batch)
    with pytest.raises(ValueError, match=words):
        probe(Model()).fisher(given, targets).to_dense()


def test_optimizers_take_the_loop_that_everybody_writes(batch):
    """Labels outside the model's call; those that are -100 are left out without being named."""
    model = nets.randomised(Model())
    model.train()
    expected, before = oracle(model, batch, "exact"), nn.utils.parameters_to_vector(model.parameters()).detach()
    opt = fv.optim.NaturalGradient(model, "categorical", "exact", lr=1.0, damping=0.1, output=lambda out: out.logits)
    labels = batch.pop("labels")
    out = model(**BatchEncoding(batch))
    F.cross_entropy(out.logits.flatten(0, 1), labels.flatten()).backward()
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    opt.step()
    moved = nn.utils.parameters_to_vector(model.parameters()).detach() - before
    assert_matches(moved, -torch.linalg.solve(expected + 0.1 * torch.eye(len(g)).double(), g))
