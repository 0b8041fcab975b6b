"""The same training in PyTorch: what `python -m vit_jax.benchmark --peer` is held against.

    python benchmarks/torch_peer.py SPECIFICATION.json

A strong peer on purpose: q, k and v in one product, scaled_dot_product_attention, fused optimizers (Muon's matrices
orthogonalised together, by shape), pictures on the device already and nothing done to them; on a GPU compiled by
torch.compile, with bfloat16 by autocast or else TF32, as the specification's dtype says.

It prints a line of JSON that says what it is, and then one for each line read from stdin: a number of steps is
answered with their seconds. The specification is what `vit_jax.training.comparing` makes of a config.
"""

import json
import pathlib
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Newton-Schulz: five steps of a quintic that brings singular values near 1 (Jordan et al. 2024).
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


class Attention(nn.Module):
    cosine: Tensor
    sine: Tensor

    def __init__(self, width: int, heads: int, qk_norm: bool, epsilon: float, turns: tuple[Tensor, Tensor] | None):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width // heads, epsilon, bias=False) for _ in range(2 * qk_norm))
        for name, turn in zip(("cosine", "sine"), turns or (), strict=False):
            self.register_buffer(name, turn, persistent=False)
        self.rotary = turns is not None

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B, H, N, Dh]
        if self.norms:
            q, k = self.norms[0](q).to(v.dtype), self.norms[1](k).to(v.dtype)
        if self.rotary:
            q, k = self.turned(q), self.turned(k)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))

    def turned(self, x: Tensor) -> Tensor:
        cosine, sine = self.cosine.to(x.dtype), self.sine.to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


class Block(nn.Module):
    def __init__(self, model: dict[str, Any], turns: tuple[Tensor, Tensor] | None):
        super().__init__()
        width, epsilon = model["width"], model["norm_epsilon"]
        self.norm1, self.norm2 = nn.LayerNorm(width, epsilon), nn.LayerNorm(width, epsilon)
        self.attention = Attention(width, model["num_heads"], model["qk_norm"], epsilon, turns)
        gelu = nn.GELU("tanh" if model["gelu"] == "tanh" else "none")
        self.mlp = nn.Sequential(nn.Linear(width, model["mlp_dim"]), gelu, nn.Linear(model["mlp_dim"], width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ChannelNorm(nn.LayerNorm):
    """Over the channels of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ViT(nn.Module):
    """Pictures [B, C, S, S] -> logits [B, K]; `model` holds vit_jax's fields of the same names."""

    def __init__(self, model: dict[str, Any], size: int, channels: int, classes: int):
        super().__init__()
        width, patch, self.pool = model["width"], model["patch_size"], model["pool"]
        side, self.stem = size // patch, nn.Sequential()
        if model["stem"] == "conv":
            halvings = patch.bit_length() - 1
            for i in range(halvings):
                wide = max(width >> (halvings - 1 - i), 8)
                self.stem.append(nn.Conv2d(channels, wide, 3, 2, padding=1, bias=False))
                self.stem.append(ChannelNorm(wide, model["norm_epsilon"]))
                self.stem.append(nn.GELU("tanh" if model["gelu"] == "tanh" else "none"))
                channels = wide
            patch = 1
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width)) if self.pool == "cls" else None
        cls = int(self.pool == "cls")
        learned = model["position_embedding"] == "learned"
        self.positions = nn.Parameter(0.02 * torch.randn(1, side**2 + cls, width)) if learned else None
        rotary = model["position_embedding"] == "rotary"
        turns = rotation(side, cls, width // model["num_heads"]) if rotary else None
        self.blocks = nn.Sequential(*(Block(model, turns) for _ in range(model["depth"])))
        self.norm = nn.LayerNorm(width, model["norm_epsilon"])
        self.weigh = nn.Linear(width, 1) if self.pool == "seq" else None
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(self.stem(x)).flatten(2).transpose(1, 2)  # [B, N, D]
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        if self.positions is not None:
            x = x + self.positions
        x = self.norm(self.blocks(x))
        if self.weigh is not None:
            x = (self.weigh(x).softmax(dim=1) * x).sum(dim=1)
        else:
            x = x[:, 0] if self.pool == "cls" else x.mean(dim=1)
        return self.head(x)


def rotation(side: int, cls: int, size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines by which the pairs of a head's features turn with row and column, each [N, Dh / 2]."""
    frequencies = 100.0 ** (-torch.arange(size // 4) / (size // 4))
    places = torch.arange(side**2)[:, None]
    angles = torch.cat([places // side * frequencies, places % side * frequencies], dim=1)
    angles = F.pad(angles, (0, 0, cls, 0))
    return angles.cos(), angles.sin()


class Muon:
    """Muon with updates of AdamW's usual size, 0.2 (arXiv 2502.16982), on matrices, of which q, k and v are three."""

    def __init__(self, named: dict[str, nn.Parameter], rate: float, momentum: float, decay: float, quick: bool):
        self.parameters, self.rate, self.momentum, self.decay, self.quick = named, rate, momentum, decay, quick
        self.steps, self.kept = 0, dict[tuple[int, ...], Tensor]()
        on_gpu = next(iter(named.values())).is_cuda
        self.orthogonal = torch.compile(orthogonal) if on_gpu else orthogonal

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        groups: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None
            parts = 3 if name.endswith("qkv.weight") else 1
            for pair in zip(parameter.chunk(parts), parameter.grad.chunk(parts), strict=True):
                groups.setdefault(tuple(pair[0].shape), []).append(pair)
        for shape, pairs in groups.items():
            weights, gradients = [w for w, _ in pairs], torch.stack([g for _, g in pairs])
            if shape not in self.kept:
                self.kept[shape] = torch.zeros_like(gradients)
            self.kept[shape].lerp_(gradients, 1 - self.momentum)
            of_kept, of_new = (1 - self.momentum ** (self.steps + i) for i in (1, 0))  # what is missing at the start
            ahead = (gradients / of_new).lerp(self.kept[shape] / of_kept, self.momentum)  # Nesterov
            updates = self.orthogonal(ahead, self.quick)
            torch._foreach_mul_(weights, 1 - self.rate * self.decay)
            torch._foreach_add_(weights, list(updates.unbind()), alpha=-0.2 * max(shape) ** 0.5 * self.rate)


def orthogonal(x: Tensor, quick: bool) -> Tensor:
    """Matrices [n, r, c] with their singular values brought near 1; in bfloat16 where that is `quick`."""
    a, b, c = COEFFICIENTS
    tall, dtype = x.shape[1] > x.shape[2], x.dtype
    x = x.transpose(1, 2) if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-8)
    x = x.bfloat16() if quick else x
    for _ in range(ITERATIONS):
        square = x @ x.transpose(1, 2)
        x = a * x + torch.baddbmm(square, square, square, beta=b, alpha=c) @ x
    return (x.transpose(1, 2) if tall else x).to(dtype)


def optimizers(model: nn.Module, how: dict[str, Any], quick: bool) -> list[Any]:
    """The specification's optimizer: one, or for Muon two."""
    rate, decay = how["learning_rate"], how["weight_decay"]
    rest = dict(model.named_parameters())
    muon = how["name"] == "muon"
    matrices = {name: p for name, p in rest.items() if muon and name.startswith("blocks.") and p.ndim == 2}
    rest = {name: p for name, p in rest.items() if name not in matrices}
    decayed = {name: p for name, p in rest.items() if name.endswith("weight") and p.ndim > 1}
    others = [p for name, p in rest.items() if name not in decayed]
    groups = [{"params": list(decayed.values()), "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    if how["name"] == "sgd":
        return [torch.optim.SGD(groups, rate, how["momentum"], fused=True)]
    adam = torch.optim.Adam if how["name"] == "adam" else torch.optim.AdamW
    found: list[Any] = [adam(groups, rate, (0.9, how["b2"]), fused=True)]
    return [*found, Muon(matrices, rate, how["momentum"], decay, quick)] if muon else found


class Training:
    """Steps of the specification's training on one batch of noise."""

    def __init__(self, specification: dict[str, Any]):
        self.how = how = specification
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_float32_matmul_precision("high")
        shape = (how["channels"], how["image_size"], how["image_size"])
        self.model = ViT(how["model"], how["image_size"], how["channels"], how["classes"]).to(self.device)
        self.half = how["dtype"] == "bfloat16"
        self.optimizers = optimizers(self.model, how["optimizer"], self.half and self.device == "cuda")
        self.forward = torch.compile(self.model) if self.device == "cuda" else self.model
        part = how["batch_size"] // how["accumulate"]
        self.images = torch.randn(how["accumulate"], part, *shape, device=self.device)
        self.labels = torch.randint(0, how["classes"], (how["accumulate"], part), device=self.device)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        for images, labels in zip(self.images, self.labels, strict=True):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
                logits = self.forward(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.how["label_smoothing"])
            (loss / len(self.images)).backward()
        if self.how["optimizer"]["clip_norm"]:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.how["optimizer"]["clip_norm"])
        for optimizer in self.optimizers:
            optimizer.step()

    def __call__(self, steps: int) -> float:
        """The seconds of as many steps."""
        self.wait()
        started = time.perf_counter()
        for _ in range(steps):
            self.step()
        self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def about(self) -> dict[str, Any]:
        cuda = self.device == "cuda"
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "torch": torch.__version__,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        }


def main() -> None:
    training = Training(json.loads(pathlib.Path(sys.argv[1]).read_text()))
    compiling = training(1)
    training(2)
    print(json.dumps(training.about() | {"compile_seconds": compiling}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"seconds": training(int(line))}), flush=True)


if __name__ == "__main__":
    main()
