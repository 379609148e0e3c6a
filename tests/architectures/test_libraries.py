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
from tests.oracles.checks import FLOAT32, FLOAT64, assert_matches

N = 3
pytestmark = pytest.mark.filterwarnings("ignore")


def gpt2(attention, n):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=SHADES, n_positions=8, n_embd=6, n_layer=1, n_head=2, n_inner=7, attn_implementation=attention,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    ids, targets = next_tokens(n)
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids}, targets


def bert(attention, n):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=SHADES + 2, hidden_size=6, num_hidden_layers=1, num_attention_heads=2, intermediate_size=7,
        max_position_embeddings=8, attn_implementation=attention, pad_token_id=SHADES + 1,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config), *hidden_tokens(n)


def vit(attention, n):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=6, num_hidden_layers=1, num_attention_heads=2, intermediate_size=7, image_size=8, patch_size=4,
        num_channels=1, num_labels=10, attn_implementation=attention,
    )  # fmt: skip
    images, labels = digits(n)
    return transformers.ViTForImageClassification(config), {"pixel_values": images}, labels


def of_timm(build, n):
    timm = pytest.importorskip("timm")
    images, labels = digits(n)
    return build(timm.models), {"x": images}, labels


def resnet(models):
    return models.ResNet(
        models.resnet.BasicBlock, (1, 1, 1, 1), channels=(3, 3, 3, 4), stem_width=3, in_chans=1, num_classes=10
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


def swin(models):
    return models.SwinTransformer(
        img_size=8, patch_size=1, in_chans=1, num_classes=10, embed_dim=4, depths=(2,), num_heads=(2,), window_size=4,
        mlp_ratio=1.0,
    )  # fmt: skip


CASES = {
    "GPT-2, eager": lambda n: gpt2("eager", n),
    "GPT-2, sdpa": lambda n: gpt2("sdpa", n),
    "BERT, eager": lambda n: bert("eager", n),
    "BERT, sdpa": lambda n: bert("sdpa", n),
    "ViT, eager": lambda n: vit("eager", n),
    "ViT, sdpa": lambda n: vit("sdpa", n),
    "timm ResNet": lambda n: of_timm(resnet, n),
    "timm MobileNet": lambda n: of_timm(mobilenet, n),
    "timm ViT": lambda n: of_timm(vision_transformer, n),
    "timm Swin": lambda n: of_timm(swin, n),
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


def made(name, n=N):
    torch.manual_seed(0)
    model, inputs, targets = CASES[name](n)
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
    # transformers' eager attention of ViT takes the softmax in float32, whatever the model is in
    tolerance = FLOAT32 if name == "ViT, eager" else FLOAT64
    assert_matches(fisher.to_dense(), F, tolerance)
    v = torch.randn(len(F), 2, dtype=torch.float64)
    assert_matches(fisher.fresh() @ v, F @ v, tolerance)
    assert_matches(fisher.diagonal(), F.diagonal(), tolerance)
    damped = F + 0.1 * torch.eye(len(F), dtype=torch.float64)
    assert_matches(fisher.solve(v, 0.1), torch.linalg.solve(damped, v), tolerance)
    single = fisher_of(copy.deepcopy(model).float(), cast(inputs, torch.float32), targets)
    assert_matches(single.to_dense(), F, FLOAT32)


WITHOUT_STRUCTURE = {
    "GPT-2": (),
    "BERT": ("cls.predictions",),  # the decoder's bias is the one of the module around it
    "ViT": ("vit.embeddings",),  # positions and class token, as bare parameters
    "timm ResNet": (),
    "timm MobileNet": (),
    "timm ViT": ("",),
    # tables of relative positions
    "timm Swin": ("layers.0.blocks.0.attn", "layers.0.blocks.1.attn"),
}  # fmt: skip


@libraries
def test_what_has_no_structure(name):
    model, inputs, targets = made(name)
    fisher = fisher_of(model, inputs, targets)
    fisher.look()
    generic = [layer for layer in fisher.layers if layer.path == "generic"]
    assert tuple(layer.name for layer in generic) == WITHOUT_STRUCTURE[name.split(",")[0]]
    assert all(layer.note for layer in generic)


@libraries
def test_every_method_is_compared(name):
    comparison = fv.compare(fisher_of(*made(name)), progress=False)
    assert set(comparison.methods) == set(fv.approximations)


OPTIMIZERS = {
    "KFAC": {}, "EKFAC": {}, "FOOF": {"lr": 0.03}, "CWNGD": {"lr": 0.03, "damping": 1.0}, "TENGraD": {},
    "HessianFree": {},
}  # fmt: skip


@libraries
@pytest.mark.parametrize("preset", OPTIMIZERS)
def test_optimizers_lower_the_loss(name, preset):
    model, inputs, targets = made(name, 24)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = getattr(fv.optim, preset)(model, "categorical", output=logits, **OPTIMIZERS[preset])

    def closure():
        optimizer.zero_grad()
        z = logits(model(**inputs))
        value = functional.cross_entropy(z.flatten(0, -2), targets.flatten(), ignore_index=IGNORED)
        value.backward()
        return value

    losses = [closure().item()]
    for _ in range(5):
        optimizer.step(closure)
        losses.append(closure().item())
    assert min(losses[1:]) < losses[0], losses
