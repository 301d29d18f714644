"""Lowering TorchScript: the same outputs, without loops and growing lists."""

from __future__ import annotations

from typing import List, Tuple

import pytest
import torch
from torch import Tensor, nn

from detectors import lowering


class Levels(nn.Module):
    """Loops over a list, appends to others, and changes values in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)
        self.strides = [1, 2, 4]

    def forward(self, image: Tensor) -> Tuple[Tensor, Tensor]:
        pyramid: List[Tensor] = []
        for stride in self.strides:
            pyramid.insert(0, self.layer(image[None, :, ::stride, ::stride]))
        scores: List[Tensor] = []
        places: List[Tensor] = []
        for level, x in enumerate(pyramid):
            score = x.flatten().sigmoid()
            score.mul_(2).clamp_(max=1.5)
            kept = score > 0.9
            scores.append(score[kept])
            places.append(kept.nonzero()[:, 0] + level)
        return torch.cat(scores), torch.cat(places)


class Halved(nn.Module):
    """How often it loops depends on the image."""

    def forward(self, image: Tensor) -> Tensor:
        while int(image.shape[-1]) > 8:
            image = image[..., ::2]
        return image


def kinds(module: torch.jit.ScriptModule) -> set:
    text = str(module.inlined_graph)
    return {kind for kind in (*lowering.UNWANTED, "aten::mul_", "aten::clamp_") if kind in text}


@pytest.fixture
def scripted() -> torch.jit.ScriptModule:
    torch.manual_seed(0)
    return torch.jit.script(Levels().eval())


def test_loops_lists_and_mutations_are_gone(scripted):
    assert kinds(scripted) == {*lowering.UNWANTED, "aten::mul_", "aten::clamp_"}
    found = lowering.lowered(scripted)
    assert kinds(found) == set()
    for height, width in ((8, 12), (31, 17), (1, 1)):
        image = torch.randn(3, height, width)
        for one, other in zip(scripted(image), found(image)):
            assert torch.equal(one, other)


def test_what_is_lowered_is_left_as_it_was(scripted):
    before = str(scripted.inlined_graph)
    lowering.lowered(scripted)
    assert str(scripted.inlined_graph) == before


def test_a_loop_of_unknown_length_stays():
    module = torch.jit.script(Halved().eval())
    found = lowering.lowered(module)
    assert kinds(found) == {"prim::Loop"}
    for width in (7, 9, 100):
        image = torch.randn(3, 4, width)
        assert torch.equal(found(image), module(image))


def test_the_scripted_detector(exports):
    export = exports("testRetinaNet_scripted")
    found = export.graph_module()
    assert found is export.graph_module()
    assert kinds(found) == set()
    assert kinds(export.script_module()) >= {"prim::Loop", "aten::append"}
    for images in export.tuning_inputs.values():
        with torch.no_grad():
            wanted = export.eager(*images)
        assert len(wanted[0]) > 10
        for one, other in zip(wanted, found(*images)):
            assert one.shape == other.shape
            assert torch.allclose(one, other, atol=1e-3)
