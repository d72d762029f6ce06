"""A speech encoder, wav2vec 2.0, compressed by DeepTwist. It tells eight tones in noise from each other."""

import pytorch_lightning as pl
import rich
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

from lowrank_pl import CompressionRatio, DeepTwist, ExtractStructure, Targets, load_compressed

FOLDER = "speech_compressed"


def new_encoder():
    config = Wav2Vec2Config(
        num_labels=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        conv_dim=(32, 32, 32), conv_kernel=(10, 3, 3), conv_stride=(5, 2, 2), num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, classifier_proj_size=32, layerdrop=0.0, apply_spec_augment=False,
    )  # fmt: skip
    return Wav2Vec2ForSequenceClassification(config)
    # with a network, and speech of 16,000 samples a second:
    # return Wav2Vec2ForSequenceClassification.from_pretrained("facebook/wav2vec2-base", num_labels=8)


def tones(count, seed):
    """Waves of 1,000 samples of one of eight frequencies, at any phase."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 8, (count,), generator=generator)
    phase, time = 6.28 * torch.rand(count, 1, generator=generator), torch.arange(1000)
    waves = torch.sin(0.1 * 1.3 ** labels[:, None] * time + phase)
    return TensorDataset(waves + 0.5 * torch.randn(waves.shape, generator=generator), labels)


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = new_encoder()

    def training_step(self, batch, _):
        waves, labels = batch
        return self.net(input_values=waves, labels=labels).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


@torch.no_grad()
def accuracy(net, data):
    waves, labels = data[:]
    right = net.eval()(input_values=waves).logits.argmax(1) == labels
    net.train()
    return float(right.float().mean())


def main():
    pl.seed_everything(0)
    test, loader = tones(256, seed=1), DataLoader(tones(1024, seed=0), 32, shuffle=True)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    module = Classifier()
    pl.Trainer(max_epochs=6, **options).fit(module, loader)
    before = accuracy(module.net, test)

    # the projection behind the convolutions, and both linear layers of the head, are small, and matter
    targets = Targets(exclude=["net.projector", "*feature_projection*"])
    compress = DeepTwist(S_D=16, method="svd", rank=CompressionRatio(2.0), targets=targets)
    extract = ExtractStructure(FOLDER, submodule="net")
    pl.Trainer(max_epochs=4, callbacks=[compress, extract], **options).fit(module, loader)

    small = load_compressed(new_encoder(), FOLDER)
    rich.print(extract.report.to_table(accuracy=(before, accuracy(small, test))))


if __name__ == "__main__":
    main()
