"""A detector of torchvision, compressed by DeepTwist. It looks for one bright rectangle in noise."""

import pytorch_lightning as pl
import rich
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou

from lowrank_pl import CompressionRatio, DeepTwist, ExtractStructure, Targets, load_compressed

FOLDER, BATCH = "detector_compressed", 8


def new_detector():
    stage = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())  # noqa: E731
    backbone = nn.Sequential(stage(3, 16), stage(16, 32), stage(32, 64))
    backbone.out_channels = 64
    anchors = AnchorGenerator(((8,),), ((1.0,),))
    return FCOS(backbone, num_classes=2, min_size=96, max_size=96, anchor_generator=anchors, detections_per_img=5)
    # with a network, for photographs: return torchvision.models.detection.fcos_resnet50_fpn(weights="DEFAULT")


def pictures(count, seed):
    """Images of 96 x 96 pixels with one rectangle each, and what there is to be found."""
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        image = 0.3 * torch.rand(3, 96, 96, generator=generator)
        x, y, w, h = torch.randint(24, 48, (4,), generator=generator)
        image[:, y : y + h, x : x + w] += 0.6
        box = torch.stack([x, y, x + w, y + h]).float()
        found.append((image, {"boxes": box[None], "labels": torch.tensor([1])}))
    return found


class Detector(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = new_detector()

    def training_step(self, batch, _):
        return sum(self.net(*batch).values())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 2e-3)


@torch.no_grad()
def share_found(net, data):
    """Of how many pictures the best box overlaps the rectangle by more than half."""
    found = [net.eval()([image])[0]["boxes"][:1] for image, _ in data]
    net.train()
    hits = [box_iou(best, target["boxes"]).sum() > 0.5 for best, (_, target) in zip(found, data, strict=True)]
    return sum(map(float, hits)) / len(hits)


def main():
    pl.seed_everything(0)
    lists = lambda samples: [*zip(*samples, strict=True)]  # noqa: E731
    loader = DataLoader(pictures(128, seed=0), BATCH, shuffle=True, drop_last=True, collate_fn=lists)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    module = Detector()
    pl.Trainer(max_epochs=8, **options).fit(module, loader)
    before = share_found(module.net, pictures(64, seed=1))
    # the layers that put out boxes and scores are convolutions, which `skip_last` does not know as last
    targets = Targets(exclude=["*.cls_logits", "*.bbox_*"])
    # detectors take lists of images, so that the size of a batch cannot be told from its tensors: it is given
    compress = DeepTwist(S_D=16, method="svd", rank=CompressionRatio(2.0), targets=targets, batch_size=BATCH)
    extract = ExtractStructure(FOLDER, submodule="net", latency=False)
    pl.Trainer(max_epochs=4, callbacks=[compress, extract], **options).fit(module, loader)

    small = load_compressed(new_detector(), FOLDER)
    rich.print(extract.report.to_table(found=(before, share_found(small, pictures(64, seed=1)))))


if __name__ == "__main__":
    main()
