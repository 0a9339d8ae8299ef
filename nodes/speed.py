"""Optional speed-ups: compilation, CUDA graphs, step skipping, and attention in 8 bits."""

import comfy.ldm.modules.attention
import comfy.patcher_extension
from comfy_api.latest import io
from comfy_api.torch_helpers import set_torch_compile_wrapper

from ..krea2_model.extrapolation import VelocityExtrapolation
from . import inputs
from .managed.graphs import CUDA_GRAPH
from .sampler_run import check_model

EVERY = {"every step": 1, "every 2nd step": 2, "every 3rd step": 3}
EXACT, SAGE = "exact", "8 bits (SageAttention)"
COMPILE, BOTH, GRAPH = "compile", "compile and CUDA graph", "CUDA graph"


class K2Compile(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2Compile",
            display_name="Compile Krea 2",
            category="Krea 2",
            description=(
                "Compiles the transformer's blocks with torch.compile: the first run is slow, "
                "later steps are faster, at every size and prompt."
            ),
            search_aliases=inputs.aliases("torch compile, inductor, cuda graph, speed, faster"),
            inputs=[
                io.Model.Input("model", tooltip="Krea 2, with LoRAs already applied."),
                io.Combo.Input(
                    "mode",
                    options=[COMPILE, BOTH, GRAPH],
                    default=COMPILE,
                    optional=True,
                    tooltip=(
                        "A CUDA graph launches all kernels of a step at once: faster for small "
                        "images and 8-bit weights on fast NVIDIA cards that hold the whole model."
                    ),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, compiled on first use.")],
        )

    @classmethod
    def execute(cls, model, mode=COMPILE):
        check_model(model)
        if mode not in (COMPILE, BOTH, GRAPH):
            raise ValueError(f"mode is {mode!r}; expected one of {COMPILE}, {BOTH}, {GRAPH}.")
        # Both hold on to the weights' addresses, which dynamic VRAM changes.
        compiled = model.clone(disable_dynamic=True)
        if mode != COMPILE:
            if compiled.load_device.type != "cuda":
                raise ValueError(
                    f"mode is {mode!r}, which needs a GPU with CUDA; this model runs on "
                    f"{compiled.load_device}. Choose {COMPILE}, or leave this node out."
                )
            compiled.model_options["transformer_options"][CUDA_GRAPH] = True
        if mode == GRAPH:
            return io.NodeOutput(compiled)
        count = len(compiled.get_model_object("diffusion_model").blocks)
        set_torch_compile_wrapper(
            compiled,
            backend="inductor",
            # One graph for all blocks and every number of tokens.
            keys=[f"diffusion_model.blocks.{index}" for index in range(count)],
            dynamic=True,
            options={"guard_filter_fn": _without_options},
        )
        return io.NodeOutput(compiled)


class K2Approximate(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2Approximate",
            display_name="Krea 2 Step Skipping",
            category="Krea 2",
            description=(
                "Trades accuracy for speed: skips later steps of the model, or uses 8-bit "
                "attention. Both are off by default."
            ),
            search_aliases=[
                *inputs.aliases("cache, easycache, teacache, speed"),
                "faster, not exact",
                "sage",
                "skip steps",
            ],
            inputs=[
                io.Model.Input("model", tooltip="Krea 2. Skip steps with Raw, which has many."),
                io.Combo.Input(
                    "evaluate",
                    options=list(EVERY),
                    default="every step",
                    tooltip=(
                        "Steps that run the model, after the first fifth; skipped steps "
                        "extrapolate from the last two. Every 2nd step makes Raw about 1.6 times "
                        "as fast; needs a sampler with one evaluation per step, such as euler."
                    ),
                ),
                io.Combo.Input(
                    "attention",
                    options=[EXACT, SAGE],
                    default=EXACT,
                    tooltip=(
                        "exact uses ComfyUI's attention; 8 bits needs the sageattention package "
                        "and an NVIDIA card."
                    ),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The same model, for the sampler.")],
        )

    @classmethod
    def execute(cls, model, evaluate="every step", attention=EXACT):
        check_model(model)
        for name, value, options in (
            ("evaluate", evaluate, [*EVERY]),
            ("attention", attention, [EXACT, SAGE]),
        ):
            if value not in options:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(options)}.")
        model = model.clone()
        if EVERY[evaluate] > 1:
            model.add_wrapper_with_key(
                comfy.patcher_extension.WrappersMP.PREDICT_NOISE,
                "krea2_forecast",
                _SkipsSteps(EVERY[evaluate]),
            )
        if attention == SAGE:
            options = model.model_options["transformer_options"]
            options["optimized_attention_override"] = _sage_attention()
        return io.NodeOutput(model)


class _SkipsSteps:
    """A wrapper of the guider's prediction, guidance included, that skips steps."""

    _extrapolation: VelocityExtrapolation  # set with _sigmas, at the first step of a run

    def __init__(self, every: int):
        self._every = every
        self._sigmas = None
        self._steps: dict[float, int] = {}

    def __call__(self, executor, x, timestep, model_options, seed):
        sigmas = model_options["transformer_options"]["sample_sigmas"]
        if sigmas is not self._sigmas:  # a new run
            self._sigmas = sigmas
            self._steps = {time: step for step, time in enumerate(sigmas.float().tolist())}
            self._extrapolation = VelocityExtrapolation(len(sigmas) - 1, self._every)
        time = timestep.flatten()[0].float().item()
        step = self._steps.get(time)
        if step is not None and self._extrapolation.should_skip(step):
            return x - time * self._extrapolation.velocity(time)
        predicted = executor(x, timestep, model_options, seed)
        if step is not None:
            self._extrapolation.record(time, (x - predicted) / time)
        return predicted


def _sage_attention():
    """ComfyUI's SageAttention as an attention override."""
    module = comfy.ldm.modules.attention
    if not module.SAGE_ATTENTION_IS_AVAILABLE:
        raise ValueError(
            f"attention is {SAGE!r}, which needs a package that this ComfyUI does not have. "
            "Install sageattention into ComfyUI's Python (NVIDIA cards only) and restart, or "
            "choose exact."
        )
    return lambda function, *args, **options: module.attention_sage(*args, **options)


def _without_options(guards):
    """Guards without those on a run's options, such as the block index: no reason to recompile."""
    return ["options" not in guard.name for guard in guards]
