"""A module gives back the tensors that its layout was filled with."""

import pytest
import torch
from cases import DECOMPOSITIONS, LAYERS, make_layer, some_ranks, spec_on, supports

from lowrank_pl.decompositions import DENSE, ZERO
from lowrank_pl.ranks import RankProblem

PAIRS = [(d, name) for d in DECOMPOSITIONS for name in LAYERS if supports(d, make_layer(name)[0])]
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.mark.parametrize(("decomposition", "name"), PAIRS, ids=lambda x: str(x).replace(" ", ""))
def test_tensors_are_the_inverse_of_parameters(decomposition, name):
    layer, x = make_layer(name)
    problem = RankProblem(name, spec_on(layer, x), decomposition, layer.weight.detach())
    ranks = some_ranks(problem.full)
    structures = [decomposition.factor(layer.weight, problem.layer, rank) for rank in (ranks[0], ranks[-1])]
    structures += [problem.structure(DENSE), problem.structure(ZERO)]
    for structure in structures:
        for layout in structure.layout.forms():
            module = structure.with_layout(layout).to_module(layer.bias)
            found = layout.tensors(module)
            assert all(map(torch.equal, found, structure.tensors))
            assert len(found) == len(structure.tensors)
            torch.testing.assert_close(layout.weight(found).detach(), structure.reconstruct(), check_dtype=False)
