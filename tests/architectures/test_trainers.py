"""The optimizers inside Lightning's and Hugging Face's trainers take the steps of a plain loop (an optional job).

Skipped where these libraries are not installed; CONTRIBUTING.md says how to run it.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import fisherviz as fv
from tests.oracles import nets
from tests.oracles.checks import FLOAT32, assert_matches

STEPS, BATCH = 4, 8
PRESETS = ("KFAC", "FOOF", "EKFAC", "CWNGD", "TENGraD")
pytestmark = pytest.mark.filterwarnings("ignore")


def made():
    torch.manual_seed(0)
    return nets.mlp(4, 6, 3).float().train()


def data():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(STEPS * BATCH, 4, generator=generator)
    return TensorDataset(inputs, torch.randint(3, (STEPS * BATCH,), generator=generator))


def optimizer_of(net, preset, **options):
    torch.manual_seed(2)  # the labels that it samples are drawn from a generator of its own, seeded from here
    return getattr(fv.optim, preset)(net, "categorical", lr=0.1, **options)


def plain_loop(net, preset, **options):
    """The oracle: weights after a loop that everybody writes."""
    optimizer = optimizer_of(net, preset, **options)
    for inputs, targets in DataLoader(data(), BATCH):

        def closure(inputs=inputs, targets=targets):
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(inputs), targets)
            loss.backward()
            return loss

        optimizer.step(closure)
    return nn.utils.parameters_to_vector(net.parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_lightning_takes_the_steps_of_a_plain_loop(preset, tmp_path):
    lightning = pytest.importorskip("lightning")
    net = made()
    expected = plain_loop(copy.deepcopy(net), preset)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, _):
            return functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return optimizer_of(self.net, preset)

    trainer = lightning.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(data(), BATCH))
    assert_matches(nn.utils.parameters_to_vector(net.parameters()), expected, FLOAT32)


def trained_by_transformers(model, train_set, collate, optimizer, folder, **options):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    settings = transformers.TrainingArguments(
        folder, per_device_train_batch_size=BATCH, num_train_epochs=1, use_cpu=True, report_to=[], save_strategy="no",
        max_grad_norm=0.0, disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    InOrder(
        model, settings, data_collator=collate, train_dataset=train_set, optimizers=(optimizer, constant), **options
    ).train()


class WithLoss(nn.Module):
    """A model whose forward gives the loss beside the outputs of the network that the optimizer knows."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("preset", PRESETS)
def test_hugging_faces_trainer_takes_the_steps_of_a_plain_loop(preset, tmp_path):
    net, options = made(), {"adapt": False, "rescale": False} if preset == "KFAC" else {}
    expected = plain_loop(copy.deepcopy(net), preset, **options)

    def together(examples):
        inputs, labels = zip(*examples, strict=True)
        return {"x": torch.stack(inputs), "labels": torch.stack(labels)}

    trained_by_transformers(WithLoss(net), data(), together, optimizer_of(net, preset, **options), tmp_path)
    assert_matches(nn.utils.parameters_to_vector(net.parameters()), expected, FLOAT32)


def next_token_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return functional.cross_entropy(logits, labels[:, 1:].flatten())


def test_hugging_faces_trainer_trains_gpt2_with_a_loss_outside_of_the_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=9, n_positions=6, n_embd=6, n_layer=1, n_head=2, n_inner=7, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    net = transformers.GPT2LMHeadModel(config).train()
    tokens = torch.randint(9, (STEPS * BATCH, 6), generator=torch.Generator().manual_seed(1))

    def optimizer_of_it(net):
        torch.manual_seed(2)
        return fv.optim.FOOF(net, "categorical", lr=0.1, output=lambda out: out.logits)

    other = copy.deepcopy(net)
    optimizer = optimizer_of_it(other)
    for batch in tokens.split(BATCH):
        optimizer.zero_grad()
        next_token_loss(other(input_ids=batch), batch).backward()
        optimizer.step()
    examples = [{"input_ids": row, "labels": row} for row in tokens]

    def together(rows):
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    trained_by_transformers(net, examples, together, optimizer_of_it(net), tmp_path, compute_loss_func=next_token_loss)
    trained, expected = (nn.utils.parameters_to_vector(each.parameters()) for each in (net, other))
    assert_matches(trained, expected, FLOAT32)
