"""The Hydra configuration of lowrank_pl: `train.yaml` and its groups."""
