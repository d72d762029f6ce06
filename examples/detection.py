"""A detector of torchvision, compressed by DeepTwist. It looks for one bright rectangle in noise.

Detectors take lists of images, so that the size of a batch cannot be told from its tensors: it is given.
"""

import pytorch_lightning as pl
import rich
import torch
from torch.utils.data import DataLoader
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.ops import box_iou

from lowrank_pl import CompressionRatio, DeepTwist, ExtractStructure, load_compressed

FOLDER, BATCH = "detector_compressed", 8


def new_detector():
    return ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=2, width_mult=0.25, image_size=96, detections_per_img=5
    )
    # with a network, and images of 320 x 320 pixels:
    # return ssdlite320_mobilenet_v3_large(weights="DEFAULT")


def pictures(count, seed):
    """Images of 96 x 96 pixels with one rectangle each, and what there is to be found."""
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        image = 0.3 * torch.rand(3, 96, 96, generator=generator)
        (x, y), (w, h) = torch.randint(0, 48, (2,), generator=generator), torch.randint(24, 48, (2,), generator=generator)
        image[:, y : y + h, x : x + w] += 0.6
        boxes = torch.stack([x, y, x + w, y + h])[None].float()
        found.append((image, {"boxes": boxes, "labels": torch.tensor([1])}))
    return found


class Detector(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = new_detector()

    def training_step(self, batch, _):
        images, targets = batch
        return sum(self.net(images, targets).values())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 2e-3)


@torch.no_grad()
def share_found(net, data):
    """Of how many pictures the best box overlaps the rectangle by more than half."""
    hits = 0
    for image, target in data:
        (found,) = net.eval()([image])
        hits += len(found["boxes"]) > 0 and float(box_iou(found["boxes"][:1], target["boxes"])) > 0.5
    return hits / len(data)


def main():
    pl.seed_everything(0)
    test = pictures(64, seed=1)
    lists = lambda samples: tuple(map(list, zip(*samples, strict=True)))  # noqa: E731
    loader = DataLoader(pictures(128, seed=0), BATCH, shuffle=True, drop_last=True, collate_fn=lists)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    module = Detector()
    pl.Trainer(max_epochs=8, **options).fit(module, loader)
    before = share_found(module.net, test)

    compress = DeepTwist(S_D=16, method="svd", rank=CompressionRatio(2.0), batch_size=BATCH)
    extract = ExtractStructure(FOLDER, submodule="net", latency=False)
    pl.Trainer(max_epochs=4, callbacks=[compress, extract], **options).fit(module, loader)

    small = load_compressed(new_detector(), FOLDER)
    rich.print(extract.report.to_table(found=(before, share_found(small, test))))


if __name__ == "__main__":
    main()
