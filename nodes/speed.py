"""What makes sampling faster and is not on by itself."""

from comfy_api.latest import io

from .sampling import check_model


class K2Compile(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2Compile",
            display_name="Compile Krea 2",
            category="Krea 2",
            description=(
                "Compiles the transformer's blocks with torch.compile: a wait at the first run, "
                "faster steps from then on, for every size and prompt."
            ),
            search_aliases=["krea", "krea2", "k2", "torch compile", "inductor", "speed", "faster"],
            inputs=[io.Model.Input("model", tooltip="Krea 2, with its LoRAs.")],
            outputs=[io.Model.Output(tooltip="The transformer, compiled as it is first used.")],
        )

    @classmethod
    def execute(cls, model):
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        check_model(model)
        # A compiled block keeps the weights it was made with, which dynamic VRAM moves about.
        compiled = model.clone(disable_dynamic=True)
        count = len(compiled.get_model_object("diffusion_model").blocks)
        set_torch_compile_wrapper(
            compiled,
            backend="inductor",
            # One graph serves all blocks and every number of tokens.
            keys=[f"diffusion_model.blocks.{index}" for index in range(count)],
            dynamic=True,
            options={"guard_filter_fn": _without_options},
        )
        return io.NodeOutput(compiled)


def _without_options(guards):
    """Options of a run, such as which block it is, are no reason to compile again."""
    return ["options" not in guard.name for guard in guards]
