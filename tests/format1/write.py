"""Writes what this folder holds, with the version that is installed: `python tests/format1/write.py FOLDER`.

The files here are those of 0.1.0 (commit 86bae2d): for each of FITS a Lightning checkpoint after step 7, the weights
at the end of step 14, and the extracted network, whose layers are of all kinds.
"""

import sys
from pathlib import Path

import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from nets import StepData, loader, quiet_trainer

from lowrank_pl import Cheapest, DeepTwist, ExtractStructure, FixedRank, LearningCompression, Targets, TiledSVD

ALL = Targets(skip_first=False, skip_last=False)
LC = {"mu0": 1.0, "growth": 1.1, "steps": 6, "l_step_steps": 3, "targets": ALL}
FITS = {
    "deeptwist": lambda: DeepTwist(4, {"*conv2": "tucker2", "*": TiledSVD(8)}, FixedRank(2), ALL),
    "lc": lambda: LearningCompression(1800.0, method=Cheapest("tucker2", "svd"), cost="params", **LC),
    "lc_macs": lambda: LearningCompression(45.0, method="svd", penalty="quadratic", lr_decay=0.9, **LC),
}


def fit(name, folder, checkpoint=None):
    """14 steps, or those that are left; the weights and the extracted network go into the folder."""
    extract, module = ExtractStructure(folder / name, submodule="net"), StepData()
    every = ModelCheckpoint(folder, filename=f"{name}-{{step}}", every_n_train_steps=7, save_top_k=-1)
    callback = FITS[name]()
    trainer = quiet_trainer(folder, callback, extract, every, max_steps=14, max_epochs=-1, enable_checkpointing=True)
    torch.manual_seed(0)
    trainer.fit(module, loader(), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    save_file({k: v.contiguous() for k, v in module.net.state_dict().items()}, folder / f"{name}.safetensors")
    return callback, extract


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for each in FITS:
        callback, extract = fit(each, target)
        kinds = {n: e["structure"]["kind"] for n, e in extract.extracted.lowrank_pl_record["layers"].items()}
        sys.stdout.write(f"{each}: {kinds}\n")
