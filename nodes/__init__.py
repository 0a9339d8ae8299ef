"""The nodes, in reading order: the table of contents."""

from comfy_api.latest import ComfyExtension

from .batches import K2ContactSheet, K2PromptBatch
from .control import K2ControlLora
from .describer import K2Describe
from .detailer import K2Detailer
from .diagnostics import K2Inspect, K2SelfCheck
from .edits import K2Edit
from .expander import K2PromptExpander
from .grid import K2Grid
from .guidance import K2NegativeGuidance
from .images import K2FitImage, K2Outpaint
from .inpaint import K2Composite, K2CropForInpaint, K2Inpaint, K2Stitch
from .large import K2RotaryScaling, K2SparseAttention, K2TiledSampling
from .latents import K2EmptyLatent, K2VAEDecode, K2VAEEncode
from .layer_weights import K2TapWeights
from .loaders import K2Loader, K2ModelLoader, K2TextEncoderLoader, K2VAELoader
from .loras import K2LoraLoader
from .picture_settings import K2PictureSettings
from .prompt_images import K2TextEncodeImages
from .prompts import K2TextEncode
from .references import K2Reference
from .regions import K2Regions
from .sampling import K2ModelSampling, K2Sampler, K2Sigmas
from .schedules import K2GuidanceSchedule, K2TwoStage
from .speed import K2Approximate, K2Compile
from .style_library import K2SaveStyle, K2Styles
from .style_loras import K2StyleLora
from .style_mix import K2StyleMix
from .style_routes import add_style_routes
from .styles import K2StyleTransfer
from .training import K2TrainLora
from .upscale import K2Upscale
from .variations import K2Vary, K2Walk

NODES = [
    K2Loader,
    K2ModelLoader,
    K2TextEncoderLoader,
    K2VAELoader,
    K2LoraLoader,
    K2StyleLora,
    K2PromptExpander,
    K2Describe,
    K2TextEncode,
    K2TextEncodeImages,
    K2Styles,
    K2SaveStyle,
    K2StyleMix,
    K2Reference,
    K2Edit,
    K2ControlLora,
    K2Regions,
    K2StyleTransfer,
    K2TapWeights,
    K2PromptBatch,
    K2EmptyLatent,
    K2Sampler,
    K2Vary,
    K2Walk,
    K2Sigmas,
    K2ModelSampling,
    K2GuidanceSchedule,
    K2NegativeGuidance,
    K2TwoStage,
    K2Upscale,
    K2TiledSampling,
    K2RotaryScaling,
    K2SparseAttention,
    K2VAEDecode,
    K2VAEEncode,
    K2FitImage,
    K2Inpaint,
    K2Composite,
    K2Outpaint,
    K2CropForInpaint,
    K2Stitch,
    K2Detailer,
    K2ContactSheet,
    K2Grid,
    K2PictureSettings,
    K2TrainLora,
    K2Compile,
    K2Approximate,
    K2Inspect,
    K2SelfCheck,
]


class Krea2Extension(ComfyExtension):
    async def on_load(self):
        add_style_routes()

    async def get_node_list(self):
        return NODES
