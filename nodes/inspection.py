"""What is this file? The answer of krea2_model, as a node."""

from comfy_api.latest import io, ui

from ..krea2_model.tools.describe import describe
from . import model_files


class K2Inspect(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2Inspect",
            display_name="Inspect a Krea 2 File",
            category="Krea 2",
            description=(
                "Says what a model file is: kind, variant, layout, quantisation, and what is "
                "missing or too much."
            ),
            search_aliases=["krea", "krea2", "k2", "inspect", "what is this file", "metadata"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=model_files.list_everything(),
                    tooltip="Any file or diffusers folder of ComfyUI's models folders.",
                ),
            ],
            outputs=[io.String.Output("text", display_name="text", tooltip="What it is.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, file=None):
        return file is None or model_files.problem(model_files.find_anything, file)

    @classmethod
    def fingerprint_inputs(cls, file=None):
        return None if file is None else model_files.fingerprint(model_files.find_anything(file))

    @classmethod
    def execute(cls, file):
        text = describe(model_files.find_anything(file))
        return io.NodeOutput(text, ui=ui.PreviewText(text))
