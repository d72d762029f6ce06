"""A vision transformer of timm: trained, stored in a checkpoint, and compressed from there by DeepTwist.

The pictures are scikit-learn's digits, 8 x 8 pixels.
"""

import pytorch_lightning as pl
import rich
import timm
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

from lowrank_pl import CompressionRatio, DeepTwist, ExtractStructure, load_compressed

CHECKPOINT, FOLDER = "vit.ckpt", "vit_compressed"


def new_vit():
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "depth": 3, "embed_dim": 64, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes)
    # with a network, and pictures of 224 x 224 pixels:
    # return timm.create_model("vit_tiny_patch16_224", num_classes=10, pretrained=True)


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = new_vit()

    def training_step(self, batch, _):
        images, labels = batch
        return cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


@torch.no_grad()
def accuracy(net, data):
    images, labels = data[:]
    right = net.eval()(images).argmax(1) == labels
    net.train()
    return float(right.float().mean())


def main():
    pl.seed_everything(0)
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    train, test = random_split(TensorDataset(images, torch.tensor(labels)), [0.8, 0.2])
    loader = DataLoader(train, 32, shuffle=True, drop_last=True)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}

    trainer = pl.Trainer(max_epochs=12, **options)
    trainer.fit(Classifier(), loader)
    trainer.save_checkpoint(CHECKPOINT)

    module = Classifier.load_from_checkpoint(CHECKPOINT)
    before = accuracy(module.net, test)
    compress = DeepTwist(S_D=40, method="svd", rank=CompressionRatio(2.0))
    extract = ExtractStructure(FOLDER, submodule="net")
    pl.Trainer(max_epochs=12, callbacks=[compress, extract], **options).fit(module, loader)

    small = load_compressed(new_vit(), FOLDER)
    rich.print(extract.report.to_table(accuracy=(before, accuracy(small, test))))


if __name__ == "__main__":
    main()
