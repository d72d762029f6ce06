"""What type checkers say of the public names. Not run: `mypy` reads it, and fails where an error below is none."""

import torch
from torch import nn

from lowrank_pl import (
    EVBMF,
    Cheapest,
    CompressionRatio,
    CostBudget,
    DeepTwist,
    FirstOf,
    GreedyEnergy,
    LearningCompression,
    LStep,
    Macs,
    MultipleOf,
    MuSchedule,
    Report,
    Targets,
    compress,
    summarize,
)

DeepTwist(S_D=200, method="tiled_svd", rank=CompressionRatio(4.0))
DeepTwist(200, {"conv*": "svd", "*": Cheapest("svd", "tucker2")}, {"*": EVBMF()}, Targets(exclude=["fc"]))
DeepTwist(method=("tucker2", "svd"))
LearningCompression(1e-3, method={"conv*": ["spatial_svd", "svd"], "*": FirstOf("tiled_svd", "svd")})
LearningCompression(lambda_=1e-3, l_step_epochs=1, clear_momentum=True)
LearningCompression(budget=CostBudget("macs", 0.5), l_step=LStep(epochs=2), cost=Macs())
LearningCompression(1e-3, schedule=MuSchedule(mu0=1e-4, steps=30), l_step=LStep(steps=100))
LearningCompression(lambda_=1e-3, mu0=1e-4, growth=1.5, steps=3, patience=3, tolerance=0, l_step_steps=10)
LearningCompression(lambda_=1e-3, cost=lambda layer: float(layer.num_weights), l_step_steps=10)
MultipleOf("evbmf", 8)
GreedyEnergy(Macs(), 0.5)
small: nn.Module = compress(nn.Linear(3, 3), method="svd")
report: Report = summarize(nn.Linear(3, 3), small, torch.randn(1, 3))

DeepTwist(mthod="svd")  # type: ignore[call-arg]
DeepTwist(S_D="no")  # type: ignore[arg-type]
DeepTwist(method=("tucker2", 3))  # type: ignore[arg-type]
DeepTwist(rank=3)  # type: ignore[arg-type]
LearningCompression(lambda_=1e-3, mu0="no")  # type: ignore[arg-type]
LearningCompression(lambda_=1e-3, l_step_epoch=1)  # type: ignore[call-arg]
CompressionRatio("4")  # type: ignore[arg-type]
compress(nn.Linear(3, 3), targets="fc")  # type: ignore[arg-type]
