"""Nodes for finding faults: the kind of a model file, and a self-check of the installation."""

import comfy.model_management as management
from comfy_api.latest import io, ui

from ..krea2_model.tools.describe import describe as describe_file
from ..krea2_model.tools.self_check import Report, survey
from ..krea2_model.tools.self_check import versions as python_versions
from . import inputs, model_files
from .managed import describe


class K2Inspect(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2Inspect",
            display_name="Inspect a Krea 2 File",
            category="Krea 2",
            description=(
                "Reports what a model file is: kind, variant, layout, quantisation, and missing or "
                "surplus tensors."
            ),
            search_aliases=inputs.aliases("inspect, what is this file, metadata"),
            inputs=[
                io.Combo.Input(
                    "file",
                    options=model_files.list_everything(),
                    tooltip="Any file or diffusers folder in ComfyUI's models folders.",
                ),
            ],
            outputs=[io.String.Output("text", display_name="text", tooltip="The report.")],
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
        text = describe_file(model_files.find_anything(file))
        return io.NodeOutput(text, ui=ui.PreviewText(text))


class K2SelfCheck(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2SelfCheck",
            display_name="Krea 2 Self-Check",
            category="Krea 2",
            description=(
                "Reports problems and their fixes, with versions, devices, files and patches, as "
                "text for a bug report."
            ),
            search_aliases=inputs.aliases("diagnose, debug, bug report, versions"),
            inputs=[
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="A model, to report its quantisation, LoRAs and patches.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="A text encoder, to report its quantisation and LoRAs.",
                ),
            ],
            outputs=[io.String.Output("text", display_name="text", tooltip="The report.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        # Files and memory change without an input's doing; NaN differs from every value before it.
        return float("nan")

    @classmethod
    def execute(cls, model=None, clip=None):
        text = str(self_check(model, clip))
        return io.NodeOutput(text, ui=ui.PreviewText(text))


def self_check(model=None, clip=None) -> Report:
    """Check this ComfyUI and, where they are given, a MODEL and a CLIP."""
    report = Report()
    report.add("Versions", lambda: [*python_versions(), *describe.versions()])
    report.add("Devices", lambda: describe.devices(report))
    report.add("Acceleration", lambda: describe.accelerations(report))
    report.add("What this ComfyUI knows", lambda: describe.capabilities(report))
    report.add("Replaced by custom nodes", describe.replaced)
    device = management.get_torch_device()
    # An Apple GPU's memory is the processor's.
    has_memory = not (management.is_device_cpu(device) or management.is_device_mps(device))
    memory = management.get_total_memory(device) if has_memory else 0
    report.add("Model files", lambda: survey(model_files.own_files(), report, memory))
    if model is not None:
        report.add("MODEL", lambda: describe.model(model))
    if clip is not None:
        report.add("CLIP", lambda: describe.clip(clip))
    return report
