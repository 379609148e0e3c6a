"""The same architectures as transformers and timm have them, at small random configurations (an optional job).

Skipped where these libraries are not installed; CONTRIBUTING.md says how to run it.
"""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional

import fisherviz as fv
from tests.architectures.networks import IGNORED, SHADES, digits, hidden_tokens, next_tokens
from tests.oracles import nets, positions
from tests.oracles.checks import FLOAT32, assert_matches

N = 3
pytestmark = pytest.mark.filterwarnings("ignore")


def gpt2(attention):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=SHADES, n_positions=8, n_embd=6, n_layer=1, n_head=2, n_inner=7, attn_implementation=attention,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    ids, targets = next_tokens(N)
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids}, targets


def bert(attention):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=SHADES + 2, hidden_size=6, num_hidden_layers=1, num_attention_heads=2, intermediate_size=7,
        max_position_embeddings=8, attn_implementation=attention, pad_token_id=SHADES + 1,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config), *hidden_tokens(N)


def vit(attention):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=6, num_hidden_layers=1, num_attention_heads=2, intermediate_size=7, image_size=8, patch_size=4,
        num_channels=1, num_labels=10, attn_implementation=attention,
    )  # fmt: skip
    images, labels = digits(N)
    return transformers.ViTForImageClassification(config), {"pixel_values": images}, labels


def of_timm(build):
    timm = pytest.importorskip("timm")
    images, labels = digits(N)
    return build(timm.models), {"x": images}, labels


def resnet(models):
    return models.ResNet(
        models.resnet.BasicBlock, (1, 1), channels=(3, 4), stem_width=3, in_chans=1, num_classes=10, stem_type=""
    )


def mobilenet(models):
    from timm.models._efficientnet_builder import decode_arch_def, round_channels

    return models.MobileNetV3(
        decode_arch_def([["ds_r1_k3_s1_e1_c4"], ["ir_r1_k3_s2_e2_c4_se0.5"]]), num_classes=10, in_chans=1, stem_size=4,
        num_features=6, round_chs_fn=functools.partial(round_channels, divisor=1),
    )  # fmt: skip


def vision_transformer(models):
    return models.VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=6, depth=1, num_heads=2, mlp_ratio=1.0
    )


CASES = {
    "GPT-2, eager": lambda: gpt2("eager"),
    "GPT-2, sdpa": lambda: gpt2("sdpa"),
    "BERT, eager": lambda: bert("eager"),
    "BERT, sdpa": lambda: bert("sdpa"),
    "ViT, eager": lambda: vit("eager"),
    "ViT, sdpa": lambda: vit("sdpa"),
    "timm ResNet": lambda: of_timm(resnet),
    "timm MobileNet": lambda: of_timm(mobilenet),
    "timm ViT": lambda: of_timm(vision_transformer),
}
libraries = pytest.mark.parametrize("name", CASES)


def logits(out):
    return out if isinstance(out, torch.Tensor) else out.logits


class Plain(nn.Module):
    """A model as the oracle calls it."""

    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *given):
        return logits(self.model(**dict(zip(self.names, given, strict=True))))


def cast(inputs, dtype):
    return {name: part.to(dtype) if part.is_floating_point() else part for name, part in inputs.items()}


def made(name):
    torch.manual_seed(0)
    model, inputs, targets = CASES[name]()
    return nets.randomised(model), cast(inputs, torch.float64), targets


def brute_force(model, inputs, targets):
    single = [tuple(part[n : n + 1] for part in inputs.values()) for n in range(N)]
    return positions.mean(positions.rows(Plain(model, tuple(inputs)), single, targets != IGNORED))


def fisher_of(model, inputs, targets):
    return fv.Probe(model, "categorical", output=logits).fisher(inputs, targets)


@libraries
def test_exact_quantities(name):
    model, inputs, targets = made(name)
    F = brute_force(model, inputs, targets)
    fisher = fisher_of(model, inputs, targets)
    assert_matches(fisher.to_dense(), F)
    v = torch.randn(len(F), 2, dtype=torch.float64)
    assert_matches(fisher.fresh() @ v, F @ v)
    assert_matches(fisher.diagonal(), F.diagonal())
    assert_matches(fisher.solve(v, 0.1), torch.linalg.solve(F + 0.1 * torch.eye(len(F), dtype=torch.float64), v))
    single = fisher_of(copy.deepcopy(model).float(), cast(inputs, torch.float32), targets)
    assert_matches(single.to_dense(), F, FLOAT32)


WITHOUT_STRUCTURE = {
    "the parameters of positions and class tokens": ("position_embeddings", "wpe", "embeddings", ""),
    "a table for what all examples share": ("token_type_embeddings",),
    "tied tables": ("wte", "word_embeddings"),
    "the decoder's own bias beside a tied weight": ("decoder", "predictions"),
}


@libraries
def test_what_has_no_structure(name):
    model, inputs, targets = made(name)
    fisher = fisher_of(model, inputs, targets)
    fisher.look()
    generic = [layer for layer in fisher.layers if layer.path == "generic"]
    expected = {last for names in WITHOUT_STRUCTURE.values() for last in names}
    assert {layer.name.rsplit(".", 1)[-1] for layer in generic} <= expected
    assert all(layer.note for layer in generic)


@libraries
def test_every_method_is_compared(name):
    comparison = fv.compare(fisher_of(*made(name)), progress=False)
    assert set(comparison.methods) == set(fv.approximations)


@libraries
@pytest.mark.parametrize("preset", ["KFAC", "EKFAC", "FOOF", "CWNGD", "TENGraD", "HessianFree"])
def test_optimizers_lower_the_loss(name, preset):
    model, inputs, targets = made(name)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = getattr(fv.optim, preset)(model, "categorical", output=logits, damping=10.0)

    def loss():
        z = logits(model(**inputs))
        counts = functional.cross_entropy(z.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return counts / N

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    losses = [closure().item()]
    for _ in range(4):
        optimizer.step(closure)
        losses.append(loss().item())
    assert min(losses[1:]) < losses[0], losses
