"""config.json files of a diffusers pipeline, from our configs."""

from mindsigma.errors import MindSigmaError

DIFFUSERS_VERSION = "0.31.0"

MODEL_INDEX = {
    "_class_name": "PixArtSigmaPipeline",
    "_diffusers_version": DIFFUSERS_VERSION,
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "PixArtTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "_diffusers_version": DIFFUSERS_VERSION,
    "algorithm_type": "dpmsolver++",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "solver_order": 2,
    "solver_type": "midpoint",
    "timestep_spacing": "linspace",
    "use_karras_sigmas": False,
}

TOKENIZER = {
    "tokenizer_class": "T5Tokenizer",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "extra_ids": 100,
    "legacy": True,
}


def tokenizer_class(files):
    """transformers' class that reads a tokenizer of these file names; release 5 takes both for the same."""
    return "T5TokenizerFast" if "spiece.model" not in files and "tokenizer.json" in files else "T5Tokenizer"


def model_index(tokenizer_files):
    """model_index.json of a pipeline whose tokenizer folder holds files of these names."""
    return {**MODEL_INDEX, "tokenizer": ["transformers", tokenizer_class(tokenizer_files)]}


def tokenizer_config(tokenizer_files):
    """tokenizer_config.json beside files of these names."""
    return {**TOKENIZER, "tokenizer_class": tokenizer_class(tokenizer_files)}


def diffusers_config(kind, config):
    """config.json of a network as diffusers, or for T5 transformers, writes it."""
    return {"dit": _transformer, "vae": _vae, "t5": _t5, "controlnet": _controlnet}[kind](config)


def _controlnet(config):
    """As SimpleTuner writes it; diffusers' research project reads num_layers of it, for heads of 16 x 72."""
    _check_mlp(config)
    return {
        "_class_name": "PixArtSigmaControlNetAdapterModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "cross_attention_dim": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "num_layers": config.layers,
    }


def _check_mlp(config):
    if config.mlp_ratio != 4:
        raise MindSigmaError(f"diffusers' PixArt transformer has mlp_ratio 4, this one {config.mlp_ratio:g}")


def _transformer(config):
    _check_mlp(config)
    return {
        "_class_name": "PixArtTransformer2DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "attention_type": "default",
        "caption_channels": config.caption_channels,
        "cross_attention_dim": config.hidden_size,
        "dropout": 0.0,
        "in_channels": config.in_channels,
        "interpolation_scale": config.pe_interpolation,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_single",
        "num_attention_heads": config.num_heads,
        "num_embeds_ada_norm": 1000,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": config.input_size,
        "upcast_attention": False,
        "use_additional_conditions": config.micro_condition,
    }


def _vae(config):
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": config.force_upcast,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "mid_block_add_attention": config.mid_block_add_attention,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.out_channels,
        "sample_size": 1024,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor or None,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": config.use_post_quant_conv,
        "use_quant_conv": config.use_quant_conv,
    }


def _t5(config):
    return {
        "architectures": ["T5EncoderModel"],
        "d_ff": config.d_ff,
        "d_kv": config.d_kv,
        "d_model": config.d_model,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "is_gated_act": True,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "model_type": "t5",
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "tie_word_embeddings": False,
        "use_cache": False,
        "vocab_size": config.vocab_size,
    }
