"""Networks with random weights and tiny configurations: how each is made, and what a batch of it is."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import plain
import torch
from torch import Tensor, nn

Batch = tuple[Any, ...] | dict[str, Any]  # the arguments of forward


@dataclass(frozen=True)
class Network:
    """`make()` gives the module, `batch(n)` its arguments for n inputs. With `tell_batch` the tensors do not tell how
    many, and `batch_size` is given. Learning-compression asks to exclude what is `frozen`."""

    name: str
    library: str
    make: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    tell_batch: bool = False
    frozen: tuple[str, ...] = ()


def floats(*shape: int) -> Callable[[int], Batch]:
    return lambda n: (torch.randn(n, *shape),)


def tokens(length: int = 12, below: int = 64) -> Callable[[int], Tensor]:
    return lambda n: torch.randint(3, below, (n, length))


def named(**makers: Callable[[int], Tensor]) -> Callable[[int], Batch]:
    return lambda n: {name: maker(n) for name, maker in makers.items()}


def normal(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape)


def instance(path: str, *args: Any, **kwargs: Any) -> Any:
    """What the class or function of that dotted path gives for these arguments."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)(*args, **kwargs)


# -- timm ----------------------------------------------------------------------------------------------------------

STAGES = {"layers": (1, 1, 1, 1), "channels": (16, 24, 32, 48)}
DIMS = {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)}
VIT = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}
SWIN = {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 4, 8), "window_size": 2}
TIMM: dict[str, dict[str, Any]] = {
    "resnet18": STAGES,
    "resnet50": STAGES,
    "seresnet18": STAGES,
    "skresnet18": STAGES,
    "resnest14d": STAGES,
    "resnext50_32x4d": {"layers": (1, 1, 1, 1), "channels": (16, 32, 32, 64), "cardinality": 4},
    "densenet121": {"growth_rate": 8, "block_config": (2, 2, 2, 2)},
    "test_nfnet": {},
    "test_efficientnet": {},
    "test_efficientnet_evos": {},
    "test_byobnet": {},
    "mobilenetv2_035": {},
    "mobilenetv3_small_050": {},
    "mobilenetv4_conv_small_035": {},
    "mnasnet_small": {},
    "lcnet_035": {},
    "regnetx_002": {},
    "regnety_002": {},
    "rexnet_130": {"initial_chs": 8, "final_chs": 48},
    "ghostnet_050": {},
    "repghostnet_050": {},
    "starnet_s050": {},
    "convnextv2_atto": DIMS,
    "inception_next_atto": DIMS,
    "mambaout_femto": DIMS,
    "edgenext_xx_small": DIMS,
    "mobilevit_xxs": {},
    "vit_tiny_patch16_224": VIT,
    "vit_base_patch16_siglip_224": VIT,
    "vit_base_patch16_rope_224": VIT,
    "vit_srelpos_small_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "deit3_small_patch16_224": VIT,
    "beit_base_patch16_224": VIT,
    "eva02_tiny_patch14_224": VIT | {"img_size": 56},
    "aimv2_large_patch14_224": VIT | {"img_size": 56},
    "cait_xxs24_224": VIT,
    "xcit_nano_12_p16_224": VIT,
    "convit_tiny": VIT | {"embed_dim": 12, "num_heads": 4, "local_up_to_layer": 1},
    "samvit_base_patch16": VIT | {"global_attn_indexes": (1,), "window_size": 2},
    "tnt_s_legacy_patch16_224": {"img_size": 64, "depth": 2, "embed_dim": 48, "inner_dim": 12},
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
    "maxvit_nano_rw_256": {
        "img_size": 64, "embed_dim": (32, 32, 64, 64), "depths": (1, 1, 1, 1), "stem_width": 16,
    },
    "coatnet_nano_rw_224": {
        "img_size": 64, "embed_dim": (32, 32, 64, 64), "depths": (1, 1, 1, 1), "stem_width": 16,
    },
    "coat_lite_tiny": {"img_size": 64, "embed_dims": (16, 24, 32, 48), "serial_depths": (1, 1, 1, 1)},
    "levit_128s": {"img_size": 64, "embed_dim": (32, 48, 64), "depth": (1, 1, 1)},
    "davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1), "embed_dims": (16, 24, 32, 48), "num_heads": (1, 1, 2, 4)},
    "twins_svt_small": {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)},
    "hiera_tiny_224": {"img_size": 64, "stages": (1, 1, 1, 1), "embed_dim": 16, "num_heads": 1},
    "visformer_tiny": {"img_size": 64, "embed_dim": 48, "depth": (1, 1, 1)},
    "sequencer2d_s": {"layers": (1, 1, 1, 1), "embed_dims": (24, 48, 48, 48), "hidden_sizes": (8, 12, 12, 12)},
    "repvit_m0_9": {"embed_dim": (16, 24, 32, 48), "depth": (1, 1, 1, 1)},
    "fastvit_t8": {"layers": (1, 1, 1, 1), "embed_dims": (32, 64, 64, 128)},
}  # fmt: skip


def timm_networks() -> list[Network]:
    def create(name: str, options: dict[str, Any]) -> nn.Module:
        return instance("timm.create_model", name, num_classes=10, **options)

    found = [
        Network(name, "timm", partial(create, name, options), floats(3, *[options.get("img_size", 64)] * 2))
        for name, options in TIMM.items()
    ]
    classes: dict[str, tuple[str, dict[str, Any]]] = {
        "resnetv2 (bit)": ("timm.models.resnetv2.ResNetV2", {"layers": (1, 1, 1), "channels": (128, 128, 128),
                                                             "stem_chs": 32, "num_classes": 10}),  # StdConv2d
        "mixer": ("timm.models.mlp_mixer.MlpMixer", {"img_size": 64, "num_blocks": 2, "embed_dim": 48,
                                                     "num_classes": 10}),
        "poolformer": ("timm.models.metaformer.MetaFormer", {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48),
                                                             "num_classes": 10}),
        "convmixer": ("timm.models.convmixer.ConvMixer", {"dim": 48, "depth": 2, "num_classes": 10}),
        "focalnet": ("timm.models.focalnet.FocalNet", {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_classes": 10}),
        "volo": ("timm.models.volo.VOLO", {"img_size": 64, "layers": (1, 1, 1, 1), "embed_dims": (24, 48, 48, 48),
                                           "num_heads": (1, 2, 2, 2), "outlook_attention": (True, False, False, False),
                                           "num_classes": 10}),
    }  # fmt: skip
    found += [
        Network(name, "timm", partial(instance, path, **options), floats(3, 64, 64))
        for name, (path, options) in classes.items()
    ]
    return found


# -- torchvision ---------------------------------------------------------------------------------------------------


def _faster_rcnn() -> nn.Module:
    from torchvision.models import mobilenet_v3_small
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.rpn import AnchorGenerator

    backbone = mobilenet_v3_small(width_mult=0.5).features
    backbone.out_channels = 288
    anchors = AnchorGenerator(((16, 32),), ((1.0,),))
    sizes = {"min_size": 64, "max_size": 64, "box_detections_per_img": 5, "rpn_post_nms_top_n_train": 20}
    heads = {"box_head": TwoMLPHead(288 * 49, 64), "box_predictor": FastRCNNPredictor(64, 4)}
    return FasterRCNN(backbone, rpn_anchor_generator=anchors, rpn_post_nms_top_n_test=20, **heads, **sizes)


def _ssd_lite() -> nn.Module:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    return ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=4, width_mult=0.25, image_size=64
    )


def pictures(n: int) -> Batch:
    """Lists, as torchvision's detectors take them."""
    images = [torch.rand(3, 64, 64) for _ in range(n)]
    boxes = torch.tensor([[8.0, 8.0, 40.0, 40.0], [20.0, 10.0, 60.0, 50.0]])
    return images, [{"boxes": boxes.clone(), "labels": torch.tensor([1, 2])} for _ in range(n)]


def torchvision_networks() -> list[Network]:
    models = "torchvision.models."
    vit = {"image_size": 64, "patch_size": 16, "num_layers": 2, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 96}
    swin = {"patch_size": [4, 4], "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "window_size": [2, 2]}

    def convnext() -> nn.Module:
        from torchvision.models.convnext import CNBlockConfig, ConvNeXt

        return ConvNeXt(
            [CNBlockConfig(16, 32, 1), CNBlockConfig(32, 64, 1), CNBlockConfig(64, None, 1)], num_classes=10
        )

    def lraspp() -> nn.Module:
        from torchvision.models import mobilenet_v3_small
        from torchvision.models.segmentation.lraspp import _lraspp_mobilenetv3

        backbone = mobilenet_v3_small(width_mult=0.5, dilated=True)
        return _lraspp_mobilenetv3(backbone, 5)

    def r3d() -> nn.Module:
        from torchvision.models.video.resnet import BasicBlock, BasicStem, Conv3DSimple, VideoResNet

        net = VideoResNet(BasicBlock, [Conv3DSimple] * 4, [1, 1, 1, 1], BasicStem, num_classes=10)
        net.layer3, net.layer4, net.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 10)
        return net

    def mvit() -> nn.Module:
        from torchvision.models.video.mvit import MSBlockConfig, MViT

        block = {"kernel_q": [3, 3, 3], "kernel_kv": [3, 3, 3], "stride_q": [1, 1, 1], "stride_kv": [1, 2, 2]}
        blocks = [MSBlockConfig(1, 32, 32, **block), MSBlockConfig(2, 32, 64, **block)]
        return MViT((32, 32), 4, blocks, True, True, True, 0.5, 0.0, 0.0, num_classes=10)

    entries: list[tuple[str, Callable[[], nn.Module], Callable[[int], Batch]]] = [
        ("resnet18", partial(instance, models + "resnet18", num_classes=10), floats(3, 64, 64)),
        ("vit", partial(instance, models + "VisionTransformer", num_classes=10, **vit), floats(3, 64, 64)),
        ("swin_t", partial(instance, models + "SwinTransformer", num_classes=10, **swin), floats(3, 32, 32)),
        ("convnext", convnext, floats(3, 64, 64)),
        ("shufflenet_v2", partial(instance, models + "shufflenet_v2_x0_5", num_classes=10), floats(3, 64, 64)),
        ("squeezenet1_1", partial(instance, models + "squeezenet1_1", num_classes=10), floats(3, 64, 64)),
        ("lraspp (segmentation)", lraspp, floats(3, 64, 64)),
        ("r3d (video)", r3d, floats(3, 4, 24, 24)),
        ("mvit (video)", mvit, floats(3, 4, 32, 32)),
    ]
    found = [Network(name, "torchvision", make, batch) for name, make, batch in entries]
    found.append(Network("ssdlite (detection)", "torchvision", _ssd_lite, pictures, tell_batch=True))
    found.append(Network("faster_rcnn (detection)", "torchvision", _faster_rcnn, pictures, tell_batch=True))
    return found


# -- Hugging Face --------------------------------------------------------------------------------------------------

BERT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
LLAMA = BERT | {"num_key_value_heads": 2, "max_position_embeddings": 64, "use_cache": False, "pad_token_id": 0}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "use_cache": False}
BART = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "use_cache": False,
}  # fmt: skip
WAV2VEC2 = BERT | {
    "conv_dim": (16, 16, 16), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2), "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0, "layerdrop": 0.0,
}  # fmt: skip
IMAGES = {"image_size": 32, "patch_size": 8}
_TEXT = named(input_ids=tokens())
_WAVE = named(input_values=normal(800))
_PIXELS = named(pixel_values=normal(3, 32, 32))
# name -> class, configuration, its values, batch
HUGGING_FACE: dict[str, tuple[str, str, dict[str, Any], Callable[[int], Batch]]] = {
    "BERT": ("BertForSequenceClassification", "BertConfig", BERT, _TEXT),
    "DistilBERT": ("DistilBertForSequenceClassification", "DistilBertConfig",
                   {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, _TEXT),
    "ALBERT": ("AlbertForSequenceClassification", "AlbertConfig", BERT | {"embedding_size": 16}, _TEXT),
    "ELECTRA": ("ElectraForSequenceClassification", "ElectraConfig", BERT | {"embedding_size": 16}, _TEXT),
    "RoBERTa": ("RobertaForMaskedLM", "RobertaConfig", BERT, _TEXT),
    "DeBERTa-v2": ("DebertaV2ForSequenceClassification", "DebertaV2Config",
                   BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}, _TEXT),
    "XLNet": ("XLNetForSequenceClassification", "XLNetConfig",
              {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "use_mems_eval": False,
               "use_mems_train": False}, _TEXT),
    "Longformer": ("LongformerModel", "LongformerConfig", BERT | {"attention_window": 4}, _TEXT),
    "ModernBERT": ("ModernBertForSequenceClassification", "ModernBertConfig", BERT | {"pad_token_id": 0}, _TEXT),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config",
              {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "use_cache": False},
              _TEXT),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", BERT | {"use_cache": False}, _TEXT),
    "OPT": ("OPTForCausalLM", "OPTConfig",
            {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "word_embed_proj_dim": 32, "use_cache": False}, _TEXT),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA, _TEXT),
    "Mistral": ("MistralForCausalLM", "MistralConfig", LLAMA, _TEXT),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig",
                LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}, _TEXT),
    "Mamba": ("MambaForCausalLM", "MambaConfig",
              {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "use_cache": False},
              _TEXT),
    "T5": ("T5ForConditionalGeneration", "T5Config", T5, named(input_ids=tokens(), decoder_input_ids=tokens(8))),
    "BART": ("BartForConditionalGeneration", "BartConfig", BART,
             named(input_ids=tokens(), decoder_input_ids=tokens(8))),
    "Perceiver": ("PerceiverModel", "PerceiverConfig",
                  {"d_model": 16, "d_latents": 32, "num_latents": 8, "num_blocks": 1, "num_self_attends_per_block": 2,
                   "num_self_attention_heads": 4, "num_cross_attention_heads": 4}, named(inputs=normal(12, 16))),
    "ViT": ("ViTForImageClassification", "ViTConfig", BERT | IMAGES, _PIXELS),
    "BEiT": ("BeitForImageClassification", "BeitConfig", BERT | IMAGES, _PIXELS),
    "SegFormer": ("SegformerForSemanticSegmentation", "SegformerConfig",
                  {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2],
                   "decoder_hidden_size": 32}, named(pixel_values=normal(3, 64, 64))),
    "Wav2Vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", WAV2VEC2, _WAVE),
    "HuBERT": ("HubertForCTC", "HubertConfig", WAV2VEC2, _WAVE),
    "Whisper": ("WhisperForConditionalGeneration", "WhisperConfig",
                BART | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0,
                        "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
                named(input_features=normal(8, 32), decoder_input_ids=tokens(8))),
    "AST": ("ASTForAudioClassification", "ASTConfig", BERT | {"max_length": 32, "num_mel_bins": 16, "patch_size": 8,
            "time_stride": 8, "frequency_stride": 8}, named(input_values=normal(32, 16))),
    "CLIP": ("CLIPModel", "CLIPConfig",
             {"text_config": BERT | {"projection_dim": 16, "max_position_embeddings": 32, "eos_token_id": 2},
              "vision_config": BERT | IMAGES | {"projection_dim": 16}, "projection_dim": 16},
             named(input_ids=tokens(), pixel_values=normal(3, 32, 32))),
    "SigLIP": ("SiglipModel", "SiglipConfig",
               {"text_config": BERT | {"max_position_embeddings": 32, "projection_size": 32},
                "vision_config": BERT | IMAGES}, named(input_ids=tokens(), pixel_values=normal(3, 32, 32))),
}  # fmt: skip


def hugging_face_networks() -> list[Network]:
    def create(model: str, config: str, values: dict[str, Any]) -> nn.Module:
        return instance(f"transformers.{model}", instance(f"transformers.{config}", **values))

    return [
        Network(name, "transformers", partial(create, model, config, values), batch)
        for name, (model, config, values, batch) in HUGGING_FACE.items()
    ]


def diffusers_networks() -> list[Network]:
    unet = {
        "sample_size": 16, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "block_out_channels": (16, 32),
        "norm_num_groups": 8, "attention_head_dim": 8, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    conditional = unet | {
        "cross_attention_dim": 32, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    dit = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 3, "out_channels": 3, "num_layers": 2,
        "sample_size": 16, "patch_size": 4, "num_embeds_ada_norm": 10, "norm_num_groups": 1,
    }  # fmt: skip
    noisy = {"sample": normal(3, 16, 16), "timestep": lambda n: torch.randint(0, 10, (n,))}
    of_dit = {"hidden_states": normal(3, 16, 16), "timestep": noisy["timestep"], "class_labels": noisy["timestep"]}
    return [
        Network("UNet2DModel", "diffusers", partial(instance, "diffusers.UNet2DModel", **unet), named(**noisy)),
        Network(
            "UNet2DConditionModel", "diffusers", partial(instance, "diffusers.UNet2DConditionModel", **conditional),
            named(**noisy, encoder_hidden_states=normal(6, 32)),
        ),
        Network("DiTTransformer2DModel", "diffusers",
                partial(instance, "diffusers.DiTTransformer2DModel", **dit), named(**of_dit)),
    ]  # fmt: skip


def torchaudio_networks() -> list[Network]:
    def lengths(size: int) -> Callable[[int], Tensor]:
        return lambda n: torch.full((n,), size)

    def frames(n: int) -> Batch:
        return torch.randn(n, 20, 16), lengths(20)(n)

    wav2vec2 = {
        "extractor_mode": "group_norm", "extractor_conv_layer_config": [(16, 10, 5), (16, 3, 2)],
        "extractor_conv_bias": False, "encoder_embed_dim": 32, "encoder_projection_dropout": 0.0,
        "encoder_pos_conv_kernel": 16, "encoder_pos_conv_groups": 4, "encoder_num_layers": 2, "encoder_num_heads": 4,
        "encoder_attention_dropout": 0.0, "encoder_ff_interm_features": 64, "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0, "encoder_layer_norm_first": False, "encoder_layer_drop": 0.0, "aux_num_out": 12,
    }  # fmt: skip
    tacotron = {
        "n_mels": 8, "n_symbol": 32, "symbol_embedding_dim": 32, "encoder_embedding_dim": 32,
        "encoder_n_convolution": 2, "decoder_rnn_dim": 32, "decoder_max_step": 20, "attention_rnn_dim": 32,
        "attention_hidden_dim": 16, "attention_location_n_filter": 8, "attention_location_kernel_size": 7,
        "prenet_dim": 16, "postnet_n_convolution": 3, "postnet_embedding_dim": 32,
    }  # fmt: skip

    def speech(n: int) -> Batch:
        return torch.randint(0, 32, (n, 10)), lengths(10)(n), torch.randn(n, 8, 12), lengths(12)(n)

    models = "torchaudio.models."
    conformer = {"input_dim": 16, "num_heads": 4, "ffn_dim": 64, "num_layers": 2, "depthwise_conv_kernel_size": 7}
    entries: list[tuple[str, Callable[[], nn.Module], Callable[[int], Batch]]] = [
        ("Conformer", partial(instance, models + "Conformer", **conformer), frames),
        ("Emformer", partial(instance, models + "Emformer", 16, 4, 32, 2, 4, right_context_length=2),
         lambda n: (torch.randn(n, 22, 16), torch.full((n,), 20))),
        ("Wav2Letter", partial(instance, models + "Wav2Letter", 12, "mfcc", 13), floats(13, 40)),
        ("DeepSpeech", partial(instance, models + "DeepSpeech", 16, 64, 12), floats(1, 20, 16)),
        ("ConvTasNet", partial(instance, models + "ConvTasNet", 2, 16, 32, 3, 16, 32, 2, 1), floats(1, 400)),
        ("Wav2Vec2Model", partial(instance, models + "wav2vec2_model", **wav2vec2), floats(800)),
        ("Tacotron2", partial(instance, models + "Tacotron2", **tacotron), speech),
    ]  # fmt: skip
    return [Network(name, "torchaudio", make, batch) for name, make, batch in entries]


def plain_networks() -> list[Network]:
    def sequences(n: int) -> Batch:
        return torch.randn(12, n, 32), torch.randn(8, n, 32)

    transformer = {"d_model": 32, "nhead": 4, "num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 64}
    entries: list[tuple[str, Callable[[], nn.Module], Callable[[int], Batch], bool]] = [
        ("nn.Transformer, sequence first", partial(nn.Transformer, **transformer), sequences, True),  # type: ignore[arg-type]
        ("nn.TransformerEncoder", plain.encoder, floats(12, 32), False),
        ("LSTM tagger", partial(plain.Tagger, nn.LSTM), lambda n: (tokens()(n),), False),
        ("GRU tagger", partial(plain.Tagger, nn.GRU), lambda n: (tokens()(n),), False),
        ("TCN, weight_norm", plain.tcn, floats(16, 40), False),
        ("GAN discriminator, spectral_norm", plain.discriminator, floats(3, 32, 32), False),
        ("GAN generator, transposed", plain.generator, floats(32, 1, 1), False),
        ("3-d U-Net", plain.UNet3d, floats(1, 8, 16, 16), False),
        ("autoencoder", plain.autoencoder, floats(64), False),
        ("FNO, complex weights", plain.FNO, floats(1, 16, 16), False),
        ("graph network, einsum", plain.GraphNet, lambda n: (torch.randn(n, 10, 16), torch.rand(n, 10, 10)), False),
        ("tied-embedding LM", plain.TiedLM, lambda n: (tokens()(n),), False),
        ("mixture of experts, 3-d weights", plain.Experts, floats(12, 32), False),
        ("multilayer perceptron", plain.mlp, floats(1, 16, 16), False),
        ("Siamese network", plain.Siamese, lambda n: (torch.randn(n, 3, 32, 32), torch.randn(n, 3, 32, 32)), False),
        ("DLRM, embedding bags", plain.DLRM,
         lambda n: (torch.randn(n, 8), torch.randint(0, 100, (n, 4))), False),
        ("NeRF", plain.NeRF, floats(24, 3), False),
    ]  # fmt: skip
    found = [Network(name, "torch", make, batch, tell) for name, make, batch, tell in entries]
    return [*found, Network("LoRA", "torch", plain.lora, floats(32), frozen=("*.base",))]


def networks() -> list[Network]:
    """All of them, in the order of the table."""
    return [
        *plain_networks(),
        *torchvision_networks(),
        *timm_networks(),
        *hugging_face_networks(),
        *diffusers_networks(),
        *torchaudio_networks(),
    ]
