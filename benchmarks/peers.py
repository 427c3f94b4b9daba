"""The networks of diffusers and transformers, of our networks' sizes and called as ours are.

What is not installed raises ImportError.
"""

import torch
import torch.nn as nn

import clip

VAE_WIDTHS = 128, 256, 512, 512         # of its levels
WIDTH, LAYERS, SIDE, PATCH, EMBEDDING = 1024, 24, 224, 14, 768      # of ViT-L/14


class UNet(nn.Module):
    """diffusers' UNet of a Config, for latents of so many channels."""
    def __init__(self, config, channels):
        super().__init__()
        from diffusers import UNet2DConditionModel
        attends = [2**level in config.attention_resolutions
                   for level in range(len(config.channel_mult))]
        self.unet = UNet2DConditionModel(
            sample_size=config.image_size // 8, in_channels=2 * channels, out_channels=channels,
            down_block_types=[("CrossAttn" if a else "") + "DownBlock2D" for a in attends],
            up_block_types=[("CrossAttn" if a else "") + "UpBlock2D" for a in reversed(attends)],
            block_out_channels=[mult * config.model_channels for mult in config.channel_mult],
            layers_per_block=config.num_res_blocks, attention_head_dim=config.num_heads,
            cross_attention_dim=config.context_dim, norm_num_groups=config.norm_groups)
        self.register_buffer("nothing", torch.zeros(()))

    def forward(self, x, t, context):
        return self.unet(x, t, context, return_dict=False)[0]

    def idle_parameters(self):
        return {"nothing": self.nothing}    # all get a gradient; the optimizer needs some to decay


class Autoencoder(nn.Module):
    """diffusers' autoencoder."""
    def __init__(self):
        super().__init__()
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        whole = AutoencoderKL(
            block_out_channels=VAE_WIDTHS, layers_per_block=2, latent_channels=4,
            down_block_types=["DownEncoderBlock2D"] * len(VAE_WIDTHS),
            up_block_types=["UpDecoderBlock2D"] * len(VAE_WIDTHS))
        self.encoder, self.quant_conv = whole.encoder, whole.quant_conv
        self.decoder, self.post_quant_conv = whole.decoder, whole.post_quant_conv

    def encode(self, x):
        return self.quant_conv(self.encoder(x)).chunk(2, dim=1)

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype)))


class Clip(nn.Module):
    """transformers' image tower, with our preprocessing before it, which is part of the work."""
    def __init__(self):
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
        self.tower = CLIPVisionModelWithProjection(CLIPVisionConfig(
            hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
            num_attention_heads=WIDTH // clip.HEAD_WIDTH, image_size=SIDE, patch_size=PATCH,
            projection_dim=EMBEDDING, hidden_act="quick_gelu"))
        self.before = clip.CLIP(vision_layers=0)

    def encode_image(self, x):
        return self.tower(self.before.preprocess(x)).image_embeds
