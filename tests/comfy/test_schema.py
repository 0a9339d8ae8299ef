"""What users and shared workflows rely on: ids, order of inputs, and words on everything."""

import pytest

from in_process import NODES

# For ever: new inputs are appended, nothing is renamed or moved.
INPUTS = {
    "K2Loader": ["model", "text_encoder", "vae", "dtype", "implementation"],
    "K2ModelLoader": ["file", "dtype", "implementation"],
    "K2TextEncoderLoader": ["file", "dtype"],
    "K2VAELoader": ["file", "dtype"],
    "K2LoraLoader": ["model", "clip", "lora", "strength", "clip_strength"],
    "K2PromptExpander": [
        *("clip", "prompt", "creativity", "length", "seed", "variants", "style", "language"),
        "enabled",
    ],
    "K2Describe": ["clip", "image", "length", "creativity", "seed", "max_side", "caption"],
    "K2StyleLora": ["model", "prompt", "style", "strength"],
    "K2TextEncode": ["clip", "prompt", "negative", "official_length", "max_tokens", "weights"],
    "K2TextEncodeImages": [
        *("clip", "prompt", *(f"image_{number}" for number in range(1, 9)), "negative", "labels"),
        *("max_side", "roles", "strengths", "official_length", "max_tokens", "weights"),
    ],
    "K2StyleMix": [
        *("clip", "prompt", *(f"image_{number}" for number in range(1, 9)), "shares", "strength"),
        *("preset", "negative", "vae", "through", "labels", "suppression", "max_side"),
        *("megapixels", "weights"),
    ],
    "K2Styles": ["model", "clip", "prompt", "styles", "negative", "vae"],
    "K2SaveStyle": [
        *("name", "words", "images", "picture_strength", "lora", "lora_strength", "negative"),
        *("styles", "thumbnail", "replace"),
    ],
    "K2Reference": [
        *("positive", "negative", "vae", "image", "family", "strength", "start", "end", "fit"),
        *("megapixels", "latent", "index", "apart"),
    ],
    "K2Edit": [
        *("model", "clip", "vae", "prompt", "image_1", "image_2", "negative", "family", "task"),
        *("boost", "boost_2", "mask", "latent", "megapixels", "encoder_side", "cache", "weights"),
    ],
    "K2ControlLora": [
        *("control", "positive", "negative", "vae", "image", "strength", "start", "end", "mask"),
        "form",
    ],
    "K2StyleTransfer": [
        *("model", "vae", "image", "strength", "start", "end", "image_2", "image_3", "image_4"),
        *("image_5", "image_6", "image_7", "image_8", "weights", "mask", "clip"),
        *("value_statistics", "key_scale", "first_block", "last_block", "megapixels"),
        "style_prompt",
    ],
    "K2TapWeights": [
        *("conditioning", "layer_2", "layer_5", "layer_8", "layer_11", "layer_14", "layer_17"),
        *("layer_20", "layer_23", "layer_26", "layer_29", "layer_32", "layer_35"),
    ],
    "K2EmptyLatent": ["aspect", "megapixels", "width", "height", "batch", "swap"],
    "K2Sampler": [
        *("model", "positive", "negative", "latent", "preset", "seed", "steps", "guidance"),
        *("denoise", "sampler", "shift", "mu", "seeds", "start_sigma", "noise"),
    ],
    "K2Vary": ["seed", "variation_seed", "strength", "index", "noise"],
    "K2Walk": ["start", "end", "frames", "seed", "end_seed"],
    "K2Sigmas": ["model", "latent", "preset", "steps", "denoise", "shift", "mu", "start_sigma"],
    "K2ModelSampling": ["model", "width", "height", "shift", "mu"],
    "K2VAEDecode": ["samples", "vae"],
    "K2VAEEncode": ["pixels", "vae"],
    "K2FitImage": ["image", "mask", "megapixels", "aspect", "mode", "padding"],
    "K2Inpaint": ["vae", "image", "mask", "grow", "feather", "soft", "fill"],
    "K2Composite": ["original", "painted", "mask", "feather"],
    "K2Outpaint": ["image", "left", "top", "right", "bottom", "feather"],
    "K2CropForInpaint": ["image", "mask", "context", "megapixels"],
    "K2Stitch": ["stitch", "painted", "mask", "feather"],
    "K2Detailer": [
        *("model", "positive", "negative", "vae", "image", "mask", "segs", "clip", "prompts"),
        *("preset", "seed", "steps", "guidance", "denoise", "context", "grow", "feather", "blend"),
        *("megapixels", "islands", "max_batch", "sampler", "shift", "mu", "start_sigma"),
    ],
    "K2NegativeGuidance": ["model", "negative", "strength", "blend", "start", "end", "limit"],
    "K2Compile": ["model", "mode"],
    "K2Approximate": ["model", "evaluate", "attention"],
    "K2Inspect": ["file"],
    "K2GuidanceSchedule": ["model", "start", "end", "ramp", "rescale"],
    "K2TwoStage": [
        *("raw", "turbo", "positive", "negative", "latent", "turbo_last", "seed", "raw_steps"),
        "guidance",
    ],
    "K2Regions": [
        *("clip", "positive", "negative", "regions", "masks", "model", "latent", "places"),
        *("text_factor", "separate", "weights", "prompt", "soft", "picture", "images"),
    ],
    "K2Upscale": [
        *("model", "positive", "negative", "vae", "image", "latent", "upscale_model", "scale"),
        *("sigma", "seed", "method", "parts", "steps", "guidance", "tile", "overlap"),
        *("batch", "clip", "tile_prompt", "prompt"),
    ],
    "K2TiledSampling": [
        *("model", "tile", "overlap", "move", "true_places", "batch", "cut_references"),
        *("clip", "image", "tile_prompt", "prompt"),
    ],
    "K2RotaryScaling": ["model", "method", "dynamic", "strength", "size"],
    "K2SparseAttention": ["model", "above", "block", "reach", "stride"],
    "K2PromptBatch": ["clip", "prompts", "negative", "images_per_prompt", "wildcard_seed"],
    "K2ContactSheet": ["images", "captions", "columns", "cell", "text_size"],
    "K2Grid": [
        *("model", "clip", "vae", "latent", "prompt", "negative", "preset", "seed", "steps"),
        *("guidance", "denoise", "sampler", "shift", "mu", "x_axis", "x_values", "y_axis"),
        *("y_values", "z_axis", "z_values", "lora", "filename_prefix", "max_cells"),
    ],
    "K2PictureSettings": ["image"],
    "K2SelfCheck": ["model", "clip"],
    "K2TrainLora": [
        *("model", "clip", "vae", "folder", "name", "method", "rank", "steps", "batch"),
        *("learning_rate", "resolution", "seed", "trigger", "caption", "caption_dropout", "alpha"),
        *("targets", "optimiser", "base", "checkpointing", "offload", "resume", "images"),
        "captions",
    ],
}
OUTPUTS = {
    "K2Loader": ["MODEL", "CLIP", "VAE"],
    "K2LoraLoader": ["MODEL", "CLIP", "STRING"],
    "K2PromptExpander": ["STRING"],
    "K2Describe": ["STRING"],
    "K2StyleLora": ["MODEL", "STRING"],
    "K2TextEncode": ["CONDITIONING", "CONDITIONING"],
    "K2TextEncodeImages": ["CONDITIONING", "CONDITIONING", "IMAGE"],
    "K2StyleMix": ["CONDITIONING", "CONDITIONING"],
    "K2Styles": ["MODEL", "CONDITIONING", "CONDITIONING", "STRING", "STRING"],
    "K2SaveStyle": ["STRING"],
    "K2Reference": ["CONDITIONING", "CONDITIONING"],
    "K2Edit": ["CONDITIONING", "CONDITIONING", "LATENT", "MODEL"],
    "K2ControlLora": ["CONDITIONING", "CONDITIONING", "CONTROL_NET", "STRING"],
    "K2StyleTransfer": ["MODEL"],
    "K2TapWeights": ["CONDITIONING"],
    "K2EmptyLatent": ["LATENT", "INT", "INT"],
    "K2Sampler": ["LATENT"],
    "K2Vary": ["NOISE"],
    "K2Walk": ["CONDITIONING", "NOISE"],
    "K2Sigmas": ["SIGMAS"],
    "K2ModelSampling": ["MODEL"],
    "K2VAEDecode": ["IMAGE"],
    "K2VAEEncode": ["LATENT"],
    "K2FitImage": ["IMAGE", "MASK", "INT", "INT"],
    "K2Inpaint": ["LATENT", "MASK"],
    "K2Composite": ["IMAGE"],
    "K2Outpaint": ["IMAGE", "MASK"],
    "K2CropForInpaint": ["IMAGE", "MASK", "KREA2_STITCH"],
    "K2Stitch": ["IMAGE"],
    "K2Detailer": ["IMAGE", "MASK"],
    "K2Compile": ["MODEL"],
    "K2NegativeGuidance": ["MODEL"],
    "K2Approximate": ["MODEL"],
    "K2Inspect": ["STRING"],
    "K2GuidanceSchedule": ["MODEL"],
    "K2TwoStage": ["LATENT"],
    "K2Regions": ["CONDITIONING", "CONDITIONING", "STRING", "IMAGE"],
    "K2Upscale": ["LATENT"],
    "K2TiledSampling": ["MODEL"],
    "K2RotaryScaling": ["MODEL"],
    "K2SparseAttention": ["MODEL"],
    "K2PromptBatch": ["CONDITIONING", "CONDITIONING", "INT", "STRING"],
    "K2ContactSheet": ["IMAGE"],
    "K2Grid": ["IMAGE", "IMAGE", "STRING"],
    "K2PictureSettings": [
        *("STRING", "STRING", "INT", "INT", "FLOAT", "*", "FLOAT", "INT", "INT", "*", "*"),
        *("STRING", "STRING"),
    ],
    "K2SelfCheck": ["STRING"],
    "K2TrainLora": ["LORA_MODEL", "LOSS_MAP", "IMAGE", "STRING"],
}


def test_no_node_is_missing():
    assert set(NODES) == set(INPUTS)


@pytest.mark.parametrize("node_id", INPUTS)
def test_inputs_keep_their_order(node_id):
    schema = NODES[node_id].GET_SCHEMA()
    assert [entry.id for entry in schema.inputs] == INPUTS[node_id]
    if node_id in OUTPUTS:
        assert [entry.get_io_type() for entry in schema.outputs] == OUTPUTS[node_id]


def test_inputs_that_came_later_are_optional():
    """Graphs that were posted before they came have to run on."""
    later = {
        "K2TextEncode": ["max_tokens", "weights"],
        "K2Sampler": ["seeds", "start_sigma", "noise"],
        "K2Sigmas": ["start_sigma"],
        "K2PromptExpander": ["enabled"],
    }
    for node_id, names in later.items():
        inputs = {entry.id: entry for entry in NODES[node_id].GET_SCHEMA().inputs}
        assert all(inputs[name].optional for name in names), node_id


@pytest.mark.parametrize("node_id", INPUTS)
def test_everything_has_words(node_id):
    schema = NODES[node_id].GET_SCHEMA()
    assert schema.category == "Krea 2" and schema.display_name and schema.description
    assert {"krea", "krea2", "k2"} <= set(schema.search_aliases)
    for entry in (*schema.inputs, *schema.outputs):
        assert entry.tooltip, f"{node_id}.{entry.id}"
