"""BERT for classification, compressed to 60 % of its multiply-adds by learning-compression.

The "text" is scikit-learn's digits: 64 tokens, one for each pixel, of a vocabulary of 17 grey levels.
"""

import pytorch_lightning as pl
import rich
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split
from transformers import BertConfig, BertForSequenceClassification

from lowrank_pl import CostBudget, ExtractStructure, LearningCompression, load_compressed

FOLDER = "bert_compressed"


def new_bert():
    config = BertConfig(
        vocab_size=17, num_labels=10, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
    )  # fmt: skip
    return BertForSequenceClassification(config)
    # with a network, and a tokenizer for your own texts:
    # return BertForSequenceClassification.from_pretrained("google-bert/bert-base-uncased", num_labels=10)


class Classifier(pl.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, _):
        tokens, labels = batch
        return self.net(input_ids=tokens, labels=labels).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


@torch.no_grad()
def accuracy(net, data):
    tokens, labels = data[:]
    right = net.eval()(input_ids=tokens).logits.argmax(1) == labels
    net.train()
    return float(right.float().mean())


def main():
    pl.seed_everything(0)
    pixels, labels = load_digits(return_X_y=True)
    train, test = random_split(TensorDataset(torch.tensor(pixels).long(), torch.tensor(labels)), [0.8, 0.2])
    loader = DataLoader(train, 32, shuffle=True, drop_last=True)
    trainer = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}

    # learning-compression starts from trained weights
    module = Classifier(new_bert())
    pl.Trainer(max_epochs=8, **trainer).fit(module, loader)
    before = accuracy(module.net, test)

    # mu ends at 0.1 * 2 ** 7 = 12.8: weights and their projections have met by then
    compress = LearningCompression(budget=CostBudget("macs", 0.6), mu0=1e-1, growth=2.0, steps=8, l_step_epochs=1)
    extract = ExtractStructure(FOLDER, submodule="net")
    pl.Trainer(max_epochs=-1, callbacks=[compress, extract], **trainer).fit(module, loader)

    small = load_compressed(new_bert(), FOLDER)
    rich.print(extract.report.to_table(accuracy=(before, accuracy(small, test))))


if __name__ == "__main__":
    main()
